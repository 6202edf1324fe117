//! The block device: a disk of 512-byte sectors. *Block Device*.
//!
//! ```text
//!   notify(queue) ──bell──> worker, a thread for each queue ──pop──> request ──> groups of neighbours
//!                             │  ^                                                  │
//!                             │  └───────── completions <── io_uring, or PREADV and PWRITEV, or the disk's methods
//!                             └── publishes them, as many at a time as the guest has on their way
//! ```
//!
//! A driver that has one request on its way at a time is answered on the thread that rings, without waking the worker, if
//! the request needs no waiting ([`work`]).
//!
//! What can be moved between the disk's file and guest memory directly is, without a copy ([`disk::Disk::direct`],
//! [`disk::InPlace`]); all else goes through a buffer. A flush is done when the host says so. Where the host has no space left, a write waits and
//! is tried again: the guest sees no error, and goes on when there is space.

mod bell;
mod config;
mod limits;
mod pace;
mod request;
mod ring;
#[cfg(test)]
mod tests;
mod work;
mod worker;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use disk::Disk;

use crate::{Activation, Device, read_config_bytes};
use limits::Limiter;
pub use limits::Limits;
use worker::Worker;

/// Its device id.
const ID: u16 = 2;
/// Bytes of a sector.
pub const SECTOR: u64 = disk::SECTOR;
/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// The most queues: one for each vCPU that there can be.
const MAX_QUEUES: usize = 64;
/// Bytes of the disk's name.
const NAME: usize = 20;
/// Errors of the host are told at most so often.
const TELL: Duration = Duration::from_secs(1);

/// Feature bits.
mod feature {
    pub(super) const SIZE_MAX: u64 = 1 << 1;
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const READ_ONLY: u64 = 1 << 5;
    pub(super) const BLOCK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const CONFIG_WCE: u64 = 1 << 11;
    pub(super) const MULTI_QUEUE: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// How a request went.
mod status {
    pub(super) const OK: u8 = 0;
    pub(super) const IO_ERROR: u8 = 1;
    pub(super) const UNSUPPORTED: u8 = 2;
}

/// What a block device is made of.
pub struct BlockOptions {
    /// Its disk.
    pub disk: Box<dyn Disk>,
    /// What the log calls it.
    pub label: String,
    /// What the guest is told as its serial number; 20 bytes count.
    pub serial: String,
    /// Queues: one for each vCPU.
    pub queues: u32,
    /// How much it may do.
    pub limits: Limits,
}

/// A disk for the guest.
pub struct Block {
    shared: Arc<Shared>,
    sizes: Vec<u16>,
    workers: Vec<Option<Worker>>,
    threads: bool,
    /// What the driver wrote to the configuration: whether writes may wait for a flush.
    writeback: bool,
}

/// What the workers have in common.
struct Shared {
    disk: Box<dyn Disk>,
    label: String,
    /// The serial number, with zeros behind it.
    name: [u8; NAME],
    limiter: Option<Limiter>,
    /// Writes are durable before they are acknowledged.
    write_through: AtomicBool,
    /// When an error of the host was last told, and how many were not told since.
    told: Mutex<Option<Instant>>,
    untold: AtomicU64,
}

impl Block {
    /// The device.
    pub fn new(options: BlockOptions) -> Self {
        let BlockOptions { disk, label, serial, queues, limits } = options;
        let mut name = [0; NAME];
        let len = serial.len().min(NAME);
        name[..len].copy_from_slice(&serial.as_bytes()[..len]);
        let queues = (queues as usize).clamp(1, MAX_QUEUES);
        let shared = Shared {
            disk,
            label,
            name,
            limiter: Limiter::new(limits),
            write_through: AtomicBool::new(false),
            told: Mutex::default(),
            untold: AtomicU64::new(0),
        };
        Self {
            shared: Arc::new(shared),
            sizes: vec![QUEUE_SIZE; queues],
            workers: Vec::new(),
            threads: true,
            writeback: true,
        }
    }

    /// The same without threads: all of a request happens before the doorbell's write comes back, each time in the same way.
    pub fn without_threads(self) -> Self {
        Self { threads: false, ..self }
    }

    fn decide_cache(&self, features: u64) {
        let writeback = match features & feature::CONFIG_WCE {
            // A driver that knows no flush cannot ask for durability.
            0 => features & feature::FLUSH != 0,
            _ => self.writeback,
        };
        self.shared.write_through.store(!writeback, Ordering::SeqCst);
    }
}

impl Shared {
    /// The status of what the host did; its error is in the log.
    fn outcome(&self, result: io::Result<()>, what: &str) -> u8 {
        match result {
            Ok(()) => status::OK,
            Err(error) => {
                self.tell(format_args!(
                    "a {what} of the disk {} failed: {error}; the guest sees an I/O error",
                    self.label
                ));
                status::IO_ERROR
            }
        }
    }

    /// One sentence for the log, unless there was one just now: a guest must not be able to fill it.
    fn tell(&self, sentence: std::fmt::Arguments<'_>) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_some_and(|last| last.elapsed() < TELL) {
            self.untold.fetch_add(1, Ordering::Relaxed);
            return;
        }
        *told = Some(Instant::now());
        match self.untold.swap(0, Ordering::Relaxed) {
            0 => log::error!("virtio-blk: {sentence}"),
            more => log::error!("virtio-blk: {sentence} (and {more} errors before it)"),
        }
    }
}

impl Device for Block {
    fn id(&self) -> u16 {
        ID
    }

    fn features(&self) -> u64 {
        let always = feature::SIZE_MAX
            | feature::SEG_MAX
            | feature::BLOCK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE;
        let queues = if self.sizes.len() > 1 { feature::MULTI_QUEUE } else { 0 };
        let access = match self.shared.disk.is_read_only() {
            true => feature::READ_ONLY,
            false => feature::DISCARD | feature::WRITE_ZEROES,
        };
        always | queues | access
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        let config = config::bytes(&*self.shared.disk, self.sizes.len() as u16, self.writeback);
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (config::WRITEBACK, [value]) = (offset, data) {
            self.writeback = *value != 0;
            self.shared.write_through.store(!self.writeback, Ordering::SeqCst);
        }
    }

    fn activate(&mut self, activation: Activation) {
        self.decide_cache(activation.features);
        let start = |queue| match self.threads {
            true => Worker::start(self.shared.clone(), queue),
            false => Worker::without_thread(self.shared.clone(), queue),
        };
        self.workers = activation.queues.into_iter().map(|queue| queue.and_then(start)).collect();
    }

    fn notify(&mut self, index: u16) {
        if let Some(Some(worker)) = self.workers.get(usize::from(index)) {
            worker.ring();
        }
    }

    fn reset(&mut self) {
        // All of them are told before the first is waited for.
        self.workers.iter().flatten().for_each(Worker::stop);
        self.workers.clear();
        if let Err(error) = self.shared.disk.close() {
            log::error!("{}: it cannot be closed properly: {error}", self.shared.label);
        }
        self.writeback = true;
    }
}
