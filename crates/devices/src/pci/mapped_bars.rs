//! A function's base address registers on the machine's bus: what the guest writes there moves the function's registers
//! while it runs.

use std::sync::{Arc, Weak};

use engine::Space;

use super::{BarKind, ConfigSpace};
use crate::bus::{MachineBus, SharedDevice, Window};

const BARS: usize = 6;
/// A device's offset in the memory or ports of base address register 1; others lie at multiples of it.
pub const BAR_STRIDE: u64 = 1 << 40;

/// The base address register that a device's offset is in, and the offset there.
pub fn bar_of(offset: u64) -> (u8, u64) {
    ((offset / BAR_STRIDE) as u8, offset % BAR_STRIDE)
}

/// Where a function's base address registers are mapped now.
pub struct MappedBars {
    /// The function is on it: neither may keep the other.
    bus: Weak<MachineBus>,
    name: String,
    /// The space and the first address of each, with its length.
    mapped: [Option<(Space, u64, u64)>; BARS],
}

impl MappedBars {
    /// Nothing mapped on `bus`; `name` is the device's in the ledger.
    pub fn new(bus: &Arc<MachineBus>, name: &str) -> Self {
        let bus = Arc::downgrade(bus);
        Self { bus, name: name.to_owned(), mapped: [None; BARS] }
    }

    /// Maps `device` where the configuration space has its registers now, with offsets as [`bar_of`] tells them apart.
    /// What another device has is left to it.
    pub fn update(&mut self, config: &ConfigSpace, device: &SharedDevice) {
        let wanted: [_; BARS] = std::array::from_fn(|index| {
            let bar = config.bar(index)?;
            let space = if bar.kind == BarKind::Io { Space::Port } else { Space::Memory };
            // Address 0 is what a register has that nobody has placed.
            Some((space, bar.base.filter(|&base| base != 0)?, bar.size))
        });
        let Some(bus) = self.bus.upgrade() else { return };
        for (mapped, wanted) in self.mapped.iter_mut().zip(wanted) {
            if let Some((space, base, _)) = mapped.take_if(|mapped| Some(*mapped) != wanted) {
                bus.remove(space, base);
            }
        }
        for (index, wanted) in (0u64..).zip(wanted) {
            let mapped = &mut self.mapped[index as usize];
            let Some((space, base, len)) = wanted.filter(|_| mapped.is_none()) else { continue };
            let window = Window { space, base, len, offset: index * BAR_STRIDE };
            match bus.insert_window(window, &self.name, device.clone()) {
                Ok(()) => *mapped = wanted,
                Err(error) => log::debug!("{error}"),
            }
        }
    }

    /// Takes everything off the bus.
    pub fn unmap(&mut self) {
        let Some(bus) = self.bus.upgrade() else { return };
        for (space, base, _) in self.mapped.iter_mut().filter_map(Option::take) {
            bus.remove(space, base);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use engine::Bus;

    use super::super::{ConfigWrite, Header};
    use super::*;
    use crate::bus::Device;

    /// Reads give the base address register's number and the offset in it.
    struct Probe;

    impl Device for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            let (bar, offset) = bar_of(offset);
            data.fill(bar << 4 | offset as u8 & 0xf);
        }
        fn write(&mut self, _offset: u64, _data: &[u8]) {}
        fn register(&self, _offset: u64, _write: bool) -> &'static str {
            "PROBE"
        }
    }

    struct Function {
        bus: Arc<MachineBus>,
        config: ConfigSpace,
        bars: MappedBars,
        device: SharedDevice,
    }

    impl Function {
        fn new() -> Self {
            let bus = Arc::new(MachineBus::new());
            let mut config = ConfigSpace::new(&Header::default());
            config.add_bar(0, BarKind::Io, 0x10).unwrap();
            config.add_bar(1, BarKind::Memory32, 0x1000).unwrap();
            config.add_bar(2, BarKind::Memory64, 0x4000).unwrap();
            let bars = MappedBars::new(&bus, "probe");
            Self { bus, config, bars, device: Arc::new(Mutex::new(Probe)) }
        }

        fn write(&mut self, offset: u16, value: u32) {
            self.config.write(offset, ConfigWrite { value, mask: u32::MAX });
            self.bars.update(&self.config, &self.device);
        }

        fn read(&self, space: Space, address: u64) -> u8 {
            let mut byte = [0];
            self.bus.read(space, address, &mut byte);
            byte[0]
        }
    }

    #[test]
    fn registers_move_while_the_machine_runs() {
        let mut function = Function::new();
        function.write(0x10, 0xc001);
        function.write(0x14, 0xe000_0000);
        function.write(0x18, 0x4000);
        function.write(0x1c, 0x10);
        assert_eq!(function.read(Space::Port, 0xc001), 0xff, "not enabled");
        function.write(0x04, 3);
        assert_eq!(function.read(Space::Port, 0xc001), 0x01);
        assert_eq!(function.read(Space::Memory, 0xe000_0002), 0x12);
        assert_eq!(function.read(Space::Memory, 0x10_0000_4003), 0x23);
        function.write(0x14, 0xf000_0000);
        assert_eq!(function.read(Space::Memory, 0xe000_0002), 0xff);
        assert_eq!(function.read(Space::Memory, 0xf000_0004), 0x14);
        function.write(0x04, 1);
        assert_eq!(function.read(Space::Memory, 0xf000_0004), 0xff);
        assert_eq!(function.read(Space::Port, 0xc00f), 0x0f);
        function.bars.unmap();
        assert_eq!(function.read(Space::Port, 0xc00f), 0xff);
    }

    #[test]
    fn what_another_device_has_stays_its_own_until_it_goes() {
        let mut function = Function::new();
        let other: SharedDevice = Arc::new(Mutex::new(Probe));
        function.bus.insert(Space::Memory, 0xfec0_0800, 0x100, "other", other).unwrap();
        function.write(0x04, 2);
        function.write(0x14, 0xfec0_0000);
        assert_eq!(function.read(Space::Memory, 0xfec0_0000), 0xff);
        assert_eq!(function.read(Space::Memory, 0xfec0_0801), 0x01);
        // Two registers of one function at one place: the first has it.
        function.write(0x14, 0xd000_0000);
        function.write(0x18, 0xd000_0000);
        assert_eq!(function.read(Space::Memory, 0xd000_0001), 0x11);
        function.write(0x14, 0xe000_0000);
        assert_eq!(function.read(Space::Memory, 0xd000_0001), 0x21);
    }
}
