//! Code that changes under hot translations: its bytes, its mapping, its rights, the mode, and what watches it. Each
//! program runs on the interpreter alone and with the translator at two settings; all must end as the test says.

use std::sync::Arc;

use engine::{Attention, Signals, VmExit};
use x86::{Cr0, Cr4};

use crate::cpu::Cpu;
use crate::cpuid::CpuModel;
use crate::interpreter::Interpreter;
use crate::jit::Settings;
use crate::shared::{Peers, Shared};
use crate::testing::*;

/// Where functions are that the programs call.
pub const FUNCTION: u64 = CODE + 0x2000;
/// Another page with a function.
pub const OTHER: u64 = CODE + 0x4000;
/// A page of its own, mapped by an entry of its own, see [`with_page`].
pub const PAGE: u64 = 0x40_0000;
/// The table that maps it.
pub const PAGE_TABLE: u64 = TABLES + 0x3000;
pub const DATA: u64 = 0x28_0000;
/// Rounds that the loops go.
pub const ROUNDS: u64 = 100;

pub const RCX: u8 = 1;
pub const RBX: u8 = 3;

pub fn write(cpu: &Cpu, at: u64, code: &[u8]) {
    (at..).zip(code).for_each(|(at, &byte)| put(cpu, at, byte));
}

/// `mov $value, %eax; ret`
fn function(cpu: &Cpu, at: u64, value: u32) {
    let [a, b, c, d] = value.to_le_bytes();
    write(cpu, at, &[0xb8, a, b, c, d, 0xc3]);
}

pub fn interpreter(mut cpu: Cpu, shared: &Arc<Shared>, settings: Option<Settings>) -> Interpreter {
    for vector in 0..20 {
        set_gate(&cpu, vector, 0, 1);
        if get::<u8>(&cpu, handler(vector)) == 0 {
            put(&cpu, handler(vector), 0xf4u8);
        }
    }
    cpu.update_breakpoints();
    cpu.update_paging();
    let attention = Attention::new();
    let peers = Peers::join(shared.clone(), cpu.id, attention.clone());
    let mut interpreter = Interpreter::new(cpu, attention, peers);
    if let Some(settings) = settings {
        interpreter.enable_jit_with(settings).unwrap();
    }
    interpreter
}

/// The interpreter alone, everything translated, and what is hot translated.
pub fn engines() -> [Option<Settings>; 3] {
    let settings = |hot| Some(Settings { hot, ..Settings::default() });
    [None, settings(0), settings(5)]
}

/// Runs code on each engine until it halts, RCX counting down from [`ROUNDS`], and checks the processor then. All
/// must have retired as many instructions.
pub fn on_each_engine(code: &[u8], cpu: impl Fn() -> Cpu, check: impl Fn(&Cpu)) {
    let mut instructions = Vec::new();
    for settings in engines() {
        let mut cpu = cpu();
        write(&cpu, CODE, code);
        cpu.registers.set(RCX, ROUNDS);
        let mut interpreter = interpreter(cpu, &Arc::new(Shared::new(1)), settings);
        let exit = interpreter.run();
        assert!(matches!(exit, VmExit::Halt), "{settings:?}: {exit:?}");
        check(&interpreter.cpu);
        instructions.push(interpreter.cpu.instructions);
    }
    assert!(instructions.iter().all(|&n| n == instructions[0]), "{instructions:?} instructions");
}

/// The vector, the error code or RIP on top of the stack, and RCX, where the processor halted in a handler.
pub fn fault(cpu: &Cpu) -> Option<(u8, u64, u64)> {
    let vector = (0..20).find(|&vector| cpu.rip == handler(vector) + 1)?;
    Some((vector, stack::<1>(cpu, 8)[0], cpu.registers.get(RCX)))
}

/// 64-bit mode with [`PAGE`] mapped to where a test wants it.
pub fn with_page(target: u64) -> Cpu {
    let cpu = long();
    put(&cpu, TABLES + 0x2000 + 16, PAGE_TABLE | 7);
    put(&cpu, PAGE_TABLE, target | 7);
    cpu
}

#[test]
fn a_loop_patches_the_instruction_after_the_store() {
    // l: mov %cl, p+2(%rip); p: add $0, %eax; dec %ecx; jnz l; hlt
    let code = [0x88, 0x0d, 2, 0, 0, 0, 0x83, 0xc0, 0, 0xff, 0xc9, 0x75, 0xf3, 0xf4];
    on_each_engine(&code, long, |cpu| assert_eq!(cpu.registers.get(0), (1..=ROUNDS).sum::<u64>()));
}

#[test]
fn a_loop_patches_the_instruction_before_the_store() {
    // p: add $0, %eax; mov %cl, p+2(%rip); dec %ecx; jnz p; hlt
    let code = [0x83, 0xc0, 0, 0x88, 0x0d, 0xf9, 0xff, 0xff, 0xff, 0xff, 0xc9, 0x75, 0xf3, 0xf4];
    on_each_engine(&code, long, |cpu| assert_eq!(cpu.registers.get(0), (2..=ROUNDS).sum::<u64>()));
}

#[test]
fn a_loop_patches_a_function_in_another_page() {
    // l: mov %ecx, FUNCTION+1; call FUNCTION; add %eax, %ebx; dec %ecx; jnz l; hlt
    let code = [
        0x89, 0x0c, 0x25, 0x01, 0x20, 0x10, 0x00, 0xe8, 0xf4, 0x1f, 0x00, 0x00, 0x01, 0xc3, 0xff, 0xc9, 0x75,
        0xee, 0xf4,
    ];
    let cpu = || {
        let cpu = long();
        function(&cpu, FUNCTION, 0);
        cpu
    };
    on_each_engine(&code, cpu, |cpu| assert_eq!(cpu.registers.get(RBX), (1..=ROUNDS).sum::<u64>()));
}

#[test]
fn what_is_patched_before_serialize_is_executed_behind_it() {
    // l: mov %cl, p+2(%rip); serialize; pause; p: add $0, %eax; dec %ecx; jnz l; hlt
    let code =
        [0x88, 0x0d, 7, 0, 0, 0, 0x0f, 0x01, 0xe8, 0xf3, 0x90, 0x83, 0xc0, 0, 0xff, 0xc9, 0x75, 0xee, 0xf4];
    on_each_engine(&code, long, |cpu| assert_eq!(cpu.registers.get(0), (1..=ROUNDS).sum::<u64>()));
}

#[test]
fn serialize_and_pause_need_no_handler() {
    // l: serialize; pause; dec %ecx; jnz l; hlt
    let mut cpu = long();
    write(&cpu, CODE, &[0x0f, 0x01, 0xe8, 0xf3, 0x90, 0xff, 0xc9, 0x75, 0xf7, 0xf4]);
    cpu.registers.set(RCX, 1000);
    let settings = Settings { hot: 4, ..Settings::default() };
    let mut interpreter = interpreter(cpu, &Arc::new(Shared::new(1)), Some(settings));
    assert!(matches!(interpreter.run(), VmExit::Halt));
    assert_eq!((interpreter.cpu.instructions, interpreter.cpu.registers.get(RCX)), (4001, 0));
    let calls = interpreter.jit_statistics().unwrap().handler_calls;
    assert!(calls < 10, "{calls} handlers");
}

#[test]
fn what_a_device_writes_over_a_hot_loop_is_executed() {
    for settings in engines() {
        let cpu = long();
        // l: inc %ebx; nop; jmp l
        write(&cpu, CODE, &[0xff, 0xc3, 0x90, 0xeb, 0xfb]);
        let memory = cpu.memory.clone();
        let mut interpreter = interpreter(cpu, &Arc::new(Shared::new(1)), settings);
        let attention = interpreter.attention.clone();
        let device = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(30));
            attention.raise(Signals::EXIT);
            std::thread::sleep(std::time::Duration::from_millis(30));
            // As the device's view of the RAM does it.
            memory.write_bytes(CODE + 2, &[0xf4]);
            memory.marks().written(CODE + 2);
            std::thread::sleep(std::time::Duration::from_secs(10));
            attention.raise(Signals::EXIT);
        });
        assert!(matches!(interpreter.run(), VmExit::Interrupted));
        assert!(matches!(interpreter.run(), VmExit::Halt), "{settings:?}: the old code went on");
        drop(device);
    }
}

#[test]
fn another_vcpu_executes_what_one_patched_once_it_has_serialized() {
    // 1..=2000: wait until DATA is n; CPUID; call FUNCTION; fail where it does not give n; DATA+0x40 = n
    let executor = [
        0xbf, 0x01, 0x00, 0x00, 0x00, 0xf3, 0x90, 0x39, 0x3c, 0x25, 0x00, 0x00, 0x28, 0x00, 0x75, 0xf5, 0x31,
        0xc0, 0x0f, 0xa2, 0xe8, 0xe7, 0x1f, 0x00, 0x00, 0x39, 0xf8, 0x75, 0x12, 0x89, 0x3c, 0x25, 0x40, 0x00,
        0x28, 0x00, 0xff, 0xc7, 0x81, 0xff, 0xd1, 0x07, 0x00, 0x00, 0x75, 0xd7, 0xf4, 0x0f, 0x0b,
    ];
    // 1..=2000: store n into the function; DATA = n; wait until DATA+0x40 is n
    let patcher = [
        0xbf, 0x01, 0x00, 0x00, 0x00, 0x89, 0x3c, 0x25, 0x01, 0x20, 0x10, 0x00, 0x89, 0x3c, 0x25, 0x00, 0x00,
        0x28, 0x00, 0xf3, 0x90, 0x39, 0x3c, 0x25, 0x40, 0x00, 0x28, 0x00, 0x75, 0xf5, 0xff, 0xc7, 0x81, 0xff,
        0xd1, 0x07, 0x00, 0x00, 0x75, 0xdd, 0xf4,
    ];
    for settings in engines() {
        let shared = Arc::new(Shared::new(2));
        let (first, mut second) = (long(), long());
        function(&first, FUNCTION, 0);
        write(&first, CODE, &executor);
        write(&first, CODE + 0x8000, &patcher);
        second.memory = first.memory.clone();
        (second.id, second.rip) = (1, CODE + 0x8000);
        let mut executing = interpreter(first, &shared, settings);
        let mut patching = interpreter(second, &shared, settings);
        let attentions = [executing.attention.clone(), patching.attention.clone()];
        std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_secs(20));
            attentions.iter().for_each(|attention| attention.raise(Signals::EXIT));
        });
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                let exit = patching.run();
                assert!(
                    matches!(exit, VmExit::Halt),
                    "{exit:?} of the patcher after {:?}",
                    get::<u32>(&patching.cpu, DATA)
                );
            });
            let exit = executing.run();
            assert!(
                matches!(exit, VmExit::Halt) && fault(&executing.cpu).is_none(),
                "{settings:?}: {exit:?}"
            );
            other.join().unwrap();
        });
    }
}

/// A loop that calls the function at R14, adds what it gives to EBX, exchanges the page-table entry at R15 with the one at R13,
/// and does `flush`.
pub fn exchanging(flush: [u8; 4]) -> Vec<u8> {
    // l: call *%r14; add %eax, %ebx; mov (%r15), %r8; mov (%r13), %r9; mov %r9, (%r15); mov %r8, (%r13)
    let mut code = vec![
        0x41, 0xff, 0xd6, 0x01, 0xc3, 0x4d, 0x8b, 0x07, 0x4d, 0x8b, 0x4d, 0x00, 0x4d, 0x89, 0x0f, 0x4d, 0x89,
        0x45, 0x00,
    ];
    code.extend(flush);
    // dec %ecx; jnz l; hlt
    code.extend([0xff, 0xc9, 0x75, 0xe5, 0xf4]);
    code
}

/// A loop at [`CODE`] that calls the function at R14: the same with calls of `target` by its address, that is, of what
/// translated code may go to without looking it up.
fn directly(code: &[u8], target: u64) -> Vec<u8> {
    let mut direct = Vec::new();
    let mut rest = code;
    while let Some((&first, behind)) = rest.split_first() {
        if let Some(behind) = rest.strip_prefix(&[0x41, 0xff, 0xd6]) {
            let next = CODE + direct.len() as u64 + 5;
            direct.push(0xe8);
            direct.extend_from_slice(&(target.wrapping_sub(next) as u32).to_le_bytes());
            rest = behind;
        } else {
            direct.push(first);
            rest = behind;
        }
    }
    // jnz to the start; hlt
    let jump = direct.len() - 2;
    direct[jump] -= (direct.len() - code.len()) as u8;
    direct
}

/// That loop, where the entry is that of [`PAGE`].
fn remapped(flush: [u8; 4]) {
    let cpu = || {
        let mut cpu = with_page(FUNCTION);
        put(&cpu, DATA, OTHER | 7);
        function(&cpu, FUNCTION, 1);
        function(&cpu, OTHER, 1000);
        for (register, value) in [(12, TABLES), (13, DATA), (14, PAGE), (15, PAGE_TABLE)] {
            cpu.registers.set(register, value);
        }
        cpu
    };
    let code = exchanging(flush);
    for code in [directly(&code, PAGE), code] {
        on_each_engine(&code, cpu, |cpu| assert_eq!(cpu.registers.get(RBX), ROUNDS / 2 * 1001));
    }
}

#[test]
fn a_remapped_function_is_the_new_one_after_invlpg() {
    remapped([0x41, 0x0f, 0x01, 0x3e]);
}

#[test]
fn a_remapped_function_is_the_new_one_after_a_load_of_cr3() {
    remapped([0x41, 0x0f, 0x22, 0xdc]);
}

#[test]
fn address_spaces_that_are_kept_keep_their_code_apart() {
    // l: mov %r12, %cr3; call *%r14; add %eax, %ebx; mov %r13, %cr3; call *%r14; sub %eax, %ebx; dec %ecx; jnz l; hlt
    let code = [
        0x41, 0x0f, 0x22, 0xdc, 0x41, 0xff, 0xd6, 0x01, 0xc3, 0x41, 0x0f, 0x22, 0xdd, 0x41, 0xff, 0xd6, 0x29,
        0xc3, 0xff, 0xc9, 0x75, 0xea, 0xf4,
    ];
    let cpu = || {
        let mut cpu = with_page(FUNCTION);
        cpu.cr4 |= Cr4::PCIDE;
        // The other space differs in the page alone.
        for (at, entry) in [(0x4000, TABLES + 0x5007), (0x5000, TABLES + 0x6007), (0x7000, OTHER | 7)] {
            put(&cpu, TABLES + at, entry);
        }
        for (n, entry) in [0x87, 0x20_0087, TABLES + 0x7007].into_iter().enumerate() {
            put(&cpu, TABLES + 0x6000 + 8 * n as u64, entry);
        }
        function(&cpu, FUNCTION, 7);
        function(&cpu, OTHER, 5);
        let keep = 1 << 63;
        for (register, value) in [(12, TABLES | 1 | keep), (13, TABLES + 0x4002 | keep), (14, PAGE)] {
            cpu.registers.set(register, value);
        }
        cpu
    };
    for code in [&code[..], &directly(&code, PAGE)] {
        on_each_engine(code, cpu, |cpu| assert_eq!(cpu.registers.get(RBX), ROUNDS * 2));
    }
}

/// A hot loop that stores to the page, loads and calls there; after half of its rounds the page gets another entry.
fn with_rights(entry: u64) -> Option<(u8, u64, u64)> {
    // l: mov %ecx, (%rbx); add (%rbx), %eax; call *%r14; cmp $50, %ecx; jne n; mov %r12, (%r15); invlpg (%r13)
    // n: dec %ecx; jnz l; hlt
    let code = [
        0x89, 0x0b, 0x03, 0x03, 0x41, 0xff, 0xd6, 0x83, 0xf9, 0x32, 0x75, 0x08, 0x4d, 0x89, 0x27, 0x41, 0x0f,
        0x01, 0x7d, 0x00, 0xff, 0xc9, 0x75, 0xe8, 0xf4,
    ];
    let cpu = || {
        let mut cpu = with_page(FUNCTION);
        function(&cpu, FUNCTION, 1);
        for (register, value) in [(RBX, PAGE + 0x800), (12, entry), (13, PAGE), (14, PAGE), (15, PAGE_TABLE)]
        {
            cpu.registers.set(register, value);
        }
        cpu
    };
    let found = std::cell::RefCell::new(Vec::new());
    for code in [&code[..], &directly(&code, PAGE)] {
        on_each_engine(code, cpu, |cpu| found.borrow_mut().push(fault(cpu)));
    }
    let found = found.into_inner();
    assert!(found.iter().all(|one| *one == found[0]), "{found:x?}");
    found[0]
}

#[test]
fn rights_that_are_taken_away_are_gone_for_hot_code() {
    assert_eq!(with_rights(FUNCTION | 7), None);
    assert_eq!(with_rights(FUNCTION | 5), Some((14, 3, 49)), "a store to what is read-only now");
    assert_eq!(with_rights(FUNCTION | 7 | 1 << 63), Some((14, 0x11, 49)), "a fetch from what is data now");
    assert_eq!(with_rights(0), Some((14, 2, 49)), "a store to what is not there");
}

#[test]
fn forgetting_code_whose_memory_is_full_changes_nothing() {
    // l: call *%r14; dec %ecx; jnz l; hlt
    let code = [0x41, 0xff, 0xd6, 0xff, 0xc9, 0x75, 0xf9, 0xf4];
    for (hot, direct) in [(0, false), (3, false), (0, true), (3, true)] {
        let mut cpu = long();
        write(&cpu, CODE, &if direct { directly(&code, FUNCTION) } else { code.to_vec() });
        // A chain of 400 functions: lea 1(%rbx), %rbx; push %rbx; pop %rax; jmp to the next.
        for n in 0..400u64 {
            let jump = if n == 399 { [0xc3, 0, 0, 0, 0] } else { [0xe9, 0xf5, 0, 0, 0] };
            let body = [&[0x48, 0x8d, 0x5b, 1, 0x53, 0x58][..], &jump].concat();
            write(&cpu, FUNCTION + 0x100 * n, &body);
        }
        cpu.registers.set(RCX, ROUNDS);
        cpu.registers.set(14, FUNCTION);
        let settings = Settings { code_bytes: 32 << 10, hot, ..Settings::default() };
        let mut interpreter = interpreter(cpu, &Arc::new(Shared::new(1)), Some(settings));
        assert!(matches!(interpreter.run(), VmExit::Halt));
        assert_eq!(interpreter.cpu.registers.get(RBX), 400 * ROUNDS);
        assert!(interpreter.jit_statistics().unwrap().evictions > 2);
    }
}

#[test]
fn the_same_bytes_mean_something_else_in_compatibility_mode() {
    // l: push $KERNEL_CODE32; push %r14; lretq; back: dec %ecx; jnz l; hlt
    let code = [0x6a, 0x30, 0x41, 0x56, 0x48, 0xcb, 0xff, 0xc9, 0x75, 0xf6, 0xf4];
    let cpu = || {
        let mut cpu = long();
        // dec %eax; inc %eax; inc %ebx; ljmp to `back`
        write(&cpu, FUNCTION, &[0x48, 0xff, 0xc0, 0x43, 0xea, 0x06, 0x00, 0x10, 0x00, 0x08, 0x00]);
        cpu.registers.set(14, FUNCTION);
        cpu
    };
    on_each_engine(&code, cpu, |cpu| assert_eq!((cpu.registers.get(0), cpu.registers.get(RBX)), (0, ROUNDS)));
}

#[test]
fn hot_code_is_single_stepped_where_it_asks_for_it() {
    // l: add $3, %eax; push %rbx; pop %rdx; test $7, %cl; jnz n; pushfq; orl $0x100, (%rsp); popfq; add $1, %rsi;
    // lea (%rsi,%rdi), %rdi; n: dec %ecx; jnz l; hlt
    let code = [
        0x83, 0xc0, 0x03, 0x53, 0x5a, 0xf6, 0xc1, 0x07, 0x75, 0x11, 0x9c, 0x81, 0x0c, 0x24, 0x00, 0x01, 0x00,
        0x00, 0x9d, 0x48, 0x83, 0xc6, 0x01, 0x48, 0x8d, 0x3c, 0x3e, 0xff, 0xc9, 0x75, 0xe1, 0xf4,
    ];
    let cpu = || {
        let cpu = long();
        // incl DATA; andl $~0x100, 16(%rsp); iretq
        let count = [
            0xff, 0x04, 0x25, 0x00, 0x00, 0x28, 0x00, 0x81, 0x64, 0x24, 0x10, 0xff, 0xfe, 0xff, 0xff, 0x48,
            0xcf,
        ];
        // Over the handlers' neighbours, which this program does not need.
        write(&cpu, handler(1), &count);
        put(&cpu, handler(2), 0xcfu8);
        cpu
    };
    on_each_engine(&code, cpu, |cpu| {
        assert_eq!((get::<u32>(cpu, DATA), cpu.registers.get(6)), (12, 12));
    });
}

#[test]
fn hot_code_is_checked_for_alignment_once_it_asks_for_it() {
    // l: mov 1(%rbx), %eax; add %eax, %edx; cmp $50, %ecx; jne n; pushfq; orl $0x40000, (%rsp); popfq
    // n: dec %ecx; jnz l; hlt
    let code = [
        0x8b, 0x43, 0x01, 0x01, 0xc2, 0x83, 0xf9, 0x32, 0x75, 0x09, 0x9c, 0x81, 0x0c, 0x24, 0x00, 0x00, 0x04,
        0x00, 0x9d, 0xff, 0xc9, 0x75, 0xe9, 0xf4,
    ];
    let cpu = || {
        let mut cpu = long();
        cpu.cr0.insert(Cr0::AM);
        to_user(&mut cpu);
        cpu.registers.set(RBX, DATA);
        cpu
    };
    on_each_engine(&code, cpu, |cpu| assert_eq!(fault(cpu), Some((17, 0, 49))));
}

#[test]
fn breakpoints_that_are_set_on_a_hot_loop_hit() {
    // l: mov %ecx, (%rbx); add (%rbx), %eax; cmp $50, %ecx; jne n; mov %rbx, %dr0; mov %rsi, %dr7; n: dec %ecx; jnz l;
    // hlt
    let code = [
        0x89, 0x0b, 0x03, 0x03, 0x83, 0xf9, 0x32, 0x75, 0x06, 0x0f, 0x23, 0xc3, 0x0f, 0x23, 0xfe, 0xff, 0xc9,
        0x75, 0xed, 0xf4,
    ];
    let watched = |address: u64, dr7: u64, at: u64| {
        let cpu = || {
            let mut cpu = long();
            cpu.registers.set(RBX, address);
            cpu.registers.set(6, 0x400 | dr7);
            cpu
        };
        on_each_engine(&code, cpu, |cpu| assert_eq!(fault(cpu), Some((1, at, 49))));
    };
    watched(DATA, 0xd_0001, CODE + 2);
    watched(DATA, 0xf_0001, CODE + 2);
}

#[test]
fn a_breakpoint_on_an_instruction_of_a_hot_loop_hits() {
    // l: cmp $50, %ecx; jne n; mov %rbx, %dr0; mov %rsi, %dr7; n: inc %eax; dec %ecx; jnz l; hlt
    let code = [
        0x83, 0xf9, 0x32, 0x75, 0x06, 0x0f, 0x23, 0xc3, 0x0f, 0x23, 0xfe, 0xff, 0xc0, 0xff, 0xc9, 0x75, 0xef,
        0xf4,
    ];
    let cpu = || {
        let mut cpu = long();
        cpu.registers.set(RBX, CODE + 13);
        cpu.registers.set(6, 0x401);
        cpu
    };
    on_each_engine(&code, cpu, |cpu| assert_eq!(fault(cpu), Some((1, CODE + 13, 50))));
}

#[test]
fn vector_instructions_in_a_hot_loop_fault_once_cr0_ts_is_set() {
    // l: movups (%rbx), %xmm0; paddd %xmm0, %xmm1; cmp $50, %ecx; jne n; mov %cr0, %rax; or $8, %eax; mov %rax, %cr0
    // n: dec %ecx; jnz l; hlt
    let code = [
        0x0f, 0x10, 0x03, 0x66, 0x0f, 0xfe, 0xc8, 0x83, 0xf9, 0x32, 0x75, 0x09, 0x0f, 0x20, 0xc0, 0x83, 0xc8,
        0x08, 0x0f, 0x22, 0xc0, 0xff, 0xc9, 0x75, 0xe7, 0xf4,
    ];
    let cpu = || {
        let mut cpu = long();
        cpu.registers.set(RBX, DATA);
        cpu
    };
    on_each_engine(&code, cpu, |cpu| assert_eq!(fault(cpu), Some((7, CODE, 49))));
}

#[test]
fn an_instruction_that_the_model_lacks_is_undefined_in_hot_code_too() {
    // l: dec %ecx; jnz l; popcnt %eax, %ebx; hlt
    let code = [0xff, 0xc9, 0x75, 0xfc, 0xf3, 0x0f, 0xb8, 0xd8, 0xf4];
    for (model, vector) in [("host", None), ("host,-popcnt", Some((6, CODE + 4, 0)))] {
        let cpu = || {
            let mut cpu = long();
            cpu.wires.model = Arc::new(CpuModel::parse(model, 1).unwrap());
            cpu
        };
        on_each_engine(&code, cpu, |cpu| assert_eq!(fault(cpu), vector));
    }
}

#[test]
fn branches_to_57_bit_addresses_are_followed_with_5_level_paging_alone() {
    // l: call *%r14; add %eax, %ebx; dec %ecx; jnz l; hlt
    let code = [0x41, 0xff, 0xd6, 0x01, 0xc3, 0xff, 0xc9, 0x75, 0xf7, 0xf4];
    for five in [false, true] {
        let cpu = || {
            let mut cpu = long();
            if five {
                cpu.cr4 |= Cr4::LA57;
                (cpu.cr3, cpu.mmu.paging.root) = (TABLES + 0x4000, TABLES + 0x4000);
                put(&cpu, TABLES + 0x4000, TABLES | 7);
                put(&cpu, TABLES + 0x4008, TABLES | 7);
            }
            function(&cpu, FUNCTION, 3);
            cpu.registers.set(14, 1 << 48 | FUNCTION);
            cpu
        };
        on_each_engine(&code, cpu, |cpu| match five {
            true => assert_eq!(cpu.registers.get(RBX), 3 * ROUNDS),
            false => assert_eq!(fault(cpu), Some((13, 0, ROUNDS))),
        });
    }
}

#[test]
fn a_change_of_a_page_that_is_not_its_code_does_not_stop_its_translations() {
    let cpu = long();
    // l: inc %ebx; dec %ecx; jnz l; hlt
    write(&cpu, CODE, &[0xff, 0xc3, 0xff, 0xc9, 0x75, 0xfa, 0xf4]);
    let memory = cpu.memory.clone();
    memory.marks().written(CODE);
    let mut interpreter = interpreter(cpu, &Arc::new(Shared::new(1)), engines()[1]);
    for round in 1..=3 {
        (interpreter.cpu.rip, interpreter.cpu.halted) = (CODE, false);
        interpreter.cpu.registers.set(RCX, ROUNDS);
        assert!(matches!(interpreter.run(), VmExit::Halt));
        assert_eq!(interpreter.cpu.registers.get(RBX), round * ROUNDS);
        // Someone has saved the page, and cleans it.
        memory.marks().clean(CODE);
    }
}

/// Processor time of this thread.
fn processor_time() -> std::time::Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is there, and the clock is one of every thread's.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(result, 0);
    std::time::Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn code_without_end_is_forgotten_in_less_than_five_milliseconds() {
    const FROM: u64 = CODE;
    const BLOCKS: u64 = 0x5_4000;
    let mut cpu = long();
    for n in 0..BLOCKS {
        // add %eax, (%rbx), twice; jmp to the next; the last jumps to the first.
        put(&cpu, FROM + 8 * n, 0x9090_02eb_0301_0301u64);
    }
    put(&cpu, FROM + 8 * BLOCKS, 0xe9u8);
    put(&cpu, FROM + 8 * BLOCKS + 1, (8 * BLOCKS as u32 + 5).wrapping_neg());
    cpu.registers.set(RBX, MEMORY - 0x1_0000);
    let settings = Settings { hot: 0, leave_early: true, ..Settings::default() };
    let mut interpreter = interpreter(cpu, &Arc::new(Shared::new(1)), Some(settings));
    let (mut most, mut epoch) = (std::time::Duration::ZERO, interpreter.blocks.epoch);
    let last = epoch + 3;
    for _ in 0..20 * BLOCKS {
        let before = processor_time();
        assert!(interpreter.run_block().is_none());
        if interpreter.blocks.epoch != epoch {
            (most, epoch) = (most.max(processor_time() - before), interpreter.blocks.epoch);
        }
        if epoch == last {
            break;
        }
    }
    assert_eq!(epoch, last, "it was never full");
    let bytes = interpreter.jit_statistics().unwrap().host_bytes;
    println!("{bytes} bytes made, the longest pause {most:?} of processor time");
    assert!(bytes > 3 * (56 << 20), "{bytes}");
    assert!(most < std::time::Duration::from_millis(5), "{most:?}");
}

/// A device that makes the code's page stale whenever it is written to, as a store of another vCPU's would.
struct Stale(guest_memory::GuestMemory);

impl engine::Bus for Stale {
    fn read(&self, _: engine::Space, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _: engine::Space, _: u64, _: &[u8]) {
        self.0.marks().written(CODE);
    }
}

#[test]
fn a_store_to_the_next_instruction_is_seen_when_another_made_the_block_stale_just_before() {
    // l: mov %eax, (%rbx); mov %ecx, next+1(%rip); next: mov $0, %eax; add %eax, %esi; dec %ecx; jnz l; hlt
    let code =
        [0x89, 0x03, 0x89, 0x0d, 1, 0, 0, 0, 0xb8, 0, 0, 0, 0, 0x01, 0xc6, 0xff, 0xc9, 0x75, 0xed, 0xf4];
    let with_device = || {
        let mut cpu = long();
        cpu.wires.bus = Arc::new(Stale(cpu.memory.clone()));
        put(&cpu, TABLES + 0x2000 + 8 * (MEMORY >> 21), MEMORY | 0x87);
        cpu.registers.set(RBX, MEMORY);
        cpu
    };
    on_each_engine(&code, with_device, |cpu| {
        assert_eq!(cpu.registers.get(6), ROUNDS * (ROUNDS + 1) / 2);
    });
}
