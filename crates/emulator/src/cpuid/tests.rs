//! What every model promises, and what the texts that describe one may be.

use iced_x86::{Code, CpuidFeature};
use x86::{Cr4, Xcr0};

use super::feature::{self, ALL, Feature, Features, Origin};
use super::{CpuModel, CpuModelError, CpuidContext};

fn host(cpus: u32) -> CpuModel {
    CpuModel::parse("host", cpus).unwrap()
}

fn context(xcr0: u64) -> CpuidContext {
    CpuidContext {
        apic_id: 2,
        tsc_hz: 2_300_000_000,
        osxsave: true,
        ospke: false,
        xcr0,
        ..CpuidContext::default()
    }
}

fn models() -> impl Iterator<Item = CpuModel> {
    CpuModel::usable_names().into_iter().map(|name| CpuModel::parse(name, 4).unwrap())
}

#[test]
fn a_bit_of_cpuid_means_one_feature() {
    for (n, a) in ALL.iter().enumerate() {
        for b in &ALL[n + 1..] {
            assert!((a.word, a.bit) != (b.word, b.bit) && a.name != b.name, "{a:?} and {b:?}");
        }
    }
}

#[test]
fn each_register_tells_the_features_of_the_model() {
    let model = host(2);
    let context = CpuidContext { osxsave: false, ..context(1) };
    let read = |leaf, subleaf, register: usize| model.cpuid(&context, leaf, subleaf)[register];
    assert_eq!(read(7, 0, 1) & 1 << 16 != 0, model.has(feature::AVX512F));
    assert_eq!(read(7, 0, 1) & 1 << 20 != 0, model.has(feature::SMAP));
    assert_eq!(read(7, 0, 2) & 1 << 22 != 0, model.has(feature::RDPID));
    assert_eq!(read(7, 0, 3) & 1 << 29 != 0, model.has(feature::ARCH_CAPABILITIES));
    assert_eq!(read(1, 0, 2) & 1 << 31 != 0, model.has(feature::HYPERVISOR));
    assert_eq!(read(1, 0, 3) & 1 << 26 != 0, model.has(feature::SSE2));
    assert_eq!(read(0x8000_0001, 0, 3) & 1 << 29 != 0, model.has(feature::LM));
    assert_eq!(read(0x8000_0007, 0, 3) & 1 << 8 != 0, model.has(feature::NONSTOP_TSC));
    assert_eq!(read(0xd, 1, 0) & 2 != 0, model.has(feature::XSAVEC));
}

#[test]
fn what_the_host_executes_is_what_the_host_has() {
    let linux = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let flags: Vec<&str> = linux.lines().find(|line| line.starts_with("flags")).unwrap().split(' ').collect();
    for model in models() {
        for feature in model.features().iter().filter(|f| f.origin == Origin::Host) {
            assert!(flags.contains(&feature.name), "{} has {}", model.name(), feature.name);
        }
    }
}

#[test]
fn no_model_promises_what_the_cpu_does_not_implement() {
    for model in models() {
        let one = model.cpuid(&context(1), 1, 0);
        let absent = [(2, 3, "monitor"), (2, 5, "vmx"), (2, 6, "smx")];
        for (register, bit, name) in absent {
            assert_eq!(one[register] >> bit & 1, 0, "{} has {name}", model.name());
        }
        let seven = model.cpuid(&context(1), 7, 0);
        let absent = [(1, 2, "sgx"), (1, 4, "hle"), (1, 11, "rtm"), (1, 14, "mpx")];
        for (register, bit, name) in absent {
            assert_eq!(seven[register] >> bit & 1, 0, "{} has {name}", model.name());
        }
        assert_eq!(model.cpuid(&context(1), 0xd, 1)[2..], [0, 0], "supervisor states");
    }
}

#[test]
fn a_model_has_what_its_features_need() {
    for model in models() {
        let mut complete = *model.features();
        model.features().iter().for_each(|feature| {
            let mut alone = Features::default();
            alone.add(feature);
            alone.iter().for_each(|needed| complete.add(needed));
        });
        assert_eq!(complete, *model.features(), "{}", model.name());
    }
}

#[test]
fn names_of_models_and_features_are_read_in_any_case() {
    let model = CpuModel::parse("X86-64-V1 , +PCID,-nx", 1).unwrap();
    assert_eq!(model.name(), "x86-64-v1");
    assert!(model.has(feature::PCID) && !model.has(feature::NX));
    assert_eq!(CpuModel::parse("max", 1).unwrap().features(), host(1).features());
    for nameless in ["", ",+pcid"] {
        assert!(
            matches!(CpuModel::parse(nameless, 1), Err(CpuModelError::UnknownModel { .. })),
            "{nameless:?}"
        );
    }
}

#[test]
fn features_go_with_what_needs_them_and_come_with_what_they_need() {
    let without = CpuModel::parse("host,-xsave", 1).unwrap();
    for gone in
        [feature::XSAVE, feature::XSAVEC, feature::AVX, feature::AVX2, feature::AVX512F, feature::AVX512_BF16]
    {
        assert!(!without.has(gone), "{}", gone.name);
    }
    assert!(without.has(feature::SSE2));
    assert_eq!(without.xsave_states(), Xcr0::empty());
    let with = CpuModel::parse("x86-64-v1,+invpcid", 1).unwrap();
    assert!(with.has(feature::INVPCID) && with.has(feature::PCID));
    let last = CpuModel::parse("x86-64-v1,+pcid,-pcid,+smep", 1).unwrap();
    assert!(!last.has(feature::PCID) && last.has(feature::SMEP));
}

#[test]
fn an_unknown_model_is_refused_with_names_that_are_like_it() {
    let close_to = |name| match CpuModel::parse(name, 1) {
        Err(CpuModelError::UnknownModel { close, .. }) => close,
        other => panic!("{other:?}"),
    };
    assert_eq!(close_to("haswel")[0], "Haswell");
    assert!(close_to("skylake").contains(&"Skylake-Server"));
    assert_eq!(close_to("qwertyuiop"), CpuModel::names());
    assert_eq!(close_to(&"a".repeat(1 << 20)), CpuModel::names());
    let error = CpuModel::parse("haswel", 1).unwrap_err().to_string();
    assert!(error.contains("\"haswel\"") && error.contains("Haswell"), "{error}");
}

#[test]
fn an_unknown_feature_is_refused_with_names_that_are_like_it() {
    match CpuModel::parse("host,-avx512", 1) {
        Err(CpuModelError::UnknownFeature { name, close }) => {
            assert_eq!(name, "avx512");
            assert!(close.contains(&"avx512f"), "{close:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn modifiers_that_make_no_sense_are_refused() {
    assert_eq!(CpuModel::parse("host,avx", 1).unwrap_err(), CpuModelError::BadModifier("avx".into()));
    assert_eq!(CpuModel::parse("host,-sse2", 1).unwrap_err(), CpuModelError::Indispensable("sse2"));
    assert_eq!(CpuModel::parse("host,+vmx", 1).unwrap_err(), CpuModelError::NotOffered("vmx"));
    assert!(CpuModel::parse("host,-vmx,-rtm,", 1).is_ok(), "it is not there already");
    assert!(matches!(CpuModel::parse("host,+", 1), Err(CpuModelError::UnknownFeature { .. })));
}

#[test]
fn features_that_the_host_lacks_are_named() {
    let available = Features::available();
    for name in CpuModel::names() {
        match CpuModel::parse(name, 1) {
            Ok(model) => assert!(model.features().iter().all(|feature| available.has(feature))),
            Err(CpuModelError::HostLacks { model, missing }) => {
                assert_eq!(model, name);
                let text = missing.iter().map(|feature| format!(",-{feature}")).collect::<String>();
                assert!(CpuModel::parse(&(name.to_owned() + &text), 1).is_ok());
            }
            Err(other) => panic!("{other}"),
        }
    }
}

/// Instructions of the features that the host executes and of some that our code does.
const INSTRUCTIONS: &[(Feature, Code)] = &[
    (feature::SSE3, Code::Haddps_xmm_xmmm128),
    (feature::SSSE3, Code::Pshufb_xmm_xmmm128),
    (feature::SSE4_1, Code::Pminud_xmm_xmmm128),
    (feature::SSE4_2, Code::Crc32_r64_rm64),
    (feature::PCLMULQDQ, Code::Pclmulqdq_xmm_xmmm128_imm8),
    (feature::AES, Code::Aesenc_xmm_xmmm128),
    (feature::POPCNT, Code::Popcnt_r64_rm64),
    (feature::ABM, Code::Lzcnt_r64_rm64),
    (feature::BMI1, Code::Tzcnt_r64_rm64),
    (feature::BMI2, Code::VEX_Pdep_r64_r64_rm64),
    (feature::ADX, Code::Adcx_r64_rm64),
    (feature::MOVBE, Code::Movbe_r64_m64),
    (feature::CX16, Code::Cmpxchg16b_m128),
    (feature::AVX, Code::VEX_Vaddps_ymm_ymm_ymmm256),
    (feature::AVX2, Code::VEX_Vpaddd_ymm_ymm_ymmm256),
    (feature::FMA, Code::VEX_Vfmadd132ps_ymm_ymm_ymmm256),
    (feature::F16C, Code::VEX_Vcvtph2ps_ymm_xmmm128),
    (feature::VAES, Code::VEX_Vaesenc_ymm_ymm_ymmm256),
    (feature::VPCLMULQDQ, Code::VEX_Vpclmulqdq_ymm_ymm_ymmm256_imm8),
    (feature::GFNI, Code::Gf2p8mulb_xmm_xmmm128),
    (feature::SHA, Code::Sha256rnds2_xmm_xmmm128),
    (feature::AVX_VNNI, Code::VEX_Vpdpbusd_ymm_ymm_ymmm256),
    (feature::AVX512F, Code::EVEX_Vpaddd_zmm_k1z_zmm_zmmm512b32),
    (feature::AVX512BW, Code::EVEX_Vpaddb_zmm_k1z_zmm_zmmm512),
    (feature::AVX512CD, Code::EVEX_Vplzcntd_zmm_k1z_zmmm512b32),
    (feature::AVX512DQ, Code::EVEX_Vpmullq_zmm_k1z_zmm_zmmm512b64),
    (feature::AVX512VL, Code::EVEX_Vpaddd_ymm_k1z_ymm_ymmm256b32),
    (feature::AVX512IFMA, Code::EVEX_Vpmadd52luq_zmm_k1z_zmm_zmmm512b64),
    (feature::AVX512VBMI, Code::EVEX_Vpermb_zmm_k1z_zmm_zmmm512),
    (feature::AVX512_VBMI2, Code::EVEX_Vpcompressb_zmmm512_k1z_zmm),
    (feature::AVX512_VNNI, Code::EVEX_Vpdpbusd_zmm_k1z_zmm_zmmm512b32),
    (feature::AVX512_BITALG, Code::EVEX_Vpopcntb_zmm_k1z_zmmm512),
    (feature::AVX512_VPOPCNTDQ, Code::EVEX_Vpopcntd_zmm_k1z_zmmm512b32),
    (feature::AVX512_BF16, Code::EVEX_Vdpbf16ps_zmm_k1z_zmm_zmmm512b32),
    (feature::AVX512_FP16, Code::EVEX_Vaddph_zmm_k1z_zmm_zmmm512b16_er),
    (feature::RDRAND, Code::Rdrand_r64),
    (feature::RDSEED, Code::Rdseed_r64),
    (feature::XSAVE, Code::Xsave_mem),
    (feature::XSAVEC, Code::Xsavec_mem),
    (feature::XSAVEOPT, Code::Xsaveopt_mem),
    (feature::XSAVES, Code::Xsaves_mem),
    (feature::RDPID, Code::Rdpid_r64),
    (feature::RDTSCP, Code::Rdtscp),
    (feature::INVPCID, Code::Invpcid_r64_m128),
    (feature::FSGSBASE, Code::Wrgsbase_r64),
    (feature::SMAP, Code::Stac),
    (feature::CLFLUSHOPT, Code::Clflushopt_m8),
    (feature::CLWB, Code::Clwb_m8),
    (feature::SERIALIZE, Code::Serialize),
    (feature::WBNOINVD, Code::Wbnoinvd),
];

#[test]
fn the_instructions_of_a_feature_are_there_with_it_and_only_with_it() {
    for model in models() {
        for (feature, code) in INSTRUCTIONS {
            let allowed = model.allows(code.cpuid_features());
            assert_eq!(allowed, model.has(*feature), "{} and {code:?} of {}", model.name(), feature.name);
        }
    }
    // Whether each feature that the host executes is among them.
    for feature in ALL.iter().filter(|f| f.origin == Origin::Host) {
        assert!(INSTRUCTIONS.iter().any(|(tested, _)| tested == feature), "{}", feature.name);
    }
}

#[test]
fn instructions_of_every_processor_are_allowed_and_those_of_none_are_not() {
    let least = CpuModel::parse("x86-64-v1", 1).unwrap();
    let always = [
        Code::Add_rm64_r64,
        Code::Syscall,
        Code::Sysenter,
        Code::Cpuid,
        Code::Rdmsr,
        Code::Rdtsc,
        Code::Rdpmc,
        Code::Pause,
        Code::Nop_rm64,
        Code::Endbr64,
        Code::Cmpxchg8b_m64,
        Code::Fxsave_m512byte,
        Code::Clflush_m8,
        Code::Fld_m80fp,
        Code::Fcomi_st0_sti,
        Code::Fisttp_m64int,
        Code::Addsd_xmm_xmmm64,
        Code::Mfence,
        Code::Emms,
        Code::Vmcall,
        Code::Lar_r32_r32m16,
        Code::Ud2,
        Code::Prefetchw_m8,
        Code::Cmove_r64_rm64,
    ];
    for code in always {
        let sse3 = code.cpuid_features().contains(&CpuidFeature::SSE3);
        assert!(least.allows(code.cpuid_features()) || sse3, "{code:?}: {:?}", code.cpuid_features());
    }
    let never = [
        Code::Xbegin_rel32,
        Code::Monitorq,
        Code::Tpause_r64,
        Code::Encls,
        Code::Rsm,
        Code::Vmrunq,
        Code::VEX_Tilezero_tmm,
        Code::Extrq_xmm_xmm,
    ];
    for code in never {
        assert!(!host(1).allows(code.cpuid_features()), "{code:?}");
    }
}

#[test]
fn the_highest_leaves_are_the_highest() {
    let (model, context) = (host(2), context(1));
    let basic = model.cpuid(&context, 0, 0);
    let text: Vec<u8> = [basic[1], basic[3], basic[2]].into_iter().flat_map(u32::to_le_bytes).collect();
    assert_eq!((basic[0], &text[..]), (0x1f, &b"GenuineIntel"[..]));
    assert_eq!(model.cpuid(&context, 0x8000_0000, 0)[0], 0x8000_0008);
    assert_eq!(model.cpuid(&context, 0x4000_0000, 0)[0], 0x4000_0010);
    // As on Intel's processors, what is beyond is what the last basic leaf says.
    for beyond in [0x20, 0x3fff_ffff, 0x5000_0000, 0x8000_0009, u32::MAX] {
        assert_eq!(model.cpuid(&context, beyond, 1), model.cpuid(&context, 0x1f, 1));
    }
}

#[test]
fn topology_says_one_package_of_cores() {
    for (cpus, shift) in [(1, 0), (2, 1), (3, 2), (4, 2), (64, 6)] {
        let model = host(cpus);
        let at = |id, leaf, subleaf| model.cpuid(&CpuidContext { apic_id: id, ..context(1) }, leaf, subleaf);
        for id in [0, cpus - 1] {
            for leaf in [0xb, 0x1f] {
                assert_eq!(at(id, leaf, 0), [0, 1, 0x100, id]);
                assert_eq!(at(id, leaf, 1), [shift, cpus, 0x201, id]);
                assert_eq!(at(id, leaf, 2), [0, 0, 2, id]);
            }
            let one = at(id, 1, 0);
            assert_eq!((one[1] >> 24, one[1] >> 16 & 0xff), (id, 1 << shift));
            assert_eq!(one[3] >> 28 & 1 != 0, cpus > 1, "HTT");
        }
        for cache in 0..4 {
            let eax = at(0, 4, cache)[0];
            assert_eq!(eax >> 26, (1 << shift) - 1);
            assert_eq!(eax >> 14 & 0xfff, if cache == 3 { (1 << shift) - 1 } else { 0 });
        }
        assert_eq!(at(0, 4, 4), [0; 4]);
    }
}

#[test]
fn xsave_sizes_follow_the_states_that_are_enabled() {
    let model = CpuModel::parse("host,-avx512f,-pku", 1).unwrap();
    let states = model.xsave_states();
    let at = |xcr0, subleaf| model.cpuid(&context(xcr0), 0xd, subleaf);
    assert_eq!(at(1, 0)[1], 576);
    assert_eq!(at(3, 0)[1], 576);
    assert_eq!(at(3, 1)[1], 576);
    let Ok(avx) = CpuModel::parse("x86-64-v1,+avx", 1) else { return };
    assert_eq!(states, Xcr0::X87 | Xcr0::SSE | Xcr0::AVX);
    assert_eq!(at(7, 0), [7, 832, 832, 0]);
    assert_eq!(at(7, 1)[1], 832);
    assert_eq!(at(7, 2), [256, 576, 0, 0]);
    assert_eq!(at(7, 5), [0; 4]);
    assert!(!avx.has(feature::XSAVEC));
    let Ok(avx512) = CpuModel::parse("x86-64-v1,+avx512f,+xsavec", 1) else { return };
    let at = |xcr0, subleaf| avx512.cpuid(&context(xcr0), 0xd, subleaf);
    assert_eq!(at(7, 0), [0xe7, 832, 2688, 0]);
    assert_eq!(at(0xe7, 0)[1], 2688);
    assert_eq!(at(0xe7, 1)[1], 576 + 256 + 64 + 512 + 1024);
    assert_eq!(at(0xe7, 7), [1024, 1664, 0, 0]);
    assert_eq!(at(0xe7, 9), [0; 4]);
}

#[test]
fn the_rights_of_protection_keys_are_a_state_of_their_own() {
    let model = CpuModel::parse("x86-64-v1,+pku,+xsavec", 1).unwrap();
    assert_eq!(model.xsave_states(), Xcr0::X87 | Xcr0::SSE | Xcr0::PKRU);
    let at = |subleaf| model.cpuid(&context(0x203), 0xd, subleaf);
    assert_eq!((at(0), at(1)[1]), ([0x203, 2696, 2696, 0], 584));
    assert_eq!(at(9), [8, 2688, 0, 0]);
    let without = CpuModel::parse("host,-xsave", 1).unwrap();
    assert!(!without.has(feature::PKU), "PKRU could not be saved");
}

#[test]
fn ospke_follows_cr4() {
    let told = |ospke| host(1).cpuid(&CpuidContext { ospke, ..context(1) }, 7, 0)[2] >> 3 & 3;
    assert_eq!((told(false), told(true)), (1, 3));
}

#[test]
fn osxsave_follows_cr4() {
    let (model, off) = (host(1), CpuidContext { osxsave: false, ..context(1) });
    assert_eq!(model.cpuid(&off, 1, 0)[2] >> 27 & 1, 0);
    assert_eq!(model.cpuid(&context(1), 1, 0)[2] >> 27 & 1, 1);
}

#[test]
fn the_time_stamp_counters_frequency_is_told_three_times() {
    let (model, context) = (host(1), context(1));
    let [denominator, numerator, crystal, _] = model.cpuid(&context, 0x15, 0);
    assert_eq!(crystal, 1_000_000_000, "which the local APIC's timer counts");
    assert_eq!(u64::from(crystal) * u64::from(numerator) / u64::from(denominator), context.tsc_hz);
    assert_eq!(model.cpuid(&context, 0x16, 0)[0], 2300);
    assert_eq!(model.cpuid(&context, 0x4000_0010, 0)[..2], [2_300_000, 1_000_000]);
}

#[test]
fn without_the_hypervisor_bit_there_are_no_leaves_of_kvm() {
    let (with, without) = (host(1), CpuModel::parse("host,-hypervisor", 1).unwrap());
    let text = |model: &CpuModel| -> Vec<u8> {
        model.cpuid(&context(1), 0x4000_0000, 0)[1..].iter().flat_map(|word| word.to_le_bytes()).collect()
    };
    assert_eq!(text(&with), b"KVMKVMKVM\0\0\0");
    assert_eq!(text(&without), [0; 12]);
}

#[test]
fn the_brand_string_names_the_model_and_ends() {
    let model = CpuModel::parse("x86-64-v1", 1).unwrap();
    let text: Vec<u8> = (0x8000_0002..=0x8000_0004)
        .flat_map(|leaf| model.cpuid(&context(1), leaf, 0))
        .flat_map(u32::to_le_bytes)
        .collect();
    let text = std::ffi::CStr::from_bytes_until_nul(&text).unwrap().to_str().unwrap();
    assert_eq!(text, "Ringside virtual CPU (x86-64-v1)");
}

#[test]
fn control_bits_are_those_of_the_features() {
    let most = host(1).control_bits();
    assert!(most.contains(Cr4::PCIDE | Cr4::SMEP | Cr4::SMAP | Cr4::FSGSBASE | Cr4::UMIP | Cr4::OSXSAVE));
    assert!(!most.intersects(Cr4::VMXE | Cr4::SMXE | Cr4::CET));
    assert!(most.contains(Cr4::LA57 | Cr4::PKE | Cr4::PKS | Cr4::LAM_SUP));
    let least = CpuModel::parse("x86-64-v1", 1).unwrap().control_bits();
    assert!(!least.intersects(Cr4::LA57 | Cr4::PKE | Cr4::PKS | Cr4::LAM_SUP));
    assert!(!least.intersects(Cr4::PCIDE | Cr4::SMEP | Cr4::SMAP | Cr4::FSGSBASE | Cr4::UMIP | Cr4::OSXSAVE));
    assert!(least.contains(Cr4::PAE | Cr4::PGE | Cr4::OSFXSR));
}

#[test]
fn the_prefix_of_a_missing_instruction_is_ignored() {
    let decode = |model: &CpuModel, bytes: &[u8]| {
        iced_x86::Decoder::new(64, bytes, model.decoder_options()).decode().mnemonic()
    };
    let old = CpuModel::parse("x86-64-v1", 1).unwrap();
    use iced_x86::Mnemonic::*;
    let cases: [(&[u8], _, _, Feature); 3] = [
        (&[0xf3, 0x0f, 0xbc, 0xc1], Bsf, Tzcnt, feature::BMI1),
        (&[0xf3, 0x0f, 0xbd, 0xc1], Bsr, Lzcnt, feature::ABM),
        (&[0xf3, 0x0f, 0x09], Wbinvd, Wbnoinvd, feature::WBNOINVD),
    ];
    for (bytes, without, with, feature) in cases {
        assert_eq!(decode(&old, bytes), without);
        assert_eq!(decode(&host(1), bytes), if host(1).has(feature) { with } else { without });
    }
}

#[test]
fn max_is_another_name_of_the_host() {
    let [host, max] = ["host,-avx", "max,-avx"].map(|text| CpuModel::parse(text, 1).unwrap());
    assert_eq!((host.name(), host.features()), (max.name(), max.features()));
}

#[test]
fn the_table_of_leaves_says_what_cpuid_says() {
    for model in models() {
        let leaves = model.leaves(3, 2_300_000_000);
        assert!(leaves.len() < 64);
        let context = CpuidContext {
            apic_id: 3,
            tsc_hz: 2_300_000_000,
            osxsave: false,
            ospke: false,
            xcr0: 1,
            ..CpuidContext::default()
        };
        for (n, entry) in leaves.iter().enumerate() {
            let mut said = model.cpuid(&context, entry.leaf, entry.subleaf.unwrap_or(0));
            if entry.leaf == 1 {
                said[2] &= !(1 << feature::PDCM.bit);
            }
            assert_eq!([entry.eax, entry.ebx, entry.ecx, entry.edx], said);
            let same = |other: &super::CpuidLeaf| (other.leaf, other.subleaf) == (entry.leaf, entry.subleaf);
            assert!(!leaves[n + 1..].iter().any(same), "{:#x} twice", entry.leaf);
        }
    }
}

#[test]
fn physical_addresses_are_as_wide_as_the_text_says() {
    let bits = |text: &str| CpuModel::parse(text, 1).map(|model| model.physical_bits());
    assert_eq!(bits("x86-64-v1,phys-bits=36,+pcid"), Ok(36));
    let model = CpuModel::parse("host,phys-bits=40", 1).unwrap();
    assert_eq!(model.cpuid(&context(1), 0x8000_0008, 0)[0] & 0xff, 40);
    for bad in ["35", "47", "", "4x", "-1"] {
        let text = format!("host,phys-bits={bad}");
        assert_eq!(bits(&text), Err(CpuModelError::BadPhysicalBits(bad.to_owned())), "{text}");
    }
}
