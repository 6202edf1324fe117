//! What is done with a queue's requests: taken in batches, neighbours made one transfer, carried out, given back together.
//!
//! ```text
//!   take ──> batch ──> groups of neighbours ──quickly──> PREADV2 (what is in the page cache), PWRITEV ─┬─> done ──> publish
//!                           │                                                                          │
//!                           └── else: io_uring, or one by one, or through the disk's methods ──────────┘
//! ```

mod transfer;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use guest_memory::HostSlices;

use super::bell::Bell;
use super::pace::Pace;
use super::request::{Action, Request};
use super::ring::{Operation, Ring};
use super::{Shared, status};
use crate::QueueHandle;
use crate::memory::DmaMemory;
use crate::queue::{Chain, Queue};
use transfer::Group;

/// Requests that are taken at a time.
const BATCH: usize = 128;
/// How often a write is tried again while the host has no space.
const RETRY: Duration = Duration::from_millis(500);
/// The most that is done on the thread that rings: requests, and bytes of all of them.
const AT_ONCE: usize = 4;
const AT_ONCE_BYTES: u64 = 1 << 20;
/// A transfer that takes longer than this is the worker's business, and all that follow for a while.
const TOO_LONG: Duration = Duration::from_millis(1);
const CALM: Duration = Duration::from_millis(100);

/// What the worker's thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Requests came.
    Busy,
    /// None came; some are completed and not yet published.
    Holding,
    /// There is nothing to do.
    Idle,
    /// There is no queue to be worked on.
    Gone,
}

/// What is on its way.
enum Flight {
    Group { write: bool, requests: Vec<Request> },
    Flush(Request),
}

/// A queue and what is being done with its requests.
pub(super) struct Work {
    /// Before all else that is dropped: it waits for what the kernel does with the others.
    ring: Option<Ring<Flight>>,
    shared: Arc<Shared>,
    queue: QueueHandle,
    memory: DmaMemory,
    bell: Arc<Bell>,
    pace: Pace,
    /// Taken, and not yet started.
    batch: Vec<Request>,
    /// The neighbours that are being gathered; empty between two batches.
    group: Group,
    /// A request's slices, before they go to a group.
    slices: HostSlices,
    /// Completed, and not yet published, with the bytes written.
    done: Vec<(Chain, u32)>,
    buffer: Vec<u8>,
    /// Whether the host reads what is in its page cache without waiting for the rest.
    reads_now: bool,
    /// Until then nothing is done on the thread that rings.
    calm: Option<Instant>,
    /// Whether there is a thread that may wait; else nothing is tried again.
    may_wait: bool,
}

impl Work {
    pub(super) fn new(shared: Arc<Shared>, queue: QueueHandle, bell: Arc<Bell>) -> Self {
        let direct = shared.disk.direct();
        // Where it matters when the guest sees something, nothing goes on by itself.
        let direct = direct.filter(|_| !is_compared(&queue));
        let ring = direct.and_then(|direct| match Ring::new(direct.file, &bell.event()) {
            Ok(ring) => Some(ring),
            Err(error) => {
                log::info!("virtio-blk: no io_uring here ({error}); transfers go one by one");
                None
            }
        });
        Self::with(ring, shared, (queue, bell))
    }

    /// For one thread that does everything, in [`Self::here`].
    pub(super) fn without_thread(shared: Arc<Shared>, queue: QueueHandle, bell: Arc<Bell>) -> Self {
        Self { may_wait: false, ..Self::with(None, shared, (queue, bell)) }
    }

    fn with(
        ring: Option<Ring<Flight>>,
        shared: Arc<Shared>,
        (queue, bell): (QueueHandle, Arc<Bell>),
    ) -> Self {
        let memory = queue.memory().clone();
        let (slices, more) = (memory.slices(), memory.slices());
        Self {
            ring,
            shared,
            queue,
            memory,
            bell,
            pace: Pace::new(),
            batch: Vec::new(),
            group: Group { write: false, offset: 0, slices, requests: Vec::new() },
            slices: more,
            done: Vec::new(),
            buffer: Vec::new(),
            reads_now: true,
            calm: None,
            may_wait: true,
        }
    }

    /// One turn of the worker's thread: takes what is in the queue, carries it out, gives back what is due.
    pub(super) fn turn(&mut self) -> Turn {
        let compared = is_compared(&self.queue).then(|| self.queue.clone());
        let _turn = compared.as_ref().map(QueueHandle::turn);
        let alive = self.take(BATCH, Queue::disable_notifications);
        let came = !self.batch.is_empty();
        if came {
            self.carry_out();
        }
        self.reap();
        if self.pace.is_due(self.done.len(), came, || self.bell.ringer_sleeps()) {
            self.publish();
        }
        match (alive, came, self.done.is_empty()) {
            (false, ..) => Turn::Gone,
            (_, true, _) => Turn::Busy,
            (_, _, false) => Turn::Holding,
            _ => Turn::Idle,
        }
    }

    /// Answers all that is in the queue, on the caller's thread.
    pub(super) fn here(&mut self) {
        while self.take(BATCH, |_| Ok(())) && !self.batch.is_empty() {
            self.carry_out();
            self.publish();
        }
    }

    /// On the thread that rings, while the worker sleeps: carries out what is in the queue, where the driver has one request
    /// at a time and all of them are quickly done. `false` where the worker has to wake up for the rest.
    pub(super) fn at_once(&mut self) -> bool {
        if !self.is_quick() || !self.pace.is_alone() || !self.is_settled() || self.is_calm() {
            return false;
        }
        for _ in 0..AT_ONCE {
            if !self.take(AT_ONCE, |_| Ok(())) || self.batch.is_empty() {
                return true;
            }
            let bytes: u64 = self.batch.iter().map(|request| request.len).sum();
            if self.batch.len() == AT_ONCE || bytes > AT_ONCE_BYTES {
                return false;
            }
            let start = Instant::now();
            self.carry_out_quickly();
            self.pace.published_at_once();
            self.publish();
            if start.elapsed() > TOO_LONG {
                self.calm = Some(Instant::now() + CALM);
            }
            if !self.batch.is_empty() {
                return false;
            }
        }
        false
    }

    /// Whether there are transfers that need no waiting. Past the page cache each waits for the host's disk, meanwhile a vCPU
    /// may run something else.
    fn is_quick(&self) -> bool {
        self.shared.disk.is_cached()
            && self.shared.limiter.is_none()
            && !self.shared.write_through.load(Ordering::SeqCst)
    }

    /// Whether nothing is left of earlier requests.
    fn is_settled(&self) -> bool {
        let flying = self.ring.as_ref().map_or(0, Ring::in_flight);
        self.batch.is_empty() && self.done.is_empty() && flying == 0
    }

    fn is_calm(&mut self) -> bool {
        let calm = self.calm.is_some_and(|until| Instant::now() < until);
        if !calm {
            self.calm = None;
        }
        calm
    }

    /// How long to look for more before sleeping. Not at all where the next request is carried out by who rings.
    pub(super) fn linger(&self) -> Duration {
        match self.pace.is_alone() && self.is_quick() && self.calm.is_none() {
            true => Duration::ZERO,
            false => self.pace.linger(),
        }
    }

    /// Whether nothing came meanwhile; from here on the driver notifies.
    pub(super) fn may_sleep(&mut self) -> bool {
        self.queue.with(Queue::enable_notifications) != Some(true) && self.batch.is_empty()
    }

    /// Waits for transfers that are on their way, or for the bell; `false` where there are none.
    pub(super) fn wait_for_transfers(&mut self) -> bool {
        let Some(ring) = self.ring.as_mut().filter(|ring| ring.in_flight() > 0) else { return false };
        if let Err(error) = ring.wait() {
            self.shared.tell(format_args!("waiting for the disk failed: {error}"));
            self.bell.pause(RETRY);
        }
        true
    }

    /// The worker slept so long until something came.
    pub(super) fn slept(&mut self, time: Duration) {
        self.pace.slept(time);
    }

    /// Takes what is in the queue, so many requests in all; `false` where there is no queue to be worked on.
    fn take(
        &mut self,
        most: usize,
        before: impl FnOnce(&mut Queue) -> Result<(), crate::queue::QueueError>,
    ) -> bool {
        let Self { queue, memory, batch, shared, .. } = self;
        let taken = queue.with(|queue| {
            before(queue)?;
            while batch.len() < most
                && let Some(chain) = queue.pop()?
            {
                batch.push(Request::parse(memory, chain, &*shared.disk)?);
            }
            Ok(())
        });
        if taken.is_none() {
            batch.clear();
        }
        taken.is_some()
    }

    /// Starts the batch, and completes those that need not be waited for.
    fn carry_out(&mut self) {
        let mut batch = std::mem::take(&mut self.batch);
        for request in batch.drain(..) {
            if !self.wait_for_its_turn(&request) {
                break;
            }
            match self.gather(request) {
                None => {}
                Some(request) => {
                    self.start();
                    self.alone(request);
                }
            }
        }
        self.start();
        self.submit();
        // With its allocation.
        self.batch = batch;
    }

    /// Carries out of the batch what is quickly done; the rest stays in it.
    fn carry_out_quickly(&mut self) {
        let mut batch = std::mem::take(&mut self.batch);
        for request in batch.drain(..) {
            let left = self.gather(request);
            if left.is_some() || !self.quickly() {
                self.batch.append(&mut self.group.requests);
                self.batch.extend(left);
            }
            self.group.slices.clear();
        }
        if self.batch.is_empty() {
            // With its allocation.
            self.batch = batch;
        }
    }

    /// Waits as the limits say; `false` where the worker is to end.
    fn wait_for_its_turn(&mut self, request: &Request) -> bool {
        let Some(limiter) = &self.shared.limiter else { return true };
        let wait = limiter.take(request.len, Instant::now());
        if wait.is_zero() {
            return true;
        }
        self.start();
        self.submit();
        self.publish();
        self.bell.pause(wait);
        !self.bell.is_stopped()
    }

    fn submit(&mut self) {
        if let Some(ring) = &mut self.ring
            && let Err(error) = ring.submit()
        {
            self.shared.tell(format_args!("transfers of the disk cannot be started: {error}"));
        }
    }

    /// A request that is no transfer between the file and memory.
    fn alone(&mut self, request: Request) {
        let status = match &request.action {
            Action::Read { .. } | Action::Write { .. } => return self.one_by_one(request),
            Action::Flush => match &mut self.ring {
                Some(ring) if !self.shared.disk.is_read_only() => {
                    let slices = self.memory.slices();
                    if let Err(error) = ring.push(Operation::Flush, slices, Flight::Flush(request)) {
                        self.shared.tell(format_args!("a flush of the disk cannot be started: {error}"));
                    }
                    return;
                }
                _ => self.retrying("flush", |work| work.shared.disk.flush()),
            },
            Action::Identify => {
                let name = &self.shared.name[..(request.room as usize).min(self.shared.name.len())];
                return match request.chain.write(&self.memory, 0, name) {
                    Ok(written) => self.finish_with(request, status::OK, written as u64),
                    Err(error) => self.queue.fail(format_args!("the driver gave {error}")),
                };
            }
            Action::Discard(ranges) => self.retrying("discard", |work| {
                ranges.iter().try_for_each(|range| work.shared.disk.discard(range.offset, range.len))
            }),
            Action::WriteZeroes(ranges) => self.retrying("write of zeros", |work| {
                ranges.iter().try_for_each(|range| {
                    work.shared.disk.write_zeroes(range.offset, range.len, range.unmap)
                })?;
                work.settle()
            }),
            Action::Refuse(status) => *status,
        };
        self.finish(request, status);
    }

    /// What was written is durable, where the driver wants that of each write.
    fn settle(&self) -> io::Result<()> {
        match self.shared.write_through.load(Ordering::SeqCst) {
            true => self.shared.disk.flush(),
            false => Ok(()),
        }
    }

    /// Does something, again and again while the host has no space; its status.
    fn retrying(&mut self, what: &str, mut action: impl FnMut(&mut Self) -> io::Result<()>) -> u8 {
        let mut waited = None;
        loop {
            let result = action(self);
            let full = result.as_ref().err().is_some_and(is_full);
            if !full || !self.may_wait || self.bell.is_stopped() {
                if let (Some(since), true) = (waited, result.is_ok()) {
                    let since: Instant = since;
                    let label = &self.shared.label;
                    log::warn!("virtio-blk: the disk {label} goes on after {} s", since.elapsed().as_secs());
                }
                return self.shared.outcome(result, what);
            }
            if waited.is_none() {
                waited = Some(Instant::now());
                let (label, error) = (&self.shared.label, result.err().map(|error| error.to_string()));
                log::error!(
                    "virtio-blk: the host has no space for a {what} of the disk {label} ({}); the guest waits for the disk, \
                     and goes on by itself as soon as there is space",
                    error.unwrap_or_default()
                );
                self.publish();
            }
            self.bell.pause(RETRY);
        }
    }

    /// Takes what the ring has completed.
    fn reap(&mut self) {
        let Some(mut ring) = self.ring.take() else { return };
        let mut wrote = false;
        let mut again = Vec::new();
        let mut ready = Vec::new();
        ring.reap(|slices, flight, result| match flight {
            Flight::Group { write, requests } => {
                if result.as_ref().is_ok_and(|&moved| moved == slices.len()) {
                    wrote |= write;
                    if !write {
                        slices.mark_written(slices.len());
                    }
                    ready.extend(requests);
                } else {
                    again.extend(requests);
                }
            }
            Flight::Flush(request) => match result {
                Ok(_) => ready.push(request),
                Err(_) => again.push(request),
            },
        });
        if wrote && self.shared.write_through.load(Ordering::SeqCst) {
            // Each write is done again where the flush fails: that tells which error it is.
            if self.shared.disk.flush().is_err() {
                again.append(&mut ready);
            }
        }
        ready.into_iter().for_each(|request| self.finish(request, status::OK));
        for request in again {
            // By itself, so that its status is its own.
            match request.action {
                Action::Flush => {
                    let status = self.retrying("flush", |work| work.shared.disk.flush());
                    self.finish(request, status);
                }
                _ => self.one_by_one(request),
            }
        }
        self.ring = Some(ring);
    }

    fn finish(&mut self, request: Request, status: u8) {
        let read = status == status::OK && matches!(request.action, Action::Read { .. });
        let data = if read { request.len } else { 0 };
        self.finish_with(request, status, data);
    }

    /// The same, of a request to whose buffers so many bytes of data were written.
    fn finish_with(&mut self, request: Request, status: u8, data: u64) {
        match request.finish(&self.memory, status, data) {
            Ok(written) => self.done.push((request.chain, written)),
            Err(error) => self.queue.fail(format_args!("the driver gave {error}")),
        }
    }

    /// Gives the driver what is completed.
    fn publish(&mut self) {
        if self.done.is_empty() {
            return;
        }
        let done = &mut self.done;
        let published = self.queue.with(|queue| queue.complete_all(done.drain(..)));
        if published.is_none() {
            self.done.clear();
        }
    }
}

/// Whether the guest is run twice and compared, so that it matters when it sees something.
fn is_compared(queue: &QueueHandle) -> bool {
    queue.memory().guest().marks().are_device_writes_logged()
}

/// Whether the host has no space, or lets this process have none.
fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG))
}
