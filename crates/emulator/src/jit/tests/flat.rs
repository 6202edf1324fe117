//! 32-bit code in flat segments and in others, at the edges of its addresses, without paging and in compatibility mode.

use std::sync::Arc;

use engine::{Attention, VcpuState, VmExit};
use x86::descriptor::Attributes;
use x86::{Segment, SegmentRegister};

use crate::cpu::Cpu;
use crate::interpreter::Interpreter;
use crate::jit::{Settings, Statistics};
use crate::shared::{Peers, Shared};
use crate::testing::*;

const PRESENT_WRITE: u64 = 3;
/// RAM that the last page below 4 GiB is mapped to.
const TOP: u64 = 0x25_0000;
const DATA: u64 = 0x24_0000;

/// Protected mode without paging.
fn without_paging() -> Cpu {
    let cpu = protected();
    with_handlers(&cpu);
    cpu
}

/// Compatibility mode, with the last page below 4 GiB mapped.
fn compatibility() -> Cpu {
    let mut cpu = long();
    with_handlers(&cpu);
    put(&cpu, TABLES + 0x1000 + 8 * 3, (TABLES + 0x3000) | PRESENT_WRITE);
    put(&cpu, TABLES + 0x3000 + 8 * 511, (TABLES + 0x4000) | PRESENT_WRITE);
    put(&cpu, TABLES + 0x4000 + 8 * 511, TOP | PRESENT_WRITE);
    load_all(&mut cpu, KERNEL_CODE32, KERNEL_DATA);
    cpu
}

fn with_handlers(cpu: &Cpu) {
    for vector in [5, 6, 12, 13, 14] {
        set_gate(cpu, vector, 0, 0);
        put(cpu, handler(vector), 0xf4u8);
    }
}

fn write(cpu: &Cpu, at: u64, bytes: &[u8]) {
    (at..).zip(bytes).for_each(|(at, &byte)| put(cpu, at, byte));
}

/// Where a processor stops: its state, instructions, and RAM's contents; and what its translator did.
fn run_to_the_end(cpu: Cpu, translated: bool) -> (VcpuState, u64, Vec<u64>, Option<Statistics>) {
    let attention = Attention::new();
    let peers = Peers::join(Arc::new(Shared::new(1)), 0, attention.clone());
    let mut interpreter = Interpreter::new(cpu, attention, peers);
    if translated {
        interpreter.enable_jit_with(Settings { hot: 1, ..Settings::default() }).unwrap();
    }
    assert!(matches!(interpreter.run(), VmExit::Halt));
    let cpu = &interpreter.cpu;
    let memory = (0..MEMORY).step_by(8).map(|at| get(cpu, at)).collect();
    (cpu.state(), cpu.instructions, memory, interpreter.jit_statistics())
}

/// Runs it both ways. Gives the last state, and what the translator did.
fn same(machine: &dyn Fn() -> Cpu) -> (VcpuState, Statistics) {
    let (interpreted, translated) = (run_to_the_end(machine(), false), run_to_the_end(machine(), true));
    assert_eq!(interpreted.0.gprs, translated.0.gprs);
    assert_eq!(interpreted.0.rip, translated.0.rip);
    assert!(interpreted.0 == translated.0, "{:?}\n{:?}", interpreted.0, translated.0);
    assert_eq!(interpreted.1, translated.1, "instructions");
    assert!(interpreted.2 == translated.2, "memory");
    (translated.0, translated.3.unwrap())
}

/// Calls a function that sums up, a hundred times.
#[rustfmt::skip]
const SUM: [u8; 28] = [
    0xb9, 100, 0, 0, 0,             // mov $100, %ecx
    0xe8, 6, 0, 0, 0,               // again: call add
    0x49,                           // dec %ecx
    0x75, 0xf8,                     // jne again
    0xf4, 0x90, 0x90,               // hlt
    0x53,                           // add: push %ebx
    0xa1, 0, 0, 0x24, 0,            // mov DATA, %eax
    0x01, 0xc8,                     // add %ecx, %eax
    0xeb, 0,                        // jmp next
    0xff, 0x05,                     // next: incl ..
];
const SUM_END: [u8; 11] = [
    4, 0, 0x24, 0, //               .. DATA + 4
    0xa3, 0, 0, 0x24, 0, //         mov %eax, DATA
    0x5b, 0xc3, //                  pop %ebx; ret
];

fn sums(mut cpu: Cpu) -> Cpu {
    write(&cpu, CODE, &SUM);
    write(&cpu, CODE + SUM.len() as u64, &SUM_END);
    cpu.rip = CODE;
    cpu
}

#[test]
fn hot_flat_code_is_translated_without_paging_and_in_compatibility_mode() {
    for machine in [without_paging, compatibility] {
        let (state, done) = same(&|| sums(machine()));
        assert_eq!((state.rip, state.gprs[1], state.gprs[0]), (CODE + 14, 0, 5050));
        assert!(done.blocks >= 2, "{done:?}");
        assert!(done.handler_calls < 40, "{done:?}");
    }
}

#[test]
fn code_in_segments_that_are_not_flat_is_interpreted() {
    type Change = (SegmentRegister, fn(&mut Segment));
    let changes: [Change; 6] = [
        (SegmentRegister::Ds, |segment| segment.limit = 0x7f_ffff),
        (SegmentRegister::Es, |segment| segment.base = 16),
        (SegmentRegister::Es, |segment| segment.attributes.remove(Attributes::WRITABLE)),
        (SegmentRegister::Ds, |segment| segment.attributes.insert(Attributes::CODE)),
        (SegmentRegister::Cs, |segment| segment.limit = 0x7f_ffff),
        (SegmentRegister::Es, |segment| segment.attributes.insert(Attributes::UNUSABLE)),
    ];
    for (register, change) in changes {
        let (_, done) = same(&|| {
            let mut cpu = sums(without_paging());
            let mut segment = *cpu.segment(register);
            change(&mut segment);
            cpu.set_segment(register, segment);
            cpu
        });
        assert_eq!(done.blocks, 0, "{register:?}");
    }
}

#[test]
fn a_segment_that_stops_being_flat_in_hot_code_is_checked_from_the_next_instruction_on() {
    // again: mov %edx, %ds; mov (%ebx), %eax; dec %ecx; cmove %esi, %edx; jnz again; mov (%ebx), %eax; the selector in
    // ESI is of a segment that ends below what EBX points to.
    let code = [0x8e, 0xda, 0x8b, 0x03, 0x83, 0xe9, 1, 0x0f, 0x44, 0xd6, 0x75, 0xf4, 0x41, 0xeb, 0xf1];
    for machine in [without_paging, compatibility] {
        let (state, done) = same(&|| {
            let mut cpu = machine();
            write(&cpu, CODE, &code);
            put(&cpu, GDT + u64::from(FREE), 0x0040_9300_0000_ffffu64);
            for (register, value) in [(1, 50), (2, u64::from(KERNEL_DATA)), (3, DATA), (6, u64::from(FREE))] {
                cpu.registers.set(register, value);
            }
            cpu.rip = CODE;
            cpu
        });
        assert_eq!((state.rip, state.gprs[1]), (handler(13) + 1, 1));
        let frame = state.gprs[4];
        assert!(frame < STACK && done.blocks > 0, "{done:?}");
    }
}

#[test]
fn operands_and_the_stack_go_round_the_top_of_the_addresses() {
    // again: movl $0x11223344, -2(%edi); mov -2(%edi), %eax; push %eax; pop %ebx; pushl (%edi); pop %edx; bts %esi, (%edi, %ebp);
    // dec %ecx; jnz again; hlt
    let code = [
        0xc7, 0x47, 0xfe, 0x44, 0x33, 0x22, 0x11, 0x8b, 0x47, 0xfe, 0x50, 0x5b, 0xff, 0x37, 0x5a, 0x0f, 0xab,
        0x34, 0x2f, 0x49, 0x75, 0xea, 0xf4,
    ];
    for pointer in [0, 2, 4, 0xffff_fffe, 0xffff_fffc, 0x1000] {
        same(&|| {
            let mut cpu = compatibility();
            write(&cpu, CODE, &code);
            cpu.registers.set(1, 30);
            cpu.registers.set(4, pointer);
            cpu.registers.set(7, pointer & 0xff);
            cpu.registers.set(5, 0xffff_fff0);
            cpu.registers.set(6, 0xffff_ff80);
            cpu.rip = CODE;
            cpu
        });
    }
}

#[test]
fn what_runs_over_the_last_address_goes_where_interpreted_code_goes() {
    // again: dec %ecx; jz last; jmp again; last: nop …, up to the last byte.
    for bytes in [7, 8, 40] {
        same(&|| {
            let mut cpu = compatibility();
            put(&cpu, 0, 0xf4u8);
            let start = 0x1000 - bytes;
            write(&cpu, TOP + start, &[0x49, 0x74, 2, 0xeb, 0xfb]);
            (start + 5..0x1000).for_each(|at| put(&cpu, TOP + at, 0x90u8));
            cpu.registers.set(1, 30);
            cpu.rip = 0xffff_f000 + start;
            cpu
        });
    }
}

#[test]
fn branches_reach_the_other_end_of_the_addresses() {
    // again: jmp +0x10 with EIP near the top, which leads to low addresses: call and return from there.
    let (state, _) = same(&|| {
        let mut cpu = compatibility();
        // call CODE; dec %ecx; jnz back; hlt
        let distance = (CODE as u32).wrapping_sub(0xffff_f800 + 5).to_le_bytes();
        write(&cpu, TOP + 0x800, &[0xe8, distance[0], distance[1], distance[2], distance[3]]);
        write(&cpu, TOP + 0x805, &[0x49, 0x75, 0xf8, 0xf4]);
        // inc %eax; ret
        write(&cpu, CODE, &[0x40, 0xc3]);
        cpu.registers.set(1, 200);
        cpu.rip = 0xffff_f800;
        cpu
    });
    assert_eq!((state.rip, state.gprs[0]), (0xffff_f809, 200));
}

#[test]
fn an_operand_goes_over_the_end_of_a_segment_only_where_its_base_is_0() {
    // again: mov %gs:(%edi), %eax; add %eax, %ebx; dec %edi; dec %ecx; jnz again; hlt
    let code = [0x65, 0x8b, 0x07, 0x01, 0xc3, 0x4f, 0x49, 0x75, 0xf7, 0xf4];
    for base in [0, 1, DATA] {
        let (state, done) = same(&|| {
            let mut cpu = compatibility();
            write(&cpu, CODE, &code);
            let segment = Segment { base, ..*cpu.segment(SegmentRegister::Ds) };
            cpu.set_segment(SegmentRegister::Gs, segment);
            cpu.registers.set(1, 200);
            cpu.registers.set(7, 100);
            cpu.rip = CODE;
            cpu
        });
        let end = if base == 0 { (CODE + 10, 0xffff_ff9c) } else { (handler(13) + 1, 0xffff_ffff) };
        assert_eq!((state.rip, state.gprs[7]), end, "base {base:#x}");
        assert!(done.blocks > 0 && done.handler_calls < 40, "{done:?}");
    }
}
