//! How a worker is woken.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// A worker's doorbell.
pub(super) struct Bell {
    event: OwnedFd,
    /// The worker sleeps, or is about to: whoever has something for it writes to the event.
    asleep: AtomicBool,
    stop: AtomicBool,
    /// The host's number of the thread that rang last.
    ringer: AtomicI32,
}

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            event,
            asleep: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            ringer: AtomicI32::new(0),
        })
    }

    /// There is something in the queue.
    pub(super) fn ring(&self) {
        if self.asleep.load(Ordering::SeqCst) {
            self.write();
        }
    }

    /// Notes who rings.
    pub(super) fn rung_here(&self) {
        thread_local!(static THREAD: i32 = rustix::thread::gettid().as_raw_nonzero().get());
        THREAD.with(|&thread| self.ringer.store(thread, Ordering::Relaxed));
    }

    /// Whether the thread that rang last sleeps: a vCPU whose guest waits. Not where the host does not tell.
    pub(super) fn ringer_sleeps(&self) -> bool {
        let path = format!("/proc/self/task/{}/stat", self.ringer.load(Ordering::Relaxed));
        let stat = std::fs::read_to_string(path).unwrap_or_default();
        // The name may have any characters; the state follows its closing parenthesis.
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('S'))
    }

    /// The worker is to end.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.write();
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn write(&self) {
        // It fails only where its count is full: then the worker is woken already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// From here on, until [`Self::awake`], those who ring write to the event.
    pub(super) fn falls_asleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
    }

    pub(super) fn awake(&self) {
        self.asleep.store(false, Ordering::SeqCst);
        self.take();
    }

    /// Takes what was written: the next wait is one again.
    fn take(&self) {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }

    /// Waits until somebody rings, or so long.
    pub(super) fn wait(&self, limit: Option<Duration>) {
        let mut events = [PollFd::new(&self.event, PollFlags::IN)];
        let limit = limit.map(|limit| Timespec {
            tv_sec: limit.as_secs().min(1 << 30) as i64,
            tv_nsec: limit.subsec_nanos().into(),
        });
        // An interrupted wait is a short one.
        let _ = poll(&mut events, limit.as_ref());
    }

    /// Waits so long, unless the worker is to end.
    pub(super) fn pause(&self, time: Duration) {
        let until = std::time::Instant::now() + time.min(Duration::from_secs(3600));
        loop {
            let left = until.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() || self.is_stopped() {
                return;
            }
            self.wait(Some(left));
            if !self.is_stopped() {
                self.take();
            }
        }
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_ringer_that_sleeps_is_told_from_one_that_works() {
        let bell = Arc::new(Bell::new().unwrap());
        assert!(!bell.ringer_sleeps(), "nobody has rung");
        let (go_on, waits) = channel::<()>();
        let (rang, has_rung) = channel();
        let its_bell = bell.clone();
        let ringer = std::thread::spawn(move || {
            its_bell.rung_here();
            rang.send(()).unwrap();
            let _ = waits.recv();
        });
        has_rung.recv().unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while !bell.ringer_sleeps() {
            assert!(Instant::now() < until, "it waits, and nobody sees it");
        }
        drop(go_on);
        ringer.join().unwrap();
        bell.rung_here();
        assert!(!bell.ringer_sleeps(), "this thread works");
    }
}
