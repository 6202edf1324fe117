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
}

/// The other operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Right {
    /// A general register.
    Register(u8),
    /// An immediate, sign-extended.
    Immediate(u64),
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
}

impl Recipe {
    /// The general registers that it needs unchanged.
    pub fn needs(&self) -> u16 {
        let right = match self.right {
            Right::Register(number) => 1 << number,
            Right::Immediate(_) => 0,
        };
        1 << self.left | right
    }

    /// The arithmetic flags as they stand in RFLAGS.
    pub fn flags(&self, registers: &[u64; 16]) -> u64 {
        let left = registers[usize::from(self.left & 15)];
        let right = match self.right {
            Right::Register(number) => registers[usize::from(number & 15)],
            Right::Immediate(value) => value,
        };
        match self.size {
            1 => self.compute(left as u8, right as u8),
            2 => self.compute(left as u16, right as u16),
            4 => self.compute(left as u32, right as u32),
            _ => self.compute(left, right),
        }
    }

    fn compute<W: Width>(&self, left: W, right: W) -> u64 {
        let mut flags = LazyFlags::default();
        let (l, r) = (left.zext(), right.zext());
        match self.operation {
            Operation::Logic => flags.set_logic(left),
            Operation::Test => flags.set_logic(W::truncate(l & r)),
            Operation::Compare => flags.set_sub(left, right, W::truncate(l.wrapping_sub(r))),
            Operation::Add => flags.set_add(W::truncate(l.wrapping_sub(r)), right, left),
            Operation::Subtract => flags.set_sub(W::truncate(l.wrapping_add(r)), right, left),
        }
        flags.bits()
    }
}
