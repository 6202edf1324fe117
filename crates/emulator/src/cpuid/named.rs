//! The named models: the levels of the x86-64 psABI, and processors of Intel.
//!
//! A model lists what software on it expects of the instruction set; what every model has (the platform's features)
//! is not repeated, and what the processor of that name had and this one does not offer (VMX, TSX, MPX …) is left out.

use super::feature::*;

/// A model.
#[derive(Debug)]
pub(super) struct Named {
    /// Its name.
    pub name: &'static str,
    /// Type, family, model and stepping, as leaf 01H tells them in EAX.
    pub signature: u32,
    /// Its features: those of another model…
    base: Option<&'static Named>,
    /// … and these.
    more: &'static [Feature],
}

impl Named {
    /// All its features.
    pub fn features(&self) -> Features {
        let mut set = match self.base {
            Some(base) => base.features(),
            None => Features::filtered(|f| matches!(f.origin, Origin::Base | Origin::Platform)),
        };
        self.more.iter().for_each(|feature| set.add(*feature));
        set
    }
}

static V1: Named = Named { name: "x86-64-v1", signature: 0x0000_06fb, base: None, more: &[] };

static V2: Named = Named {
    name: "x86-64-v2",
    signature: 0x0001_06a5,
    base: Some(&V1),
    more: &[CX16, LAHF_LM, POPCNT, SSE3, SSSE3, SSE4_1, SSE4_2],
};

static V3: Named = Named {
    name: "x86-64-v3",
    signature: 0x0003_06f2,
    base: Some(&V2),
    more: &[AVX, AVX2, BMI1, BMI2, F16C, FMA, ABM, MOVBE, XSAVE],
};

static V4: Named = Named {
    name: "x86-64-v4",
    signature: 0x0005_0654,
    base: Some(&V3),
    more: &[AVX512F, AVX512BW, AVX512CD, AVX512DQ, AVX512VL],
};

static NEHALEM: Named =
    Named { name: "Nehalem", signature: 0x0001_06a5, base: Some(&V2), more: &[RDTSCP, PREFETCHW] };

static WESTMERE: Named = Named {
    name: "Westmere",
    signature: 0x0002_06c2,
    base: Some(&NEHALEM),
    more: &[AES, PCLMULQDQ, PCID, PDPE1GB],
};

static SANDY_BRIDGE: Named = Named {
    name: "SandyBridge",
    signature: 0x0002_06d7,
    base: Some(&WESTMERE),
    more: &[XSAVE, XSAVEOPT, AVX],
};

static IVY_BRIDGE: Named = Named {
    name: "IvyBridge",
    signature: 0x0003_06e4,
    base: Some(&SANDY_BRIDGE),
    more: &[F16C, RDRAND, FSGSBASE, SMEP, ERMS],
};

static HASWELL: Named = Named {
    name: "Haswell",
    signature: 0x0003_06f2,
    base: Some(&IVY_BRIDGE),
    more: &[AVX2, FMA, BMI1, BMI2, MOVBE, ABM, INVPCID],
};

static BROADWELL: Named =
    Named { name: "Broadwell", signature: 0x0004_06f1, base: Some(&HASWELL), more: &[ADX, RDSEED, SMAP] };

static SKYLAKE_CLIENT: Named = Named {
    name: "Skylake-Client",
    signature: 0x0005_06e3,
    base: Some(&BROADWELL),
    more: &[CLFLUSHOPT, XSAVEC, XGETBV1, XSAVES],
};

static SKYLAKE_SERVER: Named = Named {
    name: "Skylake-Server",
    signature: 0x0005_0654,
    base: Some(&SKYLAKE_CLIENT),
    more: &[AVX512F, AVX512BW, AVX512CD, AVX512DQ, AVX512VL, CLWB, PKU],
};

static CASCADE_LAKE_SERVER: Named = Named {
    name: "Cascadelake-Server",
    signature: 0x0005_0656,
    base: Some(&SKYLAKE_SERVER),
    more: &[AVX512_VNNI],
};

static ICE_LAKE_SERVER: Named = Named {
    name: "Icelake-Server",
    signature: 0x0006_06a6,
    base: Some(&CASCADE_LAKE_SERVER),
    more: &[
        AVX512IFMA,
        AVX512VBMI,
        AVX512_VBMI2,
        AVX512_BITALG,
        AVX512_VPOPCNTDQ,
        GFNI,
        VAES,
        VPCLMULQDQ,
        SHA,
        UMIP,
        RDPID,
        FSRM,
        WBNOINVD,
    ],
};

static SAPPHIRE_RAPIDS: Named = Named {
    name: "SapphireRapids",
    signature: 0x0008_06f8,
    base: Some(&ICE_LAKE_SERVER),
    more: &[AVX_VNNI, AVX512_BF16, AVX512_FP16, SERIALIZE, CLDEMOTE, MOVDIRI, MOVDIR64B],
};

/// All of them.
pub(super) static ALL: [&Named; 15] = [
    &V1,
    &V2,
    &V3,
    &V4,
    &NEHALEM,
    &WESTMERE,
    &SANDY_BRIDGE,
    &IVY_BRIDGE,
    &HASWELL,
    &BROADWELL,
    &SKYLAKE_CLIENT,
    &SKYLAKE_SERVER,
    &CASCADE_LAKE_SERVER,
    &ICE_LAKE_SERVER,
    &SAPPHIRE_RAPIDS,
];

/// A model by its name; case does not count.
pub(super) fn by_name(name: &str) -> Option<&'static Named> {
    ALL.iter().find(|model| model.name.eq_ignore_ascii_case(name)).copied()
}

/// The newest processor all of whose features are in a set: whose numbers to bear on a host that is not Intel's.
pub(super) fn nearest_signature(features: &Features) -> u32 {
    let fits = |model: &&&Named| model.features().iter().all(|feature| features.has(feature));
    ALL.iter().rev().find(fits).map_or(V1.signature, |model| model.signature)
}
