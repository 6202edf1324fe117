//! Virtio over MMIO, version 2 of its registers: a device in memory, which the command line or ACPI tells of. *Virtio Over
//! MMIO*.

use std::sync::{Arc, Mutex, PoisonError};

use devices::bus::Device as Registers;
use devices::irq::IrqLine;

use super::core::{Core, Event, Interrupts};
use crate::Device;
use crate::memory::DmaMemory;

/// Bytes of a device's window.
pub const WINDOW: u64 = 0x200;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"RING");

/// The registers, of 32 bits each.
mod register {
    use std::ops::RangeInclusive;

    pub(super) const MAGIC_VALUE: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(super) const QUEUE_NUM: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC: u64 = 0x080;
    pub(super) const QUEUE_DRIVER: u64 = 0x090;
    pub(super) const QUEUE_DEVICE: u64 = 0x0a0;
    /// Regions of shared memory, of which there are none: their lengths and addresses are all ones.
    pub(super) const SHARED_MEMORY: RangeInclusive<u64> = 0x0b0..=0x0bc;
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
    /// The device's own, of any width.
    pub(super) const CONFIG: u64 = 0x100;
}
/// The interrupt status: a queue, the configuration.
const USED: u32 = 1;
const CHANGED: u32 = 2;

/// The interrupt status and the line that follows it: level-triggered.
struct Pending {
    bits: Mutex<u32>,
    line: IrqLine,
}

impl Pending {
    fn change(&self, change: impl FnOnce(u32) -> u32) {
        let mut bits = self.bits.lock().unwrap_or_else(PoisonError::into_inner);
        *bits = change(*bits);
        self.line.set(*bits != 0);
    }

    fn bits(&self) -> u32 {
        *self.bits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Interrupts for Pending {
    fn raise(&self, event: Event) {
        let bit = match event {
            Event::Queue(_) => USED,
            Event::Config => CHANGED,
        };
        self.change(|bits| bits | bit);
    }
}

/// A virtio device in memory. Map it for [`WINDOW`] bytes.
pub struct VirtioMmio {
    core: Core,
    pending: Arc<Pending>,
}

impl VirtioMmio {
    /// A window with `device` behind it, whose interrupt is `line`: level-triggered.
    ///
    /// Features of `withheld` are not offered although they could be.
    pub fn new(device: Box<dyn Device>, memory: DmaMemory, withheld: u64, line: IrqLine) -> Self {
        let pending = Arc::new(Pending { bits: Mutex::new(0), line });
        Self { core: Core::new(device, memory, withheld, pending.clone()), pending }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let slot = self.core.slot();
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.core.device_id().into(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => self.core.device_features(),
            register::QUEUE_NUM_MAX => slot.map_or(0, |slot| slot.max().into()),
            register::QUEUE_READY => slot.is_some_and(|slot| slot.is_enabled()).into(),
            register::INTERRUPT_STATUS => self.pending.bits(),
            register::STATUS => self.core.status().bits().into(),
            at if register::SHARED_MEMORY.contains(&at) => u32::MAX,
            register::CONFIG_GENERATION => self.core.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.core.device_features_select = value,
            register::DRIVER_FEATURES => self.core.set_driver_features(value),
            register::DRIVER_FEATURES_SEL => self.core.driver_features_select = value,
            register::QUEUE_SEL => self.core.queue_select = u16::try_from(value).unwrap_or(u16::MAX),
            register::QUEUE_NUM => {
                if let Some(config) = self.core.slot_config() {
                    config.size = u16::try_from(value).unwrap_or(0);
                }
            }
            register::QUEUE_READY if value == 1 => self.core.enable_queue(),
            register::QUEUE_READY if value == 0 => self.core.disable_queue(),
            // With NOTIFICATION_DATA the upper half tells more; the queue's number is the lower half.
            register::QUEUE_NOTIFY => self.core.notified(value as u16),
            register::INTERRUPT_ACK => self.pending.change(|bits| bits & !value),
            register::STATUS => {
                self.core.set_status(value as u8);
                if value as u8 == 0 {
                    self.pending.change(|_| 0);
                }
            }
            _ => self.write_address(offset, value),
        }
    }

    /// One half of an address of the selected queue; nothing for other registers.
    fn write_address(&mut self, offset: u64, value: u32) {
        let Some(config) = self.core.slot_config() else { return };
        let address = match offset & !4 {
            register::QUEUE_DESC => &mut config.descriptors,
            register::QUEUE_DRIVER => &mut config.driver,
            register::QUEUE_DEVICE => &mut config.device,
            _ => return,
        };
        let shift = 8 * (offset & 4);
        *address = *address & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }
}

impl Registers for VirtioMmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(within) = offset.checked_sub(register::CONFIG) {
            return self.core.read_config(within, data);
        }
        data.fill(0);
        if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(within) = offset.checked_sub(register::CONFIG) {
            return self.core.write_config(within, data);
        }
        if let (&[a, b, c, d], true) = (data, offset.is_multiple_of(4)) {
            self.write_register(offset, u32::from_le_bytes([a, b, c, d]));
        }
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        match offset {
            register::QUEUE_NOTIFY => "QueueNotify",
            register::INTERRUPT_STATUS => "InterruptStatus",
            register::INTERRUPT_ACK => "InterruptACK",
            register::STATUS => "Status",
            register::CONFIG.. => "Config",
            _ => "setup",
        }
    }

    fn power_cycle(&mut self) {
        self.core.reset();
        self.pending.change(|_| 0);
    }
}

#[cfg(test)]
mod tests {
    use devices::irq::RecordedLines;

    use super::*;
    use crate::features;
    use crate::rng::Rng;
    use crate::testing::{BUFFERS, Driver};

    struct Machine {
        device: VirtioMmio,
        driver: Driver,
        lines: Arc<RecordedLines>,
    }

    impl Machine {
        fn new(negotiated: u64) -> Self {
            let (driver, lines) = (Driver::new(16, negotiated), RecordedLines::new());
            let source = Box::new(std::io::repeat(0x5a));
            let device = VirtioMmio::new(Box::new(Rng::new(source)), driver.memory.clone(), 0, lines.line(5));
            Self { device, driver, lines }
        }

        fn read(&mut self, offset: u64) -> u32 {
            let mut data = [0; 4];
            self.device.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn write(&mut self, offset: u64, value: u32) {
            self.device.write(offset, &value.to_le_bytes());
        }

        fn start(&mut self, accepted: u64) -> u32 {
            for status in [0, 1, 3] {
                self.write(register::STATUS, status);
            }
            for half in 0..2 {
                self.write(register::DRIVER_FEATURES_SEL, half);
                self.write(register::DRIVER_FEATURES, (accepted >> (32 * half)) as u32);
            }
            self.write(register::STATUS, 0xb);
            self.write(register::QUEUE_SEL, 0);
            self.write(register::QUEUE_NUM, 16);
            let config = self.driver.config;
            for (offset, address) in [
                (register::QUEUE_DESC, config.descriptors),
                (register::QUEUE_DRIVER, config.driver),
                (register::QUEUE_DEVICE, config.device),
            ] {
                self.write(offset, address as u32);
                self.write(offset + 4, (address >> 32) as u32);
            }
            self.write(register::QUEUE_READY, 1);
            self.write(register::STATUS, 0xf);
            self.read(register::STATUS)
        }
    }

    #[test]
    fn a_driver_finds_the_device_and_its_queue() {
        let mut machine = Machine::new(0);
        let identity = [0, 4, 8].map(|offset| machine.read(offset));
        assert_eq!(identity, [0x7472_6976, 2, 4]);
        assert_eq!((machine.read(register::QUEUE_NUM_MAX), machine.read(register::QUEUE_READY)), (64, 0));
        machine.write(register::QUEUE_SEL, 1);
        assert_eq!(machine.read(register::QUEUE_NUM_MAX), 0);
    }

    #[test]
    fn requests_are_served_and_the_interrupt_stays_until_it_is_acknowledged() {
        for rings in [0, features::RING_PACKED] {
            let mut machine = Machine::new(rings);
            assert_eq!(machine.start(rings | features::VERSION_1), 0xf);
            machine.driver.send(&[(BUFFERS, 3, true)], false);
            machine.write(register::QUEUE_NOTIFY, 0);
            assert_eq!(machine.driver.used().map(|(_, len)| len), Some(3));
            assert_eq!(machine.driver.bytes(BUFFERS, 4), [0x5a, 0x5a, 0x5a, 0]);
            assert!(machine.lines.level(5));
            assert_eq!(machine.read(register::INTERRUPT_STATUS), 1);
            machine.write(register::INTERRUPT_ACK, 1);
            assert!(!machine.lines.level(5));
        }
    }

    #[test]
    fn a_ring_that_breaks_the_rules_asks_for_a_reset() {
        let mut machine = Machine::new(0);
        machine.start(features::VERSION_1);
        machine.driver.send(&[(u64::MAX, 3, true)], false);
        machine.write(register::QUEUE_NOTIFY, 0);
        assert_eq!((machine.read(register::STATUS), machine.read(register::INTERRUPT_STATUS)), (0x4f, 2));
        machine.driver.restart();
        assert_eq!(machine.start(features::VERSION_1), 0xf);
        assert!(!machine.lines.level(5));
    }

    #[test]
    fn a_queue_that_the_driver_takes_away_is_not_worked_on() {
        let mut machine = Machine::new(0);
        machine.start(features::VERSION_1);
        machine.write(register::QUEUE_READY, 0);
        assert_eq!(machine.read(register::QUEUE_READY), 0);
        machine.driver.send(&[(BUFFERS, 3, true)], false);
        machine.write(register::QUEUE_NOTIFY, 0);
        assert_eq!(machine.driver.used(), None);
    }

    #[test]
    fn there_is_no_shared_memory() {
        let mut machine = Machine::new(0);
        assert_eq!((machine.read(0xb0), machine.read(0xb4)), (u32::MAX, u32::MAX));
    }

    #[test]
    fn no_access_panics() {
        let mut machine = Machine::new(0);
        let mut random = 0x1234_5678_9abc_def1u64;
        for _ in 0..100_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let (offset, len) = (random % WINDOW, 1 << (random >> 20 & 3));
            let mut data = random.to_le_bytes();
            if random & 1 << 30 == 0 {
                machine.device.read(offset, &mut data[..len]);
            } else {
                machine.device.write(offset, &data[..len]);
            }
        }
    }
}
