//! Translated code looks into the translation cache by itself: what changes there must reach it.

use std::sync::Arc;

use engine::{Attention, VmExit};
use x86::Cr4;

use crate::cpu::Cpu;
use crate::interpreter::Interpreter;
use crate::jit::Settings;
use crate::shared::{Peers, Shared};
use crate::testing::*;

/// A page of programs with protection key 1.
const PAGE: u64 = 0x20_0000;
const ROUNDS: u64 = 200;

/// Stores and loads at RBX until they are translated, writes PKRU from ESI, and goes round once more.
#[rustfmt::skip]
const CODE_BYTES: [u8; 31] = [
    0x48, 0x89, 0x0b,                   // again: mov %rcx, (%rbx)
    0x48, 0x8b, 0x13,                   // mov (%rbx), %rdx
    0x48, 0x83, 0xe9, 0x01,             // sub $1, %rcx
    0x75, 0xf4,                         // jne again
    0x89, 0xf0,                         // mov %esi, %eax
    0x31, 0xc9,                         // xor %ecx, %ecx
    0x31, 0xd2,                         // xor %edx, %edx
    0x0f, 0x01, 0xef,                   // wrpkru
    0x48, 0xff, 0xc1,                   // inc %rcx
    0x48, 0xff, 0xc7,                   // inc %rdi
    0x48, 0x83, 0xff, 0x02,             // cmp $2, %rdi
];

/// Runs it with what PKRU becomes, for data of programs at CPL 0, or of the supervisor through a pointer with a tag.
fn run_with(pkru: u64, prepare: impl Fn(&mut Cpu)) -> (Option<u64>, u64) {
    let mut cpu = long();
    for (at, byte) in (CODE..).zip(CODE_BYTES.into_iter().chain([0x75, 0xdf, 0xf4])) {
        put(&cpu, at, byte);
    }
    set_gate(&cpu, 14, 0, 0);
    set_gate(&cpu, 13, 0, 0);
    put(&cpu, handler(14), 0xf4u8);
    put(&cpu, handler(13), 0xf4u8);
    put(&cpu, TABLES + 0x2008, PAGE | 0x87 | 1 << 59);
    cpu.cr4.insert(Cr4::PKE);
    cpu.update_paging();
    // The stack is elsewhere.
    cpu.registers.set(4, 0x9000);
    for (register, value) in [(1, ROUNDS), (3, PAGE), (6, pkru), (7, 0)] {
        cpu.registers.set(register, value);
    }
    prepare(&mut cpu);
    let attention = Attention::new();
    let peers = Peers::join(Arc::new(Shared::new(1)), 0, attention.clone());
    let mut interpreter = Interpreter::new(cpu, attention, peers);
    interpreter.enable_jit_with(Settings { hot: 4, ..Settings::default() }).unwrap();
    assert!(matches!(interpreter.run(), VmExit::Halt));
    let cpu = interpreter.cpu;
    assert!(cpu.registers.get(7) >= 1, "it got to WRPKRU");
    let code = (cpu.rip == handler(14) + 1).then(|| get(&cpu, cpu.registers.get(4)));
    (code, get(&cpu, PAGE))
}

#[test]
fn new_rights_of_a_key_stop_code_that_was_translated_before() {
    assert_eq!(run_with(0, |_| {}), (None, 1));
    assert_eq!(run_with(0xffff_fff3, |_| {}), (None, 1), "of other keys");
    assert_eq!(run_with(2 << 2, |_| {}), (Some(0x23), 1), "writes disabled");
    assert_eq!(run_with(1 << 2, |_| {}), (Some(0x23), 1), "all accesses disabled");
}

#[test]
fn translated_code_follows_tagged_pointers() {
    let tagged = |cpu: &mut Cpu| {
        cpu.registers.set(3, PAGE | 0x15 << 57);
        cpu.cr3 |= 1 << 61;
        cpu.update_paging();
    };
    assert_eq!(run_with(0, tagged), (None, 1));
    assert_eq!(run_with(1 << 2, tagged), (Some(0x23), 1));
}
