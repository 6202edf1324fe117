//! The driver's side, once for all tests: rings in guest memory of either format, and a [`Rig`] that negotiates with a
//! device and works its queues as a driver does, without a transport's registers.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use guest_memory::{GuestMemory, Region};

use crate::memory::DmaMemory;
use crate::queue::{Queue, QueueConfig, QueueError};
use crate::transport::{Core, Event, Interrupts, Status};
use crate::{Device, features};

/// RAM of the tests' machines, in bytes from 0.
pub const RAM: u64 = 0x100_0000;
/// A page of ROM behind it.
pub const ROM: u64 = 0x200_0000;
/// Where tests have their buffers: up to [`RINGS`].
pub const BUFFERS: u64 = 0x2_0000;
/// Where the rings of queues but the first begin.
pub const RINGS: u64 = 0x40_0000;
/// Where the first queue's descriptors are.
const FIRST_RING: u64 = 0x1000;
/// Bytes between queues' rings.
const STRIDE: u64 = 0x1_0000;
/// Where the driver's and the device's areas are behind the descriptors.
const DRIVER: u64 = 0x4000;
const DEVICE: u64 = 0x5000;
/// Where the queues' indirect tables are, the bytes of one queue's, and of one request's.
const INDIRECT: u64 = 0x80_0000;
const INDIRECT_STRIDE: u64 = 0x8_0000;
const INDIRECT_TABLE: u64 = 0x200;
/// The most queues that a driver can have.
const MAX_QUEUES: u16 = 16;
/// How long a test waits for what another thread does.
const PATIENCE: Duration = Duration::from_secs(20);

/// A descriptor's flags.
pub const WRITE: u16 = 2;
/// As above.
pub const NEXT: u16 = 1;
/// As above.
pub const INDIRECT_FLAG: u16 = 4;

/// Memory for a test.
pub fn memory() -> DmaMemory {
    let region = |start, len, read_only| Region { start, len, read_only };
    let regions = [region(0, RAM, false), region(ROM, 0x1000, true)];
    DmaMemory::new(GuestMemory::new(&regions).expect("memory for a test"))
}

/// A buffer of a request: guest-physical address, bytes, whether the device writes it.
pub type Buffer = (u64, u32, bool);

/// A driver's side of one queue.
pub struct Driver {
    /// The guest's RAM.
    pub memory: DmaMemory,
    /// Where the queue is.
    pub config: QueueConfig,
    negotiated: u64,
    /// Where its indirect tables are.
    indirect: u64,
    /// Entries made available, and used ones seen.
    available: u16,
    seen: u16,
    /// Split: the descriptor that the next chain begins with.
    head: u16,
    /// Packed: the wrap counters of both.
    wraps: [bool; 2],
    /// Packed: entries of each request, by id.
    entries: Vec<u16>,
    /// With IN_ORDER, the ids of requests that were not seen used: used ones have to come in this order.
    sent: Option<VecDeque<u16>>,
}

impl Driver {
    /// A driver with one queue in memory of its own.
    pub fn new(size: u16, negotiated: u64) -> Self {
        Self::of_queue(0, size, negotiated, memory())
    }

    /// The driver's side of queue `index`, of at most 16, with at most 1024 entries.
    pub fn of_queue(index: u16, size: u16, negotiated: u64, memory: DmaMemory) -> Self {
        assert!(index < MAX_QUEUES && size <= 1024, "the driver has no room for such a queue");
        let ring = if index == 0 { FIRST_RING } else { RINGS + STRIDE * u64::from(index) };
        let config = QueueConfig { size, descriptors: ring, driver: ring + DRIVER, device: ring + DEVICE };
        Self {
            memory,
            config,
            negotiated,
            indirect: INDIRECT + INDIRECT_STRIDE * u64::from(index),
            available: 0,
            seen: 0,
            head: 0,
            wraps: [true; 2],
            entries: vec![0; size.into()],
            sent: (negotiated & features::IN_ORDER != 0).then(VecDeque::new),
        }
    }

    /// From now on requests may come back in any order: those of a driver that writes garbage into its rings do.
    pub fn expect_no_order(&mut self) {
        self.sent = None;
    }

    /// The same driver after a reset: with empty rings.
    pub fn restart(&mut self) {
        self.put(self.config.descriptors, &[0; 0x8000]);
        self.sent.iter_mut().for_each(VecDeque::clear);
        (self.available, self.seen, self.head, self.wraps) = (0, 0, 0, [true; 2]);
    }

    /// The device's side of the queue.
    pub fn queue(&self) -> Queue {
        Queue::new(&self.config, self.negotiated, &self.memory).expect("a queue as it should be")
    }

    /// Writes bytes into guest memory.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write(address, bytes).expect("an address in RAM");
    }

    /// Whether its ring is packed.
    pub fn is_packed(&self) -> bool {
        self.negotiated & features::RING_PACKED != 0
    }

    /// Writes a half word into guest memory.
    pub fn put16(&self, address: u64, value: u16) {
        self.put(address, &value.to_le_bytes());
    }

    /// Reads a half word of guest memory.
    pub fn get16(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read(address, &mut bytes).expect("an address in RAM");
        u16::from_le_bytes(bytes)
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn descriptor(&self, table: u64, index: u16, (address, len): (u64, u32), number: u16, flags: u16) {
        let (first, second) = if self.is_packed() { (number, flags) } else { (flags, number) };
        let word =
            u128::from(address) | u128::from(len) << 64 | u128::from(first) << 96 | u128::from(second) << 112;
        self.put(table + 16 * u64::from(index), &word.to_le_bytes());
    }

    /// Makes a request of these buffers available; `indirect` puts them into a table.
    pub fn send(&mut self, buffers: &[Buffer], indirect: bool) {
        let id = if self.is_packed() { self.available } else { self.head };
        if indirect {
            let at = self.indirect + INDIRECT_TABLE * u64::from(id);
            assert!(16 * buffers.len() as u64 <= INDIRECT_TABLE, "too many buffers for the driver's table");
            for (index, &(address, len, write)) in (0u16..).zip(buffers) {
                let last = usize::from(index) + 1 == buffers.len();
                let next = if last || self.is_packed() { 0 } else { NEXT };
                let flags = next | if write { WRITE } else { 0 };
                self.descriptor(at, index, (address, len), index + 1, flags);
            }
            let table = (at, 16 * buffers.len() as u32);
            self.publish(id, &[(table, INDIRECT_FLAG)]);
        } else {
            let list: Vec<_> = buffers
                .iter()
                .map(|&(address, len, write)| ((address, len), if write { WRITE } else { 0 }))
                .collect();
            self.publish(id, &list);
        }
    }

    /// Puts descriptors into the ring, chained.
    pub fn publish(&mut self, id: u16, list: &[((u64, u32), u16)]) {
        if let Some(sent) = &mut self.sent {
            sent.push_back(id);
        }
        let size = self.config.size;
        if self.is_packed() {
            self.entries[usize::from(id)] = list.len() as u16;
            let mut wrap = self.wraps[0];
            for (step, &(place, flags)) in list.iter().enumerate().rev() {
                let index = usize::from(self.available) + step;
                wrap = self.wraps[0] ^ (index >= usize::from(size));
                let next = if step + 1 < list.len() { NEXT } else { 0 };
                let available = if wrap { 1 << 7 } else { 1 << 15 };
                let table = self.config.descriptors;
                self.descriptor(table, index as u16 % size, place, id, flags | next | available);
            }
            assert_eq!(wrap, self.wraps[0], "the first is published last");
            let index = usize::from(self.available) + list.len();
            self.wraps[0] ^= index >= usize::from(size);
            self.available = index as u16 % size;
        } else {
            for (step, &(place, flags)) in (0u16..).zip(list) {
                let next = if usize::from(step) + 1 < list.len() { NEXT } else { 0 };
                let index = (id + step) % size;
                self.descriptor(self.config.descriptors, index, place, (index + 1) % size, flags | next);
            }
            self.head = (id + list.len() as u16) % size;
            self.put16(self.config.driver + 4 + 2 * u64::from(self.available % size), id);
            self.available = self.available.wrapping_add(1);
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            self.put16(self.config.driver + 2, self.available);
        }
    }

    /// The next used request: its id and the bytes written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let used = self.next_used()?;
        if let Some(sent) = &mut self.sent {
            assert_eq!(sent.pop_front(), Some(used.0), "not in the order of the requests");
        }
        Some(used)
    }

    fn next_used(&mut self) -> Option<(u16, u32)> {
        let size = self.config.size;
        let mut element = [0; 16];
        if self.is_packed() {
            let at = self.config.descriptors + 16 * u64::from(self.seen);
            self.memory.read(at, &mut element).expect("an address in RAM");
            let flags = u16::from_le_bytes([element[14], element[15]]);
            let used = [flags & 1 << 7 != 0, flags & 1 << 15 != 0];
            if used != [self.wraps[1]; 2] {
                return None;
            }
            let id = u16::from_le_bytes([element[12], element[13]]);
            let next = self.seen + self.entries[usize::from(id)];
            self.wraps[1] ^= next >= size;
            self.seen = next % size;
            let len = u32::from_le_bytes([element[8], element[9], element[10], element[11]]);
            return Some((id, len));
        }
        if self.get16(self.config.device + 2) == self.seen {
            return None;
        }
        let at = self.config.device + 4 + 8 * u64::from(self.seen % size);
        self.memory.read(at, &mut element[..8]).expect("an address in RAM");
        self.seen = self.seen.wrapping_add(1);
        let word = u128::from_le_bytes(element);
        Some((word as u16, (word >> 32) as u32))
    }

    /// Asks for no interrupts, or for each.
    pub fn want_interrupts(&self, wanted: bool) {
        let off = u16::from(!wanted);
        let area = self.config.driver;
        self.put16(if self.is_packed() { area + 2 } else { area }, off);
    }

    /// Asks for an interrupt when the request after `requests` more single-entry ones is used (EVENT_IDX).
    pub fn want_interrupt_after(&self, requests: u16) {
        let size = self.config.size;
        if self.is_packed() {
            let index = self.seen + requests;
            let wrap = self.wraps[1] ^ (index >= size);
            self.put16(self.config.driver, index % size | u16::from(wrap) << 15);
            self.put16(self.config.driver + 2, 2);
        } else {
            self.put16(self.config.driver + 4 + 2 * u64::from(size), self.seen.wrapping_add(requests));
        }
    }

    /// Bytes of guest memory.
    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(address, &mut bytes).expect("an address in RAM");
        bytes
    }

    /// Whether the device asked for no notifications by its flag.
    pub fn is_told_not_to_notify(&self) -> bool {
        let device = self.config.device;
        self.get16(if self.is_packed() { device + 2 } else { device }) == 1
    }
}

/// What a queue makes of a single chain of these raw descriptors.
pub fn refusal(driver: &mut Driver, list: &[((u64, u32), u16)]) -> Option<QueueError> {
    let mut queue = driver.queue();
    driver.publish(0, list);
    queue.pop().err()
}

/// The interrupts that a device raised.
#[derive(Default)]
struct Raised {
    events: Mutex<Vec<Event>>,
    changed: Condvar,
}

impl Interrupts for Raised {
    fn raise(&self, event: Event) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        self.changed.notify_all();
    }
}

/// A device with a driver that has negotiated and set up all queues.
pub struct Rig {
    core: Core,
    raised: Arc<Raised>,
    negotiated: u64,
    /// The driver's side of each queue.
    pub drivers: Vec<Driver>,
    /// The guest's RAM.
    pub memory: DmaMemory,
}

impl Rig {
    /// Starts `device` with queues of at most `size` entries and exactly these features besides version 1.
    pub fn new(device: Box<dyn Device>, size: u16, negotiated: u64) -> Self {
        let (raised, memory) = (Arc::new(Raised::default()), memory());
        let sizes: Vec<u16> = device.queue_sizes().iter().map(|&max| max.min(size)).collect();
        let core = Core::new(device, memory.clone(), 0, raised.clone());
        let drivers = (0..).zip(sizes);
        let drivers = drivers.map(|(index, size)| Driver::of_queue(index, size, negotiated, memory.clone()));
        let mut rig = Self { core, raised, negotiated, drivers: drivers.collect(), memory };
        rig.start();
        rig
    }

    /// Resets the device and starts it again, with empty rings.
    pub fn restart(&mut self) {
        self.reset();
        self.drivers.iter_mut().for_each(Driver::restart);
        self.start();
    }

    /// Resets the device.
    pub fn reset(&mut self) {
        self.core.set_status(0);
    }

    fn start(&mut self) {
        self.core.set_status(3);
        for half in 0..2 {
            self.core.driver_features_select = half;
            self.core.set_driver_features(((self.negotiated | features::VERSION_1) >> (32 * half)) as u32);
        }
        self.core.set_status(0xb);
        assert_eq!(self.status().bits(), 0xb, "the device does not offer {:#x}", self.negotiated);
        for (index, driver) in (0..).zip(&self.drivers) {
            self.core.queue_select = index;
            *self.core.slot_config().expect("a queue to be set up") = driver.config;
            self.core.enable_queue();
        }
        self.core.set_status(0xf);
    }

    /// The device's status.
    pub fn status(&self) -> Status {
        self.core.status()
    }

    /// Rings the doorbell of a queue.
    pub fn notify(&mut self, queue: u16) {
        self.core.notified(queue);
    }

    /// Puts a request into a queue, in a table where tables were negotiated, and rings the doorbell.
    pub fn send(&mut self, queue: u16, buffers: &[Buffer]) {
        let indirect = self.negotiated & features::INDIRECT_DESC != 0;
        self.drivers[usize::from(queue)].send(buffers, indirect);
        self.notify(queue);
    }

    /// Waits for the next used request of a queue: its id and the bytes written.
    ///
    /// # Panics
    /// After a while.
    pub fn wait_used(&mut self, queue: u16) -> (u16, u32) {
        let driver = &mut self.drivers[usize::from(queue)];
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = driver.used() {
                return used;
            }
            assert!(Instant::now() < until, "queue {queue} gives nothing back");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Takes the events that were raised since the last call.
    pub fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut *self.raised.events.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until `event` is raised, and takes all that were until then.
    ///
    /// # Panics
    /// After a while.
    pub fn wait_event(&self, event: Event) {
        let mut events = self.raised.events.lock().unwrap_or_else(PoisonError::into_inner);
        let until = Instant::now() + PATIENCE;
        while !events.contains(&event) {
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{event:?} was not raised");
            events = self.raised.changed.wait_timeout(events, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        events.clear();
    }

    /// Bytes of the configuration space.
    pub fn config(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xaa; len];
        self.core.read_config(offset, &mut data);
        data
    }

    /// Writes to the configuration space.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.core.write_config(offset, data);
    }

    /// A number that changes with the configuration space.
    pub fn config_generation(&self) -> u32 {
        self.core.config_generation()
    }
}
