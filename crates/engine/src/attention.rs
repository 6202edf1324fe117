use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// What a vCPU is asked to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signals(pub u32);

impl Signals {
    /// An interrupt, NMI, INIT or SIPI may be deliverable.
    pub const INTERRUPT: Self = Self(1);
    /// Leave [`crate::Vcpu::run`] with [`crate::VmExit::Interrupted`].
    pub const EXIT: Self = Self(2);
    /// The engine's own business (translation flushes between vCPUs).
    pub const ENGINE: Self = Self(4);
}

/// One vCPU's attention word: polled by the vCPU at instruction boundaries, raised by anyone, and what a halted vCPU
/// sleeps on.
#[derive(Debug, Default)]
pub struct Attention {
    word: AtomicU32,
    sleeping: Mutex<bool>,
    awake: Condvar,
    hook: std::sync::OnceLock<Hook>,
}

struct Hook(Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

impl Attention {
    /// A word with nothing raised.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Calls `hook` on every raise as well: for engines whose vCPU must be interrupted by a host signal.
    /// Only the first hook counts.
    pub fn set_hook(&self, hook: impl Fn() + Send + Sync + 'static) {
        let _ = self.hook.set(Hook(Box::new(hook)));
    }

    /// Raises signals and wakes the vCPU where it sleeps.
    pub fn raise(&self, signals: Signals) {
        let before = self.word.fetch_or(signals.0, Ordering::SeqCst);
        if before & signals.0 == signals.0 {
            return;
        }
        if *self.lock() {
            self.awake.notify_all();
        }
        if let Some(hook) = self.hook.get() {
            (hook.0)();
        }
    }

    /// The word, for the vCPU's poll: zero almost always.
    #[inline]
    pub fn pending(&self) -> bool {
        self.word.load(Ordering::Relaxed) != 0
    }

    /// Where the word is, for translated code that polls it. Good while the value lives.
    pub fn word_address(&self) -> u64 {
        self.word.as_ptr() as u64
    }

    /// Takes what is raised of `signals`: what was raised is clear afterwards.
    pub fn take(&self, signals: Signals) -> bool {
        self.word.fetch_and(!signals.0, Ordering::SeqCst) & signals.0 != 0
    }

    /// Whether any of `signals` is raised.
    pub fn is_raised(&self, signals: Signals) -> bool {
        self.word.load(Ordering::SeqCst) & signals.0 != 0
    }

    /// Sleeps until something is raised, or for `limit` at most.
    pub fn sleep(&self, limit: Option<Duration>) {
        let mut sleeping = self.lock();
        *sleeping = true;
        while self.word.load(Ordering::SeqCst) == 0 {
            match limit {
                None => sleeping = self.awake.wait(sleeping).unwrap_or_else(|e| e.into_inner()),
                Some(limit) => {
                    sleeping = self.awake.wait_timeout(sleeping, limit).unwrap_or_else(|e| e.into_inner()).0;
                    break;
                }
            }
        }
        *sleeping = false;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, bool> {
        self.sleeping.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raise_wakes_the_sleeper_and_stays_until_taken() {
        let attention = Attention::new();
        let other = attention.clone();
        let thread = std::thread::spawn(move || other.sleep(None));
        attention.raise(Signals::INTERRUPT);
        thread.join().unwrap();
        assert!(attention.pending());
        assert!(attention.take(Signals::INTERRUPT));
        assert!(!attention.pending());
    }
}
