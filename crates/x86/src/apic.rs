//! Local APIC registers. SDM vol. 3, *Advanced Programmable Interrupt Controller (APIC)*.

use bitflags::bitflags;

/// The guest-physical address of the local APIC's page after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
/// The guest-physical address of the first I/O APIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;

/// Byte offsets of the xAPIC's registers in its page. An x2APIC register's MSR is 0x800 plus the offset over 16.
#[allow(missing_docs)]
pub mod offset {
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const APR: u32 = 0x90;
    pub const PPR: u32 = 0xa0;
    pub const EOI: u32 = 0xb0;
    pub const RRD: u32 = 0xc0;
    pub const LDR: u32 = 0xd0;
    pub const DFR: u32 = 0xe0;
    pub const SVR: u32 = 0xf0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const LVT_CMCI: u32 = 0x2f0;
    pub const ICR_LOW: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_THERMAL: u32 = 0x330;
    pub const LVT_PERFORMANCE: u32 = 0x340;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_LINT1: u32 = 0x360;
    pub const LVT_ERROR: u32 = 0x370;
    pub const TIMER_INITIAL_COUNT: u32 = 0x380;
    pub const TIMER_CURRENT_COUNT: u32 = 0x390;
    pub const TIMER_DIVIDE: u32 = 0x3e0;
    pub const SELF_IPI: u32 = 0x3f0;
}

/// The name of an x2APIC register by its MSR: "x2APIC EOI".
pub const fn x2apic_name(msr: u32) -> Option<&'static str> {
    Some(match msr.wrapping_sub(super::msr::X2APIC_BASE) << 4 {
        offset::ID => "x2APIC ID",
        offset::VERSION => "x2APIC VERSION",
        offset::TPR => "x2APIC TPR",
        offset::PPR => "x2APIC PPR",
        offset::EOI => "x2APIC EOI",
        offset::LDR => "x2APIC LDR",
        offset::SVR => "x2APIC SVR",
        offset::ESR => "x2APIC ESR",
        offset::LVT_CMCI => "x2APIC LVT_CMCI",
        offset::ICR_LOW => "x2APIC ICR",
        offset::LVT_TIMER => "x2APIC LVT_TIMER",
        offset::LVT_THERMAL => "x2APIC LVT_THERMAL",
        offset::LVT_PERFORMANCE => "x2APIC LVT_PERFORMANCE",
        offset::LVT_LINT0 => "x2APIC LVT_LINT0",
        offset::LVT_LINT1 => "x2APIC LVT_LINT1",
        offset::LVT_ERROR => "x2APIC LVT_ERROR",
        offset::TIMER_INITIAL_COUNT => "x2APIC TIMER_INITIAL_COUNT",
        offset::TIMER_CURRENT_COUNT => "x2APIC TIMER_CURRENT_COUNT",
        offset::TIMER_DIVIDE => "x2APIC TIMER_DIVIDE",
        offset::SELF_IPI => "x2APIC SELF_IPI",
        _ => return None,
    })
}

bitflags! {
    /// IA32_APIC_BASE without the base address. SDM vol. 3, *Local APIC Status and Location*.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ApicBase: u64 {
        /// The processor is the bootstrap processor.
        const BSP = 1 << 8;
        /// x2APIC mode.
        const EXTD = 1 << 10;
        /// The local APIC is enabled.
        const EN = 1 << 11;
    }

    /// An entry of the local vector table. SDM vol. 3, *Local Vector Table*.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Lvt: u32 {
        /// Interrupt vector.
        const VECTOR = 0xff;
        /// Delivery mode: [`DeliveryMode`].
        const DELIVERY_MODE = 7 << 8;
        /// Delivery status: send pending; read-only.
        const DELIVERY_STATUS = 1 << 12;
        /// The pin is active low.
        const ACTIVE_LOW = 1 << 13;
        /// A level-triggered interrupt has been accepted and awaits its EOI; read-only.
        const REMOTE_IRR = 1 << 14;
        /// Level-triggered.
        const LEVEL = 1 << 15;
        /// Masked.
        const MASKED = 1 << 16;
        /// Timer: periodic.
        const PERIODIC = 1 << 17;
        /// Timer: TSC-deadline.
        const TSC_DEADLINE = 1 << 18;
    }

    /// The spurious-interrupt vector register.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct SpuriousVector: u32 {
        /// Vector of the spurious interrupt.
        const VECTOR = 0xff;
        /// The APIC is enabled by software.
        const ENABLE = 1 << 8;
        /// Focus processor checking is disabled.
        const NO_FOCUS = 1 << 9;
        /// An EOI of a level-triggered interrupt is not broadcast to the I/O APICs.
        const SUPPRESS_EOI_BROADCAST = 1 << 12;
    }

    /// The interrupt command register as x2APIC mode has it. SDM vol. 3, *Interrupt Command Register (ICR)*.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Icr: u64 {
        /// Interrupt vector.
        const VECTOR = 0xff;
        /// Delivery mode: [`DeliveryMode`].
        const DELIVERY_MODE = 7 << 8;
        /// Logical destination mode.
        const LOGICAL = 1 << 11;
        /// Delivery status: send pending; read-only, xAPIC mode only.
        const DELIVERY_STATUS = 1 << 12;
        /// Level: assert.
        const ASSERT = 1 << 14;
        /// Level-triggered.
        const LEVEL = 1 << 15;
        /// Destination shorthand.
        const SHORTHAND = 3 << 18;
        /// Destination; in xAPIC mode its high eight bits only.
        const DESTINATION = 0xffff_ffff << 32;
    }

    /// The error status register. SDM vol. 3, *Error Handling*.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ErrorStatus: u32 {
        /// An IPI with a vector below 16 was to be sent.
        const SEND_ILLEGAL_VECTOR = 1 << 5;
        /// An interrupt with a vector below 16 came.
        const RECEIVE_ILLEGAL_VECTOR = 1 << 6;
        /// A register was accessed that does not exist.
        const ILLEGAL_REGISTER = 1 << 7;
    }
}

/// How an interrupt message is delivered; the discriminant is its encoding in the LVT, the ICR, an I/O APIC's
/// redirection entry and an MSI's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DeliveryMode {
    /// To all processors of the destination, with a vector.
    Fixed = 0,
    /// To the one of the destination that runs at the lowest priority.
    LowestPriority = 1,
    /// System-management interrupt.
    Smi = 2,
    /// Non-maskable interrupt.
    Nmi = 4,
    /// INIT.
    Init = 5,
    /// Start-up IPI.
    StartUp = 6,
    /// The vector comes from the external interrupt controller.
    ExtInt = 7,
}

impl DeliveryMode {
    /// The mode of three bits; `None` for the reserved encoding.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => return None,
        })
    }
}

/// The lowest vector that an interrupt may have.
pub const FIRST_VECTOR: u8 = 16;
