//! Code that changes: by itself, ahead of itself, through other addresses, by string instructions, and by remapping.
//!
//! SDM vol. 3, *Self-Modifying Code* and *Cross-Modifying Code*.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, Ordering};
use guests::long::State;
use guests::long::reg::{AX, BX, CX, DI, DX, SI};
use guests::paging::{self, PAGE, address, bit};
use guests::report::{self, Many};
use guests::{code, smp};

guests::guest!(main);

fn main() {
    paging::open();
    ahead();
    hot_loop();
    by_strings();
    aliases();
    remapped();
    across_pages();
    generated();
    other_processors();
}

/// Copies a snippet to a page, and gives its address there.
fn place(page: u64, offset: u64, code: &[u8]) -> u64 {
    for (index, byte) in code.iter().enumerate() {
        paging::write(page * PAGE + offset + index as u64, *byte);
    }
    address(page) + offset
}

fn at(rip: u64) -> State {
    let mut state = State::kernel(code!(64; "nop"));
    (state.rip, state.start) = (rip, rip);
    state
}

fn ahead() {
    // The very next instruction's immediate; the one after a branch; the instruction's own bytes.
    let next = code!(64; "mov byte ptr [rip + 1], 0x77", "mov al, 0x11");
    let out = at(place(0, 0, next)).run();
    report::equal("the next instruction is the new one", out.gprs[AX], 0x77);
    let own = code!(64; "mov byte ptr [rip - 1], 0x55", "mov al, [rip - 8]");
    let out = at(place(0, 64, own)).run();
    report::equal("an instruction that changes itself was the old one", out.vector, 0x30);
    let wide = code!(64; "mov qword ptr [rip], 0x30cd", "mov eax, 1", "mov ebx, 2", "mov ecx, 3");
    let out = at(place(0, 128, wide)).run();
    report::equal(
        "8 bytes ahead become an INT",
        (out.vector, out.gprs[AX], out.rip - out.start),
        (0x30, 0, 13),
    );
    let pushed = code!(64; "lea rsp, [rip + 50f + 8]", "mov rax, 0x30cd30cd30cd30cd", "push rax", "50: mov ebx, 7", "nop", "nop", "nop");
    let out = at(place(0, 256, pushed)).run();
    report::equal("what PUSH writes is executed", (out.vector, out.gprs[BX]), (0x30, 0));
}

fn hot_loop() {
    // Each of many rounds changes what the next adds.
    let code = code!(64; "50: add eax, 1", "add byte ptr [rip - 1 - 7 + 1], 0", "inc byte ptr [rdi]", "dec ecx", "jnz 50b");
    let start = place(1, 0, code);
    // ADD EAX, imm8 is 83 c0 ib: the immediate is its third byte.
    let out = at(start).with(DI, start + 2).with(CX, 100).run();
    let sum: u64 = (1..=100u32).map(|n| i64::from(n as u8 as i8) as u64).fold(0, u64::wrapping_add);
    report::equal("a loop that changes its own immediate", out.gprs[AX] as u32, sum as u32);
    // From another page, thousands of times: hot on both sides.
    let callee = place(2, 0, code!(64; "add eax, 1", "ret"));
    let caller = code!(64; "50: call rsi", "xor byte ptr [rdi], 3", "dec ecx", "jnz 50b");
    let out = at(place(3, 0, caller)).with(SI, callee).with(DI, callee + 2).with(CX, 20_000).run();
    report::equal(
        "a function that is patched between its calls",
        (out.vector, out.gprs[AX]),
        (0x30, 10_000 * (1 + 2)),
    );
    // The same page, another place: data beside code.
    let beside = code!(64; "50: mov [rdi], ecx", "add eax, [rdi]", "dec ecx", "jnz 50b");
    let start = place(4, 0, beside);
    let out = at(start).with(DI, start + 0x800).with(CX, 5_000).run();
    report::equal("data in a code page", out.gprs[AX], 5_000 * 5_001 / 2);
}

fn by_strings() {
    let source = code!(64; "mov eax, 0x222");
    let target = place(5, 0, code!(64; "mov eax, 0x111"));
    at(target).run();
    let copy = code!(64; "rep movsb", "jmp rbx");
    let out = State::kernel(copy)
        .with(SI, source.as_ptr() as u64)
        .with(DI, target)
        .with(CX, source.len() as u64)
        .with(BX, target);
    report::equal("code that REP MOVSB wrote", out.run().gprs[AX], 0x222);
    let fill = code!(64; "rep stosb", "jmp rbx");
    at(place(6, 0, code!(64; "inc eax", "inc eax", "inc eax"))).run();
    let nops = State::kernel(fill).with(AX, 0x90).with(DI, address(6)).with(CX, 6).with(BX, address(6)).run();
    report::equal("code that REP STOSB wrote", (nops.vector, nops.gprs[AX]), (0x30, 0x90));
    let atomic = place(7, 0, code!(64; "mov eax, 0x111"));
    at(atomic).run();
    let out =
        State::kernel(code!(64; "lock xadd [rdi], ebx", "jmp rdi")).with(DI, atomic).with(BX, 0x100).run();
    report::equal("code that LOCK XADD wrote", out.gprs[AX], 0x112);
    let out = State::kernel(code!(64; "movups xmm0, [rsi]", "movups [rdi], xmm0", "jmp rdi"));
    let out = out.with(SI, source.as_ptr() as u64).with(DI, atomic).run();
    report::equal("code that a vector store wrote", out.gprs[AX], 0x222);
}

fn aliases() {
    // Page 9 shows page 8's frame.
    let run = place(8, 0, code!(64; "mov eax, 0x11", "ret"));
    alias(9, 8);
    let caller = code!(64; "50: call rsi", "add edx, eax", "inc byte ptr [rdi]", "dec ecx", "jnz 50b");
    let out = State::kernel(caller).with(SI, run).with(DI, address(9) + 1).with(CX, 3_000).with(DX, 0).run();
    let sum: u32 = (0..3_000u32).map(|n| u32::from((0x11 + n) as u8)).sum();
    report::equal("stores through another address of the page", out.gprs[DX], sum.into());
    paging::set(9, bit::ALL);
}

/// Makes a page show another's frame.
fn alias(page: u64, other: u64) {
    // SAFETY: the window's table.
    unsafe {
        (paging::entry_address(page) as *mut u64).write_volatile(paging::FRAMES + other * PAGE | bit::ALL);
    }
    paging::flush(address(page));
}

fn remapped() {
    // Hot code whose page is another one each time.
    place(10, 0, code!(64; "add eax, 1", "ret"));
    place(11, 0, code!(64; "add eax, 0x10", "ret"));
    let caller = code!(64; "50: call rsi", "dec ecx", "jnz 50b");
    let mut total = 0;
    let mut many = Many::new("a page that is remapped under hot code");
    for round in 0..50u64 {
        alias(12, 10 + round % 2);
        let out = State::kernel(caller).with(SI, address(12)).with(CX, 200).with(AX, total).run();
        total += 200 * if round % 2 == 0 { 1 } else { 0x10 };
        many.equal(round, out.gprs[AX], total);
    }
    many.finish();
    // By INVLPG within the code that calls.
    let switch = code!(64; "50: call rsi", "xchg [rdi], rbx", "invlpg [rsi]", "dec ecx", "jnz 50b");
    alias(12, 10);
    let other = paging::FRAMES + 11 * PAGE | bit::ALL;
    let out = State::kernel(switch)
        .with(SI, address(12))
        .with(DI, paging::entry_address(12))
        .with(BX, other)
        .with(CX, 2_000)
        .run();
    report::equal("INVLPG between the calls", out.gprs[AX], 1_000 * 0x11);
    paging::set(12, bit::ALL);
    // Its right to be executed goes.
    place(13, 0, code!(64; "ret"));
    let out = State::kernel(code!(64; "50: call rsi", "dec ecx", "jnz 50b"))
        .with(SI, address(13))
        .with(CX, 100)
        .run();
    report::equal("a page before it is NX", out.vector, 0x30);
    paging::set(13, bit::ALL | bit::NX);
    let out = State::kernel(code!(64; "call rsi")).with(SI, address(13)).run();
    report::equal("and after", (out.vector, out.error, out.cr2), (14, 0x11, address(13)));
    paging::set(13, bit::ALL);
}

fn across_pages() {
    // An instruction of 5 bytes over two pages, each half changed in turn.
    let start = place(14, PAGE - 3, code!(64; "mov eax, 0x01010101", "ret"));
    let call = |name: &str, offset: i64, value: u8, expected: u64| {
        let code = code!(64; "call rsi", "mov byte ptr [rdi], bl", "call rsi");
        let target = start.wrapping_add_signed(offset);
        let out = State::kernel(code).with(SI, start).with(DI, target).with(BX, value.into()).run();
        report::equal(name, out.gprs[AX], expected);
    };
    call("its first page changes", 1, 0x22, 0x0101_0122);
    call("its second page changes", 4, 0x33, 0x3301_0122);
    // The second page is another one.
    place(20, 0, &[0x44, 0x55, 0xc3]);
    alias(15, 20);
    let out = State::kernel(code!(64; "call rsi")).with(SI, start).run();
    report::equal("its second page is remapped", out.gprs[AX], 0x5544_0122);
    paging::set(15, bit::ALL);
}

fn generated() {
    // A little compiler: thousands of functions at the same place.
    let mut many = Many::new("generated functions at one address");
    let run = code!(64; "call rsi");
    for value in 0..3_000u32 {
        let [a, b, c, d] = value.wrapping_mul(0x9e37_79b9).to_le_bytes();
        place(16, 0x100, &[0xb8, a, b, c, d, 0xc3]);
        let out = State::kernel(run).with(SI, address(16) + 0x100).run();
        many.equal(value, out.gprs[AX] as u32, value.wrapping_mul(0x9e37_79b9));
    }
    many.finish();
}

static PUBLISHED: AtomicU32 = AtomicU32::new(0);
static SEEN: AtomicU32 = AtomicU32::new(0);
static WRONG: AtomicU32 = AtomicU32::new(0);
const ROUNDS: u32 = 500;

/// Another processor executes what this one patches, after a serializing instruction of its own.
fn other_processors() {
    if smp::start() < 2 {
        report::skip("cross-modifying code", "there is one processor");
        return;
    }
    place(17, 0, &[0xb8, 0, 0, 0, 0, 0xc3]);
    smp::run_on(1, |_| {
        // SAFETY: the function that is there.
        let function: extern "C" fn() -> u32 = unsafe { core::mem::transmute(address(17)) };
        for round in 1..=ROUNDS {
            if !smp::wait(20_000_000_000, || PUBLISHED.load(Ordering::SeqCst) == round) {
                WRONG.fetch_add(1, Ordering::SeqCst);
                return;
            }
            guests::cpu::cpuid(0, 0);
            if function() != round {
                WRONG.fetch_add(1, Ordering::SeqCst);
            }
            SEEN.store(round, Ordering::SeqCst);
        }
    });
    for round in 1..=ROUNDS {
        paging::write(17 * PAGE + 1, round);
        PUBLISHED.store(round, Ordering::SeqCst);
        if !smp::wait(20_000_000_000, || SEEN.load(Ordering::SeqCst) == round) {
            break;
        }
    }
    report::holds("the other processor finished", smp::finished(1), SEEN.load(Ordering::SeqCst));
    report::equal("it executed what was published", WRONG.load(Ordering::SeqCst), 0);
}
