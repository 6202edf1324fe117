//! SYSCALL, SYSRET, SYSENTER and SYSEXIT; SWAPGS and the segment bases.
//!
//! SDM vol. 3, *Fast System Calls in 64-Bit Mode*, *Performing Fast Calls to System Procedures*.
#![no_std]
#![no_main]

use guests::code;
use guests::cpu::{self, flag, vector};
use guests::legacy;
use guests::long::reg::{AX, BX, CX, DX, R11, SP};
use guests::long::{State, event_at, fault};
use guests::report;
use guests::tables::selector;

guests::guest!(main);

const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const FMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;

fn main() {
    // SYSRET's selectors are 16 and 8 above this base: 0x33, 0x3b, 0x43.
    unsafe { cpu::write_msr(STAR, 0x0033_0008_0000_0000) };
    syscall();
    sysret();
    sysenter();
    sysexit();
    bases();
}

fn syscall() {
    let landing = code!(64; "nop", "nop");
    let start = landing.as_ptr() as u64;
    unsafe {
        cpu::write_msr(LSTAR, start);
        cpu::write_msr(CSTAR, 0x1234);
        cpu::write_msr(FMASK, flag::IF | flag::DF | flag::TF);
    }
    let call = code!(64; "syscall", "ud2");
    let next = call.as_ptr() as u64 + 2;
    let before = State::user(call).flags(flag::IF | flag::DF | flag::CF).with(SP, 0x1234_5678);
    let out = before.run();
    report::equal("SYSCALL goes to LSTAR", (out.vector, out.rip), (vector::END, start + 4));
    report::equal("in ring 0", (out.cs, out.ss), (selector::CODE.into(), selector::DATA.into()));
    report::equal("RCX is the next RIP", out.gprs[CX], next);
    report::equal("R11 is RFLAGS", out.gprs[R11] & 0xffff, flag::IF | flag::DF | flag::CF | flag::ONE);
    report::equal("FMASK is cleared of RFLAGS", out.rflags & 0xffff, flag::CF | flag::ONE);
    report::equal("RSP is the program's", out.gprs[SP], 0x1234_5678);
    let out = State::kernel(call).run();
    report::equal(
        "SYSCALL in ring 0",
        (out.vector, out.rip, out.cs),
        (vector::END, start + 4, selector::CODE.into()),
    );
    let efer = cpu::read_msr(EFER);
    unsafe { cpu::write_msr(EFER, efer & !1) };
    State::user(call).run().check("SYSCALL without SCE", fault(vector::UD, 0));
    State::kernel(code!(64; "sysretq")).run().check("SYSRET without SCE", fault(vector::UD, 0));
    unsafe { cpu::write_msr(EFER, efer) };
    let compatibility = State::user(code!(32; ".byte 0x0f, 0x05")).cs(selector::USER_CODE32);
    if cpu::cpuid(0, 0)[1] == u32::from_le_bytes(*b"Genu") {
        compatibility.run().check("SYSCALL in compatibility mode", fault(vector::UD, 0));
    }
    unsafe { cpu::write_msr(FMASK, 0) };
    let out = State::user(code!(64; "syscall")).flags(flag::TF).run();
    report::equal("TF that FMASK leaves traps at LSTAR", (out.vector, out.rip), (vector::DB, start));
    unsafe {
        cpu::set_dr6(0);
        cpu::write_msr(FMASK, flag::IF | flag::TF);
    }
}

fn sysret() {
    let landing = code!(64; "nop");
    let start = landing.as_ptr() as u64;
    let back = State::kernel(code!(64; ".byte 0x48, 0x0f, 0x07")).with(CX, start);
    let out = back.with(R11, flag::IF | flag::CF).with(SP, guests::long::stack()).run();
    report::equal("SYSRET of 64 bits", (out.vector, out.rip), (vector::END, start + 3));
    report::equal("in ring 3", (out.cs, out.ss), (selector::USER_CODE.into(), selector::USER_DATA.into()));
    report::equal("with R11's flags", out.rflags & 0xffff, flag::IF | flag::CF | flag::ONE);
    let out = back.with(R11, flag::RF | flag::VM | 0x2a).run();
    report::equal("but neither RF nor VM nor what is reserved", out.rflags & 0x3_ffff, flag::ONE);
    let landing = code!(32; "nop");
    let out = State::kernel(code!(64; ".byte 0x0f, 0x07")).with(CX, landing.as_ptr() as u64 | 1 << 40).run();
    let at = landing.as_ptr() as u64 + 3;
    report::equal(
        "SYSRET of 32 bits",
        (out.vector, out.rip, out.cs),
        (vector::END, at, selector::USER_CODE32.into()),
    );
    let out = back.with(CX, 1 << 56).run();
    out.check("SYSRET to an address that is not canonical", fault(vector::GP, 0));
    report::equal("is a fault in ring 0", out.cs, selector::CODE.into());
    State::user(code!(64; ".byte 0x48, 0x0f, 0x07")).run().check("SYSRET in ring 3", fault(vector::GP, 0));
}

fn sysenter() {
    let landing = code!(64; "nop");
    let start = landing.as_ptr() as u64;
    unsafe {
        cpu::write_msr(SYSENTER_CS, selector::CODE.into());
        cpu::write_msr(SYSENTER_ESP, 0x77_8888);
        cpu::write_msr(SYSENTER_EIP, start);
    }
    for (name, state) in [
        ("64-bit code", State::user(code!(64; "sysenter"))),
        ("32-bit code", State::user(code!(32; "sysenter")).cs(selector::USER_CODE32)),
    ] {
        let out = state.flags(flag::IF | flag::CF).run();
        report::equal(
            format_args!("SYSENTER from {name}"),
            (out.vector, out.rip, out.gprs[SP]),
            (vector::END, start + 3, 0x77_8888),
        );
        report::equal(format_args!("SYSENTER from {name}: segments"), (out.cs, out.ss), (0x08, 0x10));
        report::equal(format_args!("SYSENTER from {name}: flags"), out.rflags & 0xffff, flag::CF | flag::ONE);
    }
    unsafe { cpu::write_msr(SYSENTER_CS, 3) };
    State::user(code!(64; "sysenter")).run().check("SYSENTER without a segment", fault(vector::GP, 0));
    State::kernel(code!(64; "sysexit")).run().check("SYSEXIT without a segment", fault(vector::GP, 0));
    unsafe { cpu::write_msr(SYSENTER_CS, selector::CODE.into()) };
    // In protected mode.
    let tables = legacy::tables();
    tables.reset();
    let landing = code!(32; "nop");
    unsafe {
        cpu::write_msr(SYSENTER_EIP, landing.as_ptr() as u64);
        cpu::write_msr(SYSENTER_ESP, u64::from(legacy::stack() - 0x100));
    }
    let out = legacy::State::user(code!(32; "sysenter")).flags(flag::IF).run();
    report::equal(
        "SYSENTER in protected mode",
        (out.vector, out.eip, out.gprs[SP]),
        (0x30, landing.as_ptr() as u32 + 3, legacy::stack() - 0x100),
    );
    report::equal("its segments and flags", (out.cs, out.ss, out.eflags & 0xffff), (8, 0x10, 2));
    let out = legacy::State::v86(code!(16; "sysenter")).run();
    report::equal(
        "SYSENTER in virtual-8086 mode",
        (out.vector, out.eip, out.cs),
        (0x30, landing.as_ptr() as u32 + 3, 8),
    );
}

fn sysexit() {
    // SYSEXIT's selectors follow SYSENTER_CS: 0x23 + … for 32 bits 16 and 24 above it, for 64 bits 32 and 40.
    unsafe { cpu::write_msr(SYSENTER_CS, 0x20) };
    let landing = code!(64; "nop");
    let out = State::kernel(code!(64; ".byte 0x48, 0x0f, 0x35"));
    let out = out.with(DX, landing.as_ptr() as u64).with(CX, guests::long::stack() - 0x40).run();
    report::equal(
        "SYSEXIT of 64 bits",
        (out.vector, out.rip, out.cs),
        (vector::END, landing.as_ptr() as u64 + 3, 0x43),
    );
    report::equal("its stack", (out.gprs[SP], out.ss), (guests::long::stack() - 0x40, 0x4b));
    let landing = code!(32; "nop");
    let out = State::kernel(code!(64; ".byte 0x0f, 0x35"));
    let out = out.with(DX, landing.as_ptr() as u64).with(CX, guests::long::stack() - 0x40).run();
    report::equal(
        "SYSEXIT of 32 bits",
        (out.vector, out.rip, out.cs),
        (vector::END, landing.as_ptr() as u64 + 3, 0x33),
    );
    report::equal("its stack segment", out.ss, 0x3b);
    let out = State::kernel(code!(64; ".byte 0x48, 0x0f, 0x35")).with(DX, 1 << 56).run();
    out.check("SYSEXIT to an address that is not canonical", fault(vector::GP, 0));
    let out = State::kernel(code!(64; ".byte 0x48, 0x0f, 0x35")).with(CX, 1 << 56).run();
    out.check("SYSEXIT to such a stack", fault(vector::GP, 0));
    State::user(code!(64; "sysexit")).run().check("SYSEXIT in ring 3", fault(vector::GP, 0));
    legacy::tables().reset();
    legacy::State::real(code!(16; "sysexit")).run().check("SYSEXIT in real mode", fault(vector::GP, 0));
    unsafe { cpu::write_msr(SYSENTER_CS, 0) };
}

fn bases() {
    // SAFETY: memory that nobody uses.
    unsafe {
        (0x80_0000 as *mut [u64; 4]).write_volatile([0x11, 0x22, 0x33, 0x44]);
        cpu::write_msr(FS_BASE, 0x80_0000);
        cpu::write_msr(GS_BASE, 0x80_0008);
        cpu::write_msr(KERNEL_GS_BASE, 0x80_0010);
    }
    let out =
        State::kernel(code!(64; "mov rax, fs:[0]", "mov rbx, gs:[0]", "swapgs", "mov rcx, gs:[0]", "swapgs"))
            .run();
    report::equal("FS, GS and SWAPGS", [out.gprs[AX], out.gprs[BX], out.gprs[CX]], [0x11, 0x22, 0x33]);
    report::equal(
        "the bases afterwards",
        (cpu::read_msr(GS_BASE), cpu::read_msr(KERNEL_GS_BASE)),
        (0x80_0008, 0x80_0010),
    );
    let out = State::kernel(code!(64; "mov fs, ax", "mov rbx, fs:[0x800000]")).with(AX, 0x10).run();
    report::equal(
        "loading FS loads its base",
        (out.vector, out.gprs[BX], cpu::read_msr(FS_BASE)),
        (vector::END, 0x11, 0),
    );
    unsafe { cpu::write_msr(FS_BASE, 0x1_2345_6789) };
    let out = State::kernel(code!(64; "mov fs, ax")).with(AX, 0x10).run();
    report::equal("with 32 bits", (out.vector, cpu::read_msr(FS_BASE)), (vector::END, 0));
    if cpu::cpuid(7, 0)[1] & 1 == 0 {
        report::skip("FSGSBASE", "the processor does not have it");
        return;
    }
    let read = code!(64; "rdfsbase rax");
    State::user(read).run().check("RDFSBASE without CR4.FSGSBASE", fault(vector::UD, 0));
    let cr4 = cpu::cr4();
    unsafe { cpu::set_cr4(cr4 | 1 << 16) };
    let out = State::user(code!(64; "wrfsbase rbx", "rdfsbase rax", "wrgsbase ecx", "rdgsbase rdx"));
    let out = out.with(BX, 0x1234_5678_9abc).with(CX, 0xffff_ffff_8000_0000).run();
    report::equal("WRFSBASE and RDFSBASE", (out.vector, out.gprs[AX]), (vector::END, 0x1234_5678_9abc));
    report::equal("of 32 bits", out.gprs[DX], 0x8000_0000);
    let out = State::user(code!(64; "nop", "wrfsbase rbx")).with(BX, 1 << 56).run();
    out.check("WRFSBASE that is not canonical", event_at(vector::GP, 0, 1));
    State::user(code!(32; ".byte 0xf3, 0x0f, 0xae, 0xc0"))
        .cs(selector::USER_CODE32)
        .run()
        .check("RDFSBASE in 32-bit code", fault(vector::UD, 0));
    unsafe { cpu::set_cr4(cr4) };
}
