//! What the host's processor does where the manual leaves a result or a flag undefined. Translated code has the host's
//! instructions, so the handlers do as they do: Intel's and AMD's processors differ. Found by trying, once.
#![allow(unsafe_code)] // The instructions that are tried.

use std::arch::asm;
use std::sync::OnceLock;

use x86::Flags;

/// The host's way with undefined results and flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undefined {
    /// AF after a shift: set, else clear.
    pub shifts_set_af: bool,
    /// OF after SHLD and SHRD by more than one is the difference of the two top bits, one of which is CF for SHLD; else whether
    /// the sign changed.
    pub double_shifts_compare_top_bits: bool,
    /// SHLD and SHRD of a word by more than 16 go on with the source's bits and clear CF; else with the destination's.
    pub words_go_on_with_source: bool,
    /// RCL and RCR by a multiple of a ring's length derive OF from the result; else they leave the flags alone.
    pub whole_turns_set_of: bool,
    /// MUL and IMUL leave SF, ZF, AF and PF as they are; else they follow from the product.
    pub products_keep_flags: bool,
    /// SF, ZF, AF and PF after BSF and BSR follow from the index; else from the operand.
    pub scans_flag_the_index: bool,
    /// LZCNT and TZCNT leave OF as it is; else they clear it.
    pub counts_keep_of: bool,
}

/// Runs an instruction with given registers and flags: gives RAX and the flags.
macro_rules! tried {
    ($text:literal, $rax:expr, $rbx:expr, $rcx:expr, $flags:expr) => {{
        let (mut rax, mut flags): (u64, u64) = ($rax, $flags | 2);
        // SAFETY: it computes on registers that are named here, and arithmetic flags.
        unsafe {
            asm!(
                "xchg rbx, r8", "push r9", "popfq", $text, "pushfq", "pop r9", "xchg rbx, r8",
                inout("r8") $rbx => _, inout("r9") flags, inout("rax") rax, in("rcx") $rcx as u64,
            );
        }
        (rax, Flags::from_bits_retain(flags))
    }};
}

impl Undefined {
    /// The host's.
    #[inline]
    pub fn of_host() -> &'static Self {
        static HOST: OnceLock<Undefined> = OnceLock::new();
        HOST.get_or_init(Self::tried)
    }

    fn tried() -> Self {
        let all = Flags::ARITHMETIC.bits();
        let kept = Flags::SF | Flags::ZF | Flags::AF | Flags::PF;
        // 3 · 3 = 9, which has PF; before it, SF, ZF and AF are set.
        let (_, product) = tried!("imul eax, ebx", 3, 3u64, 0, all & !Flags::PF.bits());
        Self {
            shifts_set_af: tried!("shl eax, cl", 1, 0u64, 3, 0).1.contains(Flags::AF),
            // From 0b0100… to 0b0001… with the last bit out set: the sign stays, CF differs from it.
            double_shifts_compare_top_bits: tried!("shld eax, ebx, cl", 0x4000_0000, 0u64, 2, 0)
                .1
                .contains(Flags::OF),
            words_go_on_with_source: tried!("shld ax, bx, cl", 0, 0xffffu64, 24, 0).0 as u16 == 0xffff,
            whole_turns_set_of: !tried!("rcl al, cl", 0, 0u64, 9, Flags::OF.bits()).1.contains(Flags::OF),
            products_keep_flags: product & kept == kept - Flags::PF,
            scans_flag_the_index: tried!("bsf eax, ebx", 0, 8u64, 0, 0).1.contains(Flags::PF),
            counts_keep_of: std::is_x86_feature_detected!("bmi1")
                && tried!("tzcnt eax, ebx", 0, 1u64, 0, all).1.contains(Flags::OF),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_defined_is_not_asked_for() {
        let (rax, flags) = tried!("add eax, ebx", 0x7fff_ffff, 1u64, 0, 0);
        assert_eq!(rax, 0x8000_0000);
        let arithmetic = flags & Flags::from_bits_retain(Flags::ARITHMETIC.bits());
        assert_eq!(arithmetic, Flags::OF | Flags::SF | Flags::AF | Flags::PF);
        assert_eq!(*Undefined::of_host(), Undefined::tried(), "each try gives the same");
    }
}
