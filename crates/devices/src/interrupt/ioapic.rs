//! The I/O APIC: 24 pins, each with a redirection entry that says which message it sends.
//!
//! Intel, *82093AA I/O Advanced Programmable Interrupt Controller*, with the EOI register of version 0x20.
//!
//! A pin's level here is whether its interrupt is asserted: the polarity bit is kept, but changes nothing, since a
//! device model asserts its line and does not drive a voltage.

use bitflags::bitflags;
use x86::apic::DeliveryMode;

use super::message::{InterruptMessage, TriggerMode};

/// Pins, and redirection entries.
pub const PINS: usize = 24;
/// Bytes of the window.
pub(super) const WINDOW: u64 = 0x1000;

/// Offsets in the window.
mod offset {
    pub const IOREGSEL: u64 = 0x00;
    pub const IOWIN: u64 = 0x10;
    pub const EOI: u64 = 0x40;
}

/// Registers behind IOREGSEL and IOWIN.
mod index {
    pub const ID: u8 = 0x00;
    pub const VERSION: u8 = 0x01;
    pub const ARBITRATION: u8 = 0x02;
    /// Two registers for each pin.
    pub const REDIRECTION: u8 = 0x10;
}

const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;
const ID_BITS: u32 = 0x0f00_0000;

bitflags! {
    /// A redirection table entry.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Redirection: u64 {
        const VECTOR = 0xff;
        const DELIVERY_MODE = 7 << 8;
        const LOGICAL = 1 << 11;
        const DELIVERY_STATUS = 1 << 12;
        const ACTIVE_LOW = 1 << 13;
        const REMOTE_IRR = 1 << 14;
        const LEVEL = 1 << 15;
        const MASKED = 1 << 16;
        const EXTENDED_DESTINATION = 0x7f << 49;
        const DESTINATION = 0xff << 56;
    }
}

impl Redirection {
    const READ_ONLY: Self = Self::DELIVERY_STATUS.union(Self::REMOTE_IRR);

    fn vector(self) -> u8 {
        self.bits() as u8
    }

    /// The message it sends; `None` for a reserved delivery mode.
    fn message(self) -> Option<InterruptMessage> {
        let delivery = match DeliveryMode::from_bits((self.bits() >> 8 & 7) as u8)? {
            DeliveryMode::StartUp => return None,
            mode => mode,
        };
        let trigger = if self.is_level() { TriggerMode::Level } else { TriggerMode::Edge };
        let (low, high) = ((self.bits() >> 56) as u8, (self.bits() >> 49) as u8 & 0x7f);
        let destination = InterruptMessage::device_destination(low, high);
        let logical = self.contains(Self::LOGICAL);
        Some(InterruptMessage { destination, logical, delivery, vector: self.vector(), trigger })
    }

    /// Whether its interrupt is level-triggered. SMI, NMI, INIT and ExtINT are edges whatever the bit says.
    fn is_level(self) -> bool {
        self.contains(Self::LEVEL) && self.bits() >> 8 & 7 <= DeliveryMode::LowestPriority as u64
    }
}

/// Where the messages go: gives whether any local APIC accepted one. It must not come back to the I/O APIC.
pub(super) type Deliver<'a> = &'a dyn Fn(&InterruptMessage) -> bool;

/// The I/O APIC's registers and pins.
#[derive(Clone, Debug)]
pub(super) struct IoApic {
    selected: u8,
    id: u32,
    arbitration: u32,
    /// Whether each pin is asserted.
    pins: u32,
    entries: [Redirection; PINS],
}

impl IoApic {
    /// All pins masked.
    pub fn new() -> Self {
        Self { selected: 0, id: 0, arbitration: 0, pins: 0, entries: [Redirection::MASKED; PINS] }
    }

    /// The state after power-up; the pins keep their levels.
    pub fn reset(&mut self) {
        *self = Self { pins: self.pins, ..Self::new() };
    }

    /// Sets whether `pin` is asserted.
    pub fn set_pin(&mut self, pin: usize, level: bool, deliver: Deliver) {
        if pin >= PINS {
            return;
        }
        let bit = 1 << pin;
        let rose = level && self.pins & bit == 0;
        self.pins = if level { self.pins | bit } else { self.pins & !bit };
        if rose {
            self.service(pin, deliver);
        }
    }

    /// Sends the message of an asserted pin, unless it is masked or awaits its EOI.
    fn service(&mut self, pin: usize, deliver: Deliver) {
        let entry = &mut self.entries[pin];
        if entry.intersects(Redirection::MASKED | Redirection::REMOTE_IRR) {
            return;
        }
        let Some(message) = entry.message() else { return };
        let accepted = deliver(&message);
        entry.set(Redirection::REMOTE_IRR, accepted && entry.is_level());
    }

    /// A local APIC's EOI of a level-triggered `vector`: the pins that had it may send again.
    pub fn end_of_interrupt(&mut self, vector: u8, deliver: Deliver) {
        for pin in 0..PINS {
            let entry = &mut self.entries[pin];
            if entry.vector() == vector && entry.contains(Redirection::REMOTE_IRR) {
                entry.remove(Redirection::REMOTE_IRR);
                if self.pins & 1 << pin != 0 {
                    self.service(pin, deliver);
                }
            }
        }
    }

    /// Reads the 32-bit register at `offset` of the window.
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            offset::IOREGSEL => u32::from(self.selected),
            offset::IOWIN => self.read_selected(),
            _ => u32::MAX,
        }
    }

    fn read_selected(&self) -> u32 {
        match self.selected {
            index::ID => self.id,
            index::VERSION => VERSION,
            index::ARBITRATION => self.arbitration,
            index => match entry_of(index) {
                Some((pin, high)) => (self.entries[pin].bits() >> if high { 32 } else { 0 }) as u32,
                None => u32::MAX,
            },
        }
    }

    /// Writes the 32-bit register at `offset` of the window.
    pub fn write(&mut self, offset: u64, value: u32, deliver: Deliver) {
        match offset {
            offset::IOREGSEL => self.selected = value as u8,
            offset::IOWIN => self.write_selected(value, deliver),
            offset::EOI => self.end_of_interrupt(value as u8, deliver),
            _ => {}
        }
    }

    fn write_selected(&mut self, value: u32, deliver: Deliver) {
        if self.selected == index::ID {
            self.id = value & ID_BITS;
            self.arbitration = self.id;
        } else if let Some((pin, high)) = entry_of(self.selected) {
            self.write_entry(pin, high, value, deliver);
        }
    }

    fn write_entry(&mut self, pin: usize, high: bool, value: u32, deliver: Deliver) {
        let entry = &mut self.entries[pin];
        let shift = if high { 32 } else { 0 };
        let bits = entry.bits() & !(0xffff_ffff << shift) | u64::from(value) << shift;
        let written = Redirection::from_bits_truncate(bits).difference(Redirection::READ_ONLY);
        *entry = written | entry.intersection(Redirection::REMOTE_IRR);
        if !entry.is_level() {
            // Also how software ends an interrupt at an I/O APIC without an EOI register.
            entry.remove(Redirection::REMOTE_IRR);
        } else if self.pins & 1 << pin != 0 {
            self.service(pin, deliver);
        }
    }

    /// The data sheet's name of the register at `offset`.
    pub fn register(&self, offset: u64) -> &'static str {
        match offset {
            offset::IOREGSEL => "IOREGSEL",
            offset::EOI => "EOI",
            offset::IOWIN => match self.selected {
                index::ID => "IOAPICID",
                index::VERSION => "IOAPICVER",
                index::ARBITRATION => "IOAPICARB",
                _ => "IOREDTBL",
            },
            _ => "none",
        }
    }
}

/// The pin of a redirection register, and whether it is the high half.
fn entry_of(index: u8) -> Option<(usize, bool)> {
    let register = index.checked_sub(index::REDIRECTION)?;
    let pin = usize::from(register / 2);
    (pin < PINS).then_some((pin, register % 2 == 1))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// An I/O APIC whose messages are all accepted.
    struct Bench {
        ioapic: IoApic,
        sent: RefCell<Vec<InterruptMessage>>,
        accepts: bool,
    }

    impl Bench {
        fn new() -> Self {
            Self { ioapic: IoApic::new(), sent: RefCell::default(), accepts: true }
        }
        fn write(&mut self, index: u8, value: u32) {
            let (sent, accepts) = (&self.sent, self.accepts);
            let deliver = |m: &InterruptMessage| {
                sent.borrow_mut().push(*m);
                accepts
            };
            self.ioapic.write(offset::IOREGSEL, index.into(), &deliver);
            self.ioapic.write(offset::IOWIN, value, &deliver);
        }
        fn read(&mut self, index: u8) -> u32 {
            self.ioapic.write(offset::IOREGSEL, index.into(), &|_| true);
            self.ioapic.read(offset::IOWIN)
        }
        fn set_pin(&mut self, pin: usize, level: bool) {
            let (sent, accepts) = (&self.sent, self.accepts);
            self.ioapic.set_pin(pin, level, &|m| {
                sent.borrow_mut().push(*m);
                accepts
            });
        }
        fn eoi(&mut self, vector: u8) {
            let sent = &self.sent;
            self.ioapic.end_of_interrupt(vector, &|m| {
                sent.borrow_mut().push(*m);
                true
            });
        }
        /// The vectors sent since the last call.
        fn sent(&mut self) -> Vec<u8> {
            self.sent.take().iter().map(|m| m.vector).collect()
        }
    }

    #[test]
    fn the_version_says_24_entries_and_an_eoi_register() {
        let mut bench = Bench::new();
        assert_eq!(bench.read(index::VERSION), 0x0017_0020);
        assert_eq!(bench.read(0x10), 0x1_0000);
        assert_eq!(bench.read(0x3f), 0);
        assert_eq!(bench.read(0x40), u32::MAX);
        bench.write(index::ID, 0xffff_ffff);
        assert_eq!((bench.read(index::ID), bench.read(index::ARBITRATION)), (0x0f00_0000, 0x0f00_0000));
    }

    #[test]
    fn an_entry_says_what_is_sent() {
        let mut bench = Bench::new();
        bench.write(0x13, 0x0500_0000);
        bench.write(0x12, 0x0941);
        bench.set_pin(1, true);
        let message = InterruptMessage {
            destination: 5,
            logical: true,
            delivery: DeliveryMode::LowestPriority,
            vector: 0x41,
            trigger: TriggerMode::Edge,
        };
        assert_eq!(bench.sent.take(), [message]);
    }

    #[test]
    fn an_edge_is_sent_once_and_lost_while_masked() {
        let mut bench = Bench::new();
        bench.write(0x18, 0x41);
        bench.set_pin(4, true);
        bench.set_pin(4, true);
        bench.set_pin(4, false);
        assert_eq!(bench.sent(), [0x41]);
        bench.write(0x18, 0x1_0041);
        bench.set_pin(4, true);
        bench.write(0x18, 0x41);
        assert_eq!(bench.sent(), []);
    }

    #[test]
    fn a_level_is_sent_again_after_its_eoi_while_it_is_asserted() {
        let mut bench = Bench::new();
        bench.write(0x30, 0x8041);
        bench.set_pin(16, true);
        assert_eq!(bench.read(0x30), 0xc041, "remote IRR");
        bench.set_pin(16, false);
        bench.set_pin(16, true);
        assert_eq!(bench.sent(), [0x41]);
        bench.eoi(0x42);
        assert_eq!(bench.sent(), []);
        bench.eoi(0x41);
        assert_eq!(bench.sent(), [0x41]);
        bench.set_pin(16, false);
        bench.ioapic.write(offset::EOI, 0x41, &|_| true);
        assert_eq!((bench.sent(), bench.read(0x30)), (vec![], 0x8041));
    }

    #[test]
    fn unmasking_an_asserted_level_sends_it() {
        let mut bench = Bench::new();
        bench.write(0x30, 0x1_8041);
        bench.set_pin(16, true);
        assert_eq!(bench.sent(), []);
        bench.write(0x30, 0x8041);
        assert_eq!(bench.sent(), [0x41]);
    }

    #[test]
    fn making_an_entry_edge_triggered_ends_its_interrupt() {
        let mut bench = Bench::new();
        bench.write(0x30, 0x8041);
        bench.set_pin(16, true);
        bench.write(0x30, 0x1_0041);
        bench.write(0x30, 0x8041);
        assert_eq!(bench.sent(), [0x41, 0x41]);
    }

    #[test]
    fn remote_irr_is_not_set_where_nobody_accepts() {
        let mut bench = Bench::new();
        bench.accepts = false;
        bench.write(0x30, 0x8041);
        bench.set_pin(16, true);
        assert_eq!(bench.read(0x30), 0x8041);
    }

    #[test]
    fn an_nmi_is_an_edge_even_where_the_entry_says_level() {
        let mut bench = Bench::new();
        bench.write(0x30, 0x8400);
        bench.set_pin(16, true);
        bench.eoi(0);
        assert_eq!((bench.sent().len(), bench.read(0x30)), (1, 0x8400));
    }
}
