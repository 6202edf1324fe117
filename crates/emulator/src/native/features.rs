//! The processor features whose instructions may be listed, and which of them the host has.

use std::arch::is_x86_feature_detected as host_has;
use std::sync::OnceLock;

use iced_x86::CpuidFeature;

/// What a stub can use of the host to move guest registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Host {
    /// VEX instructions and YMM registers.
    pub avx: bool,
    /// AVX-512 as every processor since 2017 has it: F, BW, DQ and VL.
    pub avx512: bool,
}

impl Host {
    /// This host.
    pub fn get() -> Self {
        static HOST: OnceLock<Host> = OnceLock::new();
        *HOST.get_or_init(|| Self {
            avx: host_has!("avx"),
            avx512: host_has!("avx512f")
                && host_has!("avx512bw")
                && host_has!("avx512dq")
                && host_has!("avx512vl"),
        })
    }
}

/// Features of every x86-64 processor. Their integer instructions are listed by mnemonic, not by rule.
pub(super) fn is_base(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(feature, INTEL8086 | INTEL186 | INTEL386 | INTEL486 | X64 | CMOV)
}

/// Features all of whose instructions only compute, but for those that the allow-list's rule refuses.
pub(super) fn is_computing(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        feature,
        FPU | FPU287
            | FPU387
            | MMX
            | SSE
            | SSE2
            | SSE3
            | SSSE3
            | SSE4_1
            | SSE4_2
            | POPCNT
            | LZCNT
            | BMI1
            | BMI2
            | ADX
            | MOVBE
            | AES
            | PCLMULQDQ
            | SHA
            | GFNI
            | F16C
            | FMA
            | AVX
            | AVX2
            | VAES
            | VPCLMULQDQ
            | AVX_VNNI
    ) || is_avx512(feature)
}

fn is_avx512(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        feature,
        AVX512F
            | AVX512BW
            | AVX512CD
            | AVX512DQ
            | AVX512VL
            | AVX512_IFMA
            | AVX512_VBMI
            | AVX512_VBMI2
            | AVX512_VNNI
            | AVX512_BITALG
            | AVX512_VPOPCNTDQ
            | AVX512_BF16
            | AVX512_FP16
    )
}

/// Whether the host executes instructions of a feature that [`is_base`] or [`is_computing`] names.
pub(super) fn host_executes(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    if is_avx512(feature) && !Host::get().avx512 {
        return false;
    }
    match feature {
        SSE3 => host_has!("sse3"),
        SSSE3 => host_has!("ssse3"),
        SSE4_1 => host_has!("sse4.1"),
        SSE4_2 => host_has!("sse4.2"),
        POPCNT => host_has!("popcnt"),
        LZCNT => host_has!("lzcnt"),
        BMI1 => host_has!("bmi1"),
        BMI2 => host_has!("bmi2"),
        ADX => host_has!("adx"),
        MOVBE => host_has!("movbe"),
        AES => host_has!("aes"),
        PCLMULQDQ => host_has!("pclmulqdq"),
        SHA => host_has!("sha"),
        GFNI => host_has!("gfni"),
        F16C => host_has!("f16c"),
        FMA => host_has!("fma"),
        AVX => host_has!("avx"),
        AVX2 => host_has!("avx2"),
        VAES => host_has!("vaes"),
        VPCLMULQDQ => host_has!("vpclmulqdq"),
        AVX_VNNI => has_leaf_7_1_eax(4),
        AVX512CD => host_has!("avx512cd"),
        AVX512_IFMA => host_has!("avx512ifma"),
        AVX512_VBMI => host_has!("avx512vbmi"),
        AVX512_VBMI2 => host_has!("avx512vbmi2"),
        AVX512_VNNI => host_has!("avx512vnni"),
        AVX512_BITALG => host_has!("avx512bitalg"),
        AVX512_VPOPCNTDQ => host_has!("avx512vpopcntdq"),
        AVX512_BF16 => host_has!("avx512bf16"),
        AVX512_FP16 => has_leaf_7_0_edx(23),
        AVX512F | AVX512BW | AVX512DQ | AVX512VL => true,
        FPU | FPU287 | FPU387 | MMX | SSE | SSE2 => true,
        other => is_base(other),
    }
}

/// A bit of CPUID.(EAX=7,ECX=0):EDX; what uses it also needs [`Host::avx512`] for the register state.
fn has_leaf_7_0_edx(bit: u32) -> bool {
    leaf(7, 0).is_some_and(|leaf| leaf.edx >> bit & 1 != 0)
}

/// A bit of CPUID.(EAX=7,ECX=1):EAX; what uses it also needs [`Host::avx`] for the register state.
fn has_leaf_7_1_eax(bit: u32) -> bool {
    Host::get().avx
        && leaf(7, 0).is_some_and(|leaf| leaf.eax >= 1)
        && leaf(7, 1).is_some_and(|leaf| leaf.eax >> bit & 1 != 0)
}

fn leaf(leaf: u32, subleaf: u32) -> Option<std::arch::x86_64::CpuidResult> {
    let highest = std::arch::x86_64::__cpuid(0).eax;
    (highest >= leaf).then(|| std::arch::x86_64::__cpuid_count(leaf, subleaf))
}
