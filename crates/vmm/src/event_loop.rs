//! The event loop: a thread that runs the machine's timers when they are due.
//!
//! It sleeps on a timer of the kernel's that whoever arms an earlier deadline sets anew: a guest does that thousands
//! of times a second, and must not pay for waking the thread each time.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::clock::Timers;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::outcome::{Ending, Outcome};

/// The loop's thread. It ends with the run.
pub struct EventLoop {
    thread: JoinHandle<()>,
}

/// What the loop sleeps on.
struct Alarm {
    timers: Timers,
    ending: Ending,
    /// The kernel's timer. With the lock held, it is set for the earliest deadline that there is then: so the last to
    /// set it, whoever that is, sets it right.
    clock: Mutex<OwnedFd>,
}

impl EventLoop {
    /// Starts running `timers`.
    ///
    /// # Errors
    /// The host's, where it gives no timer or no thread.
    pub fn start(timers: Timers, ending: Ending) -> std::io::Result<Self> {
        let clock = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
        let sleeper = clock.try_clone()?;
        let alarm =
            Arc::new(Alarm { timers: timers.clone(), ending: ending.clone(), clock: Mutex::new(clock) });
        // Neither the timers nor the ending keep the loop alive.
        let (earlier, ended) = (Arc::downgrade(&alarm), Arc::downgrade(&alarm));
        timers.set_wake(move || earlier.upgrade().iter().for_each(|alarm| alarm.set()));
        ending.calls(move || ended.upgrade().iter().for_each(|alarm| alarm.set()));
        let thread = std::thread::Builder::new().name("events".into()).spawn(move || {
            let run = std::panic::AssertUnwindSafe(|| run(&alarm, &sleeper));
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

fn run(alarm: &Alarm, sleeper: &OwnedFd) {
    while !alarm.ending.has_come() {
        alarm.timers.run_due();
        alarm.set();
        // It blocks until the time has come; how often that was is of no interest.
        if let Err(error) = rustix::io::read(sleeper, &mut [0; 8])
            && error != rustix::io::Errno::INTR
        {
            alarm.ending.report(Outcome::HostError(format!("cannot wait for a timer: {error}")));
        }
    }
}

impl Alarm {
    /// Sets the kernel's timer for the earliest deadline, or for now where the run has ended.
    fn set(&self) {
        let clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = match self.timers.next_deadline() {
            _ if self.ending.has_come() => Some(0),
            deadline => deadline.map(|deadline| deadline.saturating_sub(self.timers.now())),
        };
        // Zero would stop the timer.
        let value = wait.map_or(Duration::ZERO, |wait| Duration::from_nanos(wait.max(1)));
        let value = Timespec { tv_sec: value.as_secs() as i64, tv_nsec: value.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        if let Err(error) = timerfd_settime(&*clock, TimerfdTimerFlags::empty(), &once) {
            log::error!("cannot set a timer: {error}");
        }
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
