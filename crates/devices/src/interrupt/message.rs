//! Interrupt messages: what the I/O APIC, MSIs and IPIs send to the local APICs.

use x86::apic::DeliveryMode;

/// Whether an interrupt comes back after its EOI while its source still asserts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TriggerMode {
    /// Once for each rising edge.
    Edge,
    /// As long as the line is asserted; its EOI goes back to the source.
    Level,
}

/// One interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptMessage {
    /// The APIC or logical ID that it is for; [`InterruptMessage::EVERYONE`] for all.
    pub destination: u32,
    /// Whether the destination is a logical one.
    pub logical: bool,
    /// How it is delivered.
    pub delivery: DeliveryMode,
    /// Its vector, where the delivery mode has one.
    pub vector: u8,
    /// Edge or level.
    pub trigger: TriggerMode,
}

/// Bits of a message signalled interrupt. SDM vol. 3, *Message Signalled Interrupts*.
mod msi {
    /// Bits 31 to 20 of the address are this value.
    pub const ADDRESS_PREFIX: u64 = 0xfee;
    pub const LOGICAL: u64 = 1 << 2;
    pub const REDIRECTION_HINT: u64 = 1 << 3;
    pub const ASSERT: u32 = 1 << 14;
    pub const LEVEL: u32 = 1 << 15;
}

impl InterruptMessage {
    /// The destination that every local APIC takes for its own.
    pub const EVERYONE: u32 = u32::MAX;

    /// A destination of eight bits, as the bus and the xAPIC have it: all ones is everyone.
    pub(super) fn short_destination(id: u8) -> u32 {
        if id == u8::MAX { Self::EVERYONE } else { u32::from(id) }
    }

    /// A destination as devices give it: eight bits, and seven more above them in fields that are reserved on the
    /// hardware (KVM's `KVM_FEATURE_MSI_EXT_DEST_ID`).
    pub(super) fn device_destination(low: u8, high: u8) -> u32 {
        match high & 0x7f {
            0 => Self::short_destination(low),
            high => u32::from(high) << 8 | u32::from(low),
        }
    }

    /// The message that a device's write of `data` to `address` is; `None` where it is none: an address outside the
    /// interrupt range, a reserved delivery mode, or the de-assertion of a level.
    pub fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address >> 20 != msi::ADDRESS_PREFIX {
            return None;
        }
        let level = data & msi::LEVEL != 0;
        if level && data & msi::ASSERT == 0 {
            return None;
        }
        let logical = address & msi::LOGICAL != 0;
        let delivery = match DeliveryMode::from_bits((data >> 8 & 7) as u8)? {
            DeliveryMode::StartUp => return None,
            // The hint asks for one processor of a logical destination.
            DeliveryMode::Fixed if logical && address & msi::REDIRECTION_HINT != 0 => {
                DeliveryMode::LowestPriority
            }
            mode => mode,
        };
        Some(Self {
            destination: Self::device_destination((address >> 12) as u8, (address >> 5) as u8 & 0x7f),
            logical,
            delivery,
            vector: data as u8,
            trigger: if level { TriggerMode::Level } else { TriggerMode::Edge },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_msi_carries_destination_mode_vector_and_trigger() {
        let message = InterruptMessage::from_msi(0xfee0_3004, 0xc131).unwrap();
        let expected = InterruptMessage {
            destination: 3,
            logical: true,
            delivery: DeliveryMode::LowestPriority,
            vector: 0x31,
            trigger: TriggerMode::Level,
        };
        assert_eq!(message, expected);
    }

    #[test]
    fn the_redirection_hint_picks_one_of_a_logical_destination() {
        let delivery = |address| InterruptMessage::from_msi(address, 0x31).unwrap().delivery;
        assert_eq!(delivery(0xfee0_100c), DeliveryMode::LowestPriority);
        assert_eq!(delivery(0xfee0_1008), DeliveryMode::Fixed);
        assert_eq!(delivery(0xfee0_1004), DeliveryMode::Fixed);
    }

    #[test]
    fn what_is_no_interrupt_message_is_nothing() {
        for (address, data) in [
            (0xfed0_0000, 0x31),
            (0x1_fee0_0000, 0x31),
            (0xfee0_0000, 0x0331),
            (0xfee0_0000, 0x0631),
            (0xfee0_0000, 0x8031),
        ] {
            assert_eq!(InterruptMessage::from_msi(address, data), None, "{address:#x} {data:#x}");
        }
    }

    #[test]
    fn a_destination_of_all_ones_is_everyone_and_bits_5_to_11_extend_it() {
        let destination = |address| InterruptMessage::from_msi(address, 0x31).unwrap().destination;
        assert_eq!(destination(0xfeef_f000), InterruptMessage::EVERYONE);
        assert_eq!(destination(0xfee0_1020), 0x101);
    }
}
