//! Virtual-8086 mode, with and without the mode extensions, and protected mode's virtual interrupts.
//!
//! SDM vol. 3, *8086 Emulation*.
#![no_std]
#![no_main]

use guests::cpu::{self, flag, vector};
use guests::legacy::{REAL_DATA, REAL_SEGMENT, REAL_STACK, State, low, selector, tables};
use guests::long::reg::{AX, BX, DI, DX, SP};
use guests::long::{END, event_at, fault};
use guests::{code, report};

guests::guest!(main);

const VME: u32 = 1;
const PVI: u32 = 2;
const IF: u32 = flag::IF as u32;
const VIF: u32 = flag::VIF as u32;
const IOPL: u32 = flag::IOPL as u32;

fn main() {
    tables().reset();
    addressing();
    sensitive();
    ports();
    undefined();
    interrupts();
    if cpu::cpuid(1, 0)[3] & 2 == 0 {
        report::skip("VME", "the processor does not have it");
        return;
    }
    virtual_interrupt_flag();
    redirection();
    protected_mode();
}

fn data<T>(offset: u32) -> *mut T {
    low((u32::from(REAL_DATA) << 4) + offset)
}

fn stack<T>(offset: u32) -> *mut T {
    low((u32::from(REAL_STACK) << 4) + offset)
}

fn addressing() {
    // SAFETY: conventional memory, which nothing else uses; so for all of this file.
    unsafe {
        data::<u32>(0x10).write_volatile(0x1234_5678);
        let out = State::v86(code!(16; "mov eax, [di]")).with(DI, 0x10).run();
        report::equal(
            "a segment's base is 16 times its selector",
            (out.vector, out.gprs[AX]),
            (0x30, 0x1234_5678),
        );
        State::v86(code!(16; "mov eax, [edi]"))
            .with(DI, 0xfffd)
            .run()
            .check("4 bytes beyond 64 KiB", fault(vector::GP, 0));
        let out = State::v86(code!(16; "mov eax, [edi]")).with(DI, 0x1_0000).run();
        out.check("an offset of 17 bits", fault(vector::GP, 0));
        State::v86(code!(16; "mov ax, ss:[edi]"))
            .with(DI, 0xffff)
            .run()
            .check("the stack's limit", fault(vector::SS, 0));
        State::v86(code!(16; "push ax")).with(SP, 1).run().check("PUSH at SP 1", fault(vector::SS, 0));
        let out = State::v86(code!(16; "push ax")).with(SP, 0).run();
        report::equal("PUSH at SP 0 wraps", (out.vector, out.gprs[SP] & 0xffff), (0x30, 0xfffe));
        let out = State::v86(code!(16; "mov ds, ax", "mov es, bx")).with(AX, 3).with(BX, 0xffff).run();
        report::equal("any selector can be loaded", (out.vector, out.ds, out.es), (0x30, 3, 0xffff));
        let out = State::v86(code!(16; "pushfd", "pop eax")).run();
        report::equal("PUSHFD shows neither VM nor RF", out.gprs[AX] & 0x3_0000, 0);
        let out = State::v86(code!(16; "ljmp [di]")).with(DI, 0x20);
        data::<u32>(0x20).write_volatile(u32::from(REAL_SEGMENT) << 16 | 2);
        let out = out.run();
        report::equal(
            "JMP far loads a segment",
            (out.vector, out.eip, out.cs),
            (0x30, 4, REAL_SEGMENT.into()),
        );
        data::<u32>(0x20).write_volatile(u32::from(REAL_SEGMENT - 1) << 16 | 0x13);
        let out = State::v86(code!(16; "lcall [di]", "nop")).with(DI, 0x20).run();
        report::equal(
            "CALL far too",
            (out.vector, out.cs, out.eip),
            (0x30, u32::from(REAL_SEGMENT) - 1, 0x15),
        );
        let pushed = stack::<u32>(0x7ffc).read_volatile();
        report::equal("and pushes what it leaves", pushed, u32::from(REAL_SEGMENT) << 16 | 2);
    }
}

/// Instructions that look at IOPL.
fn sensitive() {
    let cases: [(&str, &[u8]); 6] = [
        ("CLI", code!(16; "cli")),
        ("STI", code!(16; "sti")),
        ("PUSHF", code!(16; "pushf")),
        ("PUSHFD", code!(16; "pushfd")),
        ("POPF", code!(16; "popf")),
        ("IRET", code!(16; "iret")),
    ];
    for (name, code) in cases {
        for level in 0..3u64 {
            let state = State::v86(code).without(flag::IOPL).flags(level << 12);
            state.run().check(format_args!("{name} with IOPL {level}"), fault(vector::GP, 0));
        }
    }
    State::v86(code!(16; "int 0x21"))
        .without(flag::IOPL)
        .run()
        .check("INT n with IOPL 0", fault(vector::GP, 0));
    let out = State::v86(code!(16; "int3")).without(flag::IOPL).run();
    out.check("INT3 does not look at IOPL", event_at(vector::BP, 0, 1));
    let out = State::v86(code!(16; "into")).without(flag::IOPL).flags(flag::OF).run();
    out.check("INTO does not either", event_at(vector::OF, 0, 1));
    State::v86(code!(16; "cli", "sti", "pushf", "popf"))
        .flags(flag::IF)
        .run()
        .check("all of them with IOPL 3", END);
    let out = State::v86(code!(16; "cli")).flags(flag::IF).run();
    report::equal("CLI clears IF then", out.eflags & IF, 0);
    // SAFETY: as above.
    unsafe { stack::<u16>(0x7000).write_volatile(0x4fd7) };
    let out = State::v86(code!(16; "popf")).flags(flag::IF).with(SP, 0x7000).run();
    // TF, set by it, traps after the next instruction: INT 0x30.
    report::equal("POPF leaves IOPL and clears what it is told to", out.eflags & 0x7eff, 0x7ed7);
}

fn ports() {
    let read = code!(16; "in al, dx");
    let out = State::v86(read).with(DX, 0x61).run();
    out.check("ports ask the bitmap even with IOPL 3", fault(vector::GP, 0));
    tables().tss.ports[0xc] = !2;
    State::v86(read).with(DX, 0x61).run().check("a port that is allowed", END);
    State::v86(code!(16; "in ax, dx"))
        .with(DX, 0x61)
        .run()
        .check("a word with one that is not", fault(vector::GP, 0));
    tables().reset();
}

fn undefined() {
    let cases: [(&str, &[u8]); 9] = [
        ("LAR", code!(16; "lar ax, bx")),
        ("LSL", code!(16; "lsl ax, bx")),
        ("VERR", code!(16; "verr ax")),
        ("LLDT", code!(16; "lldt ax")),
        ("LTR", code!(16; "ltr ax")),
        ("STR", code!(16; "str ax")),
        ("SLDT", code!(16; "sldt ax")),
        ("ARPL", code!(16; ".byte 0x63, 0xc0")),
        ("SYSCALL", code!(16; ".byte 0x0f, 0x05")),
    ];
    for (name, code) in cases {
        State::v86(code).run().check(format_args!("{name} is undefined"), fault(vector::UD, 0));
    }
    let cases: [(&str, &[u8]); 7] = [
        ("HLT", code!(16; "hlt")),
        ("MOV CR0", code!(16; "mov eax, cr0")),
        ("MOV DR7", code!(16; "mov eax, dr7")),
        ("LGDT", code!(16; "lgdt [di]")),
        ("LMSW", code!(16; "lmsw ax")),
        ("CLTS", code!(16; "clts")),
        ("RDMSR", code!(16; "rdmsr")),
    ];
    for (name, code) in cases {
        State::v86(code).run().check(format_args!("{name} is privileged"), fault(vector::GP, 0));
    }
    let out = State::v86(code!(16; "smsw ax")).run();
    out.check("SMSW", END);
    report::equal("SMSW's PE", out.gprs[AX] & 1, 1);
    let out = State::v86(code!(16; "xor eax, eax", "cpuid")).run();
    out.check("CPUID", END);
}

fn interrupts() {
    // What a handler in ring 0 finds: 9 words, and NULL in the data segments.
    let out = State::v86(code!(16; "int 0x30")).run();
    let frame: [u32; 9] = unsafe { low::<[u32; 9]>(out.frame).read_volatile() };
    let esp0 = tables().tss.esp0;
    report::equal("the frame is at ESP0", out.frame, esp0 - 36);
    let data = u32::from(REAL_DATA);
    let expected = [
        2,
        REAL_SEGMENT.into(),
        flag::VM as u32 | IOPL | 2,
        0x8000,
        REAL_STACK.into(),
        data,
        data,
        data,
        data,
    ];
    report::equal("EIP, CS, EFLAGS, ESP, SS, ES, DS, FS, GS", frame.map(|word| word & 0x3_ffff), expected);
    // A handler that is not in ring 0.
    let usual = tables().idt[0x55];
    tables().idt[0x55] = guests::descriptor::gate(selector::USER_CODE, 0, 0x80 | 3 << 5 | 14, 0);
    State::v86(code!(16; "int 0x55"))
        .run()
        .check("a handler in ring 3", fault(vector::GP, selector::USER_CODE as u64 & !3));
    tables().idt[0x55] = usual;
    State::v86(code!(16; "int 0x55")).run().check("a gate of ring 0", fault(vector::GP, 0x55 * 8 + 2));
    State::v86(code!(16; "mov bx, [0xffff]")).run().check("a fault's error code", fault(vector::GP, 0));
    let out = State::v86(code!(16; "xor dx, dx", "xor cx, cx", "div cx")).run();
    out.check("#DE", event_at(vector::DE, 0, 4));
}

fn with_vme(code: &[u8]) -> State {
    let mut state = State::v86(code).without(flag::IOPL);
    state.cr4 = VME;
    state
}

fn virtual_interrupt_flag() {
    let out = with_vme(code!(16; "sti", "hlt")).run();
    out.check("STI with VME and IOPL 0", event_at(vector::GP, 0, 1));
    report::equal("sets VIF and leaves IF", out.eflags & (VIF | IF), VIF);
    let out = with_vme(code!(16; "cli", "hlt")).flags(flag::VIF | flag::IF).run();
    out.check("CLI with VME", event_at(vector::GP, 0, 1));
    report::equal("clears VIF and leaves IF", out.eflags & (VIF | IF), IF);
    let out = with_vme(code!(16; "sti")).flags(flag::VIP).run();
    out.check("STI with an interrupt pending", fault(vector::GP, 0));
    let out = with_vme(code!(16; "cli", "hlt")).flags(flag::VIP).run();
    out.check("CLI with one pending", event_at(vector::GP, 0, 1));
    let out = with_vme(code!(16; "pushf", "pop ax", "hlt")).flags(flag::VIF).run();
    report::equal("PUSHF shows VIF as IF, and IOPL 3", out.gprs[AX] & 0xffff, IF | IOPL | 2);
    let out = with_vme(code!(16; "pushf", "pop ax", "hlt")).flags(flag::IF).run();
    report::equal("and IF itself not", out.gprs[AX] & 0xffff, IOPL | 2);
    with_vme(code!(16; "pushfd")).run().check("PUSHFD still faults", fault(vector::GP, 0));
    with_vme(code!(16; "popfd")).run().check("POPFD still faults", fault(vector::GP, 0));
    with_vme(code!(16; "iretd")).run().check("IRETD still faults", fault(vector::GP, 0));
    let popped = |flags: u16, before: u64| {
        // SAFETY: as above.
        unsafe { stack::<u16>(0x7000).write_volatile(flags) };
        with_vme(code!(16; "popf", "hlt")).flags(before).with(SP, 0x7000).run()
    };
    let out = popped(0x202 | 0xd5, 0);
    out.check("POPF with VME", event_at(vector::GP, 0, 1));
    report::equal("sets VIF from IF", out.eflags & (VIF | IF | IOPL | 0xff), VIF | 0xd7);
    let out = popped(2, flag::VIF | flag::IF);
    report::equal("clears VIF and leaves IF", out.eflags & (VIF | IF), IF);
    popped(0x202, flag::VIP).check("POPF that enables one pending", fault(vector::GP, 0));
    popped(2, flag::VIP).check("POPF that does not", event_at(vector::GP, 0, 1));
    popped(0x102, 0).check("POPF of TF", fault(vector::GP, 0));
    let returned = |flags: u16, before: u64| {
        // SAFETY: as above.
        unsafe { stack::<[u16; 3]>(0x7000).write_volatile([3, REAL_SEGMENT, flags]) };
        with_vme(code!(16; "iret", "nop", "nop", "hlt")).flags(before).with(SP, 0x7000).run()
    };
    let out = returned(0x202, 0);
    out.check("IRET with VME", event_at(vector::GP, 0, 3));
    report::equal("sets VIF", out.eflags & (VIF | IF), VIF);
    returned(0x202, flag::VIP).check("IRET that enables one pending", fault(vector::GP, 0));
    returned(0x102, 0).check("IRET of TF", fault(vector::GP, 0));
    // With IOPL 3 it is as without VME.
    let mut state = State::v86(code!(16; "sti", "hlt"));
    state.cr4 = VME;
    let out = state.run();
    report::equal("with IOPL 3 it is IF again", (out.vector, out.eip, out.eflags & (VIF | IF)), (13, 1, IF));
}

/// INT n through the bitmap in the TSS.
fn redirection() {
    let handler = u32::from(REAL_SEGMENT) << 16 | 4;
    let int = code!(16; "int 0x21", "hlt", "hlt", "hlt");
    let set = |redirected: bool| {
        tables().reset();
        tables().tss.redirection = [0xff; 32];
        if redirected {
            tables().tss.redirection[0x21 / 8] = !(1 << (0x21 % 8));
        }
        guests::legacy::reset_vectors();
    };
    let run = |state: State| {
        // SAFETY: the interrupt vector table, and conventional memory.
        unsafe { low::<u32>(4 * 0x21).write_volatile(handler) };
        let out = state.run();
        (out, unsafe { stack::<[u16; 3]>(0x7ffa).read_volatile() })
    };
    set(true);
    let (out, frame) = run(with_vme(int).flags(flag::VIF | flag::IF));
    out.check("a redirected INT n enters the program's own handler", event_at(vector::GP, 0, 4));
    report::equal("its frame shows VIF as IF, and IOPL 3", frame, [2, REAL_SEGMENT, 0x3202]);
    report::equal("and VIF is cleared", out.eflags & (VIF | IF), IF);
    let mut state = State::v86(int).flags(flag::IF);
    state.cr4 = VME;
    let (out, frame) = run(state);
    report::equal(
        "with IOPL 3 the flags are pushed as they are",
        (out.vector, out.eip, frame),
        (13, 4, [2, REAL_SEGMENT, 0x3202]),
    );
    report::equal("and IF is cleared", out.eflags & IF, 0);
    set(false);
    let (out, _) = run(with_vme(int));
    out.check("one that is not redirected, with IOPL 0", fault(vector::GP, 0));
    tables().set_gate(0x21, 0x80 | 3 << 5 | 14);
    let mut state = State::v86(int);
    state.cr4 = VME;
    run(state).0.check("and with IOPL 3", event_at(0x21, 0, 2));
    set(true);
    tables().tss.redirection[0] = 0;
    let (out, _) = run(with_vme(code!(16; "int3")));
    out.check("INT3 is never redirected", event_at(vector::BP, 0, 1));
    tables().reset();
}

/// PVI: CLI and STI in ring 3 of protected mode.
fn protected_mode() {
    let with_pvi = |code: &[u8]| {
        let mut state = State::user(code);
        state.cr4 = PVI;
        state
    };
    let out = with_pvi(code!(32; "sti")).run();
    out.check("STI with PVI", END);
    report::equal("sets VIF", out.eflags & (VIF | IF), VIF);
    let out = with_pvi(code!(32; "cli")).flags(flag::VIF | flag::IF).run();
    report::equal("CLI clears it", (out.vector, out.eflags & (VIF | IF)), (0x30, IF));
    with_pvi(code!(32; "sti"))
        .flags(flag::VIP)
        .run()
        .check("STI with an interrupt pending", fault(vector::GP, 0));
    State::user(code!(32; "sti")).run().check("STI without PVI", fault(vector::GP, 0));
    let out = with_pvi(code!(32; "pushfd", "pop eax")).flags(flag::VIF).run();
    report::equal("PUSHF shows VIF as it is", out.gprs[AX] & (VIF | IF | IOPL), VIF);
}
