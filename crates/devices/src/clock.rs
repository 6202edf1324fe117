//! Timers: being called at a time.
//!
//! Devices compute what they can from [`TimeSource::now`] when they are asked; a [`Timer`] is for what must happen
//! without being asked. All deadlines are nanoseconds of that clock.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use engine::TimeSource;

/// The deadline of a timer that is not armed; also what nobody waits for.
const NEVER: u64 = u64::MAX;

type Wake = Arc<dyn Fn() + Send + Sync>;

/// The machine's timers: devices arm them, an event loop runs them.
///
/// Lock order: while a callback or the wake function runs, no lock is held but the callback's own. So a callback may
/// take its device's lock, and a device may arm a timer with its own lock held. A callback must not call
/// [`Timers::run_due`].
#[derive(Clone)]
pub struct Timers(Arc<Shared>);

struct Shared {
    time: Arc<dyn TimeSource>,
    queue: Mutex<Queue>,
    wake: RwLock<Option<Wake>>,
}

struct Queue {
    next_id: u64,
    /// By deadline and id.
    armed: BTreeMap<(u64, u64), Arc<Slot>>,
    /// What the event loop sleeps for: no armed deadline is earlier, unless the loop has been woken.
    announced: u64,
}

struct Slot {
    id: u64,
    /// Written with the queue locked only.
    deadline: AtomicU64,
    callback: Mutex<Box<dyn FnMut(u64) + Send>>,
}

impl Timers {
    /// No timers yet, on the clock `time`.
    pub fn new(time: Arc<dyn TimeSource>) -> Self {
        let queue = Mutex::new(Queue { next_id: 0, armed: BTreeMap::new(), announced: NEVER });
        Self(Arc::new(Shared { time, queue, wake: RwLock::default() }))
    }

    /// The clock of the deadlines.
    pub fn time(&self) -> &Arc<dyn TimeSource> {
        &self.0.time
    }

    /// Nanoseconds since the machine started.
    pub fn now(&self) -> u64 {
        self.0.time.now()
    }

    /// A new timer, not armed. Each time that it is due, `callback` is called once with the time; it usually holds a
    /// `Weak` to its device, and may arm the timer again.
    pub fn timer(&self, callback: impl FnMut(u64) + Send + 'static) -> Timer {
        let mut queue = self.0.lock();
        let id = queue.next_id;
        queue.next_id += 1;
        let slot = Slot { id, deadline: AtomicU64::new(NEVER), callback: Mutex::new(Box::new(callback)) };
        Timer { shared: self.0.clone(), slot: Arc::new(slot) }
    }

    /// Calls `wake` whenever a deadline is armed that is earlier than what [`Self::run_due`] gave last: an event loop
    /// that sleeps until then has to look again.
    pub fn set_wake(&self, wake: impl Fn() + Send + Sync + 'static) {
        *self.0.wake.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(wake));
    }

    /// Runs each timer that is due, in the order of their deadlines, and gives the next deadline.
    ///
    /// Each runs at most once a call, even where its callback arms it in the past.
    pub fn run_due(&self) -> Option<u64> {
        let now = self.0.time.now();
        let due: Vec<(u64, Arc<Slot>)> = {
            let queue = self.0.lock();
            queue.armed.range(..=(now, u64::MAX)).map(|(key, slot)| (key.0, slot.clone())).collect()
        };
        for (deadline, slot) in due {
            // One of the callbacks before may have disarmed this one, or another thread have run it.
            if self.0.take(&slot, deadline) {
                (slot.callback.lock().unwrap_or_else(PoisonError::into_inner))(now);
            }
        }
        let mut queue = self.0.lock();
        let next = queue.armed.first_key_value().map(|(key, _)| key.0);
        queue.announced = next.unwrap_or(NEVER);
        next
    }

    /// The earliest deadline that is armed.
    pub fn next_deadline(&self) -> Option<u64> {
        self.0.lock().armed.first_key_value().map(|(key, _)| key.0)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Disarms `slot` if it is still armed for `deadline`.
    fn take(&self, slot: &Slot, deadline: u64) -> bool {
        let mut queue = self.lock();
        let armed = queue.armed.remove(&(deadline, slot.id)).is_some();
        if armed {
            slot.deadline.store(NEVER, Ordering::Relaxed);
        }
        armed
    }

    /// Arms `slot`, or disarms it with [`NEVER`].
    fn set(&self, slot: &Arc<Slot>, deadline: u64) {
        let mut queue = self.lock();
        let before = slot.deadline.swap(deadline, Ordering::Relaxed);
        if before == deadline {
            return;
        }
        let entry = if before == NEVER { None } else { queue.armed.remove(&(before, slot.id)) };
        if deadline == NEVER {
            return;
        }
        queue.armed.insert((deadline, slot.id), entry.unwrap_or_else(|| slot.clone()));
        if deadline >= queue.announced {
            return;
        }
        queue.announced = deadline;
        drop(queue);
        let wake = self.wake.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(wake) = wake {
            wake();
        }
    }
}

/// One thing that happens at a time. Dropping it takes it off the clock.
pub struct Timer {
    shared: Arc<Shared>,
    slot: Arc<Slot>,
}

impl Timer {
    /// Calls the callback once `now()` is `deadline_ns` or later, instead of at an earlier deadline.
    pub fn arm(&self, deadline_ns: u64) {
        self.shared.set(&self.slot, deadline_ns);
    }

    /// Takes the deadline back. A callback that another thread has begun still runs to its end.
    pub fn disarm(&self) {
        self.shared.set(&self.slot, NEVER);
    }

    /// Nanoseconds since the machine started: the clock of the deadlines.
    pub fn now(&self) -> u64 {
        self.shared.time.now()
    }

    /// The deadline, where one is armed.
    pub fn deadline(&self) -> Option<u64> {
        let deadline = self.slot.deadline.load(Ordering::Relaxed);
        (deadline != NEVER).then_some(deadline)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.disarm();
    }
}

/// A clock that stands still until it is advanced: 1 GHz, for tests.
#[derive(Debug, Default)]
pub struct ManualTime {
    now: AtomicU64,
    wall_start: AtomicU64,
}

impl ManualTime {
    /// A clock at zero, at the Unix epoch.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Moves it forward.
    pub fn advance(&self, ns: u64) {
        let advanced = |now: u64| Some(now.saturating_add(ns));
        // The closure always gives a value, so the update cannot fail.
        let _ = self.now.fetch_update(Ordering::SeqCst, Ordering::SeqCst, advanced);
    }

    /// Sets the wall clock that belongs to time zero, in nanoseconds since the Unix epoch.
    pub fn set_wall_start(&self, ns: u64) {
        self.wall_start.store(ns, Ordering::SeqCst);
    }

    /// Moves the clock forward by `ns` in steps from deadline to deadline, running what is due at each.
    pub fn run(&self, timers: &Timers, ns: u64) {
        let end = self.now().saturating_add(ns);
        while let Some(deadline) = timers.run_due().filter(|&deadline| deadline <= end) {
            self.now.fetch_max(deadline, Ordering::SeqCst);
        }
        self.now.fetch_max(end, Ordering::SeqCst);
        timers.run_due();
    }
}

impl TimeSource for ManualTime {
    fn now(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }
    fn tsc(&self) -> u64 {
        self.now()
    }
    fn host_tsc_start(&self) -> Option<u64> {
        None
    }
    fn tsc_frequency(&self) -> u64 {
        1_000_000_000
    }
    fn wall_clock(&self) -> u64 {
        self.wall_start.load(Ordering::SeqCst).saturating_add(self.now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log_of(timers: &Timers, name: &'static str, log: &Arc<Mutex<Vec<(&'static str, u64)>>>) -> Timer {
        let log = log.clone();
        timers.timer(move |now| log.lock().unwrap().push((name, now)))
    }

    #[test]
    fn due_timers_run_once_in_the_order_of_their_deadlines() {
        let (time, log) = (ManualTime::new(), Arc::default());
        let timers = Timers::new(time.clone());
        let (a, b, c) = (log_of(&timers, "a", &log), log_of(&timers, "b", &log), log_of(&timers, "c", &log));
        a.arm(20);
        b.arm(10);
        c.arm(30);
        assert_eq!(timers.run_due(), Some(10));
        time.advance(25);
        assert_eq!(timers.run_due(), Some(30));
        assert_eq!(*log.lock().unwrap(), [("b", 25), ("a", 25)]);
        assert_eq!((a.deadline(), c.deadline()), (None, Some(30)));
    }

    #[test]
    fn a_disarmed_or_dropped_timer_never_runs() {
        let (time, log) = (ManualTime::new(), Arc::default());
        let timers = Timers::new(time.clone());
        let (a, b) = (log_of(&timers, "a", &log), log_of(&timers, "b", &log));
        a.arm(1);
        b.arm(2);
        a.disarm();
        drop(b);
        time.advance(5);
        assert_eq!(timers.run_due(), None);
        assert!(log.lock().unwrap().is_empty());
    }

    #[test]
    fn the_event_loop_is_woken_for_an_earlier_deadline_only() {
        let timers = Timers::new(ManualTime::new());
        let wakes = Arc::new(AtomicU64::new(0));
        let count = wakes.clone();
        timers.set_wake(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let (a, b) = (timers.timer(|_| {}), timers.timer(|_| {}));
        a.arm(100);
        assert_eq!(wakes.load(Ordering::SeqCst), 1);
        a.arm(200);
        b.arm(150);
        assert_eq!(wakes.load(Ordering::SeqCst), 1, "the loop wakes at 100 anyway");
        assert_eq!(timers.run_due(), Some(150));
        b.arm(140);
        assert_eq!(wakes.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_callback_that_arms_in_the_past_does_not_hold_the_loop() {
        let time = ManualTime::new();
        let timers = Timers::new(time.clone());
        let runs = Arc::new(AtomicU64::new(0));
        let own: Arc<Mutex<Option<Timer>>> = Arc::default();
        let (count, weak) = (runs.clone(), Arc::downgrade(&own));
        let timer = timers.timer(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
            if let Some(timer) = weak.upgrade() {
                timer.lock().unwrap().as_ref().unwrap().arm(0);
            }
        });
        *own.lock().unwrap() = Some(timer);
        own.lock().unwrap().as_ref().unwrap().arm(5);
        time.advance(10);
        assert_eq!(timers.run_due(), Some(0));
        assert_eq!(runs.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_timer_that_an_earlier_callback_disarmed_does_not_run() {
        let time = ManualTime::new();
        let timers = Timers::new(time.clone());
        let log = Arc::default();
        let second = Arc::new(log_of(&timers, "second", &log));
        let weak = Arc::downgrade(&second);
        let first = timers.timer(move |_| {
            if let Some(second) = weak.upgrade() {
                second.disarm();
            }
        });
        first.arm(1);
        second.arm(2);
        time.advance(3);
        assert_eq!(timers.run_due(), None);
        assert!(log.lock().unwrap().is_empty());
    }
}
