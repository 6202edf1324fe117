use x86::descriptor::Attributes;
use x86::{Cr4, Exception, SegmentRegister, Selector, Vector};

use crate::cpu::Cpu;
use crate::testing::*;

const MOV_DS_AX: [u8; 2] = [0x8e, 0xd8];
const MOV_SS_AX: [u8; 2] = [0x8e, 0xd0];

fn load_ds(cpu: &mut Cpu, selector: u16) -> Result<(), Exception> {
    cpu.registers.set(0, u64::from(selector));
    run(cpu, &MOV_DS_AX)
}

#[test]
fn a_load_sets_the_accessed_flag_in_memory_and_in_the_register() {
    let mut cpu = long();
    assert!(!descriptor(&cpu, KERNEL_DATA).attributes().contains(Attributes::ACCESSED));
    load_ds(&mut cpu, KERNEL_DATA).unwrap();
    assert!(descriptor(&cpu, KERNEL_DATA).attributes().contains(Attributes::ACCESSED));
    assert!(cpu.segment(SegmentRegister::Ds).attributes.contains(Attributes::ACCESSED));
}

#[test]
fn data_segments_are_checked_in_the_manuals_order() {
    let mut cpu = long();
    let gp = |selector: u16| Err(Exception::gp(u32::from(selector & !3)));
    assert_eq!(load_ds(&mut cpu, 0x80), gp(0x80), "outside the table");
    assert_eq!(load_ds(&mut cpu, 0x0c), gp(0x0c), "no local table");
    assert_eq!(load_ds(&mut cpu, TASK), gp(TASK), "a system segment");
    assert_eq!(load_ds(&mut cpu, KERNEL_DATA | 3), gp(KERNEL_DATA), "an RPL that is too weak");
    assert_eq!(load_ds(&mut cpu, CONFORMING | 3), Ok(()), "conforming code has no privilege");
    let absent = Exception::with_code(Vector::SegmentNotPresent, u32::from(ABSENT));
    assert_eq!(load_ds(&mut cpu, ABSENT), Err(absent));
    assert_eq!(load_ds(&mut cpu, 3), Ok(()), "null");
    assert!(cpu.segment(SegmentRegister::Ds).attributes.contains(Attributes::UNUSABLE));
}

#[test]
fn a_stack_segment_must_match_the_privilege_and_shadows_the_next_instruction() {
    let mut cpu = long();
    for (selector, good) in
        [(KERNEL_DATA, true), (USER_DATA, false), (KERNEL_CODE64, false), (0, true), (3, false)]
    {
        cpu.shadow = false;
        cpu.registers.set(0, u64::from(selector));
        assert_eq!(run(&mut cpu, &MOV_SS_AX).is_ok(), good, "{selector:#x}");
        assert_eq!(cpu.shadow, good);
        assert_eq!(cpu.cpl(), 0);
    }
}

#[test]
fn a_null_stack_segment_is_for_64_bit_kernels_only() {
    let mut cpu = protected();
    cpu.registers.set(0, 0);
    assert_eq!(run(&mut cpu, &MOV_SS_AX), Err(Exception::gp(0)));
}

#[test]
fn a_null_data_segment_faults_when_it_is_used_and_not_when_it_is_loaded() {
    let mut cpu = protected();
    load_ds(&mut cpu, 0).unwrap();
    assert_eq!(run(&mut cpu, &[0xa0, 0, 0, 0, 0]), Err(Exception::gp(0)));
}

#[test]
fn cs_cannot_be_loaded_by_mov() {
    let mut cpu = long();
    assert_eq!(run(&mut cpu, &[0x8e, 0xc8]), Err(Exception::ud()));
}

#[test]
fn selectors_are_stored_by_the_operand_size() {
    let mut cpu = long();
    cpu.registers.set(0, u64::MAX);
    run(&mut cpu, &[0x66, 0x8c, 0xd8]).unwrap();
    assert_eq!(cpu.registers.get(0), 0xffff_ffff_ffff_0000 | u64::from(KERNEL_DATA));
    run(&mut cpu, &[0x8c, 0xd8]).unwrap();
    assert_eq!(cpu.registers.get(0), u64::from(KERNEL_DATA));
}

#[test]
fn push_and_pop_of_segments_move_the_stack_by_the_operand_size() {
    let mut cpu = protected();
    run(&mut cpu, &[0x06]).unwrap();
    assert_eq!(cpu.registers.get(4), STACK - 4);
    run(&mut cpu, &[0x0f, 0xa1]).unwrap();
    assert_eq!(
        (cpu.registers.get(4), cpu.segment(SegmentRegister::Fs).selector),
        (STACK, Selector(KERNEL_DATA))
    );
    run(&mut cpu, &[0x66, 0x06]).unwrap();
    assert_eq!(cpu.registers.get(4), STACK - 2);
}

#[test]
fn a_pop_of_a_segment_reads_its_selector_only() {
    let mut cpu = protected();
    let mut stack = *cpu.segment(SegmentRegister::Ss);
    stack.limit = 0x5001;
    cpu.set_segment(SegmentRegister::Ss, stack);
    put(&cpu, 0x5000, KERNEL_DATA);
    cpu.registers.set(4, 0x5000);
    run(&mut cpu, &[0x07]).unwrap();
    assert_eq!(cpu.segment(SegmentRegister::Es).selector, Selector(KERNEL_DATA));
    assert_eq!(cpu.registers.get(4), 0x5004);
    cpu.registers.set(4, 0x5001);
    assert!(run(&mut cpu, &[0x07]).is_err());
}

#[test]
fn far_pointers_load_both_halves_or_none() {
    let mut cpu = long();
    put(&cpu, 0x5000, 0x1122_3344u32);
    put(&cpu, 0x5004, KERNEL_DATA);
    cpu.registers.set(0, 0x5000);
    run(&mut cpu, &[0x0f, 0xb4, 0x08]).unwrap();
    assert_eq!(
        (cpu.registers.get(1), cpu.segment(SegmentRegister::Fs).selector.0),
        (0x1122_3344, KERNEL_DATA)
    );
    put(&cpu, 0x5000, 7u32);
    put(&cpu, 0x5004, ABSENT);
    assert!(run(&mut cpu, &[0x0f, 0xb4, 0x08]).is_err());
    assert_eq!(cpu.registers.get(1), 0x1122_3344);
}

#[test]
fn table_registers_go_to_memory_and_back() {
    let mut cpu = long();
    cpu.registers.set(0, 0x5000);
    let before = cpu.gdtr;
    run(&mut cpu, &[0x0f, 0x01, 0x00]).unwrap();
    assert_eq!((get::<u16>(&cpu, 0x5000), get::<u64>(&cpu, 0x5002)), (before.limit, before.base));
    put(&cpu, 0x5002, 0xffff_8000_0000_1000u64);
    run(&mut cpu, &[0x0f, 0x01, 0x10]).unwrap();
    assert_eq!(cpu.gdtr.base, 0xffff_8000_0000_1000);
    // The processor's widest addresses count, whichever are in use: bases are moved before 5-level paging is on.
    put(&cpu, 0x5002, 0x0000_8000_0000_1000u64);
    run(&mut cpu, &[0x0f, 0x01, 0x10]).unwrap();
    put(&cpu, 0x5002, 0x0100_0000_0000_1000u64);
    assert_eq!(run(&mut cpu, &[0x0f, 0x01, 0x10]), Err(Exception::gp(0)));
    cpu.wires = wires_for("host,-la57");
    put(&cpu, 0x5002, 0x0000_8000_0000_1000u64);
    assert_eq!(run(&mut cpu, &[0x0f, 0x01, 0x10]), Err(Exception::gp(0)));
}

#[test]
fn sixteen_bit_lgdt_loads_24_bits_of_the_base() {
    let mut cpu = protected();
    put(&cpu, 0x5000, 0xffu16);
    put(&cpu, 0x5002, 0xffff_ffffu32);
    cpu.registers.set(0, 0x5000);
    run(&mut cpu, &[0x66, 0x0f, 0x01, 0x10]).unwrap();
    assert_eq!(cpu.gdtr.base, 0xff_ffff);
    run(&mut cpu, &[0x0f, 0x01, 0x10]).unwrap();
    assert_eq!(cpu.gdtr.base, 0xffff_ffff);
}

#[test]
fn programs_learn_no_table_addresses_with_umip() {
    let mut cpu = long();
    cpu.cr4.insert(Cr4::UMIP);
    to_user(&mut cpu);
    cpu.registers.set(0, 0x5000);
    for bytes in [
        &[0x0f, 0x01, 0x00][..],
        &[0x0f, 0x01, 0x08],
        &[0x0f, 0x00, 0xc0],
        &[0x0f, 0x00, 0xc8],
        &[0x0f, 0x01, 0xe0],
    ] {
        assert_eq!(run(&mut cpu, bytes), Err(Exception::gp(0)), "{bytes:x?}");
    }
}

#[test]
fn a_task_register_load_marks_the_descriptor_busy_once() {
    let mut cpu = long();
    cpu.registers.set(0, u64::from(TASK));
    run(&mut cpu, &[0x0f, 0x00, 0xd8]).unwrap();
    assert_eq!((cpu.tr.base, cpu.tr.limit, cpu.tr.attributes.bits() & 15), (TSS, 0x67, 11));
    assert_eq!(descriptor(&cpu, TASK).attributes().bits() & 15, 11);
    assert_eq!(run(&mut cpu, &[0x0f, 0x00, 0xd8]), Err(Exception::gp(u32::from(TASK))));
}

#[test]
fn a_null_local_table_is_none() {
    let mut cpu = long();
    cpu.registers.set(0, 0);
    run(&mut cpu, &[0x0f, 0x00, 0xd0]).unwrap();
    assert_eq!(load_ds(&mut cpu, 0x0f), Err(Exception::gp(0x0c)));
}

#[test]
fn lar_and_lsl_tell_what_a_program_may_know() {
    let mut cpu = long();
    cpu.registers.set(1, u64::from(USER_DATA));
    run(&mut cpu, &[0x0f, 0x02, 0xc1]).unwrap();
    assert_eq!((cpu.registers.get(0), cpu.flags.zf()), (0x00cf_f200, true));
    run(&mut cpu, &[0x0f, 0x03, 0xc1]).unwrap();
    assert_eq!((cpu.registers.get(0), cpu.flags.zf()), (0xffff_ffff, true));
    to_user(&mut cpu);
    cpu.registers.set(1, u64::from(KERNEL_DATA));
    run(&mut cpu, &[0x0f, 0x03, 0xc1]).unwrap();
    assert_eq!((cpu.registers.get(0), cpu.flags.zf()), (0xffff_ffff, false));
}

#[test]
fn verr_and_verw_answer_in_zf() {
    let mut cpu = long();
    for (selector, readable, writable) in
        [(KERNEL_DATA, true, true), (KERNEL_CODE64, true, false), (TASK, false, false), (0, false, false)]
    {
        cpu.registers.set(0, u64::from(selector));
        run(&mut cpu, &[0x0f, 0x00, 0xe0]).unwrap();
        assert_eq!(cpu.flags.zf(), readable, "{selector:#x}");
        run(&mut cpu, &[0x0f, 0x00, 0xe8]).unwrap();
        assert_eq!(cpu.flags.zf(), writable, "{selector:#x}");
    }
}

#[test]
fn swapgs_exchanges_the_bases() {
    let mut cpu = long();
    cpu.msrs.kernel_gs_base = 0xffff_8880_0000_0000;
    cpu.set_segment_base(SegmentRegister::Gs, 0x1000);
    run(&mut cpu, &[0x0f, 0x01, 0xf8]).unwrap();
    assert_eq!((cpu.bases[5], cpu.msrs.kernel_gs_base), (0xffff_8880_0000_0000, 0x1000));
    to_user(&mut cpu);
    assert_eq!(run(&mut cpu, &[0x0f, 0x01, 0xf8]), Err(Exception::gp(0)));
}

#[test]
fn programs_set_their_bases_where_cr4_allows_it() {
    let mut cpu = long();
    let wrfsbase = [0xf3, 0x48, 0x0f, 0xae, 0xd0];
    cpu.registers.set(0, 0x7fff_0000_0000);
    assert_eq!(run(&mut cpu, &wrfsbase), Err(Exception::ud()));
    cpu.cr4.insert(Cr4::FSGSBASE);
    run(&mut cpu, &wrfsbase).unwrap();
    assert_eq!(cpu.bases[4], 0x7fff_0000_0000);
    cpu.registers.set(0, 1 << 56);
    assert_eq!(run(&mut cpu, &wrfsbase), Err(Exception::gp(0)));
}

#[test]
fn real_mode_keeps_the_limit_that_protected_mode_has_left() {
    let mut cpu = real();
    cpu.segments[3].limit = 0xffff_ffff;
    load_ds(&mut cpu, 0x1234).unwrap();
    assert_eq!((cpu.segments[3].base, cpu.segments[3].limit), (0x12340, 0xffff_ffff));
}
