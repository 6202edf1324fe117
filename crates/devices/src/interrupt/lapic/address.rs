use super::super::message::InterruptMessage;

/// What a local APIC answers to, in one word, so that senders need not lock it.
///
/// ```text
/// bits 0-31: APIC ID (initial and x2APIC)   32-39: xAPIC ID   40-47: LDR   48-51: DFR's model   61-63: flags
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address(pub u64);

/// The part of [`Address`] that is not a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Globally disabled.
    Disabled,
    XApic,
    X2Apic,
}

const FLAT: u64 = 0xf;
const CLUSTER: u64 = 0;

const SOFTWARE_ENABLED: u64 = 1 << 61;
const X2APIC: u64 = 1 << 62;
const ENABLED: u64 = 1 << 63;

impl Address {
    /// The address of an APIC with these IDs; `ldr` and `dfr` as the registers of the xAPIC have them.
    pub fn new(mode: Mode, software_enabled: bool, id: u32, xapic: (u8, u8, u32)) -> Self {
        let (xapic_id, ldr, dfr) = xapic;
        let mode = match mode {
            Mode::Disabled => 0,
            Mode::XApic => ENABLED,
            Mode::X2Apic => ENABLED | X2APIC,
        };
        let software_enabled = if software_enabled { SOFTWARE_ENABLED } else { 0 };
        let numbers =
            u64::from(id) | u64::from(xapic_id) << 32 | u64::from(ldr) << 40 | u64::from(dfr >> 28) << 48;
        Self(mode | software_enabled | numbers)
    }

    /// Whether messages reach it at all.
    pub fn is_enabled(self) -> bool {
        self.0 & ENABLED != 0
    }

    /// Whether it takes interrupts with vectors.
    pub fn is_software_enabled(self) -> bool {
        self.is_enabled() && self.0 & SOFTWARE_ENABLED != 0
    }

    /// Whether a message is for this APIC. SDM vol. 3, *Determining IPI Destination*.
    pub fn is_meant(self, message: &InterruptMessage) -> bool {
        if !self.is_enabled() {
            return false;
        }
        if message.destination == InterruptMessage::EVERYONE {
            return true;
        }
        match (message.logical, self.0 & X2APIC != 0) {
            (false, true) => message.destination == self.0 as u32,
            (false, false) => self.has_physical_xapic(message.destination),
            (true, true) => {
                let ldr = x2apic_ldr(self.0 as u32);
                message.destination >> 16 == ldr >> 16 && message.destination & ldr & 0xffff != 0
            }
            (true, false) => self.has_logical_xapic(message.destination),
        }
    }

    fn has_physical_xapic(self, destination: u32) -> bool {
        let xapic_id = u32::from((self.0 >> 32) as u8);
        // An ID that eight bits cannot say is unique all the same, so one that waits for its start in xAPIC mode can
        // be reached.
        destination == xapic_id || (destination > 0xff && destination == self.0 as u32)
    }

    fn has_logical_xapic(self, destination: u32) -> bool {
        let ldr = u32::from((self.0 >> 40) as u8);
        if destination > 0xff {
            return false;
        }
        match self.0 >> 48 & 0xf {
            FLAT => destination & ldr != 0,
            CLUSTER => destination >> 4 == ldr >> 4 && destination & ldr & 0xf != 0,
            _ => false,
        }
    }
}

/// The logical destination register in x2APIC mode, which the ID gives. SDM vol. 3, *Deriving Logical x2APIC ID from
/// the Local x2APIC ID*.
pub(super) fn x2apic_ldr(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 15)
}
