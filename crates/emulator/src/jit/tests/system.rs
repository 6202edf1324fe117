//! A small operating system and its program: system calls, interrupt masking and access to the program's memory, translated
//! and interpreted.

use std::sync::Arc;

use engine::{Attention, VcpuState, VmExit};
use x86::{Cr4, Efer, Flags};

use crate::cpu::Cpu;
use crate::interpreter::Interpreter;
use crate::jit::Settings;
use crate::mmu::View;
use crate::shared::{Peers, Shared};
use crate::testing::*;

/// The program's page, and its data.
const PROGRAM: u64 = 0x20_0000;
const DATA: u64 = PROGRAM + 0x1000;
const ROUNDS: u64 = 300;

/// Calls the operating system RDI times, with flags that change, then raises #GP.
#[rustfmt::skip]
const PROGRAM_BYTES: [u8; 17] = [
    0x48, 0x83, 0xc0, 0x75,             // again: add $0x75, %rax
    0x0f, 0x05,                         // syscall
    0x48, 0x11, 0xcd,                   // adc %rcx, %rbp
    0x90,                               // nop
    0x48, 0xff, 0xcf,                   // dec %rdi
    0x75, 0xf1,                         // jne again
    0xf4, 0xf4,                         // hlt
];

/// Sums up what it sees of the flags in RSI.
#[rustfmt::skip]
const SYSTEM_BYTES: [u8; 60] = [
    0x0f, 0x01, 0xf8,                   // swapgs
    0x9c, 0x5a, 0x48, 0x01, 0xd6,       // pushfq; pop %rdx; add %rdx, %rsi
    0xfb, 0x90,                         // sti; nop
    0x9c, 0x5a, 0x48, 0x01, 0xd6,       // pushfq; pop %rdx; add %rdx, %rsi
    0x0f, 0x01, 0xcb,                   // stac
    0x48, 0x83, 0x03, 0x01,             // addq $1, (%rbx)
    0x9c, 0x5a, 0x48, 0x01, 0xd6,       // pushfq; pop %rdx; add %rdx, %rsi
    0x0f, 0x01, 0xca,                   // clac
    0x48, 0x83, 0xff, 0x07,             // cmp $7, %rdi
    0x48, 0x0f, 0x44, 0x1c, 0x24,       // cmove (%rsp), %rbx: the seventh last time, to the operating system's memory
    0x9c, 0x5a, 0x48, 0x01, 0xd6,       // pushfq; pop %rdx; add %rdx, %rsi
    0xfa,                               // cli
    0x9c, 0x5a, 0x48, 0x01, 0xd6,       // pushfq; pop %rdx; add %rdx, %rsi
    0x65, 0x48, 0x8b, 0x14, 0x25, 0, 0, 0, 0, // mov %gs:0, %rdx
    0x90,                               // nop
];
/// add %rdx, %rsi; swapgs; sysretq
const RETURN_BYTES: [u8; 9] = [0x48, 0x01, 0xd6, 0x0f, 0x01, 0xf8, 0x48, 0x0f, 0x07];

fn machine(prepare: &dyn Fn(&mut Cpu)) -> Cpu {
    let mut cpu = long();
    let system = SYSTEM_BYTES.into_iter().chain(RETURN_BYTES);
    (CODE..).zip(system).for_each(|(at, byte)| put(&cpu, at, byte));
    (PROGRAM..).zip(PROGRAM_BYTES).for_each(|(at, byte)| put(&cpu, at, byte));
    for vector in [1, 6, 13, 14] {
        set_gate(&cpu, vector, 0, 0);
        put(&cpu, handler(vector), 0xf4u8);
    }
    // The first page is the operating system's.
    put(&cpu, TABLES + 0x2000, 0x83u64);
    put(&cpu, 0x9000, 0x9100u64);
    put(&cpu, 0x9200, 0x1234_5678u64);
    cpu.cr4.insert(Cr4::SMAP);
    cpu.update_paging();
    cpu.msrs.star = u64::from(USER_CODE32 | 3) << 48 | u64::from(KERNEL_CODE64) << 32;
    cpu.msrs.lstar = CODE;
    cpu.msrs.fmask = (Flags::IF | Flags::DF | Flags::TF | Flags::AC | Flags::CF).bits();
    cpu.msrs.kernel_gs_base = 0x9200;
    to_user(&mut cpu);
    for (register, value) in [(3, DATA), (4, 0x9000), (7, ROUNDS), (8, 0), (6, 0), (5, 0)] {
        cpu.registers.set(register, value);
    }
    cpu.set_rflags(Flags::IF.bits(), Flags::all());
    cpu.rip = PROGRAM;
    prepare(&mut cpu);
    cpu
}

/// Where it stops: the state, what is in memory, and how many handlers translated code called.
fn run_to_the_end(translated: bool, prepare: &dyn Fn(&mut Cpu)) -> (VcpuState, [u64; 2], u64, u64) {
    let attention = Attention::new();
    let peers = Peers::join(Arc::new(Shared::new(1)), 0, attention.clone());
    let mut interpreter = Interpreter::new(machine(prepare), attention, peers);
    if translated {
        interpreter.enable_jit_with(Settings { hot: 4, ..Settings::default() }).unwrap();
    }
    assert!(matches!(interpreter.run(), VmExit::Halt));
    let calls = interpreter.jit_statistics().map_or(0, |done| done.handler_calls);
    let cpu = &interpreter.cpu;
    (cpu.state(), [get(cpu, DATA), get(cpu, 0x9100)], cpu.instructions, calls)
}

/// Runs it both ways. Gives the last state, and how many handlers were called.
fn same(prepare: &dyn Fn(&mut Cpu)) -> (VcpuState, u64) {
    let interpreted = run_to_the_end(false, prepare);
    let translated = run_to_the_end(true, prepare);
    assert_eq!(interpreted.0.gprs, translated.0.gprs);
    assert_eq!(interpreted.0.rflags, translated.0.rflags);
    assert!(interpreted.0 == translated.0, "{:?}\n{:?}", interpreted.0, translated.0);
    assert_eq!(interpreted.1, translated.1, "memory");
    assert_eq!(interpreted.2, translated.2, "instructions");
    (interpreted.0, translated.3)
}

#[test]
fn system_calls_and_what_systems_do_in_them_need_no_handler() {
    let (state, calls) = same(&|_| {});
    assert_eq!((state.rip, state.gprs[7]), (handler(13) + 1, 0), "all rounds were run");
    assert!(calls < ROUNDS, "{calls} handlers for {ROUNDS} rounds");
}

#[test]
fn where_code_was_is_forgotten_with_it() {
    let attention = Attention::new();
    let peers = Peers::join(Arc::new(Shared::new(1)), 0, attention.clone());
    let mut interpreter = Interpreter::new(machine(&|_| {}), attention, peers);
    interpreter.enable_jit_with(Settings { hot: 4, ..Settings::default() }).unwrap();
    assert!(matches!(interpreter.run(), VmExit::Halt));
    let views = [View::Supervisor, View::User];
    let known = |interpreter: &Interpreter| views.map(|view| interpreter.cpu.mmu.tlb.knows_targets(view));
    assert_eq!(known(&interpreter), [true; 2]);
    interpreter.forget();
    assert_eq!(known(&interpreter), [false; 2]);
}

#[test]
fn what_is_not_plain_is_left_to_the_handlers() {
    let no_guard = |cpu: &mut Cpu| {
        cpu.cr4.remove(Cr4::SMAP);
        cpu.update_paging();
    };
    let (state, _) = same(&no_guard);
    assert_eq!(state.gprs[7], 0, "without SMAP");
    let (state, _) = same(&|cpu| cpu.msrs.fmask = Flags::IF.bits());
    assert_eq!(state.gprs[7], 0, "flags that are kept");
    let (state, _) = same(&|cpu| cpu.system_flags.insert(Flags::AC | Flags::DF | Flags::ID));
    assert_eq!(state.gprs[7], 0, "flags that come back");
    let (state, _) = same(&|cpu| cpu.efer.remove(Efer::SCE));
    assert_eq!(state.rip, handler(6) + 1);
    let (state, _) = same(&|cpu| cpu.registers.set(3, 0x9300));
    assert_eq!(state.gprs[7], 0, "the operating system's own memory");
}

#[test]
fn guarded_memory_faults_after_clac() {
    // The access behind CLAC is to the program's memory.
    let (state, _) = same(&|cpu| {
        cpu.registers.set(4, 0x9000);
        cpu.msrs.kernel_gs_base = DATA;
    });
    assert_eq!((state.rip, state.cr2), (handler(14) + 1, DATA));
}

/// Reads and sets the bases of FS and GS, and reads selectors and the time, EDI times.
#[rustfmt::skip]
const BASES: [u8; 55] = [
    0xf3, 0x48, 0x0f, 0xae, 0xc0,       // again: rdfsbase %rax
    0xf3, 0x0f, 0xae, 0xca,             // rdgsbase %edx
    0x48, 0x8d, 0x44, 0x10, 0x10,       // lea 0x10(%rax, %rdx), %rax
    0xf3, 0x48, 0x0f, 0xae, 0xd0,       // wrfsbase %rax
    0xf3, 0x49, 0x0f, 0xae, 0xdd,       // wrgsbase %r13
    0x49, 0xff, 0xc5,                   // inc %r13
    0x8c, 0xdb,                         // mov %ds, %ebx
    0x66, 0x41, 0x8c, 0xd6,             // mov %ss, %r14w
    0x66, 0x8c, 0xcd,                   // mov %cs, %bp
    0x48, 0x01, 0xc6,                   // add %rax, %rsi
    0x0f, 0x01, 0xf9,                   // rdtscp
    0x48, 0x01, 0xce,                   // add %rcx, %rsi
    0x31, 0xc0, 0x31, 0xd2,             // xor %eax, %eax; xor %edx, %edx
    0xff, 0xcf,                         // dec %edi
    0x75, 0xcb,                         // jne again
    0xf4, 0xf4,                         // hlt
];

#[test]
fn bases_and_selectors_need_no_handler() {
    let bases = |cpu: &mut Cpu| {
        (CODE..).zip(BASES).for_each(|(at, byte)| put(cpu, at, byte));
        cpu.cr4.insert(Cr4::FSGSBASE);
        cpu.msrs.tsc_aux = 0x77;
        for (register, value) in [(13, 0x1234_5678_9abc), (14, u64::MAX), (5, u64::MAX), (6, 0), (7, ROUNDS)]
        {
            cpu.registers.set(register, value);
        }
    };
    let kernel = |prepare: &dyn Fn(&mut Cpu)| {
        same(&|cpu: &mut Cpu| {
            *cpu = long();
            for vector in [6, 13] {
                set_gate(cpu, vector, 0, 0);
                put(cpu, handler(vector), 0xf4u8);
            }
            bases(cpu);
            prepare(cpu);
        })
    };
    let (state, calls) = kernel(&|_| {});
    assert_eq!((state.gprs[7], state.gprs[13]), (0, 0x1234_5678_9abc + ROUNDS));
    // Where the time is not the host's, RDTSCP is a handler's.
    assert!(calls < 2 * ROUNDS, "{calls} handlers for {ROUNDS} rounds");
    let (state, _) = kernel(&|cpu| cpu.cr4.remove(Cr4::FSGSBASE));
    assert_eq!(state.rip, handler(6) + 1);
    let (state, _) = kernel(&|cpu| cpu.registers.set(13, 0x7fff_ffff_ffff - 200));
    assert_eq!((state.rip, state.gprs[7]), (handler(13) + 1, ROUNDS - 201));
}
