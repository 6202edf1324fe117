//! Instructions that begin in one page and end in the next: each depends on the bytes and the mappings of both.

use std::sync::Arc;

use engine::VmExit;

use super::changing::*;
use crate::cpu::Cpu;
use crate::shared::Shared;
use crate::testing::*;

/// The page behind [`PAGE`].
const SECOND: u64 = PAGE + 0x1000;
/// A function there: `mov $.., %eax; ret`, of whose immediate operand the lowest byte is the last one of [`PAGE`].
const CROSSING: u64 = SECOND - 2;
const RSI: u8 = 6;

/// 64-bit mode with that function, and the registers that [`exchanging`] wants, to give [`SECOND`] the page [`OTHER`].
/// What is there makes the function give 0x302 more.
fn crossing() -> Cpu {
    let mut cpu = with_page(FUNCTION);
    put(&cpu, PAGE_TABLE + 8, (FUNCTION + 0x1000) | 7);
    write(&cpu, FUNCTION + 0xffe, &[0xb8, 1, 0, 0, 0, 0xc3]);
    write(&cpu, OTHER, &[3, 0, 0, 0xc3]);
    put(&cpu, DATA, OTHER | 7);
    for (register, value) in [(12, TABLES), (13, DATA), (14, CROSSING), (15, PAGE_TABLE + 8), (RSI, SECOND)] {
        cpu.registers.set(register, value);
    }
    cpu
}

#[test]
fn is_translated() {
    let cpu = crossing();
    // l: call *%r14; add %eax, %ebx; dec %ecx; jnz l; hlt
    write(&cpu, CODE, &[0x41, 0xff, 0xd6, 0x01, 0xc3, 0xff, 0xc9, 0x75, 0xf7, 0xf4]);
    let mut interpreter = interpreter(cpu, &Arc::new(Shared::new(1)), engines()[1]);
    interpreter.cpu.registers.set(RCX, ROUNDS);
    assert!(matches!(interpreter.run(), VmExit::Halt));
    assert_eq!(interpreter.cpu.registers.get(RBX), ROUNDS);
    let done = interpreter.jit_statistics().unwrap();
    assert!(done.entries < 20 && done.handler_calls < 20, "{done:?}");
}

#[test]
fn is_the_new_one_when_either_page_is_written() {
    for (patched, shift) in [(PAGE + 0xfff, 0), (SECOND, 8)] {
        // l: mov %cl, (%rsi); call *%r14; add %eax, %ebx; dec %ecx; jnz l; hlt
        let code = [0x88, 0x0e, 0x41, 0xff, 0xd6, 0x01, 0xc3, 0xff, 0xc9, 0x75, 0xf5, 0xf4];
        let cpu = || {
            let mut cpu = crossing();
            cpu.registers.set(RSI, patched);
            cpu
        };
        let rest = if shift == 0 { 0 } else { ROUNDS };
        let sum = ((1..=ROUNDS).sum::<u64>() << shift) + rest;
        on_each_engine(&code, cpu, |cpu| assert_eq!(cpu.registers.get(RBX), sum));
    }
}

#[test]
fn is_the_new_one_when_the_second_page_is_another() {
    // invlpg (%rsi); nop, and mov %r12, %cr3
    for flush in [[0x0f, 0x01, 0x3e, 0x90], [0x41, 0x0f, 0x22, 0xdc]] {
        let sum = ROUNDS / 2 * (1 + 0x301);
        on_each_engine(&exchanging(flush), crossing, |cpu| assert_eq!(cpu.registers.get(RBX), sum));
    }
}

#[test]
fn faults_at_the_second_page_once_that_may_not_be_fetched() {
    for (entry, error) in [(0, 0x10), (FUNCTION + 0x1007 | 1 << 63, 0x11)] {
        let cpu = || {
            let cpu = crossing();
            put(&cpu, DATA, entry);
            cpu
        };
        let flush = [0x0f, 0x01, 0x3e, 0x90];
        on_each_engine(&exchanging(flush), cpu, |cpu| {
            assert_eq!(fault(cpu), Some((14, error, ROUNDS - 1)));
            assert_eq!((cpu.cr2, stack::<2>(cpu, 8)[1]), (SECOND, CROSSING));
        });
    }
}
