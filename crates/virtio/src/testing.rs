//! The driver's side, once for all tests: rings in guest memory of either format.

use guest_memory::{GuestMemory, Region};

use crate::features;
use crate::memory::DmaMemory;
use crate::queue::{Queue, QueueConfig, QueueError};

/// RAM of the tests' machines, and a page of ROM behind it.
pub(crate) const RAM: u64 = 0x10_0000;
pub(crate) const ROM: u64 = 0x20_0000;
/// Where the driver has its rings and its buffers.
const DESCRIPTORS: u64 = 0x1000;
const DRIVER: u64 = 0x5000;
const DEVICE: u64 = 0x6000;
const INDIRECT: u64 = 0x8000;
pub(crate) const BUFFERS: u64 = 0x2_0000;

pub(crate) const WRITE: u16 = 2;
pub(crate) const NEXT: u16 = 1;
pub(crate) const INDIRECT_FLAG: u16 = 4;

/// Memory for a test.
pub(crate) fn memory() -> DmaMemory {
    let region = |start, len, read_only| Region { start, len, read_only };
    let regions = [region(0, RAM, false), region(ROM, 0x1000, true)];
    DmaMemory::new(GuestMemory::new(&regions).unwrap())
}

/// A buffer of a request: guest-physical address, bytes, whether the device writes it.
pub(crate) type Buffer = (u64, u32, bool);

/// A driver with one queue.
pub(crate) struct Driver {
    pub(crate) memory: DmaMemory,
    pub(crate) config: QueueConfig,
    negotiated: u64,
    /// Entries made available, and used ones seen.
    available: u16,
    seen: u16,
    /// Packed: the wrap counters of both.
    wraps: [bool; 2],
    /// Packed: entries of each request, by id.
    entries: Vec<u16>,
}

impl Driver {
    pub(crate) fn new(size: u16, negotiated: u64) -> Self {
        let config = QueueConfig { size, descriptors: DESCRIPTORS, driver: DRIVER, device: DEVICE };
        let (memory, entries) = (memory(), vec![0; size.into()]);
        Self { memory, config, negotiated, available: 0, seen: 0, wraps: [true; 2], entries }
    }

    /// The same driver after a reset: with empty rings.
    pub(crate) fn restart(&mut self) {
        self.memory.write(DESCRIPTORS, &[0; (INDIRECT - DESCRIPTORS) as usize]).unwrap();
        (self.available, self.seen, self.wraps) = (0, 0, [true; 2]);
    }

    pub(crate) fn queue(&self) -> Queue {
        Queue::new(&self.config, self.negotiated, &self.memory).unwrap()
    }

    pub(crate) fn is_packed(&self) -> bool {
        self.negotiated & features::RING_PACKED != 0
    }

    pub(crate) fn put16(&self, address: u64, value: u16) {
        self.memory.write(address, &value.to_le_bytes()).unwrap();
    }

    pub(crate) fn get16(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read(address, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// Writes descriptor `index` of the table at `table`.
    pub(crate) fn descriptor(
        &self,
        table: u64,
        index: u16,
        (address, len): (u64, u32),
        number: u16,
        flags: u16,
    ) {
        let (first, second) = if self.is_packed() { (number, flags) } else { (flags, number) };
        let bytes =
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &first.to_le_bytes(), &second.to_le_bytes()];
        self.memory.write(table + 16 * u64::from(index), &bytes.concat()).unwrap();
    }

    /// Makes a request of these buffers available; `indirect` puts them into a table.
    pub(crate) fn send(&mut self, buffers: &[Buffer], indirect: bool) {
        let id = if self.is_packed() { self.available } else { self.available % self.config.size };
        if indirect {
            for (index, &(address, len, write)) in (0u16..).zip(buffers) {
                let last = usize::from(index) + 1 == buffers.len();
                let next = if last || self.is_packed() { 0 } else { NEXT };
                let flags = next | if write { WRITE } else { 0 };
                self.descriptor(INDIRECT, index, (address, len), index + 1, flags);
            }
            let table = (INDIRECT, 16 * buffers.len() as u32);
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
    pub(crate) fn publish(&mut self, id: u16, list: &[((u64, u32), u16)]) {
        let size = self.config.size;
        if self.is_packed() {
            self.entries[usize::from(id)] = list.len() as u16;
            let mut wrap = self.wraps[0];
            for (step, &(place, flags)) in list.iter().enumerate().rev() {
                let index = usize::from(self.available) + step;
                wrap = self.wraps[0] ^ (index >= usize::from(size));
                let next = if step + 1 < list.len() { NEXT } else { 0 };
                let available = if wrap { 1 << 7 } else { 1 << 15 };
                self.descriptor(DESCRIPTORS, index as u16 % size, place, id, flags | next | available);
            }
            assert_eq!(wrap, self.wraps[0], "the first is published last");
            let index = usize::from(self.available) + list.len();
            self.wraps[0] ^= index >= usize::from(size);
            self.available = index as u16 % size;
        } else {
            for (step, &(place, flags)) in (0u16..).zip(list) {
                let next = if usize::from(step) + 1 < list.len() { NEXT } else { 0 };
                let index = (id + step) % size;
                self.descriptor(DESCRIPTORS, index, place, (index + 1) % size, flags | next);
            }
            self.put16(DRIVER + 4 + 2 * u64::from(self.available % size), id);
            self.available = self.available.wrapping_add(1);
            self.put16(DRIVER + 2, self.available);
        }
    }

    /// The next used request: its id and the bytes written.
    pub(crate) fn used(&mut self) -> Option<(u16, u32)> {
        let size = self.config.size;
        let mut element = [0; 16];
        if self.is_packed() {
            self.memory.read(DESCRIPTORS + 16 * u64::from(self.seen), &mut element).unwrap();
            let flags = u16::from_le_bytes([element[14], element[15]]);
            let used = [flags & 1 << 7 != 0, flags & 1 << 15 != 0];
            if used != [self.wraps[1]; 2] {
                return None;
            }
            let id = u16::from_le_bytes([element[12], element[13]]);
            let next = self.seen + self.entries[usize::from(id)];
            self.wraps[1] ^= next >= size;
            self.seen = next % size;
            return Some((id, u32::from_le_bytes(element[8..12].try_into().unwrap())));
        }
        if self.get16(DEVICE + 2) == self.seen {
            return None;
        }
        let at = DEVICE + 4 + 8 * u64::from(self.seen % size);
        self.memory.read(at, &mut element[..8]).unwrap();
        self.seen = self.seen.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        Some((word(0) as u16, word(4)))
    }

    /// Asks for no interrupts, or for each.
    pub(crate) fn want_interrupts(&self, wanted: bool) {
        let off = u16::from(!wanted);
        self.put16(if self.is_packed() { DRIVER + 2 } else { DRIVER }, off);
    }

    /// Asks for an interrupt when the request after `requests` more single-entry ones is used (EVENT_IDX).
    pub(crate) fn want_interrupt_after(&self, requests: u16) {
        let size = self.config.size;
        if self.is_packed() {
            let index = self.seen + requests;
            let wrap = self.wraps[1] ^ (index >= size);
            self.put16(DRIVER, index % size | u16::from(wrap) << 15);
            self.put16(DRIVER + 2, 2);
        } else {
            self.put16(DRIVER + 4 + 2 * u64::from(size), self.seen.wrapping_add(requests));
        }
    }

    /// Bytes of guest memory.
    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(address, &mut bytes).unwrap();
        bytes
    }
}

/// What a queue makes of a single chain of these raw descriptors.
pub(crate) fn refusal(driver: &mut Driver, list: &[((u64, u32), u16)]) -> Option<QueueError> {
    let mut queue = driver.queue();
    driver.publish(0, list);
    queue.pop().err()
}
