//! Registers of the model: MSRs and their faults, CPUID's promises, the XSAVE family, and user-mode instruction
//! prevention.
//!
//! SDM vol. 4; SDM vol. 1, *Managing State Using the XSAVE Feature Set*.
#![no_std]
#![no_main]

use guests::code;
use guests::cpu::{self, vector};
use guests::long::reg::{AX, BX, CX, DI, DX};
use guests::long::{END, Event, State, event_at, fault};
use guests::paging::{self, PAGE, address, bit};
use guests::report;

guests::guest!(main);

fn main() {
    paging::open();
    msrs();
    msr_faults();
    prevention();
    cpuid();
    if cpu::cpuid(1, 0)[2] & 1 << 26 == 0 {
        report::skip("XSAVE", "the processor does not have it");
        return;
    }
    extended_controls();
    saving();
    xsave_faults();
}

fn write_msr(msr: u64, value: u64) -> State {
    let state = State::kernel(code!(64; "wrmsr")).with(CX, msr);
    state.with(AX, value & 0xffff_ffff).with(DX, value >> 32).run()
}

fn read_msr(msr: u64) -> State {
    State::kernel(code!(64; "rdmsr")).with(CX, msr).run()
}

/// MSRs that keep what is written to them.
fn msrs() {
    let kept: [(&str, u32, u64); 12] = [
        ("SYSENTER_CS", 0x174, 0x1234),
        ("SYSENTER_ESP", 0x175, 0x7fff_1234_5678),
        ("SYSENTER_EIP", 0x176, 0xffff_8000_0000_1234),
        ("PAT", 0x277, 0x0606_0505_0404_0100),
        ("FS_BASE", 0xc000_0100, 0x7fff_1234_5678),
        ("GS_BASE", 0xc000_0101, 0xffff_8000_0000_0000),
        ("KERNEL_GS_BASE", 0xc000_0102, 0x1234_5678),
        ("STAR", 0xc000_0081, 0x1122_3344_5566_7788),
        ("LSTAR", 0xc000_0082, 0xffff_ffff_8000_0000),
        ("CSTAR", 0xc000_0083, 0x7fff_ffff_ffff),
        ("FMASK", 0xc000_0084, 0x4_7700),
        ("TSC_AUX", 0xc000_0103, 0x1234_5678),
    ];
    for (name, msr, value) in kept {
        let before = cpu::read_msr(msr);
        unsafe { cpu::write_msr(msr, value) };
        let got = cpu::read_msr(msr);
        unsafe { cpu::write_msr(msr, before) };
        report::equal(format_args!("{name} keeps its value"), got, value);
    }
    let tsc = cpu::tsc();
    unsafe { cpu::write_msr(0x10, tsc + (1 << 40)) };
    let later = cpu::tsc();
    report::holds("the TSC can be set", later > tsc + (1 << 40) && later < tsc + (1 << 41), later - tsc);
    if cpu::cpuid(7, 0)[1] & 2 != 0 {
        report::holds("TSC_ADJUST follows it", cpu::read_msr(0x3b) >> 39 != 0, cpu::read_msr(0x3b));
        unsafe { cpu::write_msr(0x3b, 0) };
        let now = cpu::tsc();
        report::holds("and takes it back", now < 1 << 40, now);
    }
    if cpu::cpuid(0x8000_0001, 0)[3] & 1 << 27 != 0 {
        unsafe { cpu::write_msr(0xc000_0103, 0x4321) };
        let out = State::user(code!(64; "rdtscp")).run();
        report::equal("RDTSCP's ECX", (out.vector, out.gprs[CX]), (vector::END, 0x4321));
    }
}

fn msr_faults() {
    let wrong: [(&str, u64, u64); 10] = [
        ("PAT with a type of 2", 0x277, 0x0007_0406_0007_0402),
        ("PAT with a type of 8", 0x277, 0x0807_0406_0007_0406),
        ("EFER's bit 1", 0xc000_0080, cpu::read_msr(0xc000_0080) | 2),
        ("EFER above 32 bits", 0xc000_0080, cpu::read_msr(0xc000_0080) | 1 << 40),
        ("LSTAR that is not canonical", 0xc000_0082, 1 << 57),
        ("an MSR that is not there", 0x4000_0fff, 0),
        ("another", 0x8000_0000, 0),
        ("MTRR capabilities, read-only", 0xfe, 0),
        ("a variable MTRR's type", 0x200, 2),
        ("MTRR default's reserved bits", 0x2ff, 0x1_0000),
    ];
    for (name, msr, value) in wrong {
        write_msr(msr, value).check(format_args!("WRMSR of {name}"), fault(vector::GP, 0));
    }
    for (name, msr) in [
        ("an MSR that is not there", 0x4000_0fff),
        ("another", 0xdead_beef),
        ("ECX of all ones", 0xffff_ffff),
    ] {
        read_msr(msr).check(format_args!("RDMSR of {name}"), fault(vector::GP, 0));
    }
    let out = State::kernel(code!(64; "rdmsr"))
        .with(CX, 0xffff_ffff_0000_0010)
        .with(AX, u64::MAX)
        .with(DX, u64::MAX)
        .run();
    out.check("RDMSR looks at ECX alone", END);
    report::equal("and clears the upper halves", (out.gprs[AX] >> 32, out.gprs[DX] >> 32), (0, 0));
}

fn prevention() {
    let codes: [(&str, &[u8]); 5] = [
        ("SGDT", code!(64; "sgdt [rdi]")),
        ("SIDT", code!(64; "sidt [rdi]")),
        ("SLDT", code!(64; "sldt eax")),
        ("STR", code!(64; "str eax")),
        ("SMSW", code!(64; "smsw eax")),
    ];
    for (name, code) in codes {
        State::user(code).with(DI, address(0)).run().check(format_args!("{name} in ring 3"), END);
    }
    if cpu::cpuid(7, 0)[2] & 4 == 0 {
        report::skip("UMIP", "the processor does not have it");
        return;
    }
    let cr4 = cpu::cr4();
    unsafe { cpu::set_cr4(cr4 | 1 << 11) };
    for (name, code) in codes {
        let out = State::user(code).with(DI, address(0)).run();
        out.check(format_args!("{name} in ring 3 with UMIP"), fault(vector::GP, 0));
        let out = State::kernel(code).with(DI, address(0)).run();
        out.check(format_args!("{name} in ring 0 with UMIP"), END);
    }
    unsafe { cpu::set_cr4(cr4) };
}

fn cpuid() {
    let highest = cpu::cpuid(0, 0)[0];
    report::holds("leaf 0 has the highest leaf", highest >= 0xd, highest);
    let out = State::user(code!(64; "cpuid")).with(AX, u64::MAX << 32).with(BX, u64::MAX).run();
    report::equal(
        "CPUID clears the upper halves",
        (out.gprs[AX] >> 32, out.gprs[BX] >> 32, out.gprs[CX] >> 32),
        (0, 0, 0),
    );
    let features = cpu::cpuid(1, 0);
    report::equal("OSXSAVE is CR4's", features[2] >> 27 & 1, 0);
    if features[2] & 1 << 26 != 0 {
        unsafe { cpu::set_cr4(cpu::cr4() | 1 << 18) };
        report::equal("and is set with it", cpu::cpuid(1, 0)[2] >> 27 & 1, 1);
        unsafe { cpu::set_cr4(cpu::cr4() & !(1 << 18)) };
    }
    // What CR4 takes is what CPUID promises.
    let [_, b7, c7, _] = cpu::cpuid(7, 0);
    for (name, bit, promised) in [
        ("VME", 0, features[3] >> 1 & 1),
        ("PVI", 1, features[3] >> 1 & 1),
        ("TSD", 2, features[3] >> 4 & 1),
        ("DE", 3, features[3] >> 2 & 1),
        ("PGE", 7, features[3] >> 13 & 1),
        ("UMIP", 11, c7 >> 2 & 1),
        ("VMXE", 13, features[2] >> 5 & 1),
        ("SMXE", 14, features[2] >> 6 & 1),
        ("FSGSBASE", 16, b7 & 1),
        ("PCIDE", 17, features[2] >> 17 & 1),
        ("OSXSAVE", 18, features[2] >> 26 & 1),
        ("SMAP", 21, b7 >> 20 & 1),
        ("PKE", 22, c7 >> 3 & 1),
    ] {
        if promised == 0 && report::ends_tcg(name, "TCG sets bits of CR4 that it does not promise") {
            continue;
        }
        let code = code!(64; "mov rbx, cr4", "mov cr4, rax", "mov cr4, rbx");
        let out = State::kernel(code).with(AX, cpu::cr4() | 1 << bit).run();
        let expected = if promised == 1 { END } else { event_at(vector::GP, 0, 3) };
        out.check(format_args!("CR4.{name} as CPUID promises"), expected);
    }
}

fn extended_controls() {
    State::kernel(code!(64; "xgetbv"))
        .with(CX, 0)
        .run()
        .check("XGETBV without OSXSAVE", fault(vector::UD, 0));
    State::kernel(code!(64; "xsave [rdi]"))
        .with(DI, address(0))
        .run()
        .check("XSAVE without OSXSAVE", fault(vector::UD, 0));
    unsafe { cpu::set_cr4(cpu::cr4() | 1 << 18) };
    let [supported, ..] = cpu::cpuid(0xd, 0);
    report::equal("x87 and SSE are there", supported & 3, 3);
    let set = |name: &str, low: u64, high: u64, index: u64, expected: Event| {
        let state = State::kernel(code!(64; "xsetbv")).with(AX, low).with(DX, high).with(CX, index);
        state.run().check(name, expected);
    };
    set("XSETBV of x87 alone", 1, 0, 0, END);
    set("XSETBV of x87 and SSE", 3, 0, 0, END);
    set("XSETBV without x87", 2, 0, 0, fault(vector::GP, 0));
    set("XSETBV of AVX without SSE", 5, 0, 0, fault(vector::GP, 0));
    set("XSETBV of what is not there", 3, 1 << 30, 0, fault(vector::GP, 0));
    set("XSETBV of register 1", 3, 0, 1, fault(vector::GP, 0));
    if supported & 4 != 0 {
        set("XSETBV of AVX", 7, 0, 0, END);
        let out = State::kernel(code!(64; "vxorps ymm0, ymm0, ymm0")).run();
        out.check("AVX works then", END);
        set("XSETBV without AVX", 3, 0, 0, END);
        let out = State::kernel(code!(64; "vxorps ymm0, ymm0, ymm0")).run();
        out.check("and is undefined without", fault(vector::UD, 0));
    }
    if supported & 0xe0 == 0xe0 {
        set("XSETBV of AVX-512 without AVX", 0xe3, 0, 0, fault(vector::GP, 0));
        set("XSETBV of part of AVX-512", 0x27, 0, 0, fault(vector::GP, 0));
        set("XSETBV of AVX-512", 0xe7, 0, 0, END);
    }
    State::user(code!(64; "xsetbv"))
        .with(AX, 3)
        .with(CX, 0)
        .run()
        .check("XSETBV in ring 3", fault(vector::GP, 0));
    let out = State::user(code!(64; "xgetbv")).with(CX, 0).run();
    report::equal("XGETBV in ring 3", (out.vector, out.gprs[AX] & 3), (vector::END, 3));
    State::user(code!(64; "xgetbv"))
        .with(CX, 5)
        .run()
        .check("XGETBV of another register", fault(vector::GP, 0));
    set("XSETBV of all", (supported & 0xe7).into(), 0, 0, END);
}

fn saving() {
    let area = address(2);
    let clear = || paging::fill(2 * PAGE, 0, PAGE as usize);
    let all = u64::from(cpu::cpuid(0xd, 0)[0] & 0xe7);
    clear();
    // A value in XMM1, saved, destroyed, restored.
    let code =
        code!(64; "movq xmm1, rbx", "xsave [rdi]", "pxor xmm1, xmm1", "xrstor [rdi]", "movq rbx, xmm1");
    let out = State::kernel(code).with(AX, all).with(DX, 0).with(DI, area).with(BX, 0x1234_5678_9abc).run();
    report::equal("XSAVE and XRSTOR", (out.vector, out.gprs[BX]), (vector::END, 0x1234_5678_9abc));
    report::equal("XSTATE_BV has SSE", paging::read::<u64>(2 * PAGE + 512) & 2, 2);
    report::equal("XMM1 is in its place", paging::read::<u64>(2 * PAGE + 176), 0x1234_5678_9abc);
    // What XSTATE_BV does not have is its initial value.
    paging::write(2 * PAGE + 512, 1u64);
    let code = code!(64; "movq xmm1, rbx", "xrstor [rdi]", "movq rbx, xmm1");
    let out = State::kernel(code).with(AX, all).with(DX, 0).with(DI, area).with(BX, 7).run();
    report::equal("XRSTOR initializes", (out.vector, out.gprs[BX]), (vector::END, 0));
    // What is not asked for stays.
    let out = State::kernel(code).with(AX, 1).with(DX, 0).with(DI, area).with(BX, 7).run();
    report::equal("XRSTOR leaves what is not asked for", (out.vector, out.gprs[BX]), (vector::END, 7));
    let [features, size, ..] = cpu::cpuid(0xd, 1);
    let [_, standard, most, _] = cpu::cpuid(0xd, 0);
    report::holds("leaf 13 has the sizes", standard >= 576 && most >= standard, (standard, most, size));
    if features & 2 != 0 {
        clear();
        let code =
            code!(64; "movq xmm1, rbx", "xsavec [rdi]", "pxor xmm1, xmm1", "xrstor [rdi]", "movq rbx, xmm1");
        let out = State::kernel(code).with(AX, all).with(DX, 0).with(DI, area).with(BX, 0x77).run();
        report::equal("XSAVEC and XRSTOR", (out.vector, out.gprs[BX]), (vector::END, 0x77));
        report::equal("XCOMP_BV is compacted", paging::read::<u64>(2 * PAGE + 520), 1 << 63 | all);
    }
    let code =
        code!(64; "movq xmm1, rbx", "fxsave [rdi]", "pxor xmm1, xmm1", "fxrstor [rdi]", "movq rbx, xmm1");
    let out = State::kernel(code).with(DI, area).with(BX, 0x99).run();
    report::equal("FXSAVE and FXRSTOR", (out.vector, out.gprs[BX]), (vector::END, 0x99));
}

fn xsave_faults() {
    let area = address(2);
    let (save, restore) = (code!(64; "xsave [rdi]"), code!(64; "xrstor [rdi]"));
    let run = |code: &[u8], at: u64| State::kernel(code).with(AX, 3).with(DX, 0).with(DI, at).run();
    run(save, area + 16).check("XSAVE on 16 bytes", fault(vector::GP, 0));
    run(restore, area + 16).check("XRSTOR on 16 bytes", fault(vector::GP, 0));
    run(code!(64; "lock xsave [rdi]"), area).check("LOCK XSAVE", fault(vector::UD, 0));
    let header = |bv: u64, compacted: u64, reserved: u64| {
        paging::fill(2 * PAGE, 0, PAGE as usize);
        paging::write(2 * PAGE + 24, 0x1f80u32);
        paging::write(2 * PAGE + 512, [bv, compacted, reserved]);
    };
    header(0, 0, 0);
    run(restore, area).check("XRSTOR of a header of zeros", END);
    header(1 << 40, 0, 0);
    run(restore, area).check("XSTATE_BV of what is not there", fault(vector::GP, 0));
    header(0, 1, 0);
    run(restore, area).check("XCOMP_BV without its top bit", fault(vector::GP, 0));
    header(0, 0, 1);
    run(restore, area).check("the header's reserved bytes", fault(vector::GP, 0));
    header(2, 0, 0);
    paging::write(2 * PAGE + 24, 0x1_0000u32);
    run(restore, area).check("MXCSR's reserved bits", fault(vector::GP, 0));
    header(0, 0, 0);
    let ts = cpu::cr0() | 8;
    let out =
        State::kernel(code!(64; "mov cr0, rbx", "xsave [rdi]")).with(BX, ts).with(AX, 3).with(DI, area).run();
    out.check("XSAVE with TS", event_at(vector::NM, 0, 3));
    // Absent pages: the area's second half.
    paging::set(3, 0);
    let at = address(3) - 512;
    let out = run(save, at);
    out.check("XSAVE to an absent page", fault(vector::PF, 2));
    report::equal("is told where", out.cr2 & !0xfff, address(3));
    run(restore, at).check("XRSTOR from an absent page", fault(vector::PF, 0));
    paging::set(3, bit::PRESENT | bit::USER);
    run(save, at).check("XSAVE to a read-only page", fault(vector::PF, 3));
    paging::set(3, bit::ALL);
    unsafe { cpu::set_cr4(cpu::cr4() & !(1 << 18)) };
}
