//! How the guest's flags follow from its registers where translated code did not keep them.
//!
//! Most flags are overwritten before anyone reads them. Only an exception or an interrupt in between makes them visible:
//! then they are computed from what the instruction that set them has left behind.

use crate::flags::LazyFlags;
use crate::width::Width;

/// What set the flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// AND, OR, XOR: the left value is the result.
    Logic,
    /// TEST of both.
    Test,
    /// CMP of both.
    Compare,
    /// ADD: the left value is the sum.
    Add,
    /// SUB: the left value is the difference.
    Subtract,
    /// ROR and ROL by an immediate: CF and OF follow from the left value, which is the result; the others are as before.
    RotateRight,
    /// See there.
    RotateLeft,
}

/// The other operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Right {
    /// A general register.
    Register(u8),
    /// An immediate, sign-extended.
    Immediate(u64),
    /// Not an operand: the number of the recipe for the flags before; 0 where they are in the frame.
    Before(u32),
}

/// Flags as a function of registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Recipe {
    /// What set them.
    pub operation: Operation,
    /// Operand size in bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// The register of the first operand, which also took the result.
    pub left: u8,
    /// The second operand.
    pub right: Right,
    /// The general registers that must be unchanged.
    pub needs: u16,
}

impl Recipe {
    /// A recipe without one before it.
    pub fn new(operation: Operation, size: u8, left: u8, right: Right) -> Self {
        let second = if let Right::Register(number) = right { 1 << (number & 15) } else { 0 };
        Self { operation, size, left, right, needs: 1 << (left & 15) | second }
    }

    /// The recipe after a rotation, where the flags before had the recipe `before` with that number.
    pub fn rotated(operation: Operation, size: u8, left: u8, before: Option<(u32, Self)>) -> Self {
        // Only the last rotation counts.
        let (number, needs) = match before {
            Some((_, Self { right: Right::Before(number), left, needs, .. })) => {
                (number, if number == 0 { 0 } else { needs & !(1 << (left & 15)) })
            }
            Some((number, before)) => (number, before.needs),
            None => (0, 0),
        };
        Self { operation, size, left, right: Right::Before(number), needs: needs | 1 << (left & 15) }
    }

    /// The number of the recipe for the flags before, where it is a rotation's.
    pub fn before(&self) -> Option<u32> {
        if let Right::Before(number) = self.right { Some(number) } else { None }
    }

    /// The arithmetic flags as they stand in RFLAGS; `before` are those before a rotation.
    pub fn flags(&self, registers: &[u64; 16], before: u64) -> u64 {
        let left = registers[usize::from(self.left & 15)];
        let right = match self.right {
            Right::Register(number) => registers[usize::from(number & 15)],
            Right::Immediate(value) => value,
            Right::Before(_) => before,
        };
        match self.size {
            1 => self.compute(left as u8, right as u8),
            2 => self.compute(left as u16, right as u16),
            4 => self.compute(left as u32, right as u32),
            _ => self.compute(left, right),
        }
    }

    /// After a rotation of a value of `bits` bits.
    fn rotation(&self, value: u64, bits: u32, before: u64) -> u64 {
        let bit = |n: u32| value >> n & 1 != 0;
        let (top, next, low) = (bit(bits - 1), bit(bits - 2), bit(0));
        let mut flags = LazyFlags::default();
        flags.set_bits(before);
        match self.operation {
            Operation::RotateRight => flags.set_cf_of(top, top != next),
            _ => flags.set_cf_of(low, low != top),
        }
        flags.bits()
    }

    fn compute<W: Width>(&self, left: W, right: W) -> u64 {
        let mut flags = LazyFlags::default();
        let (l, r) = (left.zext(), right.zext());
        match self.operation {
            Operation::RotateRight | Operation::RotateLeft => return self.rotation(l, W::BITS, r),
            Operation::Logic => flags.set_logic(left),
            Operation::Test => flags.set_logic(W::truncate(l & r)),
            Operation::Compare => flags.set_sub(left, right, W::truncate(l.wrapping_sub(r))),
            Operation::Add => flags.set_add(W::truncate(l.wrapping_sub(r)), right, left),
            Operation::Subtract => flags.set_sub(W::truncate(l.wrapping_add(r)), right, left),
        }
        flags.bits()
    }
}
