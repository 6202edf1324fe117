//! Which instructions a model has: from iced's name of a feature to ours.

use iced_x86::{CpuidFeature, DecoderOptions};
use x86::{Cr4, Xcr0};

use super::CpuModel;
use super::feature::{self, Feature};

/// What an instruction of a feature needs of the model.
enum Needs {
    /// Every x86-64 processor executes it.
    Nothing,
    /// A feature.
    One(Feature),
    /// No model executes it.
    Unmet,
}

impl CpuModel {
    /// Whether the model promises all of these features of an instruction.
    pub fn allows(&self, features: &[CpuidFeature]) -> bool {
        features.iter().all(|feature| match needs(*feature) {
            Needs::Nothing => true,
            Needs::One(feature) => self.has(feature),
            Needs::Unmet => false,
        })
    }

    /// How this model's instructions are decoded, as [`iced_x86::DecoderOptions`]: without BMI1 and ABM, the prefix of
    /// TZCNT and LZCNT is ignored, which compilers rely on; so is that of WBNOINVD.
    pub fn decoder_options(&self) -> u32 {
        let without = |feature, options| if self.has(feature) { DecoderOptions::NONE } else { options };
        without(feature::BMI1, DecoderOptions::NO_MPFX_0FBC)
            | without(feature::ABM, DecoderOptions::NO_MPFX_0FBD)
            | without(feature::WBNOINVD, DecoderOptions::NO_WBNOINVD)
            | without(feature::LAHF_LM, DecoderOptions::NO_LAHF_SAHF_64)
    }

    /// The bits of CR4 that the model has.
    pub fn control_bits(&self) -> Cr4 {
        let optional = [
            (feature::VME, Cr4::VME.union(Cr4::PVI)),
            (feature::DE, Cr4::DE),
            (feature::MCE, Cr4::MCE),
            (feature::UMIP, Cr4::UMIP),
            (feature::LA57, Cr4::LA57),
            (feature::PKU, Cr4::PKE),
            (feature::PKS, Cr4::PKS),
            (feature::LAM, Cr4::LAM_SUP),
            (feature::FSGSBASE, Cr4::FSGSBASE),
            (feature::PCID, Cr4::PCIDE),
            (feature::XSAVE, Cr4::OSXSAVE),
            (feature::SMEP, Cr4::SMEP),
            (feature::SMAP, Cr4::SMAP),
        ];
        let always = Cr4::TSD | Cr4::PSE | Cr4::PAE | Cr4::PGE | Cr4::PCE | Cr4::OSFXSR | Cr4::OSXMMEXCPT;
        let has = optional.into_iter().filter(|(feature, _)| self.has(*feature));
        has.fold(always, |bits, (_, bit)| bits | bit)
    }

    /// The states that XCR0 may have; none without XSAVE.
    pub fn xsave_states(&self) -> Xcr0 {
        let of = |feature, states| if self.has(feature) { states } else { Xcr0::empty() };
        of(feature::XSAVE, Xcr0::X87 | Xcr0::SSE)
            | of(feature::AVX, Xcr0::AVX)
            | of(feature::AVX512F, Xcr0::OPMASK | Xcr0::ZMM_HI256 | Xcr0::HI16_ZMM)
            | of(feature::PKU, Xcr0::PKRU)
    }
}

fn needs(feature: CpuidFeature) -> Needs {
    use CpuidFeature::*;
    match feature {
        INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64 | FPU | FPU287 | FPU387 | MMX | SSE
        | SSE2 | FXSR | CMOV | CX8 | CPUID | MSR | TSC | RDPMC | PAUSE | MULTIBYTENOP | CLFSH | SEP
        | SYSCALL => Needs::Nothing,
        // Hints in the space of long NOPs, which processors without the feature execute as such. RDSSP and ENDBR are
        // among them; of the other instructions of CET the table says that they are undefined.
        PREFETCHW | PREFETCHWT1 | PREFETCHITI | CLDEMOTE | CET_IBT | CET_SS => Needs::Nothing,
        // VMCALL, which is how a guest calls KVM. The others are undefined by the table.
        VMX => Needs::Nothing,
        _ => match optional(feature).or_else(|| avx512(feature)) {
            Some(feature) => Needs::One(feature),
            None => Needs::Unmet,
        },
    }
}

fn optional(feature: CpuidFeature) -> Option<Feature> {
    use CpuidFeature::*;
    Some(match feature {
        ADX => feature::ADX,
        AES => feature::AES,
        AVX => feature::AVX,
        AVX2 => feature::AVX2,
        AVX_VNNI => feature::AVX_VNNI,
        BMI1 => feature::BMI1,
        BMI2 => feature::BMI2,
        CLFLUSHOPT => feature::CLFLUSHOPT,
        CLWB => feature::CLWB,
        CMPXCHG16B => feature::CX16,
        F16C => feature::F16C,
        FMA => feature::FMA,
        FSGSBASE => feature::FSGSBASE,
        GFNI => feature::GFNI,
        INVPCID => feature::INVPCID,
        LZCNT => feature::ABM,
        MOVBE => feature::MOVBE,
        MOVDIR64B => feature::MOVDIR64B,
        MOVDIRI => feature::MOVDIRI,
        PCLMULQDQ => feature::PCLMULQDQ,
        PKU => feature::PKU,
        POPCNT => feature::POPCNT,
        RDPID => feature::RDPID,
        RDRAND => feature::RDRAND,
        RDSEED => feature::RDSEED,
        RDTSCP => feature::RDTSCP,
        SERIALIZE => feature::SERIALIZE,
        SHA => feature::SHA,
        SMAP => feature::SMAP,
        SSE3 => feature::SSE3,
        SSSE3 => feature::SSSE3,
        SSE4_1 => feature::SSE4_1,
        SSE4_2 => feature::SSE4_2,
        VAES => feature::VAES,
        VPCLMULQDQ => feature::VPCLMULQDQ,
        WBNOINVD => feature::WBNOINVD,
        XSAVE => feature::XSAVE,
        XSAVEC => feature::XSAVEC,
        XSAVEOPT => feature::XSAVEOPT,
        XSAVES => feature::XSAVES,
        _ => return None,
    })
}

fn avx512(feature: CpuidFeature) -> Option<Feature> {
    use CpuidFeature::*;
    Some(match feature {
        AVX512F => feature::AVX512F,
        AVX512BW => feature::AVX512BW,
        AVX512CD => feature::AVX512CD,
        AVX512DQ => feature::AVX512DQ,
        AVX512VL => feature::AVX512VL,
        AVX512_IFMA => feature::AVX512IFMA,
        AVX512_VBMI => feature::AVX512VBMI,
        AVX512_VBMI2 => feature::AVX512_VBMI2,
        AVX512_VNNI => feature::AVX512_VNNI,
        AVX512_BITALG => feature::AVX512_BITALG,
        AVX512_VPOPCNTDQ => feature::AVX512_VPOPCNTDQ,
        AVX512_BF16 => feature::AVX512_BF16,
        AVX512_FP16 => feature::AVX512_FP16,
        _ => return None,
    })
}
