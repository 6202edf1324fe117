use std::sync::atomic::Ordering;

use engine::MsrFault;
use x86::{Efer, Exception, msr};

use crate::testing::*;

#[test]
fn an_unknown_register_is_a_general_protection_fault() {
    let mut cpu = long();
    cpu.registers.set(1, 0xdead_0000);
    assert_eq!(run(&mut cpu, &[0x0f, 0x32]), Err(Exception::gp(0)));
    assert_eq!(run(&mut cpu, &[0x0f, 0x30]), Err(Exception::gp(0)));
}

#[test]
fn values_go_through_edx_and_eax() {
    let mut cpu = long();
    cpu.registers.set(1, u64::from(msr::IA32_LSTAR) | 1 << 40);
    cpu.registers.set(2, 0xffff_8000);
    cpu.registers.set(0, 0x1234_5678);
    run(&mut cpu, &[0x0f, 0x30]).unwrap();
    assert_eq!(cpu.msrs.lstar, 0xffff_8000_1234_5678);
    run(&mut cpu, &[0x0f, 0x32]).unwrap();
    assert_eq!((cpu.registers.get(2), cpu.registers.get(0)), (0xffff_8000, 0x1234_5678));
}

#[test]
fn efer_keeps_lma_and_refuses_lme_while_paging() {
    let mut cpu = long();
    assert_eq!(cpu.write_msr(msr::IA32_EFER, 0), Err(MsrFault));
    assert_eq!(cpu.write_msr(msr::IA32_EFER, 1 << 12), Err(MsrFault), "no SVM");
    cpu.write_msr(msr::IA32_EFER, Efer::LME.bits()).unwrap();
    assert_eq!(cpu.efer, Efer::LME | Efer::LMA);
}

#[test]
fn addresses_must_be_canonical() {
    let mut cpu = long();
    let addresses = [
        msr::IA32_LSTAR,
        msr::IA32_CSTAR,
        msr::IA32_FS_BASE,
        msr::IA32_GS_BASE,
        msr::IA32_KERNEL_GS_BASE,
        msr::IA32_SYSENTER_ESP,
        msr::IA32_SYSENTER_EIP,
    ];
    for index in addresses {
        // By the widest addresses that the processor has, whatever the paging.
        assert_eq!(cpu.write_msr(index, 1 << 56), Err(MsrFault), "{index:#x}");
        cpu.write_msr(index, 0xffff_8000_0000_0000).unwrap();
        assert_eq!(cpu.read_msr(index), Ok(0xffff_8000_0000_0000));
    }
    assert_eq!(cpu.bases[4..6], [0xffff_8000_0000_0000; 2]);
}

#[test]
fn a_write_of_the_counter_moves_its_adjustment_and_the_deadline_follows() {
    let mut cpu = long();
    cpu.write_msr(msr::IA32_TSC, 1000).unwrap();
    assert_eq!(cpu.tsc(), 1000);
    assert_eq!(cpu.read_msr(msr::IA32_TSC_ADJUST), Ok(1000));
    cpu.write_msr(msr::IA32_TSC_DEADLINE, 5000).unwrap();
    assert_eq!(cpu.wires.interrupts.read_msr(msr::IA32_TSC_DEADLINE), Ok(4000));
    assert_eq!(cpu.read_msr(msr::IA32_TSC_DEADLINE), Ok(5000));
    cpu.write_msr(msr::IA32_TSC_DEADLINE, 0).unwrap();
    assert_eq!(cpu.read_msr(msr::IA32_TSC_DEADLINE), Ok(0));
    cpu.write_msr(msr::IA32_TSC_ADJUST, 0).unwrap();
    assert_eq!(cpu.tsc(), 0);
}

#[test]
fn the_paravirtual_clock_tells_the_machines_time() {
    let mut cpu = long();
    let time = std::sync::Arc::new(MockTime::default());
    time.0.store(3_000_000_000, Ordering::Relaxed);
    cpu.wires.time = time;
    cpu.write_msr(msr::IA32_TSC, 12345).unwrap();
    cpu.write_msr(msr::KVM_SYSTEM_TIME_NEW, 0x6000 | 1).unwrap();
    let (version, zero, system) =
        (get::<u32>(&cpu, 0x6000), get::<u64>(&cpu, 0x6008), get::<u64>(&cpu, 0x6010));
    let (multiplier, shift) = (get::<u32>(&cpu, 0x6018), get::<u8>(&cpu, 0x601c) as i8);
    assert_eq!((version & 1, get::<u8>(&cpu, 0x601d)), (0, 1));
    let delta = cpu.tsc().wrapping_sub(zero);
    let delta = if shift < 0 { delta >> -shift } else { delta << shift };
    let ns = system + ((u128::from(delta) * u128::from(multiplier)) >> 32) as u64;
    assert!(ns.abs_diff(3_000_000_000) < 10, "{ns}");
    cpu.write_msr(msr::KVM_WALL_CLOCK_NEW, 0x7000).unwrap();
    assert_eq!((get::<u32>(&cpu, 0x7004), get::<u32>(&cpu, 0x7008)), (1_700_000_000, 0));
}

#[test]
fn registers_that_only_tell_refuse_writes() {
    let mut cpu = long();
    let read_only = [
        msr::IA32_PLATFORM_ID,
        msr::IA32_FEATURE_CONTROL,
        msr::IA32_MTRRCAP,
        msr::IA32_MCG_CAP,
        msr::IA32_ARCH_CAPABILITIES,
    ];
    for index in read_only {
        assert!(cpu.read_msr(index).is_ok(), "{index:#x}");
        assert_eq!(cpu.write_msr(index, 0), Err(MsrFault), "{index:#x}");
    }
    assert_eq!(cpu.read_msr(msr::IA32_PRED_CMD), Err(MsrFault), "only a command");
}

#[test]
fn machine_check_banks_can_be_cleared_and_not_filled() {
    let mut cpu = long();
    for bank in 0..cpu.read_msr(msr::IA32_MCG_CAP).unwrap() as u32 & 0xff {
        cpu.write_msr(0x400 + 4 * bank, u64::MAX).unwrap();
        cpu.write_msr(0x401 + 4 * bank, 0).unwrap();
        assert_eq!(cpu.write_msr(0x401 + 4 * bank, 1), Err(MsrFault));
    }
}

#[test]
fn what_is_saved_is_restored() {
    let mut cpu = long();
    cpu.write_msr(msr::IA32_STAR, 0x0023_0010_0000_0000).unwrap();
    cpu.write_msr(msr::IA32_TSC, 5_000).unwrap();
    cpu.write_msr(msr::KVM_SYSTEM_TIME_NEW, 0x6001).unwrap();
    cpu.write_msr(msr::IA32_PAT, 0x0007_0106_0007_0106).unwrap();
    let saved = cpu.saved_msrs();
    let mut other = long();
    for (index, value) in saved {
        other.restore_msr(index, value).unwrap_or_else(|_| panic!("{index:#x} with {value:#x}"));
    }
    assert_eq!(other.msrs, cpu.msrs);
}

/// Each register that can be written: its index, the bits that it takes, and those of them that keep their values.
const BITS: [(u32, u64, u64); 22] = [
    (msr::IA32_STAR, u64::MAX, 0),
    (msr::IA32_FMASK, 0xffff_ffff, 0),
    (msr::IA32_MISC_ENABLE, 0x4_00c5_1889, 0x1880),
    (msr::IA32_DEBUGCTL, 0x1803, 0),
    (msr::IA32_TSC_AUX, 0xffff_ffff, 0),
    (msr::IA32_SPEC_CTRL, 7, 0),
    (msr::IA32_MCG_STATUS, 7, 0),
    (msr::IA32_XSS, 0, 0),
    (msr::IA32_PKRS, 0xffff_ffff, 0),
    (msr::IA32_PERFEVTSEL0, 0xffdf_ffff, 0),
    (msr::IA32_A_PMC0, 0xffff_ffff_ffff, 0),
    (msr::IA32_FIXED_CTR0, 0xffff_ffff_ffff, 0),
    (msr::IA32_FIXED_CTR_CTRL, 0xbbb, 0),
    (msr::IA32_PERF_GLOBAL_CTRL, 0x7_0000_000f, 0),
    (msr::IA32_MTRR_DEF_TYPE, 0xc05, 0),
    (msr::IA32_MTRR_PHYSBASE0, 0xf_ffff_f005, 0),
    (msr::IA32_MTRR_PHYSBASE0 + 1, 0xf_ffff_f800, 0),
    (0x401, 0, 0),
    (0x402, u64::MAX, 0),
    (0x403, u64::MAX, 0),
    (msr::KVM_SYSTEM_TIME_NEW, 1, 0),
    (msr::IA32_TSC_ADJUST, u64::MAX, 0),
];

#[test]
fn every_bit_of_a_register_is_kept_or_faults() {
    for (index, allowed, read_only) in BITS {
        let reset = long().read_msr(index).unwrap();
        for bit in (0..64).map(|bit| 1u64 << bit) {
            let physical = [msr::IA32_MTRR_PHYSBASE0, msr::IA32_MTRR_PHYSBASE0 + 1].contains(&index);
            if physical && bit >= 1 << 36 || index == msr::KVM_SYSTEM_TIME_NEW && bit > 1 {
                // By the width of physical addresses; anywhere in RAM.
                continue;
            }
            let mut cpu = long();
            let (value, before) = (reset & read_only | bit, cpu.read_msr(index));
            // Types are numbers: 2 and 8 are none.
            let is_type = index == msr::IA32_MTRR_DEF_TYPE || index == msr::IA32_MTRR_PHYSBASE0;
            if allowed & bit != 0 && !(is_type && bit == 2) {
                cpu.write_msr(index, value).unwrap_or_else(|_| panic!("{index:#x} with {value:#x}"));
                assert_eq!(cpu.read_msr(index), Ok(value & !read_only | reset & read_only), "{index:#x}");
            } else {
                assert_eq!(cpu.write_msr(index, value), Err(MsrFault), "{index:#x} with {value:#x}");
                assert_eq!(cpu.read_msr(index), before, "{index:#x} with {value:#x}");
            }
        }
    }
}

#[test]
fn a_banks_errors_are_all_reported_or_none() {
    let mut cpu = long();
    for (value, result) in [
        (0, Ok(())),
        (u64::MAX, Ok(())),
        (!0x400, Ok(())),
        (1 << 47, Err(MsrFault)),
        (u64::MAX >> 1, Err(MsrFault)),
    ] {
        assert_eq!(cpu.write_msr(0x40c, value), result, "{value:#x}");
    }
    let banks = cpu.read_msr(msr::IA32_MCG_CAP).unwrap() as u32 & 0xff;
    for index in 0x400 + 4 * banks..0x480 {
        assert_eq!(
            (cpu.read_msr(index), cpu.write_msr(index, 0)),
            (Err(MsrFault), Err(MsrFault)),
            "{index:#x}"
        );
    }
}

#[test]
fn cpuid_follows_what_the_registers_turn_off() {
    let leaf = |cpu: &crate::cpu::Cpu, leaf| cpu.wires.model.cpuid(&cpu.cpuid_context(), leaf, 0);
    let mut cpu = long();
    assert_ne!(leaf(&cpu, 1)[3] & 1 << 9, 0, "a local APIC");
    cpu.write_msr(msr::IA32_APIC_BASE, 0xfee0_0000).unwrap();
    assert_eq!(leaf(&cpu, 1)[3] & 1 << 9, 0, "none");
    let enabled = cpu.read_msr(msr::IA32_MISC_ENABLE).unwrap();
    let highest = leaf(&cpu, 0)[0];
    cpu.write_msr(msr::IA32_MISC_ENABLE, enabled | 1 << 22).unwrap();
    assert_eq!(leaf(&cpu, 0)[0], 2);
    assert_eq!(leaf(&cpu, 7), leaf(&cpu, 2));
    assert_ne!(leaf(&cpu, 0x8000_0001)[3] & 1 << 20, 0, "the extended leaves stay");
    cpu.efer.remove(Efer::NXE);
    cpu.write_msr(msr::IA32_MISC_ENABLE, enabled | 1 << 34).unwrap();
    assert_eq!((leaf(&cpu, 0)[0], leaf(&cpu, 0x8000_0001)[3] & 1 << 20), (highest, 0));
    let wanted = (cpu.efer | Efer::NXE).bits();
    assert_eq!(cpu.write_msr(msr::IA32_EFER, wanted), Err(MsrFault));
    cpu.write_msr(msr::IA32_MISC_ENABLE, enabled).unwrap();
    assert_eq!(cpu.write_msr(msr::IA32_EFER, wanted), Ok(()));
}

#[test]
fn registers_of_features_that_the_model_lacks_are_not_there() {
    for (model, indices) in [
        ("host,-hypervisor", &[msr::KVM_SYSTEM_TIME, msr::KVM_WALL_CLOCK_NEW][..]),
        ("host,-rdtscp,-rdpid", &[msr::IA32_TSC_AUX]),
        ("host,-tsc_adjust", &[msr::IA32_TSC_ADJUST]),
        ("host,-pks", &[msr::IA32_PKRS]),
        ("host,-xsaves", &[msr::IA32_XSS]),
        ("host,-ibrs", &[msr::IA32_SPEC_CTRL]),
        ("host,-arch_perfmon", &[msr::IA32_PMC0, msr::IA32_FIXED_CTR_CTRL, msr::IA32_PERF_CAPABILITIES]),
    ] {
        let mut cpu = long();
        cpu.wires = wires_for(model);
        for &index in indices {
            assert_eq!(
                (cpu.read_msr(index), cpu.write_msr(index, 0)),
                (Err(MsrFault), Err(MsrFault)),
                "{index:#x}"
            );
        }
    }
    let mut cpu = long();
    cpu.wires = wires_for("host,-stibp");
    assert_eq!(cpu.write_msr(msr::IA32_SPEC_CTRL, 2), Err(MsrFault));
    assert_eq!(cpu.write_msr(msr::IA32_SPEC_CTRL, 1), Ok(()));
}
