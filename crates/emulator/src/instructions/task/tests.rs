use x86::{Cr0, Exception, Flags, SegmentRegister, Vector};

use super::super::event::Event;
use crate::cpu::Cpu;
use crate::testing::*;

/// The other task's TSS, and where its descriptor and a task gate to it are.
const OTHER: u64 = 0x6000;
const GATE: u16 = FREE + 8;
const OTHER_STACK: u32 = 0x20_4000;
const OTHER_CODE: u32 = 0x10_2000;

/// A processor at CPL 0 with another task, in a TSS of type `kind` (9 or 1), that runs at CPL 0.
fn prepared(kind: u64) -> Cpu {
    let cpu = protected();
    put(&cpu, GDT + u64::from(TASK), 0x0000_8b00_3000_0067u64);
    put(&cpu, GDT + u64::from(FREE), 0x0000_8000_6000_0067 | kind << 40);
    put(&cpu, GDT + u64::from(GATE), 0x0000_8500_0000_0000 | u64::from(FREE) << 16);
    let segments = [KERNEL_DATA, KERNEL_CODE32, KERNEL_DATA, KERNEL_DATA, 0, 0];
    if kind == 9 {
        put(&cpu, OTHER + 0x20, OTHER_CODE);
        put(&cpu, OTHER + 0x24, 0x202u32);
        put(&cpu, OTHER + 0x28, 0x1111u32);
        put(&cpu, OTHER + 0x38, OTHER_STACK);
        for (n, selector) in (0..).zip(segments) {
            put(&cpu, OTHER + 0x48 + 4 * n, u32::from(selector));
        }
    } else {
        put(&cpu, OTHER + 0xe, 0x2000u16);
        put(&cpu, OTHER + 0x10, 0x202u16);
        put(&cpu, OTHER + 0x12, 0x1111u16);
        put(&cpu, OTHER + 0x1a, 0x4000u16);
        for (n, selector) in (0..).zip(&segments[..4]) {
            put(&cpu, OTHER + 0x22 + 2 * n, *selector);
        }
    }
    cpu
}

fn jump(cpu: &mut Cpu, selector: u16) -> Result<(), Exception> {
    run(cpu, &[0xea, 0, 0, 0, 0, selector as u8, 0])
}

fn call(cpu: &mut Cpu, selector: u16) -> Result<(), Exception> {
    run(cpu, &[0x9a, 0, 0, 0, 0, selector as u8, 0])
}

fn is_busy(cpu: &Cpu, selector: u16) -> bool {
    descriptor(cpu, selector).0 >> 41 & 1 != 0
}

#[test]
fn a_jump_saves_one_task_and_runs_another() {
    let mut cpu = prepared(9);
    cpu.registers.set(3, 0xabcd);
    cpu.system_flags.insert(Flags::NT);
    jump(&mut cpu, FREE).unwrap();
    assert_eq!((cpu.rip, cpu.registers.get(4)), (u64::from(OTHER_CODE), u64::from(OTHER_STACK)));
    assert_eq!((cpu.registers.get(0), cpu.rflags()), (0x1111, 0x202));
    assert_eq!((cpu.tr.selector.0, cpu.tr.base), (FREE, OTHER));
    assert!(cpu.cr0.contains(Cr0::TS));
    assert_eq!((is_busy(&cpu, TASK), is_busy(&cpu, FREE)), (false, true));
    let saved = [0x20, 0x24, 0x34, 0x38, 0x4c].map(|at| get::<u32>(&cpu, TSS + at));
    assert_eq!(saved, [CODE as u32 + 7, 0x4002, 0xabcd, STACK as u32, u32::from(KERNEL_CODE32)]);
    assert_eq!(get::<u16>(&cpu, OTHER), 0, "no back link");
}

#[test]
fn a_call_nests_and_iret_comes_back() {
    let mut cpu = prepared(9);
    call(&mut cpu, GATE).unwrap();
    assert_eq!((cpu.rip, get::<u16>(&cpu, OTHER)), (u64::from(OTHER_CODE), TASK));
    assert!(cpu.system_flags.contains(Flags::NT));
    assert!(is_busy(&cpu, TASK) && is_busy(&cpu, FREE));
    run(&mut cpu, &[0xcf]).unwrap();
    assert_eq!((cpu.rip, cpu.registers.get(4), cpu.tr.selector.0), (CODE + 7, STACK, TASK));
    assert!(!cpu.system_flags.contains(Flags::NT));
    assert_eq!((is_busy(&cpu, TASK), is_busy(&cpu, FREE)), (true, false));
    assert_eq!(get::<u32>(&cpu, OTHER + 0x24), 0x202, "NT is clear in what IRET saves");
    assert_eq!(get::<u32>(&cpu, OTHER + 0x20), OTHER_CODE + 1);
}

#[test]
fn a_16_bit_task_has_16_bit_registers() {
    let mut cpu = prepared(1);
    call(&mut cpu, FREE).unwrap();
    assert_eq!((cpu.rip, cpu.registers.get(0), cpu.registers.get(4)), (0x2000, 0x1111, 0x4000));
    run(&mut cpu, &[0xcf]).unwrap();
    assert_eq!((cpu.rip, cpu.tr.selector.0), (CODE + 7, TASK));
    assert_eq!(get::<u16>(&cpu, OTHER + 0xe), 0x2001);
    assert_eq!(get::<u16>(&cpu, OTHER + 0x24), KERNEL_CODE32);
}

#[test]
fn an_exception_through_a_task_gate_pushes_its_error_code_on_the_new_stack() {
    let mut cpu = prepared(9);
    put(&cpu, IDT + 8 * 13, 0x0000_8500_0000_0000 | u64::from(FREE) << 16);
    cpu.deliver(Event::Exception(Exception::gp(0x1234))).unwrap();
    assert_eq!((cpu.rip, cpu.registers.get(4)), (u64::from(OTHER_CODE), u64::from(OTHER_STACK) - 4));
    assert_eq!(stack::<1>(&cpu, 4), [0x1234]);
    assert_eq!(get::<u32>(&cpu, TSS + 0x20), CODE as u32, "a fault: the instruction itself");
    assert_eq!(get::<u32>(&cpu, TSS + 0x24) & 1 << 16, 1 << 16, "with RF");
}

#[test]
fn int_n_through_a_task_gate_resumes_after_itself() {
    let mut cpu = prepared(9);
    put(&cpu, IDT + 8 * 0x40, 0x0000_8500_0000_0000 | u64::from(FREE) << 16);
    run(&mut cpu, &[0xcd, 0x40]).unwrap();
    assert_eq!((cpu.rip, get::<u32>(&cpu, TSS + 0x20)), (u64::from(OTHER_CODE), CODE as u32 + 2));
}

#[test]
fn tasks_that_cannot_be_entered_are_refused() {
    let gp = |selector: u16| Err(Exception::gp(u32::from(selector)));
    let change = |at: u64, and: u64, or: u64| {
        let cpu = prepared(9);
        put(&cpu, at, get::<u64>(&cpu, at) & and | or);
        cpu
    };
    let (tss, gate) = (GDT + u64::from(FREE), GDT + u64::from(GATE));
    assert_eq!(jump(&mut change(tss, !0, 2 << 40), FREE), gp(FREE), "busy");
    let absent = Err(Exception::with_code(Vector::SegmentNotPresent, FREE.into()));
    assert_eq!(call(&mut change(tss, !(1 << 47), 0), FREE), absent);
    assert_eq!(call(&mut change(tss, !(1 << 47), 0), GATE), absent, "through a gate the TSS is named");
    let absent = Err(Exception::with_code(Vector::SegmentNotPresent, GATE.into()));
    assert_eq!(call(&mut change(gate, !(1 << 47), 0), GATE), absent);
    let short = Err(Exception::with_code(Vector::InvalidTss, FREE.into()));
    assert_eq!(jump(&mut change(tss, !1, 0), FREE), short);
    let mut cpu = prepared(9);
    to_user(&mut cpu);
    assert_eq!(jump(&mut cpu, FREE), gp(FREE));
    assert_eq!(jump(&mut cpu, GATE), gp(GATE));
    assert_eq!((cpu.rip, cpu.tr.selector.0), (CODE, TASK));
}

#[test]
fn a_return_to_a_task_that_is_not_busy_is_an_invalid_tss() {
    let mut cpu = prepared(9);
    cpu.system_flags.insert(Flags::NT);
    put(&cpu, TSS, FREE);
    let invalid = Err(Exception::with_code(Vector::InvalidTss, FREE.into()));
    assert_eq!(run(&mut cpu, &[0xcf]), invalid);
}

#[test]
fn a_bad_segment_faults_in_the_new_task() {
    let cases = [
        (0x4c, KERNEL_DATA, Vector::InvalidTss),
        (0x50, 0, Vector::InvalidTss),
        (0x54, 0x70, Vector::InvalidTss),
        (0x54, ABSENT, Vector::SegmentNotPresent),
        (0x50, ABSENT, Vector::StackFault),
        (0x60, KERNEL_DATA, Vector::InvalidTss),
    ];
    for (at, selector, vector) in cases {
        let mut cpu = prepared(9);
        // The handler is a task of its own, since the new one's stack may not be usable.
        put(&cpu, GDT + u64::from(GATE), 0x0000_8900_6800_0067u64);
        for n in 0..26 {
            put(&cpu, 0x6800 + 4 * n, get::<u32>(&cpu, OTHER + 4 * n));
        }
        put(&cpu, IDT + 8 * vector as u64, 0x0000_8500_0000_0000 | u64::from(GATE) << 16);
        put(&cpu, OTHER + at, u32::from(selector));
        jump(&mut cpu, FREE).unwrap();
        assert_eq!(cpu.tr.selector.0, GATE, "{at:#x} {selector:#x}");
        assert_eq!(stack::<1>(&cpu, 4), [u64::from(selector)]);
        assert_eq!(get::<u16>(&cpu, 0x6800), FREE, "the fault came from the new task");
        assert_eq!(get::<u32>(&cpu, OTHER + 0x20), OTHER_CODE);
    }
}

#[test]
fn the_trap_flag_of_a_task_is_a_debug_trap_before_its_first_instruction() {
    let mut cpu = prepared(9);
    cpu.debug[5] = 0x4ff;
    put(&cpu, OTHER + 0x64, 1u16);
    jump(&mut cpu, FREE).unwrap();
    assert_eq!((cpu.debug_traps, cpu.debug[5]), (1 << 15, 0x4aa));
}

#[test]
fn a_task_may_run_in_virtual_8086_mode() {
    let mut cpu = prepared(9);
    put(&cpu, OTHER + 0x24, 0x2_0202u32);
    put(&cpu, OTHER + 0x20, 0x77u32);
    put(&cpu, OTHER + 0x4c, 0x1234u32);
    jump(&mut cpu, FREE).unwrap();
    assert!(cpu.mode.is_v86());
    assert_eq!((cpu.cpl(), cpu.segment(SegmentRegister::Cs).base, cpu.rip), (3, 0x12340, 0x77));
}

#[test]
fn long_mode_has_no_tasks_to_switch_to() {
    let mut cpu = long();
    put(&cpu, GDT + u64::from(FREE), 0x0000_8900_6000_0067u64);
    put(&cpu, 0x5000, 0u32);
    put(&cpu, 0x5004, FREE);
    cpu.registers.set(0, 0x5000);
    assert_eq!(run(&mut cpu, &[0xff, 0x28]), Err(Exception::gp(FREE.into())));
}
