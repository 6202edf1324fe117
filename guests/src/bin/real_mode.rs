//! Real mode: 16-bit code, its stack, strings, interrupts and far transfers, and segments of 4 GiB in it.
//!
//! SDM vol. 3, *8086 Emulation*, *Real-Address Mode*.
#![no_std]
#![no_main]

use guests::cpu::{flag, vector};
use guests::legacy::{REAL_DATA, REAL_SEGMENT, REAL_STACK, State, low, tables};
use guests::long::reg::{AX, BP, BX, CX, DI, DX, SI, SP};
use guests::long::{END, event_at, fault};
use guests::{code, report};

guests::guest!(main);

fn main() {
    tables().reset();
    arithmetic();
    addressing();
    stack();
    strings();
    transfers();
    interrupts();
    faults();
    system();
    unreal();
}

fn data<T>(offset: u32) -> *mut T {
    low((u32::from(REAL_DATA) << 4) + offset)
}

fn on_stack<T>(offset: u32) -> *mut T {
    low((u32::from(REAL_STACK) << 4) + offset)
}

/// The six arithmetic flags.
const ARITHMETIC: u32 = 0x8d5;

fn arithmetic() {
    let run = |name: &str, code: &[u8], ax: u32, bx: u32, result: u32, flags: u32| {
        let out = State::real(code).with(AX, ax).with(BX, bx).run();
        report::equal(name, (out.vector, out.gprs[AX], out.eflags & ARITHMETIC), (0x30, result, flags));
    };
    run("ADD of 16 bits leaves the upper half", code!(16; "add ax, bx"), 0x1234_ffff, 1, 0x1234_0000, 0x55);
    run("ADD of 32 bits", code!(16; "add eax, ebx"), 0xffff_ffff, 1, 0, 0x55);
    run("SUB", code!(16; "sub ax, bx"), 0, 1, 0xffff, 0x95);
    run("ADC", code!(16; "stc", "adc al, bl"), 0x7f, 0, 0x80, 0x890);
    run("SBB", code!(16; "stc", "sbb ax, ax"), 5, 0, 0xffff, 0x95);
    run("NEG", code!(16; "neg ax"), 0x8000, 0, 0x8000, 0x885);
    run("INC leaves CF", code!(16; "stc", "inc ax"), 0xffff, 0, 0, 0x55);
    run("DAA", code!(16; "add al, bl", "daa"), 0x19, 0x28, 0x47, 0x14);
    run("AAM", code!(16; "aam"), 63, 0, 0x603, 4);
    let out = State::real(code!(16; "mul bx")).with(AX, 0xffff).with(BX, 0xffff).run();
    report::equal("MUL", (out.gprs[DX], out.gprs[AX]), (0xfffe, 1));
    let out = State::real(code!(16; "idiv bl")).with(AX, 0xff9c).with(BX, 7).run();
    report::equal("IDIV", out.gprs[AX], 0xfef2);
    let out = State::real(code!(16; "cbw", "cwd")).with(AX, 0x80).run();
    report::equal("CBW and CWD", (out.gprs[AX], out.gprs[DX]), (0xff80, 0xffff));
    let out = State::real(code!(16; "shl ax, cl", "rcr ax, 1")).with(AX, 0x8001).with(CX, 1).run();
    report::equal("SHL and RCR through CF", out.gprs[AX], 0x8001);
    let out = State::real(code!(16; "movzx eax, bl", "movsx ecx, bx", "bsf dx, bx")).with(BX, 0x8080).run();
    report::equal("MOVZX, MOVSX, BSF", (out.gprs[AX], out.gprs[CX], out.gprs[DX]), (0x80, 0xffff_8080, 7));
    let out = State::real(code!(16; "xor ax, ax", "20: inc ax", "loop 20b")).with(CX, 7).run();
    report::equal("LOOP counts CX", (out.gprs[AX], out.gprs[CX]), (7, 0));
    let out = State::real(code!(16; "jcxz 20f", "inc ax", "20: nop")).with(CX, 0x1_0000).run();
    report::equal("JCXZ looks at 16 bits", out.gprs[AX], 0);
    let out = State::real(code!(16; "bswap eax", "xadd eax, ebx")).with(AX, 0x1122_3344).with(BX, 1).run();
    report::equal("BSWAP and XADD", (out.gprs[AX], out.gprs[BX]), (0x4433_2212, 0x4433_2211));
}

fn addressing() {
    // SAFETY: conventional memory, which nothing else uses; so for all of this file.
    unsafe {
        for offset in 0..0x100u32 {
            data::<u8>(offset).write_volatile(offset as u8);
            on_stack::<u8>(offset).write_volatile(!offset as u8);
        }
    }
    let modes: [(&str, &[u8], u32); 9] = [
        ("[BX+SI]", code!(16; "mov al, [bx + si]"), 0x30),
        ("[BX+DI+1]", code!(16; "mov al, [bx + di + 1]"), 0x51),
        ("[BP+SI]", code!(16; "mov al, [bp + si]"), 0xff - 0x24),
        ("DS:[BP+DI]", code!(16; "mov al, ds:[bp + di]"), 0x44),
        ("[SI]", code!(16; "mov al, [si]"), 0x20),
        ("[DI-1]", code!(16; "mov al, [di - 1]"), 0x3f),
        ("[BP]", code!(16; "mov al, [bp]"), 0xff - 4),
        ("[disp16]", code!(16; "mov al, [0x77]"), 0x77),
        ("[EBX+ESI*2]", code!(16; "mov al, [ebx + esi * 2]"), 0x50),
    ];
    for (name, code, expected) in modes {
        let state = State::real(code).with(BX, 0x10).with(SI, 0x20).with(DI, 0x40).with(BP, 4);
        report::equal(name, state.run().gprs[AX], expected);
    }
    let out = State::real(code!(16; "mov al, [bx + si]")).with(BX, 0xfff0).with(SI, 0x30).run();
    report::equal("an address wraps at 64 KiB", out.gprs[AX], 0x20);
    let out = State::real(code!(16; "lea ax, [bx + si + 7]", "lea ecx, [ebx + esi * 8]"))
        .with(BX, 0xfff0)
        .with(SI, 0x30)
        .run();
    report::equal("LEA of 16 and 32 bits", (out.gprs[AX], out.gprs[CX]), (0x27, 0x1_0170));
    let out = State::real(code!(16; "xlatb")).with(BX, 0x10).with(AX, 5).run();
    report::equal("XLAT", out.gprs[AX], 0x15);
    // SAFETY: as above.
    unsafe { data::<u32>(0x40).write_volatile(0x5678_1234) };
    let out = State::real(code!(16; "les bx, [di]", "lfs cx, [di]")).with(DI, 0x40).run();
    report::equal(
        "LES and LFS",
        (out.gprs[BX], out.es, out.gprs[CX], out.fs),
        (0x1234, 0x5678, 0x1234, 0x5678),
    );
    // Beyond 1 MiB: A20 is on.
    // SAFETY: as above; 0x10_0010 is free memory.
    unsafe { low::<u32>(0x10_0010).write_volatile(0xfeed) };
    let mut state = State::real(code!(16; "mov ax, ds:[bx]")).with(BX, 0x20);
    state.ds = 0xffff;
    report::equal("segment 0xffff reaches beyond 1 MiB", state.run().gprs[AX], 0xfeed);
}

fn stack() {
    let out =
        State::real(code!(16; "push ax", "push ebx", "push 0x12", "push cs", "pushf")).with(AX, 0xabcd).run();
    report::equal("PUSH of words and of 32 bits", out.gprs[SP], 0x8000 - 12);
    // SAFETY: as above.
    let words = unsafe { on_stack::<[u16; 6]>(0x7ff4).read_volatile() };
    report::equal("what was pushed", words, [2, REAL_SEGMENT, 0x12, 0, 0, 0xabcd]);
    let out = State::real(code!(16; "push sp", "pop ax")).run();
    report::equal("PUSH SP pushes what it was", out.gprs[AX], 0x8000);
    let out = State::real(code!(16; "pusha", "popa")).with(BX, 7).run();
    report::equal("PUSHA and POPA", (out.gprs[SP], out.gprs[BX]), (0x8000, 7));
    let out = State::real(code!(16; "pusha", "mov bp, sp", "mov ax, [bp + 6]")).run();
    report::equal("PUSHA pushes SP as it was", out.gprs[AX], 0x8000);
    let out = State::real(code!(16; "enter 8, 0", "mov ax, bp", "leave")).with(BP, 0x1234).run();
    report::equal("ENTER and LEAVE", (out.gprs[AX], out.gprs[BP], out.gprs[SP]), (0x7ffe, 0x1234, 0x8000));
    let out = State::real(code!(16; "enter 4, 3", "mov ax, sp")).with(BP, 0x7000).run();
    report::equal("ENTER of level 3", (out.gprs[AX], out.gprs[BP]), (0x8000 - 8 - 4, 0x7ffe));
    let out = State::real(code!(16; ".byte 0xe8, 1, 0", "nop", "pop ax")).run();
    report::equal("CALL pushes IP", out.gprs[AX], 3);
    let out = State::real(code!(16; "push 6", ".byte 0xc3", "ud2", "nop", "nop")).run();
    report::equal("RET", (out.vector, out.eip), (0x30, 9));
    // The stack wraps within 64 KiB.
    let out = State::real(code!(16; "push ax")).with(SP, 0x1_0000).with(AX, 0x1122).run();
    report::equal("SP alone is used", (out.vector, out.gprs[SP]), (0x30, 0x1_fffe));
    let out = State::real(code!(16; "pushfd", "pop eax")).flags(flag::CF).run();
    report::equal("PUSHFD", out.gprs[AX] & 0xffff, 3);
    let out = State::real(code!(16; "push 0x7cd5", "popf", "pushf", "pop ax", "push 2", "popf")).run();
    report::equal("POPF sets IOPL and NT", out.gprs[AX], 0x7cd7);
}

fn strings() {
    // SAFETY: as above.
    unsafe {
        data::<[u8; 8]>(0).write_volatile(*b"abcdefgh");
        data::<[u8; 8]>(0x100).write_volatile([0; 8]);
    }
    let out = State::real(code!(16; "rep movsb")).with(CX, 8).with(DI, 0x100).run();
    let moved = unsafe { data::<[u8; 8]>(0x100).read_volatile() };
    report::equal(
        "REP MOVSB",
        (moved, out.gprs[SI], out.gprs[DI], out.gprs[CX]),
        (*b"abcdefgh", 8, 0x108, 0),
    );
    let out = State::real(code!(16; "repe cmpsb")).with(CX, 8).with(DI, 0x101).run();
    report::equal("REPE CMPSB", (out.gprs[CX], out.gprs[SI]), (7, 1));
    let out = State::real(code!(16; "repne scasb")).with(CX, 8).with(AX, u32::from(b'd')).run();
    report::equal("REPNE SCASB", (out.gprs[CX], out.gprs[DI]), (4, 4));
    let out = State::real(code!(16; "std", "lodsw")).with(SI, 2).run();
    report::equal("LODSW down", (out.gprs[AX], out.gprs[SI]), (u32::from(u16::from_le_bytes(*b"cd")), 0));
    let out = State::real(code!(16; "rep stosw")).with(CX, 2).with(DI, 0xfffe).with(AX, 0x5555).run();
    report::equal("DI wraps at 64 KiB", (out.vector, out.gprs[DI]), (0x30, 2));
    let out = State::real(code!(16; "rep movsd")).with(CX, 0x1_0001).with(SI, 0x200).with(DI, 0x300).run();
    report::equal("CX of 16 bits counts", (out.gprs[CX], out.gprs[SI]), (0x1_0000, 0x204));
    let out = State::real(code!(16; "stosw")).with(DI, 0xffff).run();
    out.check("a word at 0xffff", fault(vector::GP, 0));
    let mut state = State::real(code!(16; "lods al, fs:[si]")).with(SI, 3);
    state.fs = u32::from(REAL_DATA);
    state.ds = 0;
    report::equal("LODS of another segment", state.run().gprs[AX], u32::from(b'd'));
}

fn transfers() {
    // SAFETY: as above.
    unsafe { data::<[u16; 2]>(0x20).write_volatile([0x34, REAL_SEGMENT - 3]) };
    let out = State::real(code!(16; "ljmp [di]", "nop", "nop", "nop")).with(DI, 0x20).run();
    report::equal("JMP far", (out.vector, out.cs, out.eip), (0x30, u32::from(REAL_SEGMENT) - 3, 0x37));
    let out = State::real(code!(16; "lcall [di]", "nop", "nop", "nop")).with(DI, 0x20).run();
    let pushed = unsafe { on_stack::<[u16; 2]>(0x7ffc).read_volatile() };
    report::equal("CALL far", (out.eip, pushed), (0x37, [2, REAL_SEGMENT]));
    let out = State::real(code!(16; "push cs", "push 6", ".byte 0xcb", "ud2", "nop", "nop")).run();
    report::equal("RETF", (out.vector, out.gprs[SP]), (0x30, 0x8000));
    let out =
        State::real(code!(16; "push 1", "push cs", "push 10", ".byte 0xca, 2, 0", "ud2", "nop", "nop")).run();
    report::equal("RETF n", (out.vector, out.gprs[SP]), (0x30, 0x8000));
    let out = State::real(code!(16; "jmp ebx")).with(BX, 0x1_0000).run();
    out.check("a jump beyond 64 KiB", fault(vector::GP, 0));
    let out = State::real(code!(16; "jmp 20f", "ud2", ".fill 200, 1, 0x90", "20: nop")).run();
    out.check("a near jump", END);
}

fn interrupts() {
    let out = State::real(code!(16; "int 0x55")).flags(flag::IF | flag::CF).run();
    out.check("INT n", event_at(0x55, 0, 2));
    report::equal("its frame is 6 bytes", (out.frame, out.gprs[SP]), (0x7ffa, 0x8000));
    report::equal("with the flags", out.eflags, 0x203);
    State::real(code!(16; "int3")).run().check("INT3", event_at(vector::BP, 0, 1));
    State::real(code!(16; "into")).flags(flag::OF).run().check("INTO", event_at(vector::OF, 0, 1));
    State::real(code!(16; "into")).run().check("INTO without OF", END);
    // A handler of the program's own.
    let handler = State::real(code!(16; "int 0x56", "jmp 20f", "pushf", "pop bx", "iret", "20: nop"));
    // SAFETY: the interrupt vector table.
    unsafe { low::<u32>(4 * 0x56).write_volatile(u32::from(REAL_SEGMENT) << 16 | 4) };
    let out = handler.flags(flag::IF | flag::CF).run();
    out.check("a handler's IRET", END);
    report::equal(
        "IF is off in the handler and on after it",
        (out.gprs[BX], out.eflags & 0xffff),
        (3, 0x203),
    );
    // SAFETY: as above.
    unsafe { on_stack::<[u16; 3]>(0x7000).write_volatile([3, REAL_SEGMENT, 0x7246]) };
    let out = State::real(code!(16; "iret", "ud2", "nop")).with(SP, 0x7000).run();
    report::equal("IRET pops IOPL, NT and IF", (out.vector, out.eflags & 0xffff), (0x30, 0x7246));
    let table = code!(16; "lidt [di]", "int 0x21");
    // SAFETY: as above.
    unsafe { data::<[u16; 3]>(0x60).write_volatile([0x83, 0, 0]) };
    State::real(table).with(DI, 0x60).run().check("INT n beyond IDTR's limit", event_at(vector::GP, 0, 3));
    let moved = State::real(table).with(DI, 0x60);
    // SAFETY: as above; the table moves to 0x5_0000.
    unsafe {
        for vector in 0..256u32 {
            low::<u32>(0x5_0000 + 4 * vector).write_volatile(low::<u32>(4 * vector).read_volatile());
        }
        let other = low::<u32>(4 * 0x77).read_volatile();
        low::<u32>(0x5_0000 + 4 * 0x21).write_volatile(other);
        data::<[u16; 3]>(0x60).write_volatile([0x3ff, 0, 5]);
    }
    moved.run().check("LIDT moves the table", event_at(0x77, 0, 5));
}

fn faults() {
    State::real(code!(16; "div cl")).run().check("#DE", fault(vector::DE, 0));
    State::real(code!(16; "ud2")).run().check("#UD", fault(vector::UD, 0));
    State::real(code!(16; "mov ax, [di]"))
        .with(DI, 0xffff)
        .run()
        .check("a word at 0xffff", fault(vector::GP, 0));
    State::real(code!(16; "mov ax, ss:[di]"))
        .with(DI, 0xffff)
        .run()
        .check("a word at SS:0xffff", fault(vector::SS, 0));
    State::real(code!(16; "mov al, [edi]"))
        .with(DI, 0x1_0000)
        .run()
        .check("an offset of 17 bits", fault(vector::GP, 0));
    // SAFETY: as above.
    unsafe { data::<[i16; 2]>(0x80).write_volatile([-5, 5]) };
    let bound = code!(16; "bound ax, [di]");
    State::real(bound).with(DI, 0x80).with(AX, 5).run().check("BOUND within", END);
    State::real(bound).with(DI, 0x80).with(AX, 6).run().check("BOUND without", fault(vector::BR, 0));
    let out = State::real(code!(16; "mov cr0, eax", "fld1")).with(AX, 0x38).run();
    out.check("#NM", event_at(vector::NM, 0, 3));
    for (name, code) in [
        ("LAR", code!(16; "lar ax, bx")),
        ("VERW", code!(16; "verw ax")),
        ("LTR", code!(16; "ltr ax")),
        ("STR", code!(16; "str ax")),
        ("ARPL", code!(16; ".byte 0x63, 0xc0")),
        ("SYSENTER's mode", code!(16; ".byte 0xf0, 0x90")),
    ] {
        State::real(code).run().check(format_args!("{name} is undefined"), fault(vector::UD, 0));
    }
    State::real(code!(16; "sysenter")).run().check("SYSENTER", fault(vector::GP, 0));
    let run_off = State::real(code!(16; "jmp ax")).with(AX, 0xffff);
    // SAFETY: as above: an instruction of 2 bytes at 0xffff.
    unsafe { low::<u8>((u32::from(REAL_SEGMENT) << 4) + 0xffff).write_volatile(0x0f) };
    let out = run_off.run();
    report::equal("an instruction beyond 64 KiB", (out.vector, out.eip), (13, 0xffff));
}

fn system() {
    let out = State::real(code!(16; "smsw ax", "mov ebx, cr0")).run();
    report::equal("SMSW and MOV CR0", (out.gprs[AX] & 1, out.gprs[BX] & 1), (0, 0));
    let out = State::real(code!(16; "sgdt [di]")).with(DI, 0x90).run();
    out.check("SGDT", END);
    let out = State::real(code!(16; "xor eax, eax", "cpuid")).run();
    report::holds("CPUID", out.gprs[AX] >= 1, out.gprs[AX]);
    let out = State::real(code!(16; "mov ecx, 0xc0000080", "rdmsr")).run();
    report::equal("RDMSR", (out.vector, out.gprs[AX] & 0x500), (0x30, 0));
    let out = State::real(code!(16; "cli", "sti", "cli", "clts", "wbinvd")).run();
    out.check("privileged instructions", END);
    if !report::ends_tcg("PG without PE", "TCG turns paging on") {
        let out = State::real(code!(16; "mov eax, cr0", "or eax, 0x80000000", "mov cr0, eax")).run();
        report::equal("PG without PE", (out.vector, out.cr0 & 0x8000_0001), (13, 0));
    }
    // Into protected mode and back, in one go.
    let code = code!(16; "mov eax, cr0", "or al, 1", "mov cr0, eax", "jmp 20f", "20: and al, 0xfe", "mov cr0, eax", "mov bx, 9");
    let out = State::real(code).run();
    report::equal("PE on and off without loading a segment", (out.vector, out.gprs[BX]), (0x30, 9));
}

fn unreal() {
    // SAFETY: memory that nobody uses.
    unsafe { low::<u32>(0x80_0000).write_volatile(0x1234) };
    let mut state =
        State::unreal(code!(16; "mov eax, [edi]", "mov [edi], ebx")).with(DI, 0x80_0000).with(BX, 0x5678);
    state.ds = 0;
    let out = state.run();
    report::equal("a segment keeps its limit of 4 GiB", (out.vector, out.gprs[AX]), (0x30, 0x1234));
    report::equal("in a store too", unsafe { low::<u32>(0x80_0000).read_volatile() }, 0x5678);
    let mut state =
        State::unreal(code!(16; "mov ds, cx", "mov eax, [edi]")).with(DI, 0x80_0000 - 0x10).with(CX, 1);
    state.ds = 0x4000;
    let out = state.run();
    report::equal("loading it changes the base alone", (out.vector, out.gprs[AX]), (0x30, 0x5678));
    let mut state = State::unreal(code!(16; "rep movsd")).with(SI, 0x80_0000).with(DI, 0x80_0100).with(CX, 1);
    (state.ds, state.es) = (0, 0);
    state.run().check("strings with 16-bit addresses stay below 64 KiB", END);
    let out = State::real(code!(16; "mov eax, [edi]")).with(DI, 0x80_0000).run();
    out.check("and is 64 KiB again after the next switch", fault(vector::GP, 0));
}
