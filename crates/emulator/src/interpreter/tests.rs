use engine::VmExit;
use x86::{Cr0, Flags, SegmentRegister};

use super::*;
use crate::shared::Shared;
use crate::testing::*;

const BYTES_PER_HANDLER: u64 = 16;

/// Runs `code` at RIP until it halts: behind it, or in a handler. Gives the processor.
fn execute(mut cpu: Cpu, code: &[u8]) -> Cpu {
    let start = cpu.rip + cpu.bases[1];
    for (at, &byte) in (start..).zip(code) {
        put(&cpu, at, byte);
    }
    put(&cpu, start + code.len() as u64, 0xf4u8);
    for vector in [6, 12, 13, 14, 17] {
        if cpu.mode.is_protected() {
            set_gate(&cpu, vector, 0, 0);
            put(&cpu, handler(vector), 0xf4u8);
        }
    }
    cpu.halted = false;
    let attention = Attention::new();
    let peers = Peers::join(Arc::new(Shared::new(1)), 0, attention.clone());
    let mut interpreter = Interpreter::new(cpu, attention, peers);
    assert!(matches!(interpreter.run(), VmExit::Halt));
    interpreter.cpu
}

/// The vector of the handler that the processor halted in.
fn fault(cpu: &Cpu) -> Option<u8> {
    (0..32).find(|&vector| (handler(vector)..handler(vector) + BYTES_PER_HANDLER).contains(&cpu.rip))
}

#[test]
fn non_canonical_addresses_are_stack_faults_through_the_stack_alone() {
    let cases: [(&[u8], u8); 7] = [
        (&[0x8b, 0x03], 13),             // mov (%rbx), %eax
        (&[0x8b, 0x45, 0x00], 12),       // mov (%rbp), %eax
        (&[0x64, 0x8b, 0x45, 0x00], 13), // mov %fs:(%rbp), %eax
        (&[0x50], 12),                   // push %rax
        (&[0xc3], 12),                   // ret
        (&[0xff, 0x33], 13),             // push (%rbx)
        (&[0xf3, 0xaa], 13),             // rep stosb
    ];
    for (code, vector) in cases {
        let mut cpu = long();
        to_user(&mut cpu);
        for register in [1, 3, 4, 5, 7] {
            cpu.registers.set(register, 0x8000_0000_0100);
        }
        assert_eq!(fault(&execute(cpu, code)), Some(vector), "{code:x?}");
    }
}

#[test]
fn an_instruction_of_more_than_15_bytes_is_a_general_protection_fault() {
    let mut code = [0x66; 16];
    code[15] = 0x90;
    assert_eq!(fault(&execute(long(), &code)), Some(13));
    assert_eq!(fault(&execute(long(), &code[1..])), None, "15 are allowed");
}

#[test]
fn an_instruction_must_end_within_its_code_segment() {
    let limited = |limit: u32| {
        let mut cpu = protected();
        let mut code = *cpu.segment(SegmentRegister::Cs);
        code.limit = limit;
        cpu.set_segment(SegmentRegister::Cs, code);
        execute(cpu, &[0x90, 0xb8, 1, 2, 3, 4])
    };
    let over = limited(CODE as u32 + 4);
    assert_eq!((fault(&over), stack::<2>(&over, 4)), (Some(13), [0, CODE + 1]));
    assert_eq!(fault(&limited(CODE as u32 + 6)), None);
}

#[test]
fn the_same_offset_in_another_segment_is_other_code() {
    let cpu = real();
    for (segment, byte) in [(0x1000u64, 1u8), (0x2000, 2)] {
        // add $byte, %al; ljmp back to the code at 0:0x7c05 and on
        for (at, code) in (segment << 4..).zip([0x04, byte, 0xcb]) {
            put(&cpu, at, code);
        }
    }
    let calls = [0x9a, 0, 0, 0, 0x10, 0x9a, 0, 0, 0, 0x20, 0x9a, 0, 0, 0, 0x10];
    assert_eq!(execute(cpu, &calls).registers.get(0), 4);
}

#[test]
fn programs_that_ask_for_it_get_alignment_checks() {
    let checked = |code: &[u8], address: u64, user: bool| {
        let mut cpu = long();
        cpu.cr0.insert(Cr0::AM);
        cpu.update_paging();
        if user {
            to_user(&mut cpu);
        }
        let flags = cpu.rflags() | Flags::AC.bits();
        cpu.set_rflags(flags, Flags::AC);
        cpu.registers.set(3, address);
        cpu.registers.set(0, 7);
        let cpu = execute(cpu, code);
        (fault(&cpu), get::<u16>(&cpu, address))
    };
    // HLT is not for programs: what ends well ends in #GP.
    let store = [0x66, 0x89, 0x03];
    assert_eq!(checked(&store, 0x5001, true), (Some(17), 0));
    assert_eq!(checked(&store, 0x5002, true), (Some(13), 7));
    assert_eq!(checked(&store, 0x5001, false), (None, 7), "only at CPL 3");
    assert_eq!(checked(&[0x88, 0x03], 0x5001, true), (Some(13), 7), "bytes are aligned anywhere");
    assert_eq!(checked(&[0x48, 0x8b, 0x03], 0x5004, true).0, Some(17));
}
