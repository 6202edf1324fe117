//! The machine's bus: which device answers at which port or address.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use engine::{Bus, Space};

/// A register file, as the bus sees it.
///
/// Offsets count from the start of the range that the device is mapped at (plus that range's own offset, see
/// [`Window`]). `data` has 1 to 8 bytes and lies within the range. A device answers every offset: bytes that no
/// register drives read as ones.
pub trait Device: Send {
    /// Reads `data.len()` bytes at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
    /// The data sheet's name of the register that an access to `offset` would reach now, for the exit ledger.
    fn register(&self, offset: u64, write: bool) -> &'static str;
    /// The machine comes back from a sleep in which the device had no power (ACPI S3): it is as after power-up, and
    /// its interrupt lines are low. What a battery or the standby supply feeds keeps its state and does nothing here.
    fn power_cycle(&mut self) {}
}

/// A device as the bus holds it: with the one lock that guards it.
pub type SharedDevice = Arc<Mutex<dyn Device>>;

/// A range of addresses, and where in the device's offsets it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The address space.
    pub space: Space,
    /// First address.
    pub base: u64,
    /// Length in bytes, at least 1.
    pub len: u64,
    /// The device's offset at `base`: it tells apart the ranges of a device that is mapped at several.
    pub offset: u64,
}

/// Why a range cannot be mapped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or goes beyond the end of its address space.
    #[error("{name}: {space:?} range {base:#x}+{len:#x} is empty or leaves the address space")]
    BadRange {
        /// The device that wanted it.
        name: String,
        /// Its address space.
        space: Space,
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device has some of the range.
    #[error("{name}: {space:?} range {base:#x}+{len:#x} overlaps that of {other}")]
    Overlap {
        /// The device that wanted it.
        name: String,
        /// The device that has it.
        other: String,
        /// The address space.
        space: Space,
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
}

#[derive(Clone)]
struct Mapping {
    base: u64,
    /// Last address that belongs to it.
    last: u64,
    offset: u64,
    name: Arc<str>,
    device: SharedDevice,
}

/// The machine's [`engine::Bus`]: ranges of both address spaces, each mapped to a device.
///
/// Lock order: the map's lock is released before a device's lock is taken, so a device may change the map while it is
/// accessed (as a PCI function does whose base address register is written).
#[derive(Default)]
pub struct MachineBus {
    ports: RwLock<Vec<Mapping>>,
    memory: RwLock<Vec<Mapping>>,
}

impl MachineBus {
    /// A bus with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Maps `device` at `base` for `len` bytes; its offsets begin with 0 there.
    ///
    /// # Errors
    /// [`BusError`] where the range is none, or another device has some of it.
    pub fn insert(
        &self,
        space: Space,
        base: u64,
        len: u64,
        name: &str,
        device: SharedDevice,
    ) -> Result<(), BusError> {
        self.insert_window(Window { space, base, len, offset: 0 }, name, device)
    }

    /// Maps `device` at a range whose offsets need not begin with 0.
    ///
    /// # Errors
    /// As [`Self::insert`].
    pub fn insert_window(&self, window: Window, name: &str, device: SharedDevice) -> Result<(), BusError> {
        let Window { space, base, len, offset } = window;
        let end_of_space = if space == Space::Port { 0xffff } else { u64::MAX };
        let last = len.checked_sub(1).and_then(|more| base.checked_add(more));
        let Some(last) = last.filter(|&last| last <= end_of_space) else {
            return Err(BusError::BadRange { name: name.into(), space, base, len });
        };
        let mut map = self.map(space).write().unwrap_or_else(PoisonError::into_inner);
        let at = map.partition_point(|mapping| mapping.last < base);
        if let Some(other) = map.get(at).filter(|other| other.base <= last) {
            return Err(BusError::Overlap {
                name: name.into(),
                other: other.name.to_string(),
                space,
                base,
                len,
            });
        }
        map.insert(at, Mapping { base, last, offset, name: name.into(), device });
        Ok(())
    }

    /// Takes away the range that begins at `base`; false where none does.
    pub fn remove(&self, space: Space, base: u64) -> bool {
        let removed = {
            let mut map = self.map(space).write().unwrap_or_else(PoisonError::into_inner);
            let at = map.partition_point(|mapping| mapping.base < base);
            (map.get(at).is_some_and(|mapping| mapping.base == base)).then(|| map.remove(at))
        };
        // The device is dropped, if this was its last range, with the map unlocked.
        removed.is_some()
    }

    /// The machine comes back from a sleep without power: [`Device::power_cycle`] of each device, once, with the map
    /// unlocked.
    pub fn power_cycle(&self) {
        let mut devices: Vec<SharedDevice> = Vec::new();
        for space in [Space::Port, Space::Memory] {
            let map = self.map(space).read().unwrap_or_else(PoisonError::into_inner);
            devices.extend(map.iter().map(|mapping| mapping.device.clone()));
        }
        let address = |device: &SharedDevice| Arc::as_ptr(device).cast::<()>();
        devices.sort_by_key(address);
        devices.dedup_by_key(|device| address(device));
        for device in devices {
            lock(&device).power_cycle();
        }
    }

    /// The device at `address` and the name of the register that a read or write there would reach now.
    pub fn describe(&self, space: Space, address: u64, write: bool) -> Option<(String, &'static str)> {
        let mapping = {
            let map = self.map(space).read().unwrap_or_else(PoisonError::into_inner);
            mapping_at(&map, address)?.clone()
        };
        let register = lock(&mapping.device).register(mapping.offset_of(address), write);
        Some((mapping.name.to_string(), register))
    }

    fn map(&self, space: Space) -> &RwLock<Vec<Mapping>> {
        match space {
            Space::Port => &self.ports,
            Space::Memory => &self.memory,
        }
    }

    /// Where an access of `len` bytes at `address` goes.
    fn find(&self, space: Space, address: u64, len: usize) -> Found {
        let more = (len as u64).saturating_sub(1);
        let map = self.map(space).read().unwrap_or_else(PoisonError::into_inner);
        // The first range that does not end before the access.
        match map.get(map.partition_point(|mapping| mapping.last < address)) {
            Some(mapping) if mapping.base <= address && mapping.last - address >= more => {
                Found::Whole(mapping.device.clone(), mapping.offset_of(address))
            }
            Some(mapping) if mapping.base <= address.saturating_add(more) => Found::Parts,
            _ => Found::Nobody,
        }
    }
}

impl Mapping {
    /// The device's offset at `address`, which is in the range.
    fn offset_of(&self, address: u64) -> u64 {
        self.offset.wrapping_add(address - self.base)
    }
}

fn mapping_at(map: &[Mapping], address: u64) -> Option<&Mapping> {
    let at = map.partition_point(|mapping| mapping.last < address);
    map.get(at).filter(|mapping| mapping.base <= address)
}

enum Found {
    /// One device, and its offset.
    Whole(SharedDevice, u64),
    /// The access leaves a range: each byte goes its own way, as on a bus of bytes.
    Parts,
    Nobody,
}

fn lock(device: &SharedDevice) -> std::sync::MutexGuard<'_, dyn Device + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The address of byte `index` of an access; none beyond the end of the space.
fn byte_address(space: Space, address: u64, index: usize) -> Option<u64> {
    let address = address.checked_add(index as u64)?;
    (space == Space::Memory || address <= 0xffff).then_some(address)
}

impl Bus for MachineBus {
    fn read(&self, space: Space, address: u64, data: &mut [u8]) {
        match self.find(space, address, data.len()) {
            Found::Whole(device, offset) => lock(&device).read(offset, data),
            Found::Nobody => data.fill(0xff),
            Found::Parts => {
                for (index, byte) in data.chunks_mut(1).enumerate() {
                    match byte_address(space, address, index) {
                        Some(address) => self.read(space, address, byte),
                        None => byte.fill(0xff),
                    }
                }
            }
        }
    }

    fn write(&self, space: Space, address: u64, data: &[u8]) {
        match self.find(space, address, data.len()) {
            Found::Whole(device, offset) => lock(&device).write(offset, data),
            Found::Nobody => {}
            Found::Parts => {
                for (index, byte) in data.chunks(1).enumerate() {
                    if let Some(address) = byte_address(space, address, index) {
                        self.write(space, address, byte);
                    }
                }
            }
        }
    }
}

/// A device whose registers are one byte wide, as those of the ISA bus are: an access of several bytes reaches several
/// registers, the lowest first.
pub trait ByteDevice: Send {
    /// Reads the register at `offset`.
    fn read_register(&mut self, offset: u64) -> u8;
    /// Writes the register at `offset`.
    fn write_register(&mut self, offset: u64, value: u8);
    /// Its name, as [`Device::register`] has it.
    fn register_name(&self, offset: u64, write: bool) -> &'static str;
    /// What [`Device::power_cycle`] does.
    fn lose_power(&mut self) {}
}

impl<T: ByteDevice> Device for T {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.read_register(offset.wrapping_add(index as u64));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (index, &byte) in data.iter().enumerate() {
            self.write_register(offset.wrapping_add(index as u64), byte);
        }
    }

    fn register(&self, offset: u64, write: bool) -> &'static str {
        self.register_name(offset, write)
    }

    fn power_cycle(&mut self) {
        self.lose_power();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers what was written; reads give the offset's low byte.
    #[derive(Default)]
    struct Probe(Vec<(u64, Vec<u8>)>);

    impl Device for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            for (index, byte) in data.iter_mut().enumerate() {
                *byte = offset as u8 + index as u8;
            }
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
        fn register(&self, _offset: u64, write: bool) -> &'static str {
            if write { "in" } else { "out" }
        }
    }

    #[test]
    fn a_power_cycle_reaches_each_device_once() {
        #[derive(Default)]
        struct Cycled(u32);
        impl Device for Cycled {
            fn read(&mut self, _: u64, _: &mut [u8]) {}
            fn write(&mut self, _: u64, _: &[u8]) {}
            fn register(&self, _: u64, _: bool) -> &'static str {
                "none"
            }
            fn power_cycle(&mut self) {
                self.0 += 1;
            }
        }
        let bus = MachineBus::new();
        let devices: [Arc<Mutex<Cycled>>; 2] = Default::default();
        bus.insert(Space::Port, 0x10, 1, "first", devices[0].clone()).unwrap();
        bus.insert(Space::Port, 0x20, 1, "second", devices[1].clone()).unwrap();
        bus.insert(Space::Port, 0x30, 1, "first", devices[0].clone()).unwrap();
        bus.insert(Space::Memory, 0x10, 1, "first", devices[0].clone()).unwrap();
        bus.power_cycle();
        assert_eq!(devices.map(|device| device.lock().unwrap().0), [1, 1]);
    }

    fn probe() -> Arc<Mutex<Probe>> {
        Arc::default()
    }

    fn read(bus: &MachineBus, space: Space, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xaa; len];
        bus.read(space, address, &mut data);
        data
    }

    #[test]
    fn a_read_that_nobody_answers_gives_all_ones() {
        let bus = MachineBus::new();
        assert_eq!(read(&bus, Space::Port, 0x80, 4), [0xff; 4]);
        assert_eq!(read(&bus, Space::Memory, u64::MAX - 3, 8), [0xff; 8]);
        assert_eq!(read(&bus, Space::Port, 0xffff, 4), [0xff; 4]);
        bus.write(Space::Port, 0xffff, &[1, 2, 3, 4]);
    }

    #[test]
    fn the_device_sees_offsets_and_the_two_spaces_are_apart() {
        let bus = MachineBus::new();
        let (port, memory) = (probe(), probe());
        bus.insert(Space::Port, 0x60, 8, "port", port.clone()).unwrap();
        bus.insert(Space::Memory, 0x60, 8, "memory", memory.clone()).unwrap();
        bus.write(Space::Port, 0x62, &[1, 2]);
        bus.write(Space::Memory, 0x67, &[3]);
        assert_eq!(port.lock().unwrap().0, [(2, vec![1, 2])]);
        assert_eq!(memory.lock().unwrap().0, [(7, vec![3])]);
        assert_eq!(bus.describe(Space::Port, 0x67, true), Some(("port".into(), "in")));
        assert_eq!(bus.describe(Space::Port, 0x68, true), None);
    }

    #[test]
    fn the_windows_of_one_device_have_their_own_offsets() {
        let bus = MachineBus::new();
        let device = probe();
        bus.insert(Space::Port, 0x40, 4, "pit", device.clone()).unwrap();
        let speaker = Window { space: Space::Port, base: 0x61, len: 1, offset: 0x10 };
        bus.insert_window(speaker, "pit", device).unwrap();
        assert_eq!(read(&bus, Space::Port, 0x42, 1), [2]);
        assert_eq!(read(&bus, Space::Port, 0x61, 1), [0x10]);
    }

    #[test]
    fn an_access_that_leaves_a_range_goes_byte_by_byte() {
        let bus = MachineBus::new();
        let (low, high) = (probe(), probe());
        bus.insert(Space::Port, 0x10, 2, "low", low.clone()).unwrap();
        bus.insert(Space::Port, 0x12, 1, "high", high.clone()).unwrap();
        assert_eq!(read(&bus, Space::Port, 0x11, 4), [1, 0, 0xff, 0xff]);
        assert_eq!(read(&bus, Space::Port, 0x0f, 2), [0xff, 0]);
        bus.write(Space::Port, 0x11, &[7, 8, 9, 10]);
        assert_eq!(low.lock().unwrap().0, [(1, vec![7])]);
        assert_eq!(high.lock().unwrap().0, [(0, vec![8])]);
    }

    #[test]
    fn overlapping_empty_and_endless_ranges_are_refused() {
        let bus = MachineBus::new();
        bus.insert(Space::Port, 0x10, 0x10, "first", probe()).unwrap();
        for (base, len) in [(0x0f, 2), (0x10, 0x10), (0x18, 1), (0x1f, 5), (0, 0x100)] {
            let error = bus.insert(Space::Port, base, len, "second", probe()).unwrap_err();
            assert!(matches!(&error, BusError::Overlap { other, .. } if other == "first"), "{error}");
        }
        bus.insert(Space::Port, 0x20, 1, "after", probe()).unwrap();
        bus.insert(Space::Port, 0x0f, 1, "before", probe()).unwrap();
        for (space, base, len) in
            [(Space::Port, 0xffff, 2), (Space::Port, 5, 0), (Space::Memory, u64::MAX, 2)]
        {
            assert!(matches!(bus.insert(space, base, len, "bad", probe()), Err(BusError::BadRange { .. })));
        }
        bus.insert(Space::Memory, u64::MAX, 1, "last byte", probe()).unwrap();
    }

    #[test]
    fn a_removed_range_is_nobodys() {
        let bus = MachineBus::new();
        let device = probe();
        bus.insert(Space::Memory, 0x1000, 0x1000, "bar", device.clone()).unwrap();
        assert!(!bus.remove(Space::Memory, 0x1004));
        assert!(bus.remove(Space::Memory, 0x1000));
        assert!(!bus.remove(Space::Memory, 0x1000));
        assert_eq!(read(&bus, Space::Memory, 0x1000, 2), [0xff; 2]);
        assert_eq!(Arc::strong_count(&device), 1);
    }
}
