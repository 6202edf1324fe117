//! RFLAGS. SDM vol. 1, *EFLAGS Register*.

use bitflags::bitflags;

bitflags! {
    /// RFLAGS. Bit 1 always reads as one; it is [`Flags::FIXED`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Flags: u64 {
        /// Carry.
        const CF = 1 << 0;
        /// Reserved, always one.
        const FIXED = 1 << 1;
        /// Parity of the low byte.
        const PF = 1 << 2;
        /// Auxiliary carry, out of bit 3.
        const AF = 1 << 4;
        /// Zero.
        const ZF = 1 << 6;
        /// Sign.
        const SF = 1 << 7;
        /// Trap: single step.
        const TF = 1 << 8;
        /// Interrupt enable.
        const IF = 1 << 9;
        /// Direction of string instructions.
        const DF = 1 << 10;
        /// Overflow.
        const OF = 1 << 11;
        /// I/O privilege level.
        const IOPL = 3 << 12;
        /// Nested task.
        const NT = 1 << 14;
        /// Resume.
        const RF = 1 << 16;
        /// Virtual-8086 mode.
        const VM = 1 << 17;
        /// Alignment check, and access control with SMAP.
        const AC = 1 << 18;
        /// Virtual interrupt.
        const VIF = 1 << 19;
        /// Virtual interrupt pending.
        const VIP = 1 << 20;
        /// CPUID is available.
        const ID = 1 << 21;
        /// The six that arithmetic sets.
        const ARITHMETIC = 0x8d5;
    }
}

impl Flags {
    /// The I/O privilege level, 0 to 3.
    pub const fn iopl(self) -> u8 {
        (self.bits() >> 12 & 3) as u8
    }
}
