//! The event loop: a thread that runs the machine's timers when they are due.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::clock::Timers;

use crate::outcome::{Ending, Outcome};

/// The loop's thread. It ends with the run.
pub struct EventLoop {
    thread: JoinHandle<()>,
}

/// What wakes the loop: set by whoever arms an earlier deadline or ends the run.
#[derive(Default)]
struct Alarm {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl EventLoop {
    /// Starts running `timers`.
    ///
    /// # Errors
    /// The host's, where it gives no thread.
    pub fn start(timers: Timers, ending: Ending) -> std::io::Result<Self> {
        let alarm = Arc::new(Alarm::default());
        let armed = alarm.clone();
        timers.set_wake(move || armed.ring());
        let ended = alarm.clone();
        ending.calls(move || ended.ring());
        let thread = std::thread::Builder::new().name("events".into()).spawn(move || {
            // Deadlines are a guest's timer interrupts: the kernel must not round them up to save power.
            if let Err(error) = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1)) {
                log::debug!("the timer slack stays as it is: {error}");
            }
            let run = std::panic::AssertUnwindSafe(|| run(&timers, &ending, &alarm));
            if std::panic::catch_unwind(run).is_err() {
                ending.report(Outcome::HostError("a device's timer failed (a defect in Ringside)".into()));
            }
        })?;
        Ok(Self { thread })
    }

    /// Waits for the loop, which ends when the run does.
    pub fn join(self) {
        // A panic has been reported as the run's outcome.
        let _ = self.thread.join();
    }
}

fn run(timers: &Timers, ending: &Ending, alarm: &Alarm) {
    while !ending.has_come() {
        let next = timers.run_due();
        alarm.wait(next.map(|deadline| Duration::from_nanos(deadline.saturating_sub(timers.now()))));
    }
}

impl Alarm {
    fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_one();
    }

    /// Waits until it is rung (also where that was before), for `limit` at most.
    fn wait(&self, limit: Option<Duration>) {
        let mut rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        if !*rung {
            rung = match limit {
                None => self.changed.wait(rung).unwrap_or_else(PoisonError::into_inner),
                Some(limit) => {
                    self.changed.wait_timeout(rung, limit).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        *rung = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::HostTime;
    use std::sync::mpsc;

    fn start() -> (Timers, Ending, EventLoop) {
        let timers = Timers::new(Arc::new(HostTime::start()));
        let ending = Ending::new();
        let events = EventLoop::start(timers.clone(), ending.clone()).unwrap();
        (timers, ending, events)
    }

    #[test]
    fn a_timer_armed_while_the_loop_sleeps_is_run_on_time() {
        let (timers, ending, events) = start();
        let (fired, due) = mpsc::channel();
        let timer = timers.timer(move |now| fired.send(now).unwrap());
        std::thread::sleep(Duration::from_millis(5));
        let deadline = timers.now() + 10_000_000;
        timer.arm(deadline);
        let now = due.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(now >= deadline, "{now} before {deadline}");
        ending.report(Outcome::PowerOff);
        events.join();
    }

    #[test]
    fn a_panicking_callback_ends_the_run_instead_of_hanging_it() {
        let (timers, ending, events) = start();
        let timer = timers.timer(|_| panic!("meant to fail"));
        timer.arm(0);
        assert!(matches!(ending.wait(), Outcome::HostError(_)));
        events.join();
    }
}
