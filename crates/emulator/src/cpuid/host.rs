//! What the host processor says of itself.

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::{__cpuid_count, CpuidResult};
use std::sync::OnceLock;

use super::feature::{Feature, Word};

/// The host. Asked once, because CPUID on a virtualized host takes as long as an exit to its hypervisor.
#[derive(Debug)]
pub(super) struct Host {
    leaf1: CpuidResult,
    leaf7: CpuidResult,
    leaf7_sub1: CpuidResult,
    extended: CpuidResult,
    sizes: CpuidResult,
    is_intel: bool,
}

impl Host {
    /// This host.
    pub fn get() -> &'static Self {
        static HOST: OnceLock<Host> = OnceLock::new();
        HOST.get_or_init(Self::ask)
    }

    fn ask() -> Self {
        const NONE: CpuidResult = CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 };
        let (basic, extended) = (__cpuid_count(0, 0), __cpuid_count(0x8000_0000, 0));
        let leaf = |leaf: u32, subleaf: u32| {
            let last = if leaf < 0x8000_0000 { basic.eax } else { extended.eax };
            if leaf <= last { __cpuid_count(leaf, subleaf) } else { NONE }
        };
        let leaf7 = leaf(7, 0);
        Self {
            leaf1: leaf(1, 0),
            leaf7,
            leaf7_sub1: if leaf7.eax >= 1 { leaf(7, 1) } else { NONE },
            extended: leaf(0x8000_0001, 0),
            sizes: leaf(0x8000_0008, 0),
            is_intel: [basic.ebx, basic.edx, basic.ecx] == super::leaves::GENUINE_INTEL,
        }
    }

    /// Whether it has a feature whose instructions a host executes.
    pub fn has(&self, feature: Feature) -> bool {
        let register = match feature.word {
            Word::Leaf1Ecx => self.leaf1.ecx,
            Word::Leaf1Edx => self.leaf1.edx,
            Word::Leaf7Ebx => self.leaf7.ebx,
            Word::Leaf7Ecx => self.leaf7.ecx,
            Word::Leaf7Edx => self.leaf7.edx,
            Word::Leaf7Sub1Eax => self.leaf7_sub1.eax,
            Word::ExtendedEcx => self.extended.ecx,
            Word::ExtendedEdx => self.extended.edx,
            // No instruction that computes is told here.
            Word::Leaf6Eax | Word::CountersEax | Word::XsaveEax | Word::PowerEdx | Word::SizesEbx => 0,
        };
        register >> feature.bit & 1 != 0
    }

    /// Whether its kernel keeps the registers of AVX.
    pub fn saves_avx(&self) -> bool {
        is_x86_feature_detected!("avx")
    }

    /// Whether its kernel keeps the registers of AVX-512.
    pub fn saves_avx512(&self) -> bool {
        is_x86_feature_detected!("avx512f")
    }

    /// Family, model and stepping, where they are Intel's.
    pub fn intel_signature(&self) -> Option<u32> {
        self.is_intel.then_some(self.leaf1.eax & 0x0fff_3fff)
    }

    /// Bits of a physical address.
    pub fn physical_bits(&self) -> u32 {
        match self.sizes.eax & 0xff {
            0 => 36,
            bits => bits,
        }
    }
}
