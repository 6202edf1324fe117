//! The six arithmetic flags, kept as what they are computed from. SDM vol. 1, *Status Flags*.

use x86::Flags;

use crate::undefined::Undefined;
use crate::width::Width;

/// The last result and its carries; each flag is derived when somebody asks.
#[derive(Clone, Copy, Debug, Default)]
pub struct LazyFlags {
    /// The result, sign-extended to 64 bits: ZF and, with `adjust`, SF and PF.
    result: u64,
    /// Bit 63: the carry out of the operand's top bit (CF). Bit 62: the carry into it (OF is their difference).
    carries: u64,
    /// Bit 4: AF. Bit 7: inverts SF. Bits 8 to 15: XORed into the byte whose parity is PF.
    adjust: u32,
}

const SIGN_FLIP: u32 = 1 << 7;
const AUXILIARY: u32 = 1 << 4;

impl LazyFlags {
    /// After `a + b (+ carry) = result`.
    #[inline(always)]
    pub fn set_add<W: Width>(&mut self, a: W, b: W, result: W) {
        let (a, b, r) = (a.zext(), b.zext(), result.zext());
        self.result = result.sext();
        self.carries = ((a & b) | ((a | b) & !r)) << (64 - W::BITS);
        self.adjust = (a ^ b ^ r) as u32 & AUXILIARY;
    }

    /// After `a - b (- borrow) = result`.
    #[inline(always)]
    pub fn set_sub<W: Width>(&mut self, a: W, b: W, result: W) {
        let (a, b, r) = (a.zext(), b.zext(), result.zext());
        self.result = result.sext();
        self.carries = ((!a & b) | ((!a | b) & r)) << (64 - W::BITS);
        self.adjust = (a ^ b ^ r) as u32 & AUXILIARY;
    }

    /// After AND, OR, XOR or TEST: CF and OF clear; AF, which is undefined, clear as on Intel's and AMD's processors.
    #[inline(always)]
    pub fn set_logic<W: Width>(&mut self, result: W) {
        *self = Self { result: result.sext(), carries: 0, adjust: 0 };
    }

    /// SF, ZF and PF from a result, AF clear, CF and OF as given.
    #[inline(always)]
    pub fn set_result<W: Width>(&mut self, result: W, cf: bool, of: bool) {
        self.set_logic(result);
        self.set_cf_of(cf, of);
    }

    /// Replaces CF and OF.
    #[inline(always)]
    pub fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.carries = u64::from(cf) << 63 | u64::from(cf ^ of) << 62;
    }

    /// After a shift: SF, ZF and PF from a result, AF, which is undefined, as the host leaves it, CF and OF as given.
    #[inline(always)]
    pub fn set_shifted<W: Width>(&mut self, result: W, cf: bool, of: bool) {
        self.set_result(result, cf, of);
        self.adjust = if Undefined::of_host().shifts_set_af { AUXILIARY } else { 0 };
    }

    /// Replaces CF alone.
    #[inline(always)]
    pub fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.set_cf_of(cf, of);
    }

    /// Replaces ZF alone.
    pub fn set_zf(&mut self, zf: bool) {
        let bits = self.bits() & !Flags::ZF.bits() | u64::from(zf) << 6;
        self.set_bits(bits);
    }

    /// Carry.
    #[inline(always)]
    pub fn cf(&self) -> bool {
        self.carries >> 63 != 0
    }
    /// Overflow.
    #[inline(always)]
    pub fn of(&self) -> bool {
        (self.carries ^ self.carries << 1) >> 63 != 0
    }
    /// Zero.
    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.result == 0
    }
    /// Sign.
    #[inline(always)]
    pub fn sf(&self) -> bool {
        (self.result >> 63) as u32 != self.adjust >> 7 & 1
    }
    /// Parity of the low byte.
    #[inline(always)]
    pub fn pf(&self) -> bool {
        (self.result as u8 ^ (self.adjust >> 8) as u8).count_ones() & 1 == 0
    }
    /// Auxiliary carry.
    #[inline(always)]
    pub fn af(&self) -> bool {
        self.adjust & AUXILIARY != 0
    }

    /// The six as they stand in RFLAGS.
    pub fn bits(&self) -> u64 {
        let bit = |flag: Flags, set: bool| if set { flag.bits() } else { 0 };
        bit(Flags::CF, self.cf())
            | bit(Flags::PF, self.pf())
            | bit(Flags::AF, self.af())
            | bit(Flags::ZF, self.zf())
            | bit(Flags::SF, self.sf())
            | bit(Flags::OF, self.of())
    }

    /// Takes the six from an RFLAGS value.
    pub fn set_bits(&mut self, bits: u64) {
        let flags = Flags::from_bits_retain(bits);
        self.result = u64::from(!flags.contains(Flags::ZF));
        let parity = self.result as u32 ^ u32::from(!flags.contains(Flags::PF));
        self.adjust = parity << 8 | bits as u32 & (AUXILIARY | SIGN_FLIP);
        self.set_cf_of(flags.contains(Flags::CF), flags.contains(Flags::OF));
    }

    /// A condition by its number in an instruction's encoding. SDM vol. 2, *Jcc*.
    #[inline(always)]
    pub fn condition<const CC: u8>(&self) -> bool {
        let holds = match CC >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        holds != (CC & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_combination_of_flags_survives_a_round_trip() {
        let each = [0, 2, 4, 6, 7, 11];
        for n in 0..64u64 {
            let bits = each.iter().enumerate().fold(0, |bits, (i, at)| bits | (n >> i & 1) << at);
            let mut flags = LazyFlags::default();
            flags.set_bits(bits);
            assert_eq!(flags.bits(), bits);
        }
    }
}
