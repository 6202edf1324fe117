use x86::exception::PageFaultCode;
use x86::{Exception, Flags, SegmentRegister, Vector};

use super::{Event, SoftwareKind};
use crate::testing::*;

fn selector(cpu: &crate::cpu::Cpu, register: SegmentRegister) -> u64 {
    u64::from(cpu.segment(register).selector.0)
}

#[test]
fn an_interrupt_in_long_mode_pushes_five_values_on_an_aligned_stack() {
    let mut cpu = long();
    set_gate(&cpu, 0x40, 0, 0);
    cpu.system_flags.insert(Flags::IF);
    cpu.registers.set(4, STACK - 3);
    cpu.deliver(Event::Interrupt(0x40)).unwrap();
    assert_eq!(cpu.rip, handler(0x40));
    assert_eq!(cpu.registers.get(4), ((STACK - 3) & !15) - 40);
    let frame = stack::<5>(&cpu, 8);
    assert_eq!(frame, [CODE, KERNEL_CODE64.into(), 0x202, STACK - 3, KERNEL_DATA.into()]);
    assert!(!cpu.system_flags.contains(Flags::IF));
}

#[test]
fn an_exception_from_user_code_enters_on_the_kernel_stack_with_its_error_code() {
    let mut cpu = long();
    to_user(&mut cpu);
    set_gate(&cpu, 14, 0, 0);
    let fault = Exception::page_fault(0x1234, PageFaultCode::USER);
    cpu.deliver(Event::Exception(fault)).unwrap();
    assert_eq!((cpu.cpl(), cpu.cr2), (0, 0x1234));
    assert_eq!(cpu.registers.get(4), KERNEL_STACK - 48);
    let [code, rip, cs, flags, rsp, ss] = stack::<6>(&cpu, 8);
    assert_eq!([code, rip, cs, rsp, ss], [4, CODE, USER_CODE64.into(), STACK, USER_DATA.into()]);
    assert_eq!(flags, (Flags::FIXED | Flags::RF).bits());
    assert_eq!(selector(&cpu, SegmentRegister::Ss), 0);
}

#[test]
fn the_interrupt_stack_table_is_used_at_any_privilege() {
    let mut cpu = long();
    set_gate(&cpu, 2, 0, 1);
    cpu.deliver(Event::Nmi).unwrap();
    assert_eq!(cpu.registers.get(4), IST1 - 40);
    assert!(cpu.nmi_blocked);
}

#[test]
fn a_trap_gate_leaves_interrupts_on() {
    let mut cpu = long();
    cpu.system_flags.insert(Flags::IF | Flags::TF | Flags::NT);
    set_gate_of(&cpu, 3, 0xef, 0);
    run(&mut cpu, &[0xcc]).unwrap();
    assert_eq!(cpu.system_flags & (Flags::IF | Flags::TF | Flags::NT), Flags::IF);
    assert_eq!(stack::<1>(&cpu, 8), [CODE + 1]);
}

#[test]
fn a_missing_gate_makes_a_general_protection_fault_with_ext() {
    let mut cpu = long();
    set_gate(&cpu, 13, 0, 0);
    cpu.deliver(Event::Interrupt(0x80)).unwrap();
    assert_eq!(cpu.rip, handler(13));
    assert_eq!(stack::<1>(&cpu, 8), [0x80 << 3 | 3]);
}

#[test]
fn int_n_needs_a_gate_for_its_privilege_and_sets_no_ext() {
    let mut cpu = long();
    to_user(&mut cpu);
    set_gate(&cpu, 0x80, 0, 0);
    assert_eq!(run(&mut cpu, &[0xcd, 0x80]), Err(Exception::gp(0x80 << 3 | 2)));
    assert_eq!((cpu.rip, cpu.cpl()), (CODE, 3));
    set_gate(&cpu, 0x80, 3, 0);
    run(&mut cpu, &[0xcd, 0x80]).unwrap();
    assert_eq!((cpu.rip, cpu.cpl()), (handler(0x80), 0));
    assert_eq!(stack::<1>(&cpu, 8), [CODE + 2]);
}

#[test]
fn a_contributory_fault_during_another_is_a_double_fault() {
    let mut cpu = long();
    set_gate(&cpu, 8, 0, 1);
    // #NP is not installed: its delivery raises #GP.
    cpu.deliver(Event::Exception(Exception::with_code(Vector::SegmentNotPresent, 0x10))).unwrap();
    assert_eq!(cpu.rip, handler(8));
    assert_eq!(stack::<2>(&cpu, 8), [0, CODE]);
}

#[test]
fn a_fault_after_a_benign_one_is_delivered_by_itself() {
    let mut cpu = long();
    set_gate(&cpu, 13, 0, 0);
    cpu.deliver(Event::Exception(Exception::ud())).unwrap();
    assert_eq!(cpu.rip, handler(13));
    assert_eq!(stack::<1>(&cpu, 8), [6 << 3 | 3]);
}

#[test]
fn a_page_fault_on_the_stack_of_a_page_fault_is_a_double_fault() {
    let mut cpu = long();
    set_gate(&cpu, 14, 0, 0);
    set_gate(&cpu, 8, 0, 1);
    cpu.registers.set(4, 0x4000_0000);
    cpu.deliver(Event::Exception(Exception::page_fault(0x5000_0000, PageFaultCode::empty()))).unwrap();
    assert_eq!(cpu.rip, handler(8));
    assert_eq!(cpu.cr2, 0x3fff_fff8);
    assert_eq!(stack::<5>(&cpu, 8)[4], 0x4000_0000, "the stack pointer is that of the first fault");
}

#[test]
fn nothing_to_deliver_to_is_a_triple_fault_that_tells_its_story() {
    let mut cpu = long();
    let fault = Exception::page_fault(0x5000, PageFaultCode::WRITE);
    let triple = cpu.deliver(Event::Exception(fault)).unwrap_err();
    assert_eq!(
        triple.reason,
        "triple fault: #GP(0x43) while delivering #DF(0x0) after #GP(0x73) while delivering #PF(0x2) at 0x5000"
    );
    assert_eq!((cpu.rip, cpu.registers.get(4)), (CODE, STACK));
}

#[test]
fn protected_mode_changes_stacks_by_the_task_state_segment() {
    let mut cpu = protected();
    to_user(&mut cpu);
    set_gate(&cpu, 0x80, 3, 0);
    run(&mut cpu, &[0xcd, 0x80]).unwrap();
    assert_eq!(cpu.registers.get(4), KERNEL_STACK - 20);
    let frame = stack::<5>(&cpu, 4);
    assert_eq!(frame, [CODE + 2, USER_CODE32.into(), 2, STACK, USER_DATA.into()]);
    assert_eq!(selector(&cpu, SegmentRegister::Ss), u64::from(KERNEL_DATA));
    run(&mut cpu, &[0xcf]).unwrap();
    assert_eq!((cpu.rip, cpu.cpl(), cpu.registers.get(4)), (CODE + 2, 3, STACK));
}

#[test]
fn virtual_8086_mode_is_left_and_entered_again() {
    let mut cpu = protected();
    for value in
        [0x11u32, 0x22, 0x33, 0x44, 0x55, 0x800, Flags::VM.bits() as u32 | 0x3202, 0x66, 0x77].into_iter()
    {
        cpu.push(value).unwrap();
    }
    run(&mut cpu, &[0xcf]).unwrap();
    assert!(cpu.mode.is_v86());
    assert_eq!((cpu.cpl(), cpu.rip, cpu.mode.code_size()), (3, 0x77, 16));
    assert_eq!(cpu.segment(SegmentRegister::Ss).base, 0x550);
    set_gate(&cpu, 0x20, 0, 0);
    cpu.deliver(Event::Interrupt(0x20)).unwrap();
    assert!(!cpu.mode.is_v86());
    assert_eq!(cpu.registers.get(4), KERNEL_STACK - 36);
    let frame = stack::<9>(&cpu, 4);
    assert_eq!(frame, [0x77, 0x66, 0x23202, 0x800, 0x55, 0x44, 0x33, 0x22, 0x11]);
    assert_eq!(selector(&cpu, SegmentRegister::Ds), 0);
}

#[test]
fn real_mode_goes_through_the_vector_table_and_back() {
    let mut cpu = real();
    put(&cpu, 4 * 0x10, 0x1234_5678u32);
    cpu.system_flags.insert(Flags::IF);
    run(&mut cpu, &[0xcd, 0x10]).unwrap();
    assert_eq!((cpu.rip, cpu.segment(SegmentRegister::Cs).base), (0x5678, 0x12340));
    assert!(!cpu.system_flags.contains(Flags::IF));
    run(&mut cpu, &[0xcf]).unwrap();
    assert_eq!((cpu.rip, cpu.segment(SegmentRegister::Cs).base), (0x7c02, 0));
    assert!(cpu.system_flags.contains(Flags::IF));
}

#[test]
fn iret_returns_to_user_code_and_takes_the_kernels_segments_away() {
    let mut cpu = long();
    cpu.nmi_blocked = true;
    for value in [u64::from(USER_DATA), 0x1000, 0x246, u64::from(USER_CODE64), 0x7777] {
        cpu.push(value).unwrap();
    }
    run(&mut cpu, &[0x48, 0xcf]).unwrap();
    assert_eq!((cpu.cpl(), cpu.rip, cpu.registers.get(4)), (3, 0x7777, 0x1000));
    assert_eq!(cpu.rflags(), 0x246);
    assert_eq!(selector(&cpu, SegmentRegister::Ds), 0);
    assert!(!cpu.nmi_blocked);
}

#[test]
fn iret_reaches_compatibility_mode() {
    let mut cpu = long();
    for value in [u64::from(USER_DATA), 0x1000, 0x202, u64::from(USER_CODE32), 0x7777] {
        cpu.push(value).unwrap();
    }
    run(&mut cpu, &[0x48, 0xcf]).unwrap();
    assert_eq!((cpu.cpl(), cpu.mode.code_size(), cpu.is_long()), (3, 32, true));
}

#[test]
fn iret_refuses_bad_frames_and_changes_nothing() {
    let good = [u64::from(USER_DATA), 0x1000, 0x202, u64::from(USER_CODE64), 0x7777];
    let bad = [
        (4, 0x8000_0000_0000, 0),
        (3, 0, 0),
        (3, u64::from(USER_DATA), u32::from(USER_DATA & !3)),
        (3, u64::from(USER_CODE64 & !3), u32::from(USER_CODE64 & !3)),
        (0, u64::from(KERNEL_DATA), u32::from(KERNEL_DATA)),
        (0, 0, 0),
    ];
    for (at, value, code) in bad {
        let mut cpu = long();
        let mut frame = good;
        frame[at] = value;
        for value in frame {
            cpu.push(value).unwrap();
        }
        assert_eq!(run(&mut cpu, &[0x48, 0xcf]), Err(Exception::gp(code)), "value {at} {value:#x}");
        assert_eq!((cpu.cpl(), cpu.registers.get(4)), (0, STACK - 40));
    }
}

#[test]
fn int1_is_a_debug_exception_that_no_privilege_forbids() {
    let mut cpu = long();
    to_user(&mut cpu);
    set_gate(&cpu, 1, 0, 0);
    run(&mut cpu, &[0xf1]).unwrap();
    assert_eq!((cpu.rip, cpu.cpl()), (handler(1), 0));
}

#[test]
fn int1_reports_what_a_load_of_ss_held_back() {
    let mut cpu = long();
    set_gate(&cpu, 1, 0, 0);
    cpu.debug_traps = 2;
    run(&mut cpu, &[0xf1]).unwrap();
    assert_eq!((cpu.rip, cpu.debug[4], cpu.debug_traps), (handler(1), 0xffff_0ff2, 0));
}

#[test]
fn a_debug_exception_leaves_its_reason_in_dr6() {
    let mut cpu = long();
    set_gate(&cpu, 1, 0, 0);
    cpu.deliver(Event::Exception(Exception::debug(1 << 14))).unwrap();
    assert_eq!(cpu.debug[4], 0xffff_4ff0);
    assert_eq!(stack::<3>(&cpu, 8)[2] & Flags::RF.bits(), 0, "a single step is a trap");
}

#[test]
fn events_are_named_for_people() {
    let event = Event::Software { vector: 0x80, next_rip: 0, kind: SoftwareKind::IntN };
    assert_eq!(event.to_string(), "INT 0x80");
    assert_eq!(Event::Exception(Exception::gp(8)).to_string(), "#GP(0x8)");
}
