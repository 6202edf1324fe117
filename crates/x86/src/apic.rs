//! Local APIC registers. SDM vol. 3, *Advanced Programmable Interrupt Controller (APIC)*.

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
