//! The processor features that there are, each declared once: its name, its bit in CPUID, and who brings it.
//! SDM vol. 2, *CPUID—CPU Identification*. Names are those of Linux's /proc/cpuinfo.

use super::host::Host;

/// A register of a CPUID leaf that holds feature bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Word {
    /// Leaf 01H.
    Leaf1Ecx,
    /// Leaf 01H.
    Leaf1Edx,
    /// Leaf 06H.
    Leaf6Eax,
    /// Leaf 07H, subleaf 0.
    Leaf7Ebx,
    /// Leaf 07H, subleaf 0.
    Leaf7Ecx,
    /// Leaf 07H, subleaf 0.
    Leaf7Edx,
    /// Leaf 07H, subleaf 1.
    Leaf7Sub1Eax,
    /// Leaf 0AH: the version of the performance counters, which is 2 or nothing.
    CountersEax,
    /// Leaf 0DH, subleaf 1.
    XsaveEax,
    /// Leaf 80000001H.
    ExtendedEcx,
    /// Leaf 80000001H.
    ExtendedEdx,
    /// Leaf 80000007H.
    PowerEdx,
    /// Leaf 80000008H.
    SizesEbx,
}

/// How many [`Word`]s there are.
const WORDS: usize = 13;

/// Who brings a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Every x86-64 processor has it; it cannot be taken away.
    Base,
    /// Ringside's code, on any host; it belongs to the platform, so every model has it.
    Platform,
    /// Ringside's code, on any host; the model says whether it is there.
    Ours,
    /// The host processor, which executes its instructions.
    Host,
}

/// A processor feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Linux's name of it.
    pub name: &'static str,
    /// Where CPUID tells it.
    pub word: Word,
    /// The bit there.
    pub bit: u8,
    /// Who brings it.
    pub origin: Origin,
}

/// Declares the features and [`ALL`], the list of them.
macro_rules! features {
    ($($name:ident $text:literal $word:ident $bit:literal $origin:ident;)*) => {
        $(
            #[doc = concat!("`", $text, "`.")]
            pub const $name: Feature =
                Feature { name: $text, word: Word::$word, bit: $bit, origin: Origin::$origin };
        )*
        /// All of them.
        pub const ALL: &[Feature] = &[$($name),*];
    };
}

features! {
    FPU "fpu" Leaf1Edx 0 Base;
    VME "vme" Leaf1Edx 1 Platform;
    DE "de" Leaf1Edx 2 Platform;
    PSE "pse" Leaf1Edx 3 Base;
    TSC "tsc" Leaf1Edx 4 Base;
    MSR "msr" Leaf1Edx 5 Base;
    PAE "pae" Leaf1Edx 6 Base;
    MCE "mce" Leaf1Edx 7 Platform;
    CX8 "cx8" Leaf1Edx 8 Base;
    APIC "apic" Leaf1Edx 9 Base;
    SEP "sep" Leaf1Edx 11 Base;
    MTRR "mtrr" Leaf1Edx 12 Base;
    PGE "pge" Leaf1Edx 13 Base;
    MCA "mca" Leaf1Edx 14 Platform;
    CMOV "cmov" Leaf1Edx 15 Base;
    PAT "pat" Leaf1Edx 16 Base;
    PSE36 "pse36" Leaf1Edx 17 Platform;
    CLFLUSH "clflush" Leaf1Edx 19 Base;
    MMX "mmx" Leaf1Edx 23 Base;
    FXSR "fxsr" Leaf1Edx 24 Base;
    SSE "sse" Leaf1Edx 25 Base;
    SSE2 "sse2" Leaf1Edx 26 Base;
    SS "ss" Leaf1Edx 27 Platform;

    SSE3 "pni" Leaf1Ecx 0 Host;
    PCLMULQDQ "pclmulqdq" Leaf1Ecx 1 Host;
    SSSE3 "ssse3" Leaf1Ecx 9 Host;
    FMA "fma" Leaf1Ecx 12 Host;
    CX16 "cx16" Leaf1Ecx 13 Host;
    PDCM "pdcm" Leaf1Ecx 15 Platform;
    PCID "pcid" Leaf1Ecx 17 Ours;
    SSE4_1 "sse4_1" Leaf1Ecx 19 Host;
    SSE4_2 "sse4_2" Leaf1Ecx 20 Host;
    X2APIC "x2apic" Leaf1Ecx 21 Platform;
    MOVBE "movbe" Leaf1Ecx 22 Host;
    POPCNT "popcnt" Leaf1Ecx 23 Host;
    TSC_DEADLINE "tsc_deadline_timer" Leaf1Ecx 24 Platform;
    AES "aes" Leaf1Ecx 25 Host;
    XSAVE "xsave" Leaf1Ecx 26 Ours;
    AVX "avx" Leaf1Ecx 28 Host;
    F16C "f16c" Leaf1Ecx 29 Host;
    RDRAND "rdrand" Leaf1Ecx 30 Host;
    HYPERVISOR "hypervisor" Leaf1Ecx 31 Platform;

    ARAT "arat" Leaf6Eax 2 Platform;

    ARCH_PERFMON "arch_perfmon" CountersEax 1 Platform;

    FSGSBASE "fsgsbase" Leaf7Ebx 0 Ours;
    TSC_ADJUST "tsc_adjust" Leaf7Ebx 1 Platform;
    BMI1 "bmi1" Leaf7Ebx 3 Host;
    AVX2 "avx2" Leaf7Ebx 5 Host;
    SMEP "smep" Leaf7Ebx 7 Ours;
    BMI2 "bmi2" Leaf7Ebx 8 Host;
    ERMS "erms" Leaf7Ebx 9 Ours;
    INVPCID "invpcid" Leaf7Ebx 10 Ours;
    AVX512F "avx512f" Leaf7Ebx 16 Host;
    AVX512DQ "avx512dq" Leaf7Ebx 17 Host;
    RDSEED "rdseed" Leaf7Ebx 18 Host;
    ADX "adx" Leaf7Ebx 19 Host;
    SMAP "smap" Leaf7Ebx 20 Ours;
    AVX512IFMA "avx512ifma" Leaf7Ebx 21 Host;
    CLFLUSHOPT "clflushopt" Leaf7Ebx 23 Ours;
    CLWB "clwb" Leaf7Ebx 24 Ours;
    AVX512CD "avx512cd" Leaf7Ebx 28 Host;
    SHA "sha_ni" Leaf7Ebx 29 Host;
    AVX512BW "avx512bw" Leaf7Ebx 30 Host;
    AVX512VL "avx512vl" Leaf7Ebx 31 Host;

    AVX512VBMI "avx512vbmi" Leaf7Ecx 1 Host;
    UMIP "umip" Leaf7Ecx 2 Ours;
    PKU "pku" Leaf7Ecx 3 Ours;
    LA57 "la57" Leaf7Ecx 16 Ours;
    PKS "pks" Leaf7Ecx 31 Ours;
    AVX512_VBMI2 "avx512_vbmi2" Leaf7Ecx 6 Host;
    GFNI "gfni" Leaf7Ecx 8 Host;
    VAES "vaes" Leaf7Ecx 9 Host;
    VPCLMULQDQ "vpclmulqdq" Leaf7Ecx 10 Host;
    AVX512_VNNI "avx512_vnni" Leaf7Ecx 11 Host;
    AVX512_BITALG "avx512_bitalg" Leaf7Ecx 12 Host;
    AVX512_VPOPCNTDQ "avx512_vpopcntdq" Leaf7Ecx 14 Host;
    RDPID "rdpid" Leaf7Ecx 22 Ours;
    CLDEMOTE "cldemote" Leaf7Ecx 25 Ours;
    MOVDIRI "movdiri" Leaf7Ecx 27 Ours;
    MOVDIR64B "movdir64b" Leaf7Ecx 28 Ours;

    FSRM "fsrm" Leaf7Edx 4 Ours;
    SERIALIZE "serialize" Leaf7Edx 14 Ours;
    AVX512_FP16 "avx512_fp16" Leaf7Edx 23 Host;
    SPEC_CTRL "ibrs" Leaf7Edx 26 Platform;
    STIBP "stibp" Leaf7Edx 27 Platform;
    FLUSH_L1D "flush_l1d" Leaf7Edx 28 Platform;
    ARCH_CAPABILITIES "arch_capabilities" Leaf7Edx 29 Platform;
    SSBD "ssbd" Leaf7Edx 31 Platform;

    AVX_VNNI "avx_vnni" Leaf7Sub1Eax 4 Host;
    AVX512_BF16 "avx512_bf16" Leaf7Sub1Eax 5 Host;
    LAM "lam" Leaf7Sub1Eax 26 Ours;

    XSAVEOPT "xsaveopt" XsaveEax 0 Ours;
    XSAVEC "xsavec" XsaveEax 1 Ours;
    XGETBV1 "xgetbv1" XsaveEax 2 Ours;
    XSAVES "xsaves" XsaveEax 3 Ours;

    LAHF_LM "lahf_lm" ExtendedEcx 0 Ours;
    ABM "abm" ExtendedEcx 5 Host;
    PREFETCHW "3dnowprefetch" ExtendedEcx 8 Ours;
    SYSCALL "syscall" ExtendedEdx 11 Base;
    NX "nx" ExtendedEdx 20 Platform;
    PDPE1GB "pdpe1gb" ExtendedEdx 26 Ours;
    RDTSCP "rdtscp" ExtendedEdx 27 Ours;
    LM "lm" ExtendedEdx 29 Base;

    NONSTOP_TSC "nonstop_tsc" PowerEdx 8 Platform;

    WBNOINVD "wbnoinvd" SizesEbx 9 Ours;
}

/// Other names that people give to features.
const ALIASES: &[(&str, Feature)] = &[
    ("sse3", SSE3),
    ("sse4.1", SSE4_1),
    ("sse4.2", SSE4_2),
    ("lzcnt", ABM),
    ("sha", SHA),
    ("ibpb", SPEC_CTRL),
    ("spec_ctrl", SPEC_CTRL),
    ("tsc_deadline", TSC_DEADLINE),
    ("invtsc", NONSTOP_TSC),
    ("constant_tsc", NONSTOP_TSC),
];

/// Features that processors have and this one does not: taking one away is no mistake, asking for it is.
pub(super) const NOT_OFFERED: &[&str] = &[
    "dtes64",
    "monitor",
    "vmx",
    "smx",
    "est",
    "tm2",
    "sdbg",
    "xtpr",
    "dca",
    "osxsave",
    "ht",
    "hle",
    "rtm",
    "sgx",
    "mpx",
    "cqm",
    "rdt_a",
    "intel_pt",
    "ospke",
    "waitpkg",
    "shstk",
    "ibt",
    "user_shstk",
    "tme",
    "enqcmd",
    "uintr",
    "avx512_vp2intersect",
    "md_clear",
    "tsxldtrk",
    "pconfig",
    "arch_lbr",
    "amx_bf16",
    "amx_tile",
    "amx_int8",
    "amx_fp16",
    "fred",
    "lkgs",
    "cmpccxadd",
    "xfd",
    "svm",
    "sse4a",
    "fma4",
    "xop",
    "tbm",
    "3dnow",
    "3dnowext",
    "dtherm",
    "pln",
    "pts",
    "hwp",
];

/// The first of each pair needs the second: it goes when the second goes, and brings it along when it comes.
const NEEDS: &[(Feature, Feature)] = &[
    (SSSE3, SSE3),
    (SSE4_1, SSSE3),
    (SSE4_2, SSE4_1),
    (XSAVEOPT, XSAVE),
    (XSAVEC, XSAVE),
    (XGETBV1, XSAVE),
    (XSAVES, XSAVEC),
    (AVX, XSAVE),
    (AVX, SSE4_2),
    (FMA, AVX),
    (F16C, AVX),
    (AVX2, AVX),
    (VAES, AVX),
    (VAES, AES),
    (VPCLMULQDQ, AVX),
    (VPCLMULQDQ, PCLMULQDQ),
    (AVX_VNNI, AVX2),
    (AVX512F, AVX2),
    (AVX512F, FMA),
    (AVX512F, F16C),
    (AVX512DQ, AVX512F),
    (AVX512CD, AVX512F),
    (AVX512BW, AVX512F),
    (AVX512VL, AVX512F),
    (AVX512IFMA, AVX512F),
    (AVX512VBMI, AVX512BW),
    (AVX512_VBMI2, AVX512BW),
    (AVX512_VNNI, AVX512F),
    (AVX512_BITALG, AVX512BW),
    (AVX512_VPOPCNTDQ, AVX512F),
    (AVX512_BF16, AVX512BW),
    (AVX512_FP16, AVX512BW),
    (AVX512_FP16, AVX512DQ),
    (INVPCID, PCID),
    (PKU, XSAVE),
    (FSRM, ERMS),
    (STIBP, SPEC_CTRL),
    (SSBD, SPEC_CTRL),
    (MCA, MCE),
    (PDCM, ARCH_PERFMON),
];

/// A feature by its name or alias; case does not count.
pub(super) fn by_name(name: &str) -> Option<Feature> {
    let alias = || ALIASES.iter().find(|(alias, _)| alias.eq_ignore_ascii_case(name)).map(|(_, f)| *f);
    ALL.iter().find(|feature| feature.name.eq_ignore_ascii_case(name)).copied().or_else(alias)
}

/// A set of features, as CPUID holds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features([u32; WORDS]);

impl Features {
    /// All that `choose` says yes to.
    pub fn filtered(choose: impl Fn(&Feature) -> bool) -> Self {
        let mut set = Self::default();
        ALL.iter().filter(|feature| choose(feature)).for_each(|feature| set.set(*feature));
        set
    }

    /// The register that tells these features.
    pub fn word(&self, word: Word) -> u32 {
        self.0[word as usize]
    }

    /// Whether it has a feature.
    pub fn has(&self, feature: Feature) -> bool {
        self.word(feature.word) >> feature.bit & 1 != 0
    }

    /// The features in it, in the order of [`ALL`].
    pub fn iter(&self) -> impl Iterator<Item = Feature> + '_ {
        ALL.iter().copied().filter(|feature| self.has(*feature))
    }

    fn set(&mut self, feature: Feature) {
        self.0[feature.word as usize] |= 1 << feature.bit;
    }

    /// Adds a feature with all that it needs.
    pub fn add(&mut self, feature: Feature) {
        if self.has(feature) {
            return;
        }
        self.set(feature);
        let needed = NEEDS.iter().filter(|(dependent, _)| *dependent == feature);
        needed.for_each(|(_, needed)| self.add(*needed));
    }

    /// Takes a feature away with all that needs it.
    pub fn remove(&mut self, feature: Feature) {
        self.0[feature.word as usize] &= !(1 << feature.bit);
        let dependents = NEEDS.iter().filter(|(_, needed)| *needed == feature);
        dependents.for_each(|(dependent, _)| self.remove(*dependent));
    }

    /// All that this host and Ringside's code can bring.
    pub fn available() -> Self {
        let host = Host::get();
        let mut set = Self::filtered(|f| f.origin != Origin::Host || host.has(*f));
        if !host.saves_avx() {
            set.remove(AVX);
        }
        // Host execution moves the registers of AVX-512 with instructions of all four.
        if !host.saves_avx512() || ![AVX512F, AVX512DQ, AVX512BW, AVX512VL].iter().all(|f| set.has(*f)) {
            set.remove(AVX512F);
        }
        // A host whose hypervisor took features out one by one may lack what others of its features need.
        let lost = |set: &Self| {
            let broken = NEEDS.iter().find(|(dependent, needed)| set.has(*dependent) && !set.has(*needed));
            broken.map(|(dependent, _)| *dependent)
        };
        while let Some(feature) = lost(&set) {
            set.remove(feature);
        }
        set
    }
}
