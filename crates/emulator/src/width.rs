//! Operand widths: one definition of an instruction serves all four.

use guest_memory::Scalar;

use crate::registers::Registers;

/// An operand's width: u8, u16, u32 or u64.
pub trait Width: Scalar + Copy + PartialEq + 'static {
    /// Bits in the operand.
    const BITS: u32;
    /// The low bits of a 64-bit value.
    fn truncate(value: u64) -> Self;
    /// Zero-extended to 64 bits.
    fn zext(self) -> u64;
    /// Sign-extended to 64 bits.
    fn sext(self) -> u64;
    /// The register's low bits; for bytes, a number from 32 on names AH, CH, DH, BH.
    fn read(registers: &Registers, number: u8) -> Self;
    /// Writes them as the processor does: bytes and words merge, a doubleword clears the upper half.
    fn write(registers: &mut Registers, number: u8, value: Self);
    /// The top bit.
    #[inline(always)]
    fn sign(self) -> bool {
        self.sext() >> 63 != 0
    }
}

/// Added to a byte register's number for AH, CH, DH and BH.
pub const HIGH_BYTE: u8 = 32;

macro_rules! width {
    ($type:ty, $signed:ty, $registers:ident, $number:ident, $value:ident, $read:expr, $write:expr) => {
        impl Width for $type {
            const BITS: u32 = <$type>::BITS;
            #[inline(always)]
            fn truncate(value: u64) -> Self {
                value as $type
            }
            #[inline(always)]
            fn zext(self) -> u64 {
                u64::from(self)
            }
            #[inline(always)]
            fn sext(self) -> u64 {
                self as $signed as i64 as u64
            }
            #[inline(always)]
            fn read($registers: &Registers, $number: u8) -> Self {
                $read
            }
            #[inline(always)]
            fn write($registers: &mut Registers, $number: u8, $value: Self) {
                $write
            }
        }
    };
}

width!(u8, i8, registers, number, value, (registers.get(number) >> (number >> 5 << 3)) as u8, {
    let shift = number >> 5 << 3;
    let old = registers.get(number);
    registers.set(number, old & !(0xff << shift) | u64::from(value) << shift);
});
width!(u16, i16, registers, number, value, registers.get(number) as u16, {
    let old = registers.get(number);
    registers.set(number, old & !0xffff | u64::from(value));
});
width!(
    u32,
    i32,
    registers,
    number,
    value,
    registers.get(number) as u32,
    registers.set(number, u64::from(value))
);
width!(u64, i64, registers, number, value, registers.get(number), registers.set(number, value));
