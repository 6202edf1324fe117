//! A queue's worker.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use disk::Direct;
use guest_memory::HostSlices;

use super::bell::Bell;
use super::pace::Pace;
use super::request::{Action, HEADER, Request};
use super::ring::{Operation, Ring};
use super::{Shared, status};
use crate::QueueHandle;
use crate::memory::DmaMemory;
use crate::queue::{Chain, Queue};

/// Bytes that are moved at a time through a buffer.
const CHUNK: usize = 256 << 10;
/// Requests that are taken at a time.
const BATCH: usize = 128;
/// Neighbours become one transfer up to so many bytes and parts.
const GROUP_BYTES: u64 = 1 << 20;
const GROUP_PARTS: usize = 512;
/// How often a write is tried again while the host has no space.
const RETRY: Duration = Duration::from_millis(500);

/// The thread of a queue.
pub(super) struct Worker {
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts it; `None` and a broken device where the host has no thread.
    pub(super) fn start(shared: Arc<Shared>, queue: QueueHandle) -> Option<Self> {
        let start = || -> io::Result<Self> {
            let bell = Arc::new(Bell::new()?);
            let (its_queue, its_bell) = (queue.clone(), bell.clone());
            let thread = std::thread::Builder::new()
                .name(format!("blk-queue-{}", queue.index()))
                .spawn(move || Work::new(&shared, its_queue, &its_bell).run())?;
            Ok(Self { bell, thread: Some(thread) })
        };
        start().map_err(|error| queue.fail(format_args!("the host gives no thread: {error}"))).ok()
    }

    /// There is something in the queue.
    pub(super) fn ring(&self) {
        self.bell.ring();
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

/// Neighbouring requests that are one transfer.
struct Group {
    write: bool,
    offset: u64,
    slices: HostSlices,
    requests: Vec<Request>,
}

impl Group {
    /// Takes a request that follows on this; gives it back where it does not.
    fn join(
        &mut self,
        (write, offset): (bool, u64),
        slices: &HostSlices,
        request: Request,
    ) -> Option<Request> {
        let follows = self.write == write && self.offset + self.slices.len() == offset;
        let parts = self.slices.slices().len() + slices.slices().len();
        if !follows || parts > GROUP_PARTS || self.slices.len() + slices.len() > GROUP_BYTES {
            return Some(request);
        }
        self.slices.append(slices);
        self.requests.push(request);
        None
    }
}

/// What is on its way.
enum Flight {
    Group { write: bool, requests: Vec<Request> },
    Flush(Request),
}

struct Work<'a> {
    shared: &'a Shared,
    queue: QueueHandle,
    memory: DmaMemory,
    bell: &'a Bell,
    direct: Option<Direct<'a>>,
    ring: Option<Ring<Flight>>,
    pace: Pace,
    /// Completed, and not yet published, with the bytes written.
    done: Vec<(Chain, u32)>,
    buffer: Vec<u8>,
}

impl<'a> Work<'a> {
    fn new(shared: &'a Shared, queue: QueueHandle, bell: &'a Bell) -> Self {
        let direct = shared.disk.direct();
        let ring = direct.and_then(|direct| match Ring::new(direct.file, &bell.event()) {
            Ok(ring) => Some(ring),
            Err(error) => {
                log::info!("virtio-blk: no io_uring here ({error}); transfers go one by one");
                None
            }
        });
        let memory = queue.memory().clone();
        let (pace, done, buffer) = (Pace::new(), Vec::new(), Vec::new());
        Self { shared, queue, memory, bell, direct, ring, pace, done, buffer }
    }

    fn run(mut self) {
        let mut batch = Vec::new();
        let mut idle_since = None;
        while !self.bell.is_stopped() {
            let alive = self.take(&mut batch);
            let came = !batch.is_empty();
            if came {
                idle_since = None;
                self.carry_out(batch.drain(..));
            }
            self.reap();
            if self.pace.is_due(self.done.len(), came) {
                self.publish();
            }
            if !alive {
                self.bell.falls_asleep();
                self.bell.wait(None);
                self.bell.awake();
            } else if !came && self.done.is_empty() {
                self.rest(&mut idle_since);
            } else if !came {
                look_away();
            }
        }
    }

    /// Takes what is in the queue; `false` where there is no queue to be worked on.
    fn take(&mut self, batch: &mut Vec<Request>) -> bool {
        let disk = &*self.shared.disk;
        let (queue, memory) = (&self.queue, &self.memory);
        let taken = queue.with(|queue| {
            queue.disable_notifications()?;
            while batch.len() < BATCH
                && let Some(chain) = queue.pop()?
            {
                batch.push(Request::parse(memory, chain, disk)?);
            }
            Ok(())
        });
        if taken.is_none() {
            batch.clear();
        }
        taken.is_some()
    }

    /// There is nothing to do: looks a while for more, and then sleeps.
    fn rest(&mut self, idle_since: &mut Option<Instant>) {
        let now = Instant::now();
        let since = *idle_since.get_or_insert(now);
        if now - since < self.pace.linger() {
            look_away();
            return;
        }
        self.bell.falls_asleep();
        if self.queue.with(Queue::enable_notifications) != Some(true) && !self.bell.is_stopped() {
            match self.ring.as_mut().filter(|ring| ring.in_flight() > 0) {
                Some(ring) => {
                    if let Err(error) = ring.wait() {
                        self.shared.tell(format_args!("waiting for the disk failed: {error}"));
                        self.bell.pause(RETRY);
                    }
                }
                None => self.bell.wait(None),
            }
        }
        self.bell.awake();
        self.pace.slept(now.elapsed());
        *idle_since = None;
    }

    /// Starts requests, and completes those that need not be waited for.
    fn carry_out(&mut self, requests: impl Iterator<Item = Request>) {
        let mut group: Option<Group> = None;
        for mut request in requests {
            if let Some(limiter) = &self.shared.limiter {
                let wait = limiter.take(request.len, Instant::now());
                if !wait.is_zero() {
                    self.start(group.take());
                    self.submit();
                    self.publish();
                    self.bell.pause(wait);
                    if self.bell.is_stopped() {
                        return;
                    }
                }
            }
            let Some((place, slices)) = self.direct_transfer(&request) else {
                self.start(group.take());
                self.alone(request);
                continue;
            };
            if let Some(group) = &mut group {
                match group.join(place, &slices, request) {
                    None => continue,
                    Some(back) => request = back,
                }
            }
            let (write, offset) = place;
            self.start(group.replace(Group { write, offset, slices, requests: vec![request] }));
        }
        self.start(group);
        self.submit();
    }

    /// Where a request's bytes can be moved directly: whether they are written, where, and the guest's memory.
    fn direct_transfer(&self, request: &Request) -> Option<((bool, u64), HostSlices)> {
        let direct = self.direct.as_ref()?;
        let (write, offset) = match request.action {
            Action::Read { offset } => (false, offset),
            Action::Write { offset } => (true, offset),
            _ => return None,
        };
        if write && offset < direct.guarded {
            return None;
        }
        let slices = match write {
            true => request.chain.readable_slices(&self.memory, HEADER as u64, request.len),
            false => request.chain.writable_slices(&self.memory, 0, request.len),
        };
        let slices = slices.ok()?;
        if direct.alignment > 1 {
            let mask = direct.alignment as u64 - 1;
            let aligned =
                |slice: &guest_memory::HostSlice| (slice.address() | slice.len() as u64) & mask == 0;
            if offset & mask != 0 || !slices.slices().iter().all(aligned) {
                return None;
            }
        }
        Some(((write, offset), slices))
    }

    /// Starts a transfer, or carries it out where there is no ring.
    fn start(&mut self, group: Option<Group>) {
        let Some(Group { write, offset, slices, requests }) = group else { return };
        let operation = if write { Operation::Write(offset) } else { Operation::Read(offset) };
        let Some(ring) = &mut self.ring else {
            requests.into_iter().for_each(|request| self.one_by_one(request));
            return;
        };
        if let Err(error) = ring.push(operation, slices, Flight::Group { write, requests }) {
            self.shared.tell(format_args!("a transfer of the disk cannot be started: {error}"));
        }
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
        let disk = &*self.shared.disk;
        let status = match &request.action {
            Action::Read { .. } | Action::Write { .. } => return self.one_by_one(request),
            Action::Flush => match &mut self.ring {
                Some(ring) if !disk.is_read_only() => {
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
                    Ok(written) => self.finish(request, status::OK, written as u64),
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
        self.finish(request, status, 0);
    }

    /// A transfer by itself, on this thread, and tried again while the host has no space.
    fn one_by_one(&mut self, request: Request) {
        let done = match request.action {
            Action::Read { offset } => {
                let status = self.retrying("read", |work| work.read(&request, offset));
                (status, if status == status::OK { request.len } else { 0 })
            }
            Action::Write { offset } => {
                (self.retrying("write", |work| work.write(&request, offset).and_then(|()| work.settle())), 0)
            }
            _ => (status::UNSUPPORTED, 0),
        };
        self.finish(request, done.0, done.1);
    }

    fn read(&mut self, request: &Request, offset: u64) -> io::Result<()> {
        if let Some((_, slices)) = self.direct_transfer(request)
            && let Some(direct) = self.direct
        {
            return slices.read_exact_at(direct.file.as_fd(), offset);
        }
        self.in_parts(request.len, |work, at, part| {
            work.shared.disk.read(offset + at, part)?;
            request.chain.write(&work.memory, at, part).map_err(io::Error::other)
        })
    }

    fn write(&mut self, request: &Request, offset: u64) -> io::Result<()> {
        if let Some((_, slices)) = self.direct_transfer(request)
            && let Some(direct) = self.direct
        {
            return slices.write_all_at(direct.file.as_fd(), offset);
        }
        self.in_parts(request.len, |work, at, part| {
            request.chain.read(&work.memory, HEADER as u64 + at, part).map_err(io::Error::other)?;
            work.shared.disk.write(offset + at, part).map(|()| 0)
        })
    }

    /// Goes through so many bytes by means of the buffer.
    fn in_parts(
        &mut self,
        len: u64,
        mut action: impl FnMut(&mut Self, u64, &mut [u8]) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(CHUNK, 0);
        let mut at = 0;
        let mut result = Ok(0);
        while at < len && result.is_ok() {
            let part = (len - at).min(CHUNK as u64);
            result = action(self, at, &mut buffer[..part as usize]);
            at += part;
        }
        self.buffer = buffer;
        result.map(|_| ())
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
            if !full || self.bell.is_stopped() {
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
        for request in ready {
            let data = if matches!(request.action, Action::Read { .. }) { request.len } else { 0 };
            self.finish(request, status::OK, data);
        }
        for request in again {
            // By itself, so that its status is its own.
            match request.action {
                Action::Flush => {
                    let status = self.retrying("flush", |work| work.shared.disk.flush());
                    self.finish(request, status, 0);
                }
                _ => self.one_by_one(request),
            }
        }
        self.ring = Some(ring);
    }

    fn finish(&mut self, request: Request, status: u8, data: u64) {
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
        let published: Option<()> = self
            .queue
            .with(|queue| done.drain(..).try_for_each(|(chain, written)| queue.complete(&chain, written)));
        if published.is_none() {
            self.done.clear();
        }
    }
}

/// A microsecond or so between two looks at the queue. It does not yield: on a busy host that would cost a whole time slice.
fn look_away() {
    for _ in 0..40 {
        std::hint::spin_loop();
    }
}

/// Whether the host has no space, or lets this process have none.
fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG))
}
