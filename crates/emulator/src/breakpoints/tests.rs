use std::sync::Arc;

use engine::{Attention, VmExit};
use x86::{Cr4, Flags};

use crate::cpu::Cpu;
use crate::interpreter::Interpreter;
use crate::shared::{Peers, Shared};
use crate::testing::*;

const DATA: u64 = 0x20_9000;
/// DR7 for breakpoint 0: an access of 4 bytes, a store of 4, I/O of a byte, an instruction.
const ACCESS: u64 = 0xf_0001;
const WRITE: u64 = 0xd_0001;
const PORT: u64 = 0x2_0001;
const CODE_AT: u64 = 1;

/// Runs code until it halts: at its end, or in the handler of the debug exception. Gives the processor.
fn execute(mut cpu: Cpu, code: &[u8]) -> Cpu {
    set_gate(&cpu, 1, 0, 0);
    set_gate(&cpu, 0x40, 0, 0);
    for (at, &byte) in (CODE..).zip(code) {
        put(&cpu, at, byte);
    }
    put(&cpu, CODE + code.len() as u64, 0xf4u8);
    put(&cpu, handler(1), 0xf4u8);
    cpu.update_breakpoints();
    let attention = Attention::new();
    let peers = Peers::join(Arc::new(Shared::new(1)), 0, attention.clone());
    let mut interpreter = Interpreter::new(cpu, attention, peers);
    assert!(matches!(interpreter.run(), VmExit::Halt));
    interpreter.cpu
}

fn with_breakpoint(address: u64, dr7: u64) -> Cpu {
    let mut cpu = long();
    cpu.debug[0] = address;
    cpu.debug[5] = 0x400 | dr7;
    cpu.registers.set(3, DATA);
    cpu
}

/// Where the debug exception came from, from the start of the code, and DR6 without the bits that are always set.
fn trapped(cpu: &Cpu) -> Option<(u64, u64)> {
    (cpu.rip == handler(1) + 1).then(|| (stack::<1>(cpu, 8)[0] - CODE, cpu.debug[4] & 0xe00f))
}

const LOAD: [u8; 2] = [0x8b, 0x03];
const STORE: [u8; 2] = [0x89, 0x03];
const NOP: [u8; 1] = [0x90];

#[test]
fn a_store_to_a_watched_place_traps_after_itself() {
    let code = [&NOP[..], &STORE, &NOP].concat();
    assert_eq!(trapped(&execute(with_breakpoint(DATA, WRITE), &code)), Some((3, 1)));
    assert_eq!(trapped(&execute(with_breakpoint(DATA + 4, WRITE), &code)), None);
    let unaligned = execute(with_breakpoint(DATA + 3, WRITE), &code);
    assert_eq!(trapped(&unaligned), Some((3, 1)), "the length aligns the address");
}

#[test]
fn a_load_hits_breakpoints_on_accesses_alone() {
    let code = [&LOAD[..], &NOP].concat();
    assert_eq!(trapped(&execute(with_breakpoint(DATA, ACCESS), &code)), Some((2, 1)));
    assert_eq!(trapped(&execute(with_breakpoint(DATA, WRITE), &code)), None);
    assert_eq!(trapped(&execute(with_breakpoint(DATA, ACCESS & !1), &code)), None, "not enabled");
}

#[test]
fn a_vector_store_and_a_push_hit_too() {
    let vector = [&[0x0f, 0x11, 0x03][..], &NOP].concat();
    assert_eq!(trapped(&execute(with_breakpoint(DATA + 12, WRITE), &vector)), Some((3, 1)));
    assert_eq!(trapped(&execute(with_breakpoint(STACK - 8, WRITE), &[0x50, 0x90])), Some((1, 1)));
}

#[test]
fn a_repeated_store_traps_after_the_iteration_that_hit() {
    let mut cpu = with_breakpoint(DATA + 8, WRITE);
    cpu.registers.set(7, DATA);
    cpu.registers.set(1, 100);
    let cpu = execute(cpu, &[0xf3, 0xab, 0x90]);
    assert_eq!((trapped(&cpu), cpu.registers.get(1)), (Some((0, 1)), 97));
}

#[test]
fn an_instruction_breakpoint_faults_before_it_and_resumes_with_rf() {
    let code = [&NOP[..], &NOP, &NOP].concat();
    let cpu = execute(with_breakpoint(CODE + 1, CODE_AT), &code);
    assert_eq!(trapped(&cpu), Some((1, 1)));
    assert_eq!(stack::<3>(&cpu, 8)[2] & Flags::RF.bits(), 0);
    // The handler returns with RF set: one pass, and no second hit.
    let mut cpu = with_breakpoint(CODE + 1, CODE_AT);
    cpu.system_flags.insert(Flags::RF);
    cpu.rip = CODE + 1;
    let cpu = execute(cpu, &code);
    assert_eq!(trapped(&cpu), None);
    assert!(!cpu.system_flags.contains(Flags::RF));
}

#[test]
fn iret_loads_rf_for_one_instruction() {
    let mut cpu = with_breakpoint(CODE + 2, CODE_AT);
    for value in [u64::from(KERNEL_DATA), STACK, 0x1_0002, u64::from(KERNEL_CODE64), CODE + 2] {
        cpu.push(value).unwrap();
    }
    // IRETQ to the NOP behind it, which then jumps back to itself once.
    let cpu = execute(cpu, &[0x48, 0xcf, 0x90, 0xeb, 0xfd]);
    assert_eq!(trapped(&cpu), Some((2, 1)), "the second time round");
}

#[test]
fn ports_are_watched_with_debugging_extensions() {
    let mut cpu = with_breakpoint(0x60, PORT);
    cpu.cr4.insert(Cr4::DE);
    assert_eq!(trapped(&execute(cpu, &[0x90, 0xe4, 0x60, 0x90])), Some((3, 1)));
    assert_eq!(trapped(&execute(with_breakpoint(0x60, PORT), &[0xe4, 0x60])), None);
}

#[test]
fn single_steps_end_after_each_instruction_and_iteration() {
    let traced = || {
        let mut cpu = with_breakpoint(0, 0);
        cpu.system_flags.insert(Flags::TF);
        cpu
    };
    assert_eq!(trapped(&execute(traced(), &[0x90, 0x90])), Some((1, 1 << 14)));
    assert_eq!(trapped(&execute(traced(), &[0xeb, 0x02, 0x90, 0x90])), Some((4, 1 << 14)));
    assert_eq!(trapped(&execute(traced(), &[0xf4, 0x90])), Some((1, 1 << 14)), "HLT does not wait");
    let mut cpu = traced();
    cpu.registers.set(7, DATA);
    cpu.registers.set(1, 100);
    let cpu = execute(cpu, &[0xf3, 0xaa, 0x90]);
    assert_eq!((trapped(&cpu), cpu.registers.get(1)), (Some((0, 1 << 14)), 99));
}

#[test]
fn popf_that_sets_tf_traps_after_the_next_instruction() {
    let mut cpu = with_breakpoint(0, 0);
    cpu.push(0x102u64).unwrap();
    assert_eq!(trapped(&execute(cpu, &[0x9d, 0x90, 0x90])), Some((2, 1 << 14)));
    let mut cpu = with_breakpoint(0, 0);
    cpu.system_flags.insert(Flags::TF);
    cpu.push(2u64).unwrap();
    assert_eq!(trapped(&execute(cpu, &[0x9d, 0x90])), Some((1, 1 << 14)), "and one that clears it traps");
}

#[test]
fn a_load_of_ss_holds_traps_off_for_one_instruction() {
    let mut cpu = with_breakpoint(0, 0);
    cpu.system_flags.insert(Flags::TF);
    cpu.registers.set(0, u64::from(KERNEL_DATA));
    assert_eq!(trapped(&execute(cpu, &[0x8e, 0xd0, 0x90, 0x90])), Some((3, 1 << 14)));
    // A data breakpoint that the load itself hits waits as well.
    let cpu = with_breakpoint(DATA, ACCESS);
    put(&cpu, DATA, KERNEL_DATA);
    assert_eq!(trapped(&execute(cpu, &[0x8e, 0x13, 0x90, 0x90])), Some((3, 1)));
    // No instruction breakpoint right after it.
    let mut cpu = with_breakpoint(CODE + 2, CODE_AT);
    cpu.registers.set(0, u64::from(KERNEL_DATA));
    assert_eq!(trapped(&execute(cpu, &[0x8e, 0xd0, 0x90, 0x90])), None);
}

#[test]
fn an_interrupt_instruction_is_not_traced_into_its_handler() {
    let mut cpu = with_breakpoint(0, 0);
    cpu.system_flags.insert(Flags::TF);
    put(&cpu, handler(0x40), 0xf4u8);
    let cpu = execute(cpu, &[0xcd, 0x40]);
    assert_eq!((cpu.rip, trapped(&cpu)), (handler(0x40) + 1, None));
}

#[test]
fn with_btf_only_branches_trap() {
    let mut cpu = with_breakpoint(0, 0);
    cpu.system_flags.insert(Flags::TF);
    cpu.msrs.debugctl = 2;
    let cpu = execute(cpu, &[0x90, 0x90, 0xeb, 0x01, 0x90, 0x90]);
    assert_eq!((trapped(&cpu), cpu.msrs.debugctl), (Some((5, 1 << 14)), 0));
}

#[test]
fn general_detect_faults_with_rf_and_is_off_in_the_handler() {
    let cpu = execute(with_breakpoint(0, 1 << 13), &[0x0f, 0x21, 0xc0]);
    assert_eq!((trapped(&cpu), cpu.debug[5]), (Some((0, 1 << 13)), 0x400));
    assert_ne!(stack::<3>(&cpu, 8)[2] & Flags::RF.bits(), 0);
}
