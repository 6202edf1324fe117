//! What the host processor says of itself.

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::{__cpuid_count, CpuidResult};

use super::feature::Word;

/// A leaf of the host's CPUID; zeros where it has no such leaf.
fn leaf(leaf: u32, subleaf: u32) -> CpuidResult {
    let highest = __cpuid_count(leaf & 0x8000_0000, 0).eax;
    if leaf > highest {
        return CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 };
    }
    __cpuid_count(leaf, subleaf)
}

/// The host's feature bits.
pub(super) fn register(word: Word) -> u32 {
    match word {
        Word::Leaf1Ecx => leaf(1, 0).ecx,
        Word::Leaf1Edx => leaf(1, 0).edx,
        Word::Leaf6Eax => leaf(6, 0).eax,
        Word::Leaf7Ebx => leaf(7, 0).ebx,
        Word::Leaf7Ecx => leaf(7, 0).ecx,
        Word::Leaf7Edx => leaf(7, 0).edx,
        Word::Leaf7Sub1Eax if leaf(7, 0).eax >= 1 => leaf(7, 1).eax,
        Word::Leaf7Sub1Eax => 0,
        Word::XsaveEax => leaf(0xd, 1).eax,
        Word::ExtendedEcx => leaf(0x8000_0001, 0).ecx,
        Word::ExtendedEdx => leaf(0x8000_0001, 0).edx,
        Word::PowerEdx => leaf(0x8000_0007, 0).edx,
        Word::SizesEbx => leaf(0x8000_0008, 0).ebx,
    }
}

/// Whether the host's kernel keeps the registers of AVX.
pub(super) fn saves_avx() -> bool {
    is_x86_feature_detected!("avx")
}

/// Whether the host's kernel keeps the registers of AVX-512.
pub(super) fn saves_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
}

/// Family, model and stepping, where they are Intel's.
pub(super) fn intel_signature() -> Option<u32> {
    let vendor = leaf(0, 0);
    let names = [vendor.ebx, vendor.edx, vendor.ecx] == super::leaves::GENUINE_INTEL;
    names.then(|| leaf(1, 0).eax & 0x0fff_3fff)
}

/// Leaf 07H EBX: how the x87 unit, which the host executes, treats the last instruction's and operand's addresses
/// (FDP_EXCPTN_ONLY, and FCS and FDS always zero).
pub(super) fn x87_pointers() -> u32 {
    register(Word::Leaf7Ebx) & (1 << 6 | 1 << 13)
}

/// Bits of a physical address.
pub(super) fn physical_bits() -> u32 {
    match leaf(0x8000_0008, 0).eax & 0xff {
        0 => 36,
        bits => bits,
    }
}
