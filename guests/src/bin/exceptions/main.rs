//! Exceptions in long mode: vectors, error codes, priorities, double faults, and the state that handlers find.
//!
//! SDM vol. 3, *Interrupt and Exception Handling*.
#![no_std]
#![no_main]

mod delivery;
mod page_faults;

use guests::cpu::{flag, vector};
use guests::descriptor::{PRESENT, kind};
use guests::long::reg::{AX, BP, BX, CX, DI, DX, SI, SP};
use guests::long::{END, Event, State, event, event_at, fault};
use guests::paging::{PAGE, address, bit};
use guests::tables::selector;
use guests::{code, cpu, paging, report, tables};

guests::guest!(main);

/// An address that no paging mode of 4 levels has.
const NOT_CANONICAL: u64 = 0x8000_0000_0000;

fn main() {
    paging::open();
    divide();
    traps();
    undefined();
    privileged();
    not_available();
    floating_point();
    alignment();
    canonical();
    delivery::gates();
    delivery::gate_errors();
    delivery::double_faults();
    page_faults::page_faults();
    page_faults::restartable_strings();
    page_faults::restartable_others();
    control_registers();
    ports();
    compatibility();
}

fn divide() {
    let all = |state: State| state.with(AX, 5).with(DX, 1).with(CX, 0);
    all(State::kernel(code!(64; "div cl"))).run().check("DIV of 8 bits by 0", fault(vector::DE, 0));
    all(State::kernel(code!(64; "div cx"))).run().check("DIV of 16 bits by 0", fault(vector::DE, 0));
    all(State::kernel(code!(64; "div ecx"))).run().check("DIV of 32 bits by 0", fault(vector::DE, 0));
    let out = all(State::user(code!(64; "div rcx"))).run();
    out.check("DIV of 64 bits by 0", fault(vector::DE, 0));
    report::equal("a #DE leaves RAX and RDX", (out.gprs[AX], out.gprs[DX]), (5, 1));
    report::equal("a fault pushes RF", out.rflags & flag::RF, flag::RF);
    let out = State::kernel(code!(64; "idiv ecx"))
        .with(AX, 0x8000_0000)
        .with(DX, 0xffff_ffff)
        .with(CX, 0xffff_ffff);
    out.run().check("IDIV of the smallest by -1", fault(vector::DE, 0));
    let out = State::kernel(code!(64; "div ecx")).with(DX, 7).with(CX, 7).run();
    out.check("DIV with a quotient of 33 bits", fault(vector::DE, 0));
    State::kernel(code!(64; "div ecx"))
        .with(DX, 6)
        .with(CX, 7)
        .run()
        .check("DIV with a quotient of 32 bits", END);
}

fn traps() {
    let out = State::kernel(code!(64; "int3")).run();
    out.check("INT3 is a trap", event_at(vector::BP, 0, 1));
    report::equal("a trap pushes RF as it was", out.rflags & flag::RF, 0);
    State::user(code!(64; "int3")).run().check("INT3 in ring 3", event_at(vector::BP, 0, 1));
    State::user(code!(64; ".byte 0xcd, 3")).run().check("INT 3 in ring 3", event_at(vector::BP, 0, 2));
    let out = State::user(code!(64; ".byte 0xf1")).run();
    out.check("INT1 asks for no privilege", event_at(vector::DB, 0, 1));
    State::kernel(code!(64; "int 0x55")).run().check("INT n", event_at(0x55, 0, 2));
    State::user(code!(64; "int 0x55"))
        .run()
        .check("INT n through a gate of ring 0", fault(vector::GP, 0x55 * 8 + 2));
    State::user(code!(64; "int 0xd")).run().check("INT 13 in ring 3", fault(vector::GP, 13 * 8 + 2));
}

fn undefined() {
    let cases: [(&str, &[u8]); 37] = [
        ("UD2", code!(64; "ud2")),
        ("UD1", code!(64; ".byte 0x0f, 0xb9, 0xc0")),
        ("UD0", code!(64; ".byte 0x0f, 0xff, 0xc0")),
        ("LOCK NOP", code!(64; ".byte 0xf0, 0x90")),
        ("LOCK MOV", code!(64; ".byte 0xf0, 0x89, 0x07")),
        ("LOCK ADD of registers", code!(64; ".byte 0xf0, 0x01, 0xc0")),
        ("LOCK CMP", code!(64; ".byte 0xf0, 0x39, 0x07")),
        ("LOCK ADD to a register", code!(64; ".byte 0xf0, 0x03, 0x07")),
        ("LOCK BT", code!(64; ".byte 0xf0, 0x0f, 0xa3, 0x07")),
        ("LOCK TEST", code!(64; ".byte 0xf0, 0x85, 0x07")),
        ("LOCK MOV CR0", code!(64; ".byte 0xf0, 0x0f, 0x20, 0xc0")),
        ("PUSH ES", code!(64; ".byte 0x06")),
        ("POP SS", code!(64; ".byte 0x17")),
        ("DAA", code!(64; ".byte 0x27")),
        ("AAA", code!(64; ".byte 0x37")),
        ("PUSHA", code!(64; ".byte 0x60")),
        ("POPA", code!(64; ".byte 0x61")),
        ("CALL far direct", code!(64; ".byte 0x9a, 0, 0, 0, 0, 8, 0")),
        ("JMP far direct", code!(64; ".byte 0xea, 0, 0, 0, 0, 8, 0")),
        ("INTO", code!(64; ".byte 0xce")),
        ("AAM", code!(64; ".byte 0xd4, 10")),
        ("AAD", code!(64; ".byte 0xd5, 10")),
        ("SALC", code!(64; ".byte 0xd6")),
        ("group 82", code!(64; ".byte 0x82, 0xc0, 1")),
        ("MOV to CS", code!(64; ".byte 0x8e, 0xc8")),
        ("MOV from segment register 6", code!(64; ".byte 0x8c, 0xf0")),
        ("LEA of a register", code!(64; ".byte 0x8d, 0xc0")),
        ("MOV CR1", code!(64; ".byte 0x0f, 0x22, 0xc8")),
        ("MOV from CR5", code!(64; ".byte 0x0f, 0x20, 0xe8")),
        ("MOV CR15", code!(64; ".byte 0x44, 0x0f, 0x22, 0xf8")),
        ("MOV DR8", code!(64; ".byte 0x44, 0x0f, 0x23, 0xc0")),
        ("CMPXCHG8B of a register", code!(64; ".byte 0x0f, 0xc7, 0xc9")),
        ("group 4 /2", code!(64; ".byte 0xfe, 0xd0")),
        ("group 5 /7", code!(64; ".byte 0xff, 0xf8")),
        ("CALL far of a register", code!(64; ".byte 0xff, 0xd8")),
        ("VEX behind a LOCK", code!(64; ".byte 0xf0, 0xc5, 0xf8, 0x77")),
        ("VEX behind a REX", code!(64; ".byte 0x40, 0xc5, 0xf8, 0x77")),
    ];
    for (name, code) in cases {
        State::kernel(code).with(DI, address(0)).run().check(name, fault(vector::UD, 0));
    }
    let long = code!(64; ".fill 14, 1, 0x66", "nop");
    State::kernel(long).run().check("15 bytes of instruction", END);
    let long = code!(64; ".fill 15, 1, 0x66", "nop");
    State::kernel(long).run().check("16 bytes of instruction", fault(vector::GP, 0));
    let long = code!(64; ".fill 15, 1, 0xf0", "nop");
    State::kernel(long).run().check("16 bytes, before LOCK is looked at", fault(vector::GP, 0));
}

fn privileged() {
    let cases: [(&str, &[u8]); 23] = [
        ("HLT", code!(64; "hlt")),
        ("CLTS", code!(64; "clts")),
        ("LGDT", code!(64; "lgdt [rdi]")),
        ("LIDT", code!(64; "lidt [rdi]")),
        ("LLDT", code!(64; "lldt ax")),
        ("LTR", code!(64; "ltr ax")),
        ("LMSW", code!(64; "lmsw ax")),
        ("INVLPG", code!(64; "invlpg [rdi]")),
        ("WBINVD", code!(64; "wbinvd")),
        ("INVD", code!(64; "invd")),
        ("RDMSR", code!(64; "rdmsr")),
        ("WRMSR", code!(64; "wrmsr")),
        ("SWAPGS", code!(64; "swapgs")),
        ("SYSRET", code!(64; "sysretq")),
        ("SYSEXIT", code!(64; "sysexit")),
        ("MOV to CR0", code!(64; "mov cr0, rax")),
        ("MOV from CR0", code!(64; "mov rax, cr0")),
        ("MOV to CR8", code!(64; "mov cr8, rax")),
        ("MOV from DR7", code!(64; "mov rax, dr7")),
        ("MOV to DR0", code!(64; "mov dr0, rax")),
        ("CLI", code!(64; "cli")),
        ("STI", code!(64; "sti")),
        ("IN", code!(64; "in al, 0x60")),
    ];
    for (name, code) in cases {
        // The operand is not looked at: its page is not there.
        paging::set(3, 0);
        let out = State::user(code).with(DI, address(3)).run();
        out.check(format_args!("{name} in ring 3"), fault(vector::GP, 0));
    }
    paging::set(3, bit::ALL);
    State::user(code!(64; "cli", "sti", "in al, 0x61")).flags(flag::IOPL).run().check("I/O with IOPL 3", END);
    let out = State::user(code!(64; "popfq")).with(SP, address(1) - 8);
    paging::write(PAGE - 8, flag::IF | flag::IOPL | flag::ONE | flag::CF);
    report::equal("POPF in ring 3 leaves IF and IOPL", out.run().rflags & 0xffff, flag::ONE | flag::CF);
    paging::write(PAGE - 8, flag::IF | flag::ONE);
    let out = out.flags(flag::IOPL).run();
    report::equal(
        "POPF with IOPL 3 sets IF and leaves IOPL",
        out.rflags & 0xffff,
        flag::IF | flag::IOPL | flag::ONE,
    );
}

fn not_available() {
    let (ts, mp, em) = (8, 2, 4);
    let usual = cpu::cr0() & !(ts | em | mp);
    let cases: [(&str, u64, &[u8], Event); 13] = [
        ("x87 with TS", ts | mp, code!(64; "mov cr0, rax", "fld1"), event_at(vector::NM, 0, 3)),
        ("x87 with EM", em, code!(64; "mov cr0, rax", "fld1"), event_at(vector::NM, 0, 3)),
        ("FWAIT with TS and MP", ts | mp, code!(64; "mov cr0, rax", "fwait"), event_at(vector::NM, 0, 3)),
        ("FWAIT with TS alone", ts, code!(64; "mov cr0, rax", "fwait"), END),
        ("FWAIT with EM", em, code!(64; "mov cr0, rax", "fwait"), END),
        ("SSE with TS", ts, code!(64; "mov cr0, rax", "xorps xmm0, xmm0"), event_at(vector::NM, 0, 3)),
        ("SSE with EM", em, code!(64; "mov cr0, rax", "xorps xmm0, xmm0"), event_at(vector::UD, 0, 3)),
        ("MMX with TS", ts, code!(64; "mov cr0, rax", "emms"), event_at(vector::NM, 0, 3)),
        ("MMX with EM", em, code!(64; "mov cr0, rax", "emms"), event_at(vector::UD, 0, 3)),
        (
            "SSE with EM and TS",
            em | ts,
            code!(64; "mov cr0, rax", "xorps xmm0, xmm0"),
            event_at(vector::UD, 0, 3),
        ),
        ("FXSAVE with TS", ts, code!(64; "mov cr0, rax", "fxsave [rdi]"), event_at(vector::NM, 0, 3)),
        ("MOVNTI with EM and TS", em | ts, code!(64; "mov cr0, rax", "movnti [rdi], eax"), END),
        ("SFENCE with EM and TS", em | ts, code!(64; "mov cr0, rax", "sfence"), END),
    ];
    for (name, bits, code, expected) in cases {
        State::kernel(code).with(AX, usual | bits).with(DI, address(0)).run().check(name, expected);
    }
    paging::set(3, 0);
    let out = State::kernel(code!(64; "mov cr0, rax", "fld qword ptr [rdi]")).with(AX, usual | ts);
    out.with(DI, address(3)).run().check("#NM comes before the operand's #PF", event_at(vector::NM, 0, 3));
    paging::set(3, bit::ALL);
    let out = State::kernel(code!(64; "mov cr0, rax", "clts", "fld1", "fninit")).with(AX, usual | ts).run();
    out.check("CLTS", END);
    let osfxsr = cpu::cr4() & !(1 << 9);
    let out = State::kernel(code!(64; "mov cr4, rax", "xorps xmm0, xmm0")).with(AX, osfxsr).run();
    out.check("SSE without OSFXSR", event_at(vector::UD, 0, 3));
}

fn floating_point() {
    // Unmasked zero divide; the next x87 instruction that waits finds it.
    let code = code!(64; "fninit", "fldcw [rdi]", "fld1", "fldz", "fdivp", "nop", "fld1");
    paging::write(0, 0x037bu16);
    let out = State::kernel(code).with(DI, address(0)).run();
    out.check("#MF before the next x87 instruction", event_at(vector::MF, 0, 11));
    let code =
        code!(64; "fninit", "fldcw [rdi]", "fld1", "fldz", "fdivp", "fnstsw ax", "fnclex", "fld1", "fninit");
    let out = State::kernel(code).with(DI, address(0)).run();
    out.check("FNSTSW and FNCLEX do not wait", END);
    report::equal("ES and ZE are in the status word", out.gprs[AX] & 0x84, 0x84);
    let code = code!(64; "fninit", "fldcw [rdi]", "fld1", "fldz", "fdivp", "fwait");
    let out = State::kernel(code).with(DI, address(0)).run();
    out.check("FWAIT finds it too", event_at(vector::MF, 0, 10));
    State::kernel(code!(64; "fninit")).run();
    paging::write(0, 0x1d80u32); // MXCSR: zero divides unmasked
    paging::write(16, 0u64);
    let code = code!(64; "ldmxcsr [rdi]", "mov eax, 0x3f800000", "movd xmm0, eax", "divss xmm0, [rdi + 16]");
    let out = State::kernel(code).with(DI, address(0)).run();
    out.check("#XM at the instruction", event_at(vector::XM, 0, 12));
    let out = State::kernel(
        code!(64; "mov cr4, rcx", "ldmxcsr [rdi]", "movss xmm0, [rdi + 20]", "divss xmm0, [rdi + 16]"),
    );
    paging::write(20, 1f32);
    let out = out.with(CX, cpu::cr4() & !(1 << 10)).with(DI, address(0)).run();
    out.check("#UD for it without OSXMMEXCPT", event_at(vector::UD, 0, 11));
    paging::write(0, 0x1_1f80u32);
    State::kernel(code!(64; "ldmxcsr [rdi]"))
        .with(DI, address(0))
        .run()
        .check("MXCSR's reserved bits", fault(vector::GP, 0));
    paging::write(0, 0x1f80u32);
    State::kernel(code!(64; "ldmxcsr [rdi]")).with(DI, address(0)).run().check("MXCSR again", END);
}

fn alignment() {
    let am = cpu::cr0() | 1 << 18;
    let usual = cpu::cr0();
    unsafe { cpu::set_cr0(am) };
    let odd = address(0) + 1;
    let user = |code| State::user(code).flags(flag::AC).with(DI, odd).with(SI, address(0));
    let misaligned = fault(vector::AC, 0);
    user(code!(64; "mov eax, [rdi]")).run().check("#AC of a load", misaligned);
    user(code!(64; "mov [rdi], eax")).run().check("#AC of a store", misaligned);
    user(code!(64; "mov al, [rdi]")).run().check("bytes are always aligned", END);
    user(code!(64; "add word ptr [rdi], 1")).run().check("#AC of a read-modify-write", misaligned);
    user(code!(64; "mov rax, [rdi + 3]")).run().check("8 bytes on 4", misaligned);
    user(code!(64; "mov eax, [rdi + 3]")).run().check("4 bytes on 4", END);
    user(code!(64; "push rax")).with(SP, address(1) - 4).run().check("#AC of a push", misaligned);
    user(code!(64; "movaps xmm0, [rdi]")).run().check("#GP of MOVAPS", fault(vector::GP, 0));
    user(code!(64; "lodsd")).with(SI, odd).run().check("#AC of a string", misaligned);
    user(code!(64; "fld qword ptr [rdi]")).run().check("#AC of x87", misaligned);
    user(code!(64; "lock xadd [rdi], eax")).run().check("#AC of XADD", misaligned);
    user(code!(64; "call [rdi]")).run().check("#AC of a branch's operand", misaligned);
    State::user(code!(64; "mov eax, [rdi]")).with(DI, odd).run().check("without EFLAGS.AC", END);
    State::kernel(code!(64; "mov eax, [rdi]"))
        .flags(flag::AC)
        .with(DI, odd)
        .run()
        .check("not in ring 0", END);
    unsafe { cpu::set_cr0(usual) };
    user(code!(64; "mov eax, [rdi]")).run().check("without CR0.AM", END);
    let out = State::kernel(code!(64; "cmpxchg16b [rdi]")).with(DI, address(0) + 8).run();
    out.check("CMPXCHG16B on 8", fault(vector::GP, 0));
}

fn canonical() {
    let state = |code| State::kernel(code).with(DI, NOT_CANONICAL).with(BP, NOT_CANONICAL).with(AX, 1);
    state(code!(64; "mov eax, [rdi]")).run().check("a load", fault(vector::GP, 0));
    state(code!(64; "mov [rdi], eax")).run().check("a store", fault(vector::GP, 0));
    state(code!(64; "mov eax, [rbp]")).run().check("a load through RBP", fault(vector::SS, 0));
    state(code!(64; "mov eax, ds:[rbp]"))
        .run()
        .check("a segment override does not matter in 64-bit mode", fault(vector::SS, 0));
    let last = 0x7fff_ffff_fffd;
    state(code!(64; "mov eax, [rdi]"))
        .with(DI, last)
        .run()
        .check("an operand that leaves the lower half", fault(vector::GP, 0));
    state(code!(64; "push rax")).with(SP, NOT_CANONICAL + 8).run().check("a push", fault(vector::SS, 0));
    state(code!(64; "pop rax")).with(SP, NOT_CANONICAL).run().check("a pop", fault(vector::SS, 0));
    state(code!(64; "ret")).with(SP, NOT_CANONICAL).run().check("a return's stack", fault(vector::SS, 0));
    state(code!(64; "leave")).run().check("LEAVE", fault(vector::SS, 0));
    state(code!(64; "jmp rdi")).run().check("JMP", fault(vector::GP, 0));
    state(code!(64; "call rdi")).run().check("CALL", fault(vector::GP, 0));
    paging::write(PAGE - 8, NOT_CANONICAL);
    let out = state(code!(64; "ret")).with(SP, address(1) - 8).run();
    out.check("RET", fault(vector::GP, 0));
    report::equal("RET leaves RSP then", out.gprs[SP], address(1) - 8);
    state(code!(64; "invlpg [rdi]")).run().check("INVLPG takes any address", END);
    state(code!(64; "prefetcht0 [rdi]")).run().check("PREFETCH takes any address", END);
    state(code!(64; "lea rax, [rdi]")).run().check("LEA takes any address", END);
    state(code!(64; "nop dword ptr [rdi]")).run().check("NOP takes any address", END);
    let base = state(code!(64; "wrmsr")).with(AX, 0).with(DX, 1 << 24); // with 57 bits neither
    for (name, msr) in [
        ("FS_BASE", 0xc000_0100),
        ("KERNEL_GS_BASE", 0xc000_0102),
        ("LSTAR", 0xc000_0082),
        ("SYSENTER_EIP", 0x176),
    ] {
        base.with(CX, msr).run().check(name, fault(vector::GP, 0));
    }
}

fn control_registers() {
    let (cr0, cr3, cr4) = (cpu::cr0(), cpu::cr3(), cpu::cr4());
    let write_cr0 = code!(64; "mov cr0, rax");
    let write_cr3 = code!(64; "mov cr3, rax");
    let write_cr4 = code!(64; "mov cr4, rax");
    let cases = [
        ("CR0 without PE", write_cr0, cr0 & !1, false),
        ("CR0 without PG", write_cr0, cr0 & !(1 << 31), false),
        ("CR0 with NW but not CD", write_cr0, cr0 | 1 << 29, false),
        ("CR0 above 32 bits", write_cr0, cr0 | 1 << 32, false),
        ("CR0 with CD", write_cr0, cr0 | 1 << 30, true),
        ("CR0's reserved bits are ignored", write_cr0, cr0 | 1 << 10, true),
        ("CR3 above the physical addresses", write_cr3, cr3 | 1 << 60, false),
        ("CR4 without PAE", write_cr4, cr4 & !(1 << 5), false),
        ("CR4's reserved bit 15", write_cr4, cr4 | 1 << 15, false),
        ("CR4 above 32 bits", write_cr4, cr4 | 1 << 40, false),
        ("CR4's LA57 in 64-bit mode", write_cr4, cr4 ^ 1 << 12, false),
        ("CR4 with PGE", write_cr4, cr4 | 1 << 7, true),
        ("CR4 with TSD", write_cr4, cr4 | 1 << 2, true),
        ("CR8 of 4 bits", code!(64; "mov cr8, rax"), 15, true),
        ("CR8 of 5 bits", code!(64; "mov cr8, rax"), 16, false),
        ("DR6 above 32 bits", code!(64; "mov dr6, rax"), 1 << 32, false),
        ("DR7 above 32 bits", code!(64; "mov dr7, rax"), 1 << 32, false),
        ("DR0 above 32 bits", code!(64; "mov dr0, rax"), 1 << 32, true),
    ];
    for (name, code, value, fine) in cases {
        let ends = name.starts_with("CR4")
            || ["CR0 without PE", "CR0 without PG", "CR3 above the physical addresses"].contains(&name);
        if ends && !fine && report::ends_tcg(name, "TCG does it, and executes what then lies there") {
            continue;
        }
        let expected = if fine { END } else { fault(vector::GP, 0) };
        State::kernel(code).with(AX, value).run().check(name, expected);
    }
    unsafe { cpu::set_cr8(0) };
    let out =
        State::kernel(code!(64; "mov cr0, rax", "mov rbx, cr0")).with(AX, cr0 | 1 << 10 | 1 << 20).run();
    report::equal("CR0's reserved bits stay 0", out.gprs[BX], cr0);
    State::kernel(code!(64; "mov rax, dr4")).run().check("DR4 is DR6", END);
    let out = State::kernel(code!(64; "mov cr4, rax", "mov rax, dr4")).with(AX, cr4 | 8).run();
    out.check("DR4 with CR4.DE", event_at(vector::UD, 0, 3));
    let out = State::user(code!(64; "rdtsc")).run();
    out.check("RDTSC in ring 3", END);
    unsafe { cpu::set_cr4(cr4 | 4) };
    State::user(code!(64; "rdtsc")).run().check("RDTSC in ring 3 with TSD", fault(vector::GP, 0));
    State::kernel(code!(64; "rdtsc")).run().check("RDTSC in ring 0 with TSD", END);
    unsafe { cpu::set_cr4(cr4) };
    let efer = cpu::read_msr(0xc000_0080);
    let write_msr = State::kernel(code!(64; "wrmsr")).with(CX, 0xc000_0080);
    write_msr.with(AX, efer & !0x100).run().check("EFER.LME under paging", fault(vector::GP, 0));
    write_msr.with(AX, efer | 2).run().check("EFER's reserved bits", fault(vector::GP, 0));
    write_msr.with(AX, efer).run().check("EFER as it is", END);
    let out = State::kernel(code!(64; "lmsw ax", "mov rbx, cr0")).with(AX, 0xe).run();
    report::equal("LMSW does not clear PE", out.gprs[BX] & 0xf, 0xf);
    let out = State::kernel(code!(64; "rdmsr")).with(CX, 0x1234_5678).run();
    out.check("an MSR that is not there", fault(vector::GP, 0));
}

/// The I/O permission bitmap. SDM vol. 1, *Input/Output*.
fn ports() {
    #[repr(C, align(4096))]
    struct Task {
        tss: tables::Tss,
        bits: [u8; 32],
    }
    static mut TASK: Task = unsafe { core::mem::zeroed() };
    let task = unsafe { &mut *(&raw mut TASK) };
    task.tss = unsafe { tables::TSS[0] };
    task.tss.io_map = size_of::<tables::Tss>() as u16;
    task.bits = [0xff; 32];
    // Port 0x61, and 0x80 to 0x8f.
    task.bits[0xc] = !2;
    task.bits[0x10] = 0;
    task.bits[0x11] = 0;
    let load = |limit: u64| {
        let base = (&raw const TASK) as u64;
        tables::set_gdt(selector::TSS, guests::descriptor::segment(base, limit, PRESENT | kind::TSS, 0));
        unsafe { core::arch::asm!("ltr {:x}", in(reg) selector::TSS) };
    };
    load(size_of::<Task>() as u64 - 1);
    let read = code!(64; "in al, dx");
    let wide = code!(64; "in eax, dx");
    let refused = fault(vector::GP, 0);
    State::user(read).with(DX, 0x61).run().check("a port that is allowed", END);
    State::user(read).with(DX, 0x60).run().check("a port that is not", refused);
    State::user(wide).with(DX, 0x60).run().check("4 ports, of which 1 is allowed", refused);
    State::user(wide).with(DX, 0x80).run().check("4 ports that are allowed", END);
    State::user(wide).with(DX, 0x8d).run().check("the last of 4 ports is not", refused);
    State::user(code!(64; "outsb"))
        .with(DX, 0x80)
        .with(SI, address(0))
        .run()
        .check("OUTS to an allowed port", END);
    State::user(code!(64; "insb"))
        .with(DX, 0x60)
        .with(DI, address(0))
        .run()
        .check("INS from one that is not", refused);
    State::user(read).with(DX, 0xffff).run().check("a port beyond the bitmap", refused);
    load(104 + 0x11);
    State::user(read).with(DX, 0x80).run().check("a port at the limit's byte", END);
    load(104 + 0x10);
    State::user(read).with(DX, 0x80).run().check("the byte after it is beyond the limit", refused);
    tables::load(0);
}

fn compatibility() {
    let user = |code| {
        let state = State::user(code).cs(selector::USER_CODE32);
        state.with(SP, guests::long::stack()).with(BX, 0)
    };
    user(code!(32; "inc eax")).run().check("32-bit code in ring 3", END);
    State::kernel(code!(32; "inc eax")).cs(selector::CODE32).run().check("32-bit code in ring 0", END);
    let out = user(code!(32; "into")).flags(flag::OF).run();
    out.check("INTO is a trap", event_at(vector::OF, 0, 1));
    user(code!(32; "into")).run().check("INTO without OF", END);
    paging::write(0, [5i32, 10]);
    let window = paging::FRAMES;
    let bound = code!(32; "bound eax, [edi]");
    user(bound).with(AX, 4).with(DI, window).run().check("BOUND below", fault(vector::BR, 0));
    user(bound).with(AX, 5).with(DI, window).run().check("BOUND at the lower bound", END);
    user(bound).with(AX, 10).with(DI, window).run().check("BOUND at the upper bound", END);
    user(bound).with(AX, 11).with(DI, window).run().check("BOUND above", fault(vector::BR, 0));
    user(code!(32; ".byte 0x62, 0xc0")).run().check("BOUND of a register", fault(vector::UD, 0));
    user(code!(32; "aam 0")).run().check("AAM by 0", fault(vector::DE, 0));
    user(code!(32; ".byte 0xc4, 0xc0")).run().check("LES of a register", event(vector::UD, 0));
    user(code!(32; "mov eax, [edi]")).with(DI, 0xffff_fffe).run();
}
