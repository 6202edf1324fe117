//! Debug facilities: breakpoints of every kind and length, single steps, what holds them back, and what DR6 says.
//!
//! SDM vol. 3, *Debug, Branch Profile, TSC, and Intel Resource Director Technology Features*.
#![no_std]
#![no_main]

use guests::cpu::{self, flag, vector};
use guests::long::reg::{AX, BX, CX, DI, DX, SI};
use guests::long::{State, event_at, fault};
use guests::paging::{self, address};
use guests::report::{self, Many};
use guests::tables::{self, Frame};
use guests::{code, legacy};

guests::guest!(main);

/// DR6 with nothing in it.
const NOTHING: u64 = 0xffff_0ff0;
const STEP: u64 = 1 << 14;
const GENERAL_DETECT: u64 = 1 << 13;
const BTF: u64 = 2;
const DEBUGCTL: u32 = 0x1d9;

fn main() {
    paging::open();
    registers();
    steps();
    step_shadows();
    branches();
    code_breakpoints();
    data_breakpoints();
    data_breakpoint_details();
    io_breakpoints();
    general_detect();
    legacy_modes();
}

/// One #DB: how far from the snippet's beginning, and what DR6 said besides [`NOTHING`].
type Entry = (i64, u64);

struct Log {
    start: u64,
    entries: [Entry; 16],
    count: usize,
    resume: bool,
}

static mut LOG: Log = Log { start: 0, entries: [(0, 0); 16], count: 0, resume: false };

fn log() -> &'static mut Log {
    // SAFETY: one processor, and the handler runs only within a snippet.
    unsafe { &mut *(&raw mut LOG) }
}

extern "C" fn on_debug(frame: &mut Frame) {
    let log = log();
    if log.count < log.entries.len() {
        log.entries[log.count] = (frame[2].wrapping_sub(log.start) as i64, cpu::dr6() ^ NOTHING);
    }
    log.count += 1;
    unsafe { cpu::set_dr6(0) };
    if log.resume {
        frame[4] |= flag::RF;
    }
    if log.count > 14 {
        frame[4] &= !flag::TF;
    }
}

/// Runs a snippet to its end, and compares the #DBs on the way.
fn traced(name: &str, state: State, expected: &[Entry]) -> State {
    let log = log();
    *log = Log { start: state.start, entries: [(0, 0); 16], count: 0, resume: true };
    tables::handle(vector::DB as usize, on_debug);
    unsafe { cpu::set_dr6(0) };
    let out = state.run();
    tables::unhandle(vector::DB as usize);
    unsafe { cpu::set_dr7(0x400) };
    let log = self::log();
    report::equal(name, (out.vector, &log.entries[..log.count.min(16)]), (vector::END, expected));
    out
}

fn registers() {
    unsafe {
        cpu::set_dr6(0);
        report::equal("DR6 after a write of 0", cpu::dr6(), NOTHING);
        cpu::set_dr6(0xffff_ffff);
        report::equal("DR6's bit 12 and upper half", cpu::dr6() & 0xffff_ffff_0000_1000, 0);
        cpu::set_dr6(0);
        cpu::set_dr7(0);
        report::equal("DR7 after a write of 0", cpu::dr7(), 0x400);
        cpu::set_dr7(0xffff_0000);
        report::equal("DR7's conditions", cpu::dr7(), 0xffff_0400);
        cpu::set_dr7(0x400);
        for value in [0u64, 0xffff_ffff_ffff_ffff, 0x1234_5678_9abc_def0] {
            cpu::set_dr0(value);
            cpu::set_dr3(!value);
            report::equal("DR0 and DR3 keep 64 bits", (cpu::dr0(), cpu::dr3()), (value, !value));
        }
        cpu::set_dr0(0);
        cpu::set_dr3(0);
    }
}

fn steps() {
    let stepped = |name, code, expected: &[Entry]| {
        let state = State::kernel(code).flags(flag::TF).with(DI, address(0)).with(SI, address(1)).with(CX, 3);
        traced(name, state, expected)
    };
    stepped("each instruction is stepped", code!(64; "nop", "nop"), &[(1, STEP), (2, STEP)]);
    let out = stepped(
        "a repeated one after each iteration",
        code!(64; "rep movsb"),
        &[(0, STEP), (0, STEP), (2, STEP)],
    );
    report::equal("and it is complete", out.gprs[CX], 0);
    stepped("a branch", code!(64; "jmp 50f", "ud2", "50: nop"), &[(4, STEP), (5, STEP)]);
    stepped("CPUID", code!(64; "cpuid"), &[(2, STEP)]);
    stepped("RDMSR", code!(64; "mov ecx, 0x10", "rdmsr"), &[(5, STEP), (7, STEP)]);
    stepped("I/O", code!(64; "in al, 0x61"), &[(2, STEP)]);
    stepped("MOV CR", code!(64; "mov rax, cr0", "mov cr0, rax"), &[(3, STEP), (6, STEP)]);
    stepped("PUSHF pushes TF", code!(64; "pushfq", "pop rbx"), &[(1, STEP), (2, STEP)]);
    stepped("STI does not hold it back", code!(64; "sti", "cli"), &[(1, STEP), (2, STEP)]);
    let clear = code!(64; "pushfq", "and dword ptr [rsp], -257", "popfq", "nop");
    stepped("POPF that clears TF is the last", clear, &[(1, STEP), (8, STEP), (9, STEP)]);
    let set = code!(64; "pushfq", "or dword ptr [rsp], 256", "popfq", "nop", "nop", "pushfq", "and dword ptr [rsp], -257", "popfq");
    let out = State::kernel(set);
    traced(
        "POPF that sets TF begins after the next",
        out,
        &[(10, STEP), (11, STEP), (12, STEP), (19, STEP), (20, STEP)],
    );
    let user = State::user(code!(64; "nop", "mov eax, [rdi]")).flags(flag::TF).with(DI, address(0));
    traced("in ring 3", user, &[(1, STEP), (3, STEP)]);
    let handler = code!(64; "int3", "nop");
    tables::handle(vector::BP as usize, nothing);
    let state = State::kernel(handler).flags(flag::TF);
    traced("INT3 is not stepped, what follows it is", state, &[(2, STEP)]);
    tables::unhandle(vector::BP as usize);
    paging::set(3, 0);
    let out = State::kernel(code!(64; "mov eax, [rdi]")).flags(flag::TF).with(DI, address(3)).run();
    out.check("a fault comes instead of the step", fault(vector::PF, 0));
    report::equal("with TF in its frame", out.rflags & flag::TF, flag::TF);
    paging::set(3, 7);
    let out = State::kernel(code!(64; "ud2")).flags(flag::TF).run();
    out.check("UD2 with TF", fault(vector::UD, 0));
    stepped("INT1 says nothing of itself", code!(64; ".byte 0xf1", "nop"), &[(1, 0), (2, STEP)]);
    let syscall = State::kernel(code!(64; ".byte 0xf1"));
    traced("INT1 alone", syscall, &[(1, 0)]);
    unsafe { cpu::set_dr6(0) };
    let out = State::kernel(code!(64; "mov rax, 0x4003", "mov dr6, rax", ".byte 0xf1")).run();
    out.check("INT1 with DR6 in use", event_at(vector::DB, 0, 11));
    report::equal("changes nothing of BS", out.dr6 & STEP, STEP);
    unsafe { cpu::set_dr6(0) };
}

extern "C" fn nothing(_: &mut Frame) {}

fn step_shadows() {
    let stepped = |name, code, expected: &[Entry]| {
        let state = State::kernel(code).flags(flag::TF).with(AX, 0x10).with(DI, address(0)).with(BX, 0);
        traced(name, state, expected);
    };
    stepped("MOV SS holds the step back", code!(64; "mov ss, eax", "nop", "nop"), &[(3, STEP), (4, STEP)]);
    stepped("MOV DS does not", code!(64; "mov ds, eax", "nop"), &[(2, STEP), (3, STEP)]);
    stepped("MOV SS, then INT1", code!(64; "mov ss, eax", ".byte 0xf1", "nop"), &[(3, 0), (4, STEP)]);
    let code = code!(64; "mov ss, eax", "mov dr6, rbx", "nop");
    let log = log();
    *log = Log { start: code.as_ptr() as u64, entries: [(0, 0); 16], count: 0, resume: true };
    tables::handle(vector::DB as usize, on_debug);
    unsafe {
        cpu::set_dr6(0);
        cpu::set_dr7(0x400 | 1 << 13);
    }
    let out = State::kernel(code).flags(flag::TF).with(AX, 0x10).run();
    tables::unhandle(vector::DB as usize);
    let entries = &self::log().entries[..3];
    let expected: &[Entry] = &[(2, GENERAL_DETECT), (5, STEP), (6, STEP)];
    report::equal("MOV SS does not hold general detect back", (out.vector, entries), (vector::END, expected));
}

fn branches() {
    unsafe { cpu::write_msr(DEBUGCTL, BTF) };
    if cpu::read_msr(DEBUGCTL) & BTF == 0 {
        report::skip("BTF", "the processor has no DEBUGCTL");
        return;
    }
    let code = code!(64; "nop", "test eax, eax", "jnz 50f", "jmp 50f", "ud2", "50: nop", "nop");
    let state = State::kernel(code).flags(flag::TF).with(AX, 0);
    // The trap clears BTF: what follows is stepped one by one.
    traced("BTF steps to the next taken branch", state, &[(9, STEP), (10, STEP), (11, STEP)]);
    report::equal("the trap clears BTF", cpu::read_msr(DEBUGCTL) & BTF, 0);
    unsafe { cpu::write_msr(DEBUGCTL, 0) };
}

/// DR7 for breakpoint `n`: enabled locally, of a condition and a length.
fn enable(n: u64, condition: u64, length: u64) -> u64 {
    let code = match length {
        1 => 0,
        2 => 1,
        8 => 2,
        _ => 3,
    };
    1 << (2 * n) | (condition | code << 2) << (16 + 4 * n)
}

const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const IO: u64 = 2;
const ACCESS: u64 = 3;

fn code_breakpoints() {
    let nops = code!(64; "nop", "nop", "nop");
    let start = nops.as_ptr() as u64;
    let set = |at: u64, dr7: u64| unsafe {
        cpu::set_dr0(at);
        cpu::set_dr7(0x400 | dr7);
    };
    set(start + 1, enable(0, EXECUTE, 1));
    traced("a breakpoint on an instruction is a fault", State::kernel(nops), &[(1, 1)]);
    set(start + 1, enable(0, EXECUTE, 1) << 1 & 3);
    traced("enabled globally", State::kernel(nops), &[(1, 1)]);
    set(start + 1, 0);
    traced("not enabled", State::kernel(nops), &[]);
    set(start, enable(0, EXECUTE, 1));
    traced("on the first instruction", State::kernel(nops), &[(0, 1)]);
    set(start, enable(0, EXECUTE, 1));
    traced("with RF not", State::kernel(nops).flags(flag::RF), &[]);
    set(start + 1, enable(0, EXECUTE, 1));
    traced("RF is for one instruction", State::kernel(nops).flags(flag::RF), &[(1, 1)]);
    let long = code!(64; "mov eax, 0x12345678", "nop");
    set(long.as_ptr() as u64 + 1, enable(0, EXECUTE, 1));
    traced("within an instruction", State::kernel(long), &[]);
    let shadow = code!(64; "mov ss, eax", "nop", "nop");
    set(shadow.as_ptr() as u64 + 2, enable(0, EXECUTE, 1));
    traced("after MOV SS", State::kernel(shadow).with(AX, 0x10), &[]);
    let repeated = code!(64; "rep stosb", "nop");
    set(repeated.as_ptr() as u64, enable(0, EXECUTE, 1));
    let state = State::kernel(repeated).with(CX, 5).with(DI, address(0));
    traced("on a repeated instruction, once", state, &[(0, 1)]);
    unsafe {
        cpu::set_dr1(start + 2);
        cpu::set_dr2(start + 2);
        cpu::set_dr3(start);
        cpu::set_dr7(0x400 | enable(1, EXECUTE, 1) | enable(2, EXECUTE, 1) | enable(3, EXECUTE, 1));
    }
    traced("three of them", State::kernel(nops), &[(0, 8), (2, 6)]);
    // Before the fetch of the rest, and before what the instruction itself would raise.
    let undefined = code!(64; "ud2");
    set(undefined.as_ptr() as u64, enable(0, EXECUTE, 1));
    let out = State::kernel(undefined).run();
    out.check("before #UD", fault(vector::DB, 0));
    report::equal("and its frame has no RF", out.rflags & flag::RF, 0);
    unsafe { cpu::set_dr7(0x400) };
    let jump = code!(64; "jmp 50f", "nop", "50: nop");
    set(jump.as_ptr() as u64 + 3, enable(0, EXECUTE, 1));
    traced("at a branch's target", State::kernel(jump), &[(3, 1)]);
    unsafe { cpu::set_dr7(0x400) };
}

/// Each length and condition, against each access at each distance.
fn data_breakpoints() {
    let codes: [(u64, bool, &[u8]); 10] = [
        (1, true, code!(64; "mov [rdi], al")),
        (2, true, code!(64; "mov [rdi], ax")),
        (4, true, code!(64; "mov [rdi], eax")),
        (8, true, code!(64; "mov [rdi], rax")),
        (16, true, code!(64; "movups [rdi], xmm0")),
        (1, false, code!(64; "mov al, [rdi]")),
        (2, false, code!(64; "mov ax, [rdi]")),
        (4, false, code!(64; "mov eax, [rdi]")),
        (8, false, code!(64; "mov rax, [rdi]")),
        (16, false, code!(64; "movups xmm1, [rdi]")),
    ];
    let mut many = Many::new("data breakpoints");
    // Across the end of a page as well.
    for watched in [address(1) + 0x100, address(2) - 8, address(2)] {
        for length in [1, 2, 4, 8] {
            for condition in [WRITE, ACCESS] {
                for distance in -16..=8i64 {
                    let at = watched.wrapping_add_signed(distance);
                    for (size, write, code) in codes {
                        unsafe {
                            cpu::set_dr6(0);
                            cpu::set_dr2(watched);
                            cpu::set_dr7(0x400 | enable(2, condition, length));
                        }
                        let hit =
                            at < watched + length && watched < at + size && (write || condition == ACCESS);
                        let out = State::kernel(code).with(DI, at).run();
                        unsafe { cpu::set_dr7(0x400) };
                        let len = code.len() as u64 - 2;
                        let expected = if hit { (vector::DB, len, 4) } else { (vector::END, len + 2, 0) };
                        let got = (out.vector, out.rip - out.start, out.dr6 ^ NOTHING);
                        many.equal(
                            format_args!("{length} {condition} {distance} {size} {write}"),
                            got,
                            expected,
                        );
                    }
                }
            }
        }
    }
    many.finish();
}

fn data_breakpoint_details() {
    let watched = address(1) + 0x40;
    let set = |dr7: u64| unsafe {
        cpu::set_dr0(watched);
        cpu::set_dr7(0x400 | dr7);
    };
    let state = |code| State::kernel(code).with(DI, watched).with(SI, address(2)).with(CX, 2);
    let write = enable(0, WRITE, 4);
    set(write);
    traced("a read-modify-write", state(code!(64; "inc dword ptr [rdi]", "nop")), &[(2, 1)]);
    set(write);
    traced("LOCK XADD", state(code!(64; "lock xadd [rdi], eax")), &[(4, 1)]);
    set(write);
    let pushed = state(code!(64; "push rax", "nop")).with(guests::long::reg::SP, watched + 8);
    traced("PUSH", pushed, &[(1, 1)]);
    set(write);
    let called = state(code!(64; "call 50f", "50: nop")).with(guests::long::reg::SP, watched + 8);
    traced("CALL, at its target", called, &[(5, 1)]);
    set(write);
    traced("STOSD", state(code!(64; "stosd", "nop")), &[(1, 1)]);
    set(write);
    let back = state(code!(64; "rep stosd", "nop")).with(DI, watched - 4).with(CX, 3);
    traced("REP STOSD, after the iteration that hits", back, &[(0, 1)]);
    set(enable(0, ACCESS, 4));
    let back = state(code!(64; "rep lodsd", "nop")).with(SI, watched - 4).with(CX, 2);
    traced("REP LODSD, at the last iteration", back, &[(2, 1)]);
    set(enable(0, ACCESS, 1));
    traced(
        "FXRSTOR's and FXSAVE's area",
        state(code!(64; "fxsave [rdi]", "fxrstor [rdi]")),
        &[(3, 1), (6, 1)],
    );
    if report::ends_tcg("the other data breakpoints", "TCG does not get past a step and a hit at once") {
        unsafe { cpu::set_dr7(0x400) };
        return;
    }
    set(write);
    traced(
        "a step and a hit at once",
        state(code!(64; "mov [rdi], eax", "nop")).flags(flag::TF),
        &[(2, STEP | 1), (3, STEP)],
    );
    unsafe { cpu::set_dr1(watched + 2) };
    set(write | enable(1, WRITE, 2));
    traced("two at once", state(code!(64; "mov [rdi], eax")), &[(2, 3)]);
    set(write | enable(1, WRITE, 2));
    traced("one of two", state(code!(64; "mov [rdi], ax")), &[(3, 1)]);
    set(enable(0, ACCESS, 2));
    let shadow = state(code!(64; "mov ss, [rdi]", "nop", "nop"));
    paging::write(watched - paging::WINDOW, 0x10u16);
    traced("a hit of MOV SS comes after the next instruction", shadow, &[(3, 1)]);
    set(enable(0, ACCESS, 2));
    let icebp = state(code!(64; "mov ss, [rdi]", ".byte 0xf1", "nop"));
    traced("a hit of MOV SS before INT1 is one #DB with it", icebp, &[(3, 1)]);
    // Before INT n the trap waits until the handler is entered.
    for (name, code) in
        [("INT3", code!(64; "mov ss, [rdi]", "int3")), ("INT n", code!(64; "mov ss, [rdi]", "int 0x44"))]
    {
        tables::handle(vector::BP as usize, nothing);
        tables::handle(0x44, nothing);
        let log = log();
        *log = Log { start: code.as_ptr() as u64, entries: [(0, 0); 16], count: 0, resume: true };
        tables::handle(vector::DB as usize, on_debug);
        // It comes within the other's handler, whose stack it must not take.
        tables::set_gate(vector::DB as usize, 0x8e, 5);
        unsafe { cpu::set_dr6(0) };
        set(enable(0, ACCESS, 2));
        let out = state(code).run();
        unsafe { cpu::set_dr7(0x400) };
        tables::reset_idt();
        for number in [vector::DB as usize, vector::BP as usize, 0x44] {
            tables::unhandle(number);
        }
        let log = self::log();
        let got = (out.vector, log.count, log.entries[0].1);
        report::equal(
            format_args!("a hit of MOV SS before {name} is reported once"),
            got,
            (vector::END, 1, 1),
        );
    }
    set(write);
    traced(
        "LEA and NOP do not hit",
        state(code!(64; "lea rax, [rdi]", "nop dword ptr [rdi]", "prefetcht0 [rdi]")),
        &[],
    );
    set(enable(0, ACCESS, 4));
    traced(
        "CMPXCHG that fails hits too",
        state(code!(64; "cmpxchg [rdi], ebx", "nop")).with(AX, 77),
        &[(3, 1)],
    );
    paging::set(1, 5);
    set(write);
    let out = state(code!(64; "mov [rdi], eax")).run();
    out.check("a fault comes instead", fault(vector::PF, 3));
    paging::set(1, 7);
    unsafe { cpu::set_dr7(0x400) };
    set(write);
    let user = State::user(code!(64; "mov [rdi], eax", "nop")).with(DI, watched);
    traced("in ring 3", user, &[(2, 1)]);
    // DR6 keeps what is not its business.
    unsafe { cpu::set_dr6(STEP | 2) };
    set(write);
    let out = state(code!(64; "mov [rdi], eax")).run();
    report::equal("BS stays, B1 goes", out.dr6 & (STEP | 3), STEP | 1);
    unsafe {
        cpu::set_dr7(0x400);
        cpu::set_dr6(0);
    }
    let moved = code!(64; "mov dr7, rax", "mov [rdi], eax");
    let out = state(moved).with(AX, 0x400 | write).run();
    out.check("a breakpoint holds from the next instruction on", event_at(vector::DB, 0, 5));
    unsafe { cpu::set_dr7(0x400) };
}

fn io_breakpoints() {
    let (input, wide) = (code!(64; "in al, dx", "nop"), code!(64; "in eax, dx", "nop"));
    let usual = cpu::cr4();
    unsafe {
        cpu::set_cr4(usual | 8);
        cpu::set_dr1(0x80);
    }
    let set = || unsafe { cpu::set_dr7(0x400 | enable(1, IO, 1)) };
    set();
    traced("IN from the port", State::kernel(input).with(DX, 0x80), &[(1, 2)]);
    set();
    traced("IN from another", State::kernel(input).with(DX, 0x84), &[]);
    set();
    traced("IN of 4 ports with it", State::kernel(wide).with(DX, 0x80), &[(1, 2)]);
    set();
    traced("OUT to it", State::kernel(code!(64; "out 0x80, al", "nop")), &[(2, 2)]);
    set();
    traced("OUTS", State::kernel(code!(64; "outsb", "nop")).with(DX, 0x80).with(SI, address(0)), &[(1, 2)]);
    set();
    let state = State::kernel(code!(64; "rep outsb", "nop")).with(DX, 0x80).with(SI, address(0)).with(CX, 2);
    traced("REP OUTS", state, &[(0, 2), (2, 2)]);
    unsafe { cpu::set_cr4(usual) };
}

fn general_detect() {
    unsafe { cpu::set_dr6(0) };
    let code = code!(64; "mov rax, dr0");
    let set = || unsafe { cpu::set_dr7(0x400 | 1 << 13) };
    set();
    let out = State::kernel(code).run();
    report::equal("the handler finds GD cleared", cpu::dr7(), 0x400);
    out.check("MOV from DR0 with GD", fault(vector::DB, 0));
    report::equal("DR6 has BD", out.dr6 ^ NOTHING, GENERAL_DETECT);
    unsafe { cpu::set_dr6(0) };
    set();
    State::kernel(code!(64; "mov dr7, rax")).run().check("MOV to DR7 with GD", fault(vector::DB, 0));
    unsafe {
        cpu::set_dr7(0x400);
        cpu::set_dr6(0);
    }
}

fn legacy_modes() {
    if report::ends_tcg("debugging outside long mode", "TCG crashes") {
        return;
    }
    legacy::tables().reset();
    let stepped = |state: legacy::State, name: &str, at: u64, dr6: u64| {
        let out = state.flags(flag::TF).run();
        out.check(name, event_at(vector::DB, 0, at));
        report::equal(format_args!("{name}: DR6"), u64::from(out.dr6) ^ NOTHING, dr6);
        unsafe { cpu::set_dr6(0) };
    };
    unsafe { cpu::set_dr6(0) };
    stepped(legacy::State::protected(code!(32; "nop")), "a step in protected mode", 1, STEP);
    stepped(legacy::State::user(code!(32; "nop")), "a step in ring 3 of it", 1, STEP);
    stepped(legacy::State::real(code!(16; "nop")), "a step in real mode", 1, STEP);
    stepped(legacy::State::v86(code!(16; "nop")), "a step in virtual-8086 mode", 1, STEP);
    stepped(
        legacy::State::v86(code!(16; "mov ax, ss", "mov ss, eax", "nop")).without(flag::RF),
        "MOV from SS is stepped",
        2,
        STEP,
    );
    stepped(
        legacy::State::protected(code!(32; "mov ss, eax", "nop")).with(AX, 0x10),
        "MOV SS in protected mode",
        3,
        STEP,
    );
    let popped = legacy::State::protected(code!(32; ".byte 0x17", "nop"));
    // SAFETY: a stack of ours.
    unsafe { ((legacy::stack() - 4) as usize as *mut u32).write_volatile(0x10) };
    stepped(popped.with(guests::long::reg::SP, legacy::stack() - 4), "POP SS", 2, STEP);
    let mut watched = legacy::State::protected(code!(32; "mov [edi], eax", "nop")).with(DI, 0x80_0000);
    unsafe { cpu::set_dr0(0x80_0000) };
    watched.dr7 = 0x400 | enable(0, WRITE, 4) as u32;
    let out = watched.run();
    out.check("a data breakpoint in protected mode", event_at(vector::DB, 0, 2));
    report::equal("its DR6", u64::from(out.dr6) ^ NOTHING, 1);
    unsafe { cpu::set_dr6(0) };
    // Segments have bases: breakpoints are linear.
    let mut watched = legacy::State::v86(code!(16; "mov [di], eax", "nop")).with(DI, 0x10);
    unsafe { cpu::set_dr0(u64::from(legacy::REAL_DATA) * 16 + 0x10) };
    watched.dr7 = 0x400 | enable(0, WRITE, 2) as u32;
    watched.run().check("a data breakpoint in virtual-8086 mode", event_at(vector::DB, 0, 3));
    let mut code = legacy::State::real(code!(16; "nop", "nop"));
    unsafe { cpu::set_dr0(u64::from(legacy::REAL_SEGMENT) * 16 + 1) };
    code.dr7 = 0x400 | enable(0, EXECUTE, 1) as u32;
    code.run().check("an instruction breakpoint in real mode", event_at(vector::DB, 0, 1));
    unsafe { cpu::set_dr6(0) };
}
