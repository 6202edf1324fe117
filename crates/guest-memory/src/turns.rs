//! Turns: where a vCPU is run twice and compared, devices' threads reach RAM only between its steps, so that both runs find
//! the same there.
//!
//! ```text
//!   vCPU     ── step ──┤ let_devices ├── step ── end ─┤ a device's register ├─ begin ── step ──
//!   devices             turn                                turn, turn
//! ```

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// The vCPU waits so long for devices that want their turn; then it goes first again.
const PATIENCE: Duration = Duration::from_millis(10);

/// Whose turn it is.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
    /// How many devices' threads wait for their turn.
    wanted: AtomicU32,
    /// A device had its turn since the vCPU last asked.
    taken: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    vcpu: bool,
    /// The thread whose turn it is, and how often it has asked for it.
    device: Option<(ThreadId, u32)>,
}

/// A device's turn, until it is dropped.
#[derive(Debug)]
pub struct DeviceTurn<'a>(Option<&'a Turns>);

impl Turns {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a device's turn; a thread that has it already gets it again.
    fn device(&self) -> DeviceTurn<'_> {
        let this = std::thread::current().id();
        self.wanted.fetch_add(1, Ordering::SeqCst);
        let mut state = self.lock();
        while state.vcpu || state.device.is_some_and(|(thread, _)| thread != this) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.device = Some((this, state.device.map_or(1, |(_, depth)| depth + 1)));
        self.wanted.fetch_sub(1, Ordering::SeqCst);
        DeviceTurn(Some(self))
    }

    pub(crate) fn begin(&self) {
        let start = Instant::now();
        let mut state = self.lock();
        loop {
            let wanted = self.wanted.load(Ordering::SeqCst) > 0 && start.elapsed() < PATIENCE;
            if state.device.is_none() && !wanted {
                break;
            }
            let waited = self.changed.wait_timeout(state, PATIENCE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.vcpu = true;
    }

    pub(crate) fn end(&self) {
        self.lock().vcpu = false;
        self.changed.notify_all();
    }

    /// During the vCPU's turn: whether a device had one since the last time; those that wait get theirs first.
    pub(crate) fn let_devices(&self) -> bool {
        if self.wanted.load(Ordering::Relaxed) > 0 {
            self.end();
            self.begin();
        }
        self.taken.load(Ordering::Relaxed) && self.taken.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn of_device(turns: Option<&Self>) -> DeviceTurn<'_> {
        turns.map_or(DeviceTurn(None), Self::device)
    }
}

impl Drop for DeviceTurn<'_> {
    fn drop(&mut self) {
        let Some(turns) = self.0 else { return };
        let mut state = turns.lock();
        turns.taken.store(true, Ordering::SeqCst);
        state.device = state.device.and_then(|(thread, depth)| (depth > 1).then_some((thread, depth - 1)));
        drop(state);
        turns.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_device_waits_for_the_vcpus_step_to_end_and_the_vcpu_for_the_device() {
        let turns = Arc::new(Turns::default());
        let order = Arc::new(Mutex::new(Vec::new()));
        turns.begin();
        let device = {
            let (turns, order) = (turns.clone(), order.clone());
            std::thread::spawn(move || {
                let _outer = turns.device();
                let _again = turns.device();
                order.lock().unwrap().push("device");
            })
        };
        while turns.wanted.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        order.lock().unwrap().push("vCPU");
        assert!(turns.let_devices(), "the device had its turn");
        order.lock().unwrap().push("vCPU again");
        assert!(!turns.let_devices(), "nobody had one since");
        turns.end();
        device.join().unwrap();
        assert_eq!(*order.lock().unwrap(), ["vCPU", "device", "vCPU again"]);
    }

    #[test]
    fn where_nobody_compares_devices_need_not_wait() {
        let turn = Turns::of_device(None);
        drop((Turns::of_device(None), turn));
    }
}
