//! The persistent memory device: a file's bytes are memory of the guest, and requests make what was stored there durable.
//! *PMEM Device*.
//!
//! ```text
//!  the guest's loads, stores, fetches ──> guest memory at `range`, which the file's pages are
//!  its flush requests ──> queue ──> a thread ──> `sync`, once for all that wait ──> answers
//! ```
//!
//! Where the memory is, the configuration space tells. `VIRTIO_PMEM_F_SHMEM_REGION`, by which it would be a region of
//! shared memory of the transport, is not offered: it is for hosts that cannot put memory where they like, and on PCI
//! takes a base address register that the guest may move, and RAM with it. No guest needs it: Linux's driver knows it since
//! 6.9, FreeBSD's as well, and both read the configuration where it is not offered.
//!
//! A flush fails, and the guest's program hears of it, where the file has lost pages, cannot be written, or where the
//! guest has stored to a device that is read-only, which its driver has no other way to know.

use std::io;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use guest_memory::PAGE_SIZE;

use crate::queue::{Chain, Queue, QueueError};
use crate::{Activation, Device, QueueHandle, features, read_config_bytes};

/// Its device id.
const ID: u16 = 27;
/// The one queue's entries.
const SIZES: [u16; 1] = [64];
/// The request's one type, and its bytes.
const FLUSH: u32 = 0;
const REQUEST: usize = 4;
/// Answers: done, or not.
const OK: u32 = 0;
const FAILED: u32 = 1;

/// Comes back when all that was stored is durable.
pub type Sync = Box<dyn FnMut() -> io::Result<()> + Send>;

/// What a device is made from.
pub struct PmemOptions {
    /// The guest-physical addresses of the memory.
    pub range: Range<u64>,
    /// Whether the guest's stores are discarded.
    pub read_only: bool,
    /// What the log calls it.
    pub label: String,
    /// What a flush does.
    pub sync: Sync,
}

/// A persistent memory device.
pub struct Pmem {
    range: Range<u64>,
    /// Taken by the thread while there is one.
    flusher: Option<Flusher>,
    worker: Option<Worker>,
}

struct Worker {
    doorbell: SyncSender<()>,
    thread: JoinHandle<Flusher>,
}

impl Pmem {
    /// A device for memory that the machine has there.
    pub fn new(options: PmemOptions) -> Self {
        let PmemOptions { range, read_only, label, sync } = options;
        let flusher = Flusher { range: range.clone(), read_only, label, sync, failing: false };
        Self { range, flusher: Some(flusher), worker: None }
    }
}

impl Device for Pmem {
    fn id(&self) -> u16 {
        ID
    }

    fn features(&self) -> u64 {
        features::IN_ORDER
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        let (start, size) = (self.range.start, self.range.end - self.range.start);
        let config = [start.to_le_bytes(), size.to_le_bytes()].concat();
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) {
        let (Some(queue), Some(flusher)) = (activation.queue(0), self.flusher.take()) else { return };
        let (doorbell, rung) = sync_channel(1);
        let broken = queue.clone();
        let work = move || flusher.run(&queue, &rung);
        match std::thread::Builder::new().name("pmem".into()).spawn(work) {
            Ok(thread) => self.worker = Some(Worker { doorbell, thread }),
            Err(error) => broken.fail(format_args!("the host gives no thread for it: {error}")),
        }
    }

    fn notify(&mut self, _index: u16) {
        if let Some(worker) = &self.worker {
            // Where it is full, the thread looks anyway.
            let _ = worker.doorbell.try_send(());
        }
    }

    fn reset(&mut self) {
        if let Some(Worker { doorbell, thread }) = self.worker.take() {
            drop(doorbell);
            self.flusher = thread.join().ok();
        }
    }
}

impl Drop for Pmem {
    fn drop(&mut self) {
        self.reset();
    }
}

/// What the thread works with.
struct Flusher {
    range: Range<u64>,
    read_only: bool,
    label: String,
    sync: Sync,
    /// Whether the last flush failed: each cause is told once.
    failing: bool,
}

impl Flusher {
    fn run(mut self, queue: &QueueHandle, rung: &Receiver<()>) -> Self {
        while rung.recv().is_ok() {
            while let Some(chains) = queue.with(take_all).filter(|chains| !chains.is_empty()) {
                self.answer(queue, &chains);
            }
        }
        self
    }

    /// Answers requests, with one flush for all that ask for it.
    fn answer(&mut self, queue: &QueueHandle, chains: &[Chain]) {
        let mut flushed = None;
        for chain in chains {
            let answered = requested(queue, chain).and_then(|request| {
                let answer = match request {
                    FLUSH => *flushed.get_or_insert_with(|| self.flush(queue)),
                    _ => FAILED,
                };
                chain.write(queue.memory(), 0, &answer.to_le_bytes())
            });
            match answered {
                Ok(written) => queue.complete(chain, written as u32),
                Err(error) => return queue.fail(format_args!("the driver gave {error}")),
            }
        }
    }

    fn flush(&mut self, queue: &QueueHandle) -> u32 {
        let done = self.check(queue).and_then(|()| (self.sync)());
        match done {
            Ok(()) => {
                self.failing = false;
                OK
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    log::error!("{}: what the guest stored is not safe: {error}", self.label);
                }
                FAILED
            }
        }
    }

    /// Looks whether what was stored could get into the file at all.
    fn check(&self, queue: &QueueHandle) -> io::Result<()> {
        let memory = queue.memory().guest();
        if memory.file_state(self.range.start).is_some_and(|state| state.lost) {
            return Err(io::Error::other("the file has lost pages while it was in use"));
        }
        let Some(first) = memory.locate(self.range.start).filter(|_| self.read_only) else { return Ok(()) };
        let pages =
            (first.offset..first.offset + (self.range.end - self.range.start)).step_by(PAGE_SIZE as usize);
        // Each is looked at, so that the next flush tells of new stores alone.
        match pages.filter(|&page| memory.marks().is_dirty(page) && memory.marks().clean(page)).count() {
            0 => Ok(()),
            count => {
                Err(io::Error::other(format!("it is read-only, and the guest has stored to {count} pages")))
            }
        }
    }
}

/// All requests that wait.
fn take_all(queue: &mut Queue) -> Result<Vec<Chain>, QueueError> {
    let mut chains = Vec::new();
    while let Some(chain) = queue.pop()? {
        chains.push(chain);
    }
    Ok(chains)
}

/// A request's type; there is room for its answer.
fn requested(queue: &QueueHandle, chain: &Chain) -> Result<u32, QueueError> {
    let mut bytes = [0; REQUEST];
    if chain.read(queue.memory(), 0, &mut bytes)? < REQUEST {
        return Err(QueueError::Request("a request to persistent memory of less than its type"));
    }
    if chain.writable_len() < REQUEST as u64 {
        return Err(QueueError::Request("a request to persistent memory without room for its answer"));
    }
    Ok(u32::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::sync::{Arc, Barrier};

    use super::*;
    use crate::features::{EVENT_IDX, INDIRECT_DESC, RING_PACKED};
    use crate::testing::{BUFFERS, Rig};
    use crate::transport::Event;

    /// Tests' guest memory has a page of ROM there: it stands for read-only persistent memory.
    const RANGE: Range<u64> = crate::testing::ROM..crate::testing::ROM + PAGE_SIZE;
    const ANSWER: u64 = BUFFERS + 0x100;

    fn device(read_only: bool, sync: impl FnMut() -> io::Result<()> + Send + 'static) -> Box<Pmem> {
        Box::new(Pmem::new(PmemOptions { range: RANGE, read_only, label: "f".into(), sync: Box::new(sync) }))
    }

    /// Sends a request; gives its answer.
    fn ask(rig: &mut Rig, kind: u32) -> u32 {
        rig.drivers[0].put(BUFFERS, &kind.to_le_bytes());
        rig.drivers[0].put(ANSWER, &[0xaa; 4]);
        rig.send(0, &[(BUFFERS, 4, false), (ANSWER, 4, true)]);
        assert_eq!(rig.wait_used(0).1, 4);
        u32::from_le_bytes(rig.drivers[0].bytes(ANSWER, 4).try_into().unwrap())
    }

    #[test]
    fn the_configuration_tells_where_the_memory_is() {
        let mut rig = Rig::new(device(false, || Ok(())), 16, 0);
        assert_eq!(rig.config(0, 8), RANGE.start.to_le_bytes());
        assert_eq!(rig.config(8, 8), PAGE_SIZE.to_le_bytes());
        assert_eq!((rig.config(12, 8), rig.config(1 << 40, 4)), (vec![0; 8], vec![0; 4]));
    }

    #[test]
    fn a_flush_is_answered_once_it_is_done_and_what_fails_says_so() {
        for format in [0, EVENT_IDX, RING_PACKED, RING_PACKED | EVENT_IDX | INDIRECT_DESC] {
            let (flushes, fails) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
            let (counted, failing) = (flushes.clone(), fails.clone());
            let device = device(false, move || {
                counted.fetch_add(1, Ordering::SeqCst);
                if failing.load(Ordering::SeqCst) {
                    Err(io::Error::other("the disk is gone"))
                } else {
                    Ok(())
                }
            });
            let mut rig = Rig::new(device, 16, format | features::IN_ORDER);
            assert_eq!((ask(&mut rig, FLUSH), flushes.load(Ordering::SeqCst)), (OK, 1));
            fails.store(true, Ordering::SeqCst);
            assert_eq!(ask(&mut rig, FLUSH), FAILED);
            fails.store(false, Ordering::SeqCst);
            assert_eq!((ask(&mut rig, 1), ask(&mut rig, u32::MAX)), (FAILED, FAILED));
            assert_eq!(flushes.load(Ordering::SeqCst), 2, "no flush for what is no flush");
            rig.restart();
            assert_eq!(ask(&mut rig, FLUSH), OK);
        }
    }

    #[test]
    fn requests_that_come_during_a_flush_are_answered_by_the_next_one_together() {
        let (flushes, within, after) =
            (Arc::new(AtomicU32::new(0)), Arc::new(Barrier::new(2)), Arc::new(Barrier::new(2)));
        let (counted, at, then) = (flushes.clone(), within.clone(), after.clone());
        let device = device(false, move || {
            if counted.fetch_add(1, Ordering::SeqCst) == 0 {
                at.wait();
                then.wait();
            }
            Ok(())
        });
        let mut rig = Rig::new(device, 64, INDIRECT_DESC | features::IN_ORDER);
        rig.drivers[0].put(BUFFERS, &FLUSH.to_le_bytes());
        rig.send(0, &[(BUFFERS, 4, false), (ANSWER, 4, true)]);
        within.wait();
        for request in 1..10 {
            rig.send(0, &[(BUFFERS, 4, false), (ANSWER + 4 * request, 4, true)]);
        }
        assert_eq!(rig.drivers[0].used(), None, "none is answered before it is safe");
        after.wait();
        for _ in 0..10 {
            rig.wait_used(0);
        }
        assert_eq!(flushes.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn stores_to_what_is_read_only_make_the_next_flush_fail() {
        let mut rig = Rig::new(device(true, || Ok(())), 16, 0);
        assert_eq!(ask(&mut rig, FLUSH), OK);
        let memory = rig.memory.guest().clone();
        memory.marks().written(memory.locate(RANGE.start).unwrap().offset);
        assert_eq!((ask(&mut rig, FLUSH), ask(&mut rig, FLUSH)), (FAILED, OK));
    }

    #[test]
    fn requests_without_a_type_or_room_stop_the_device_until_it_is_reset() {
        for buffers in [
            &[(BUFFERS, 3, false), (ANSWER, 4, true)][..],
            &[(ANSWER, 4, true)],
            &[(BUFFERS, 4, false), (ANSWER, 3, true)],
            &[(BUFFERS, 4, false)],
        ] {
            let mut rig = Rig::new(device(false, || Ok(())), 16, 0);
            rig.send(0, buffers);
            rig.wait_event(Event::Config);
            assert_eq!(rig.status().bits(), 0x4f, "{buffers:?}");
            rig.restart();
            assert_eq!(ask(&mut rig, FLUSH), OK);
        }
    }

    #[test]
    fn requests_of_all_shapes_are_answered_or_stop_the_device() {
        let flushes = Arc::new(AtomicU32::new(0));
        let counted = flushes.clone();
        let sync = move || {
            counted.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        let mut rig = Rig::new(device(false, sync), 16, features::IN_ORDER);
        let (mut answered, mut stopped) = (0, 0);
        for step in 0..600u32 {
            let (kind, request, answer) = (step % 3, step / 3 % 7, step / 21 % 7);
            rig.drivers[0].put(BUFFERS, &[kind, 0].map(u32::to_le_bytes).concat());
            let readable = (request > 0).then_some((BUFFERS, request, false));
            let writable = (answer > 0).then_some((ANSWER, answer, true));
            let buffers: Vec<_> = readable.into_iter().chain(writable).collect();
            if buffers.is_empty() {
                continue;
            }
            rig.send(0, &buffers);
            if request >= 4 && answer >= 4 {
                assert_eq!(rig.wait_used(0).1, 4);
                answered += 1;
            } else {
                rig.wait_event(Event::Config);
                rig.restart();
                stopped += 1;
            }
        }
        assert!(answered > 100 && stopped > 100, "{answered} {stopped}");
        assert!(flushes.load(Ordering::SeqCst) > 30);
    }
}
