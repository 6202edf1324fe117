//! A queue's worker: the thread that carries out its requests, and who rings for it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::Shared;
use super::bell::Bell;
use super::work::{Turn, Work};
use crate::QueueHandle;

/// The thread of a queue.
///
/// It holds the lock of its [`Work`] but while it sleeps. Then whoever rings may do what is quickly done himself: a guest
/// with one request at a time has its answer before it goes on.
pub(super) struct Worker {
    work: Arc<Mutex<Work>>,
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts it; `None` and a broken device where the host has no thread.
    pub(super) fn start(shared: Arc<Shared>, queue: QueueHandle) -> Option<Self> {
        let start = || -> io::Result<Self> {
            let bell = Arc::new(Bell::new()?);
            let work = Arc::new(Mutex::new(Work::new(shared, queue.clone(), bell.clone())));
            let (its_work, its_bell) = (work.clone(), bell.clone());
            let thread = std::thread::Builder::new()
                .name(format!("blk-queue-{}", queue.index()))
                .spawn(move || run(&its_work, &its_bell))?;
            Ok(Self { work, bell, thread: Some(thread) })
        };
        start().map_err(|error| queue.fail(format_args!("the host gives no thread: {error}"))).ok()
    }

    /// One without a thread: whoever rings does all of it.
    pub(super) fn without_thread(shared: Arc<Shared>, queue: QueueHandle) -> Option<Self> {
        let bell = Bell::new().map(Arc::new);
        let bell = bell.map_err(|error| queue.fail(format_args!("the host gives no event: {error}"))).ok()?;
        let work = Arc::new(Mutex::new(Work::without_thread(shared, queue, bell.clone())));
        Some(Self { work, bell, thread: None })
    }

    /// There is something in the queue.
    pub(super) fn ring(&self) {
        if self.thread.is_none() {
            return lock(&self.work).here();
        }
        self.bell.rung_here();
        let work = match self.work.try_lock() {
            Ok(work) => Some(work),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if !work.is_some_and(|mut work| work.at_once()) {
            self.bell.ring();
        }
    }

    /// Tells it to end.
    pub(super) fn stop(&self) {
        self.bell.stop();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.bell.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of its was told when it happened.
            let _ = thread.join();
        }
    }
}

fn lock(work: &Mutex<Work>) -> MutexGuard<'_, Work> {
    work.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(shared_work: &Mutex<Work>, bell: &Bell) {
    let mut idle_since = None;
    let mut work = lock(shared_work);
    while !bell.is_stopped() {
        match work.turn() {
            Turn::Busy => idle_since = None,
            Turn::Holding => look_away(),
            Turn::Idle => {
                let now = Instant::now();
                if now - *idle_since.get_or_insert(now) < work.linger() {
                    look_away();
                    continue;
                }
                idle_since = None;
                bell.falls_asleep();
                if work.may_sleep() && !bell.is_stopped() && !work.wait_for_transfers() {
                    drop(work);
                    bell.wait(None);
                    work = lock(shared_work);
                }
                bell.awake();
                work.slept(now.elapsed());
            }
            Turn::Gone => {
                bell.falls_asleep();
                drop(work);
                bell.wait(None);
                work = lock(shared_work);
                bell.awake();
            }
        }
    }
}

/// A microsecond or so between two looks at the queue. It does not yield: on a busy host that would cost a whole time slice.
fn look_away() {
    for _ in 0..40 {
        std::hint::spin_loop();
    }
}
