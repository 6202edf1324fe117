//! The local APIC, at its usual place in memory.

/// Register offsets.
pub mod offset {
    #![allow(missing_docs)]
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const PPR: u32 = 0xa0;
    pub const EOI: u32 = 0xb0;
    pub const LDR: u32 = 0xd0;
    pub const DFR: u32 = 0xe0;
    pub const SVR: u32 = 0xf0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const ICR_LOW: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_LINT1: u32 = 0x360;
    pub const LVT_ERROR: u32 = 0x370;
    pub const TIMER_INITIAL: u32 = 0x380;
    pub const TIMER_CURRENT: u32 = 0x390;
    pub const TIMER_DIVIDE: u32 = 0x3e0;
}

/// Where its registers are.
pub const BASE: u32 = 0xfee0_0000;

/// Reads a register.
pub fn read(register: u32) -> u32 {
    // SAFETY: the APIC's page is mapped, and its registers have no effect on memory.
    unsafe { ((BASE + register) as usize as *const u32).read_volatile() }
}

/// Writes a register.
pub fn write(register: u32, value: u32) {
    // SAFETY: as for `read`.
    unsafe { ((BASE + register) as usize as *mut u32).write_volatile(value) }
}

/// Turns it on, with the spurious vector 0xff, and all of its own sources masked.
pub fn enable() {
    write(offset::SVR, 0x1ff);
    for lvt in [offset::LVT_TIMER, offset::LVT_LINT0, offset::LVT_LINT1, offset::LVT_ERROR] {
        write(lvt, 1 << 16);
    }
}

/// This processor's identifier.
pub fn id() -> u32 {
    read(offset::ID) >> 24
}

/// Ends the interrupt in service.
pub fn eoi() {
    write(offset::EOI, 0);
}

/// Sends an interprocessor interrupt: `command` is the lower half of the register.
pub fn send(destination: u32, command: u32) {
    write(offset::ICR_HIGH, destination << 24);
    write(offset::ICR_LOW, command);
    while read(offset::ICR_LOW) & 1 << 12 != 0 {
        core::hint::spin_loop();
    }
}
