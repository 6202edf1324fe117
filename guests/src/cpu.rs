//! Control registers, MSRs, CPUID and the vectors' names.

use core::arch::asm;

/// Exceptions.
pub mod vector {
    /// #DE
    pub const DE: u64 = 0;
    /// #DB
    pub const DB: u64 = 1;
    /// NMI
    pub const NMI: u64 = 2;
    /// #BP
    pub const BP: u64 = 3;
    /// #OF
    pub const OF: u64 = 4;
    /// #BR
    pub const BR: u64 = 5;
    /// #UD
    pub const UD: u64 = 6;
    /// #NM
    pub const NM: u64 = 7;
    /// #DF
    pub const DF: u64 = 8;
    /// #TS
    pub const TS: u64 = 10;
    /// #NP
    pub const NP: u64 = 11;
    /// #SS
    pub const SS: u64 = 12;
    /// #GP
    pub const GP: u64 = 13;
    /// #PF
    pub const PF: u64 = 14;
    /// #MF
    pub const MF: u64 = 16;
    /// #AC
    pub const AC: u64 = 17;
    /// #XM
    pub const XM: u64 = 19;
    /// What a snippet ends with: all of it was executed.
    pub const END: u64 = 0x30;
}

/// RFLAGS.
pub mod flag {
    /// Always 1.
    pub const ONE: u64 = 2;
    /// Carry.
    pub const CF: u64 = 1;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Trap.
    pub const TF: u64 = 1 << 8;
    /// Interrupts enabled.
    pub const IF: u64 = 1 << 9;
    /// Direction.
    pub const DF: u64 = 1 << 10;
    /// Overflow.
    pub const OF: u64 = 1 << 11;
    /// I/O privilege level 3.
    pub const IOPL: u64 = 3 << 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086.
    pub const VM: u64 = 1 << 17;
    /// Alignment check, and access to user pages.
    pub const AC: u64 = 1 << 18;
    /// Virtual interrupts enabled.
    pub const VIF: u64 = 1 << 19;
    /// Virtual interrupt pending.
    pub const VIP: u64 = 1 << 20;
}

macro_rules! control_register {
    ($(#[$doc:meta])* $read:ident, $write:ident, $name:literal) => {
        $(#[$doc])*
        pub fn $read() -> u64 {
            let value;
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nostack, preserves_flags)) }
            value
        }

        $(#[$doc])*
        pub unsafe fn $write(value: u64) {
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags)) }
        }
    };
}

control_register!(/// CR0.
    cr0, set_cr0, "cr0");
control_register!(/// CR2.
    cr2, set_cr2, "cr2");
control_register!(/// CR3.
    cr3, set_cr3, "cr3");
control_register!(/// CR4.
    cr4, set_cr4, "cr4");
control_register!(/// CR8.
    cr8, set_cr8, "cr8");
control_register!(/// DR0.
    dr0, set_dr0, "dr0");
control_register!(/// DR1.
    dr1, set_dr1, "dr1");
control_register!(/// DR2.
    dr2, set_dr2, "dr2");
control_register!(/// DR3.
    dr3, set_dr3, "dr3");
control_register!(/// DR6.
    dr6, set_dr6, "dr6");
control_register!(/// DR7.
    dr7, set_dr7, "dr7");

/// Reads an MSR that exists.
pub fn read_msr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nostack, preserves_flags))
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
pub unsafe fn write_msr(msr: u32, value: u64) {
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32,
             options(nostack, preserves_flags));
    }
}

/// CPUID: EAX, EBX, ECX, EDX.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let result = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// The time-stamp counter, after all before it.
pub fn tsc() -> u64 {
    let (low, high): (u32, u32);
    unsafe { asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nostack, nomem)) }
    u64::from(high) << 32 | u64::from(low)
}

/// Lets interrupts in for one instruction: the one that STI shadows, and a NOP.
pub fn take_interrupts() {
    unsafe { asm!("sti", "nop", "nop", "cli") }
}

/// Waits with interrupts on for the next of them.
pub fn halt() {
    unsafe { asm!("sti", "hlt", "cli") }
}
