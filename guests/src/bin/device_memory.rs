//! Instructions whose operands are a device's memory: each does what it does in RAM. The test device's 64 KiB at
//! 0xff00_0000 keep what is written to them.
#![no_std]
#![no_main]

use guests::code;
use guests::cpu::{flag, vector};
use guests::long::reg::{AX, BP, BX, CX, DI, DX, SI, SP};
use guests::long::{State, fault};
use guests::paging::{self, PAGE, address, bit};
use guests::report;

guests::guest!(main);

/// The device's memory, and its pages in the window.
const DEVICE: u64 = 0xff00_0000;
const RAM_PAGES: u64 = 0;
const DEVICE_PAGES: u64 = 8;
/// Bytes that are compared.
const LEN: usize = 256;

fn main() {
    // SAFETY: the test device, or nothing.
    unsafe { (DEVICE as *mut u32).write_volatile(0x1357_9bdf) };
    if unsafe { (DEVICE as *const u32).read_volatile() } != 0x1357_9bdf {
        report::skip("device memory", "the machine has no test device");
        return;
    }
    paging::open();
    for page in 0..4 {
        map(DEVICE_PAGES + page, DEVICE + page * PAGE);
    }
    alike();
    stacks();
    borders();
    executed();
}

/// Maps a page of the window to a physical one.
fn map(page: u64, physical: u64) {
    // SAFETY: the window's table.
    unsafe { (paging::entry_address(page) as *mut u64).write_volatile(physical | bit::ALL) };
    paging::flush(address(page));
}

/// Fills the first bytes at a linear address with a pattern.
fn fill(at: u64) {
    for index in 0..LEN as u64 / 4 {
        let value = (index as u32).wrapping_mul(0x9e37_79b9) ^ 0x1234_5678;
        // SAFETY: mapped memory that nobody else uses.
        unsafe { ((at + 4 * index) as *mut u32).write_volatile(value) };
    }
}

fn contents(at: u64) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    for (index, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: as above.
        *byte = unsafe { ((at + index as u64) as *const u8).read_volatile() };
    }
    bytes
}

/// What is left of a run: event, registers relative to the memory, flags, memory.
type Left = (u64, [u64; 8], u64, [u8; LEN]);

fn run(code: &[u8], at: u64) -> Left {
    fill(at);
    let target = at + 64;
    let state = State::kernel(code).with(DI, target).with(SI, target + 33).with(CX, 5);
    let state = state.with(AX, 0x0102_0304_8506_0788).with(BX, 0x1122_3344_5566_7788).with(DX, 7);
    let out = state.flags(flag::CF).run();
    let mut registers = [0; 8];
    registers.copy_from_slice(&out.gprs[..8]);
    registers[DI] = registers[DI].wrapping_sub(at);
    registers[SI] = registers[SI].wrapping_sub(at);
    (out.vector, registers, out.rflags & 0x8d5, contents(at))
}

fn alike() {
    let cases: [(&str, &[u8]); 64] = [
        ("MOV load of 8 bits", code!(64; "mov al, [rdi]")),
        ("MOV load of 16 bits", code!(64; "mov ax, [rdi + 1]")),
        ("MOV load of 32 bits", code!(64; "mov eax, [rdi + 3]")),
        ("MOV load of 64 bits", code!(64; "mov rax, [rdi + 5]")),
        ("MOV store of 8 bits", code!(64; "mov [rdi], al")),
        ("MOV store of 16 bits", code!(64; "mov [rdi + 1], ax")),
        ("MOV store of 32 bits", code!(64; "mov [rdi + 3], eax")),
        ("MOV store of 64 bits", code!(64; "mov [rdi + 5], rax")),
        ("MOV immediate", code!(64; "mov dword ptr [rdi], 0x11223344")),
        ("MOVZX", code!(64; "movzx eax, word ptr [rdi]")),
        ("MOVSX", code!(64; "movsx rax, byte ptr [rdi + 2]")),
        ("MOVSXD", code!(64; "movsxd rax, dword ptr [rdi + 2]")),
        ("MOVBE", code!(64; "movbe eax, [rdi]")),
        ("ADD to memory", code!(64; "add [rdi], eax")),
        ("ADD from memory", code!(64; "add rax, [rdi]")),
        ("ADC", code!(64; "adc [rdi], ax")),
        ("SBB", code!(64; "sbb byte ptr [rdi], 5")),
        ("AND", code!(64; "and [rdi], rbx")),
        ("OR", code!(64; "or [rdi], bl")),
        ("XOR", code!(64; "xor ebx, [rdi]")),
        ("CMP", code!(64; "cmp [rdi], eax")),
        ("TEST", code!(64; "test [rdi], eax")),
        ("INC", code!(64; "inc dword ptr [rdi]")),
        ("DEC", code!(64; "dec byte ptr [rdi]")),
        ("NEG", code!(64; "neg qword ptr [rdi]")),
        ("NOT", code!(64; "not word ptr [rdi]")),
        ("SHL", code!(64; "shl dword ptr [rdi], cl")),
        ("SAR", code!(64; "sar qword ptr [rdi], 3")),
        ("ROL", code!(64; "rol word ptr [rdi], 9")),
        ("RCR", code!(64; "rcr byte ptr [rdi], 2")),
        ("SHLD", code!(64; "shld [rdi], eax, 7")),
        ("SHRD", code!(64; "shrd [rdi], rax, cl")),
        ("MUL", code!(64; "mul dword ptr [rdi]")),
        ("IMUL", code!(64; "imul rax, [rdi], 77")),
        ("DIV", code!(64; "div qword ptr [rdi]")),
        ("BT", code!(64; "bt [rdi], ebx")),
        ("BTS far off", code!(64; "mov eax, 300", "bts [rdi], eax")),
        ("BTR", code!(64; "btr word ptr [rdi], 3")),
        ("BSF", code!(64; "bsf eax, [rdi]")),
        ("POPCNT", code!(64; "popcnt rax, [rdi]")),
        ("SETC", code!(64; "setc [rdi]")),
        ("CMOVC", code!(64; "cmovc rax, [rdi]")),
        ("CMOVNC, not taken", code!(64; "cmovnc eax, [rdi]")),
        ("XCHG", code!(64; "xchg [rdi], rax")),
        ("LOCK XADD", code!(64; "lock xadd [rdi], eax")),
        ("CMPXCHG that fails", code!(64; "cmpxchg [rdi], ebx")),
        ("CMPXCHG that succeeds", code!(64; "mov eax, [rdi]", "lock cmpxchg [rdi], ebx")),
        ("CMPXCHG8B", code!(64; "cmpxchg8b [rdi]")),
        ("PUSH", code!(64; "push [rdi]", "pop rax")),
        ("POP", code!(64; "push rbx", "pop [rdi]")),
        (
            "CALL and RET through it",
            code!(64; "lea rax, [rip + 50f]", "mov [rdi], rax", "call [rdi]", "nop", "50: pop rax", "xor eax, eax", "mov [rdi], rax"),
        ),
        (
            "JMP through it",
            code!(64; "lea rax, [rip + 50f]", "mov [rdi], rax", "jmp [rdi]", "ud2", "50: xor eax, eax", "mov [rdi], rax"),
        ),
        ("LODS", code!(64; "lodsd")),
        ("STOS", code!(64; "stosw")),
        ("REP MOVSB", code!(64; "rep movsb")),
        ("REP MOVSD down", code!(64; "std", "rep movsd", "cld")),
        ("REP STOSQ", code!(64; "rep stosq")),
        ("REPE CMPSB", code!(64; "repe cmpsb")),
        ("REPNE SCASB", code!(64; "repne scasb")),
        ("REP OUTSB", code!(64; "mov dx, 0x80", "rep outsb")),
        ("MOVUPS", code!(64; "movups xmm0, [rdi]", "movups [rsi], xmm0")),
        ("MOVAPS", code!(64; "movaps xmm0, [rdi]", "movaps [rdi + 16], xmm0")),
        ("MOVQ and MOVD", code!(64; "movq xmm1, qword ptr [rdi]", "movd [rsi], xmm1")),
        ("x87", code!(64; "fninit", "fild qword ptr [rdi]", "fistp qword ptr [rsi]")),
    ];
    for (name, code) in cases {
        let ram = run(code, address(RAM_PAGES));
        let device = run(code, address(DEVICE_PAGES));
        report::equal(format_args!("{name} is as in RAM"), device, ram);
    }
    let out = State::kernel(code!(64; "div dword ptr [rdi]")).with(DI, address(DEVICE_PAGES) + 0x800).run();
    out.check("#DE of a device's 0", fault(vector::DE, 0));
    let out = State::kernel(code!(64; "movaps xmm0, [rdi]")).with(DI, address(DEVICE_PAGES) + 8).run();
    out.check("#GP of MOVAPS on 8", fault(vector::GP, 0));
}

fn stacks() {
    let top = address(DEVICE_PAGES + 1);
    let out = State::kernel(code!(64; "push rax", "push rbx", "pop rcx", "pop rdx"))
        .with(SP, top)
        .with(AX, 0x11)
        .with(BX, 0x22)
        .run();
    report::equal(
        "a stack in it",
        (out.vector, out.gprs[CX], out.gprs[DX], out.gprs[SP]),
        (vector::END, 0x22, 0x11, top),
    );
    let out =
        State::kernel(code!(64; "call 50f", "mov ebx, 5", "jmp 51f", "50: mov ecx, 6", "ret", "51: nop"))
            .with(SP, top)
            .run();
    report::equal("calls on it", (out.vector, out.gprs[BX], out.gprs[CX]), (vector::END, 5, 6));
    let out = State::kernel(code!(64; "enter 32, 2", "leave", "pushfq", "popfq"))
        .with(SP, top)
        .with(BP, top - 64)
        .run();
    report::equal("ENTER and LEAVE on it", (out.vector, out.gprs[SP]), (vector::END, top));
}

fn borders() {
    // A page of RAM, then the device, then RAM again.
    map(20, paging::FRAMES + 20 * PAGE);
    map(21, DEVICE);
    map(22, paging::FRAMES + 22 * PAGE);
    for (name, at) in [("from RAM into it", address(21) - 4), ("from it into RAM", address(22) - 4)] {
        let code = code!(64; "mov [rdi], rax", "mov rbx, [rdi]", "xor eax, eax");
        let out = State::kernel(code).with(DI, at).with(AX, 0x1122_3344_5566_7788).run();
        report::equal(
            format_args!("a quad {name}"),
            (out.vector, out.gprs[BX]),
            (vector::END, 0x1122_3344_5566_7788),
        );
        let out = State::kernel(code!(64; "add [rdi], rax", "mov rbx, [rdi]"))
            .with(DI, at)
            .with(AX, 0x0100_0000_0000_0001)
            .run();
        report::equal(format_args!("ADD {name}"), out.gprs[BX], 0x1222_3344_5566_7789);
        let out = State::kernel(code!(64; "rep stosb", "mov rbx, [rdi - 8]"))
            .with(DI, at)
            .with(CX, 8)
            .with(AX, 0x5a)
            .run();
        report::equal(format_args!("REP STOSB {name}"), out.gprs[BX], 0x5a5a_5a5a_5a5a_5a5a);
    }
    paging::set(22, 0);
    let out = State::kernel(code!(64; "mov [rdi], rax")).with(DI, address(22) - 4).with(AX, u64::MAX).run();
    out.check("a quad from it into an absent page", fault(vector::PF, 2));
    // SAFETY: the device's memory.
    let before = unsafe { ((DEVICE + PAGE - 4) as *const u32).read_volatile() };
    report::equal("writes nothing to it", before, 0x5a5a_5a5a);
    let out = State::kernel(code!(64; "rep movsb"))
        .with(SI, address(21))
        .with(DI, address(22) - 6)
        .with(CX, 20)
        .run();
    out.check("REP MOVSB into an absent page", fault(vector::PF, 2));
    report::equal("stops there", (out.gprs[CX], out.gprs[DI]), (14, address(22)));
    paging::set(22, bit::ALL);
}

/// Code in a device's memory.
fn executed() {
    for (index, byte) in code!(64; "mov eax, 0x1234", "add eax, ebx").iter().enumerate() {
        // SAFETY: the device's memory.
        unsafe { ((DEVICE + 0x3000 + index as u64) as *mut u8).write_volatile(*byte) };
    }
    if report::ends_tcg("code in a device's memory", "TCG runs code in RAM and ROM alone") {
        return;
    }
    let mut state = State::kernel(code!(64; "nop")).with(BX, 1);
    state.rip = DEVICE + 0x3000;
    let out = state.run();
    report::equal("code in it is executed", (out.vector, out.gprs[AX]), (vector::END, 0x1235));
}
