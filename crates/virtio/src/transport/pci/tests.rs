//! The PCI transport as a driver finds it, with the entropy device behind.

use std::sync::Arc;

use devices::irq::RecordedLines;
use devices::pci::{Address, PciBus, RecordedMessages, SharedFunction};
use engine::{Bus, Space};

use super::*;
use crate::features;
use crate::rng::Rng;
use crate::testing::{BUFFERS, Driver};

const WINDOW: u64 = 0xe000_0000;
const LINE: u32 = 17;

/// Bytes that count up.
struct Counting(u8);

impl std::io::Read for Counting {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        for byte in into.iter_mut() {
            self.0 = self.0.wrapping_add(1);
            *byte = self.0;
        }
        Ok(into.len())
    }
}

struct Machine {
    bus: Arc<MachineBus>,
    function: Arc<Mutex<VirtioPci>>,
    messages: Arc<RecordedMessages>,
    lines: Arc<RecordedLines>,
    driver: Driver,
}

impl Machine {
    /// With its window mapped and as a bus master.
    fn new(negotiated: u64) -> Self {
        let (bus, messages) = (Arc::new(MachineBus::new()), RecordedMessages::new());
        let (lines, driver) = (RecordedLines::new(), Driver::new(16, negotiated));
        let connections = Connections {
            bus: bus.clone(),
            memory: driver.memory.clone(),
            withheld: 0,
            messages: messages.clone(),
            line: lines.line(LINE),
        };
        let function = VirtioPci::new(Box::new(Rng::new(Box::new(Counting(0)))), connections).unwrap();
        let machine = Self { bus, function, messages, lines, driver };
        machine.config_write(0x10, WINDOW as u32);
        machine.config_write(0x14, 0);
        machine.config_write(0x04, 6);
        machine
    }

    fn config_read(&self, offset: u16) -> u32 {
        self.function.lock().unwrap().read_config(offset)
    }

    fn config_write(&self, offset: u16, value: u32) {
        self.function.lock().unwrap().write_config(offset, ConfigWrite { value, mask: u32::MAX });
    }

    fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.bus.read(Space::Memory, WINDOW + offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u64, len: usize) {
        self.bus.write(Space::Memory, WINDOW + offset, &value.to_le_bytes()[..len]);
    }

    /// Negotiates and sets the queue up; gives the status.
    fn start(&self, accepted: u64) -> u8 {
        for status in [0, 1, 3] {
            self.write(common::DEVICE_STATUS, status, 1);
        }
        for half in 0..2 {
            self.write(common::DRIVER_FEATURE_SELECT, half, 4);
            self.write(common::DRIVER_FEATURE, accepted >> (32 * half) & 0xffff_ffff, 4);
        }
        self.write(common::DEVICE_STATUS, 0xb, 1);
        if self.read(common::DEVICE_STATUS, 1) != 0xb {
            return self.read(common::DEVICE_STATUS, 1) as u8;
        }
        self.write(common::QUEUE_SELECT, 0, 2);
        self.write(common::QUEUE_SIZE, 16, 2);
        let config = self.driver.config;
        self.write(common::QUEUE_DESC, config.descriptors, 8);
        self.write(common::QUEUE_DRIVER, config.driver & 0xffff_ffff, 4);
        self.write(common::QUEUE_DRIVER + 4, config.driver >> 32, 4);
        self.write(common::QUEUE_DEVICE, config.device, 8);
        self.write(common::QUEUE_ENABLE, 1, 2);
        self.write(common::DEVICE_STATUS, 0xf, 1);
        self.read(common::DEVICE_STATUS, 1) as u8
    }

    fn notify(&self) {
        self.write(u64::from(NOTIFY * BLOCK), 0, 2);
    }
}

#[test]
fn a_driver_finds_the_device_by_its_ids_and_its_blocks_by_the_capabilities() {
    let machine = Machine::new(0);
    assert_eq!(machine.config_read(0), 0x1044_1af4);
    let (mut at, mut kinds) = ((machine.config_read(0x34) & 0xff) as u16, Vec::new());
    while at != 0 {
        let word = machine.config_read(at);
        if word & 0xff == 9 {
            let place = (
                machine.config_read(at + 4) & 0xff,
                machine.config_read(at + 8),
                machine.config_read(at + 12),
            );
            kinds.push(((word >> 24) as u8, place));
        }
        at = (word >> 8 & 0xff) as u16;
    }
    let expected = [
        (1, (0, 0, 0x1000)),
        (3, (0, 0x1000, 0x1000)),
        (4, (0, 0x2000, 0x1000)),
        (2, (0, 0x3000, 0x1000)),
        (5, (0, 0, 0)),
    ];
    assert_eq!(kinds, expected);
    assert_eq!((machine.read(common::NUM_QUEUES, 2), machine.read(common::QUEUE_SIZE, 2)), (1, 64));
    machine.write(common::DEVICE_FEATURE_SELECT, 1, 4);
    assert_eq!(machine.read(common::DEVICE_FEATURE, 4), (features::OFFERED | features::IN_ORDER) >> 32);
}

#[test]
fn requests_are_served_in_both_formats_with_and_without_what_can_be_negotiated() {
    let all =
        features::INDIRECT_DESC | features::EVENT_IDX | features::IN_ORDER | features::NOTIFICATION_DATA;
    for rings in [0, features::RING_PACKED, features::EVENT_IDX, all, all | features::RING_PACKED] {
        let mut machine = Machine::new(rings);
        assert_eq!(machine.start(rings | features::VERSION_1), 0xf);
        for round in 0..40 {
            machine.driver.send(&[(BUFFERS, 3, true)], rings & features::INDIRECT_DESC != 0);
            machine.notify();
            assert_eq!(machine.driver.used().map(|(_, len)| len), Some(3), "{rings:#x}");
            let first = (3 * round + 1) as u8;
            assert_eq!(machine.driver.bytes(BUFFERS, 3), [first, first + 1, first + 2]);
        }
    }
}

#[test]
fn intx_stays_up_until_its_status_is_read() {
    let mut machine = Machine::new(0);
    machine.start(features::VERSION_1);
    machine.driver.send(&[(BUFFERS, 3, true)], false);
    machine.notify();
    assert!(machine.lines.level(LINE));
    assert_eq!(machine.config_read(4) >> 16 & 8, 8);
    machine.config_write(0x04, 0x406);
    assert!(!machine.lines.level(LINE), "disabled in the command register");
    machine.config_write(0x04, 6);
    assert!(machine.lines.level(LINE));
    assert_eq!((machine.read(0x1000, 1), machine.read(0x1000, 1)), (1, 0));
    assert!(!machine.lines.level(LINE));
    assert_eq!(machine.messages.take(), []);
}

#[test]
fn msix_sends_the_queues_message() {
    let mut machine = Machine::new(0);
    let at = (machine.config_read(0x34) & 0xff) as u16;
    assert_eq!(machine.config_read(at) & 0xff, 0x11);
    machine.config_write(at, 0x8000_0000);
    machine.write(0x4010, 0x41_0000_fee0_3000 & 0xffff_ffff, 8);
    machine.write(0x4018, 0x41, 8);
    machine.write(common::QUEUE_MSIX_VECTOR, 2, 2);
    assert_eq!(machine.read(common::QUEUE_MSIX_VECTOR, 2), 0xffff, "there is no vector 2");
    machine.start(features::VERSION_1);
    machine.write(common::QUEUE_MSIX_VECTOR, 1, 2);
    assert_eq!(machine.read(common::QUEUE_MSIX_VECTOR, 2), 1);
    machine.driver.send(&[(BUFFERS, 3, true)], false);
    machine.notify();
    assert_eq!(machine.messages.take(), [(0xfee0_3000, 0x41)]);
    assert!(!machine.lines.level(LINE));
    machine.driver.want_interrupts(false);
    machine.driver.send(&[(BUFFERS, 3, true)], false);
    machine.notify();
    assert_eq!(machine.messages.take(), []);
}

#[test]
fn a_ring_that_breaks_the_rules_asks_for_a_reset_and_does_nothing_more() {
    let mut machine = Machine::new(0);
    machine.start(features::VERSION_1);
    machine.driver.send(&[(u64::MAX - 10, 3, true)], false);
    machine.notify();
    assert_eq!(machine.read(common::DEVICE_STATUS, 1), 0x4f);
    assert_eq!(machine.read(0x1000, 1), 2, "a change of the configuration");
    machine.notify();
    assert_eq!(machine.driver.used(), None);
    machine.driver.restart();
    assert_eq!(machine.start(features::VERSION_1), 0xf, "after a reset it works again");
    machine.driver.send(&[(BUFFERS, 3, true)], false);
    machine.notify();
    assert!(machine.driver.used().is_some());
}

#[test]
fn what_cannot_be_negotiated_is_not_ok() {
    let machine = Machine::new(0);
    assert_eq!(machine.start(0), 3, "not without version 1");
    assert_eq!(machine.start(features::VERSION_1 | 1 << 60), 3, "not what was not offered");
    machine.write(common::DEVICE_STATUS, 0, 1);
    machine.write(common::DEVICE_STATUS, 7, 1);
    assert_eq!(machine.read(common::DEVICE_STATUS, 1), 3, "not ready before the features are");
}

#[test]
fn a_function_that_is_no_bus_master_reaches_no_memory() {
    let mut machine = Machine::new(0);
    machine.start(features::VERSION_1);
    machine.config_write(0x04, 2);
    machine.driver.send(&[(BUFFERS, 3, true)], false);
    machine.notify();
    assert_eq!(machine.driver.used(), None);
    machine.config_write(0x04, 6);
    machine.notify();
    assert!(machine.driver.used().is_some());
}

#[test]
fn firmware_reaches_the_window_through_the_configuration_space() {
    let machine = Machine::new(0);
    let at = machine.function.lock().unwrap().access;
    machine.config_write(at + ACCESS_OFFSET, common::NUM_QUEUES as u32);
    machine.config_write(at + ACCESS_LENGTH, 2);
    assert_eq!(machine.config_read(at + ACCESS_DATA), 1);
    machine.config_write(at + ACCESS_OFFSET, common::DEVICE_STATUS as u32);
    machine.config_write(at + ACCESS_LENGTH, 1);
    machine.config_write(at + ACCESS_DATA, 3);
    assert_eq!(machine.read(common::DEVICE_STATUS, 1), 3);
    for (offset, len) in [(1, 2), (0x8000, 4), (0, 8), (u32::MAX, 1)] {
        machine.config_write(at + ACCESS_OFFSET, offset);
        machine.config_write(at + ACCESS_LENGTH, len);
        machine.config_write(at + ACCESS_DATA, 0xff);
        machine.config_read(at + ACCESS_DATA);
    }
}

#[test]
fn no_access_of_any_register_panics() {
    let mut machine = Machine::new(0);
    let pci = PciBus::new();
    let function: SharedFunction = machine.function.clone();
    pci.insert(Address::on_bus_0(1, 0), function);
    machine.driver.send(&[(BUFFERS, 3, true)], false);
    let mut random = 0x1234_5678_9abc_def1u64;
    for _ in 0..200_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let (block, within, len) = (random % 9, random >> 8 & 0x7f, 1 << (random >> 20 & 3));
        let offset = block * 0x1000 + within;
        if random & 1 << 30 == 0 {
            machine.read(offset, len);
        } else {
            machine.write(offset, random >> 32, len);
        }
    }
}
