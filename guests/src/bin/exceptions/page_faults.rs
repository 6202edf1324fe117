//! Page faults: error codes, CR2, and that what faulted can be executed again.

use guests::cpu::{flag, vector};
use guests::long::reg::{AX, BP, BX, CX, DI, DX, SI, SP};
use guests::long::{END, State, event, fault};
use guests::paging::{PAGE, address, bit};
use guests::tables::selector;
use guests::{code, paging, report};

pub fn page_faults() {
    let (p, w, u, i) = (1, 2, 4, 16);
    let read = code!(64; "mov eax, [rdi]");
    let write = code!(64; "mov [rdi], eax");
    let change = code!(64; "add dword ptr [rdi], 1");
    let cases = [
        ("absent", 0, read, write, [0, w, u, u | w]),
        ("present only", bit::PRESENT, read, write, [99, p | w, p | u, p | u | w]),
        ("writable", bit::PRESENT | bit::WRITE, read, write, [99, 99, p | u, p | u | w]),
        ("for users", bit::PRESENT | bit::USER, read, write, [99, p | w, 99, p | u | w]),
        ("absent, changed", 0, change, change, [w, w, u | w, u | w]),
        (
            "read-only, changed",
            bit::PRESENT | bit::USER,
            change,
            change,
            [p | w, p | w, p | u | w, p | u | w],
        ),
    ];
    for (name, bits, first, second, errors) in cases {
        paging::set(3, bits);
        for (index, error) in errors.into_iter().enumerate() {
            let code = if index % 2 == 0 { first } else { second };
            let state = if index < 2 { State::kernel(code) } else { State::user(code) };
            let out = state.with(DI, address(3) + 8).run();
            let expected = if error == 99 { END } else { fault(vector::PF, error) };
            out.check(format_args!("{name} {index}"), expected);
            if error != 99 {
                report::equal(format_args!("{name} {index} CR2"), out.cr2, address(3) + 8);
            }
        }
    }
    paging::set(3, bit::ALL | bit::NX);
    let jump = |state: State| state.with(DI, address(3)).run();
    let out = jump(State::kernel(code!(64; "jmp rdi")));
    report::equal(
        "a fetch from an NX page",
        (out.vector, out.error, out.rip, out.cr2),
        (vector::PF, p | i, address(3), address(3)),
    );
    let out = jump(State::user(code!(64; "jmp rdi")));
    report::equal(
        "a user's fetch from an NX page",
        (out.vector, out.error, out.cr2),
        (vector::PF, p | u | i, address(3)),
    );
    paging::set(3, 0);
    let out = jump(State::kernel(code!(64; "call rdi")));
    report::equal(
        "a fetch from an absent page",
        (out.vector, out.error, out.rip),
        (vector::PF, i, address(3)),
    );
    // UD2 begins on a page and ends on an absent one.
    paging::write(3 * PAGE - 1, 0x0fu8);
    let out = State::kernel(code!(64; "jmp rdi")).with(DI, address(3) - 1).run();
    report::equal(
        "an instruction that goes on to an absent page",
        (out.vector, out.error, out.rip, out.cr2),
        (vector::PF, i, address(3) - 1, address(3)),
    );
    // The first missing page of an access is the one that is named.
    let out = State::kernel(read).with(DI, address(3) - 2).run();
    report::equal("a load that crosses into an absent page", (out.error, out.cr2), (0, address(3)));
    let out = State::kernel(code!(64; "mov [rdi], rax")).with(DI, address(4) - 2).run();
    report::equal("a store that begins on an absent page", (out.error, out.cr2), (w, address(4) - 2));
    paging::set(3, bit::ALL);
}

/// Repeated string instructions stop at the element that faults, and could go on.
pub fn restartable_strings() {
    paging::set(5, 0);
    let end = address(5);
    let cases: [(&str, &[u8], u64, bool, bool, u64); 8] = [
        ("REP STOSB", code!(64; "rep stosb"), 1, false, true, 2),
        ("REP STOSD", code!(64; "rep stosd"), 4, false, true, 2),
        ("REP STOSQ", code!(64; "rep stosq"), 8, false, true, 2),
        ("REP MOVSB, to", code!(64; "rep movsb"), 1, true, true, 2),
        ("REP MOVSQ, to", code!(64; "rep movsq"), 8, true, true, 2),
        ("REPE CMPSD", code!(64; "repe cmpsd"), 4, true, true, 0),
        ("REPE SCASW", code!(64; "repe scasw"), 2, false, true, 0),
        ("REP LODSB", code!(64; "rep lodsb"), 1, true, false, 0),
    ];
    for (name, code, size, from, to, error) in cases {
        paging::fill(0, 0, 5 * PAGE as usize);
        let back = 7 * size;
        let (si, di) = if to { (address(1), end - back) } else { (end - back, address(1)) };
        let out = State::user(code).with(CX, 100).with(SI, si).with(DI, di).run();
        out.check(name, fault(vector::PF, 4 | error));
        report::equal(format_args!("{name}: RCX"), out.gprs[CX], 93);
        report::equal(format_args!("{name}: RSI"), out.gprs[SI], if from { si + back } else { si });
        report::equal(format_args!("{name}: RDI"), out.gprs[DI], if to { di + back } else { di });
        report::equal(format_args!("{name}: RF"), out.rflags & flag::RF, flag::RF);
    }
    let out = State::kernel(code!(64; "rep movsd")).with(CX, 9).with(SI, end - 8).with(DI, address(1)).run();
    out.check("REP MOVSD, from", fault(vector::PF, 0));
    report::equal(
        "REP MOVSD, from: registers",
        (out.gprs[CX], out.gprs[SI], out.gprs[DI]),
        (7, end, address(1) + 8),
    );
    let out = State::kernel(code!(64; "std", "rep stosw")).with(CX, 9).with(DI, address(6) + 4).run();
    out.check("REP STOSW, down", event(vector::PF, 2));
    report::equal("REP STOSW, down: registers", (out.gprs[CX], out.gprs[DI]), (6, address(6) - 2));
    let out = State::kernel(code!(64; "rep stosb")).with(CX, 0).with(DI, end).run();
    out.check("REP with a count of 0 touches nothing", END);
    let out = State::kernel(code!(64; ".byte 0x67", "rep stosb")).with(CX, 1 << 32).with(DI, end).run();
    out.check("REP with ECX touches nothing", END);
    let out = State::kernel(code!(64; "rep stosd")).with(CX, 2).with(DI, end - 6).run();
    report::equal(
        "an element that crosses into an absent page",
        (out.error, out.gprs[CX], out.gprs[DI], out.cr2),
        (2, 1, end - 2, end),
    );
    report::equal("and writes nothing there", paging::read::<u16>(5 * PAGE - 2), 0);
    paging::set(5, bit::ALL);
}

pub fn restartable_others() {
    paging::set(5, 0);
    let end = address(5);
    paging::fill(0, 0x5a, 5 * PAGE as usize);
    let unchanged = |name: &str, code: &[u8], error: u64, back: u64| {
        paging::fill(5 * PAGE - 64, 0x5a, 64);
        let before = State::kernel(code)
            .with(DI, end - back)
            .with(AX, 0x1111)
            .with(BX, 0x2222)
            .with(CX, 3)
            .with(DX, 4);
        let before = before.with(SI, address(2)).with(BP, address(2));
        let out = before.run();
        out.check(name, fault(vector::PF, error));
        report::equal(format_args!("{name}: CR2"), out.cr2, end);
        report::equal(format_args!("{name}: registers"), out.gprs, before.gprs);
        let bytes: [u8; 64] = paging::read(5 * PAGE - 64);
        report::equal(format_args!("{name}: memory"), bytes, [0x5a; 64]);
    };
    unchanged("a store over two pages", code!(64; "mov [rdi], rax"), 2, 3);
    unchanged("XCHG over two pages", code!(64; "xchg [rdi], rax"), 2, 3);
    unchanged("LOCK XADD over two pages", code!(64; "lock xadd [rdi], eax"), 2, 1);
    unchanged("CMPXCHG over two pages", code!(64; "cmpxchg [rdi], ebx"), 2, 1);
    unchanged("a vector store over two pages", code!(64; "movups [rdi], xmm0"), 2, 9);
    unchanged("ADC over two pages", code!(64; "adc [rdi], rax"), 2, 1);
    unchanged("FSTP over two pages", code!(64; "fstp tbyte ptr [rdi]"), 2, 4);
    unchanged("POP to two pages", code!(64; "pop [rdi]"), 2, 4);
    unchanged("PUSH from two pages", code!(64; "push [rdi]"), 0, 4);
    unchanged("CALL through two pages", code!(64; "call [rdi]"), 0, 4);
    unchanged("SETcc at an absent page", code!(64; "sete [rdi]"), 2, 0);
    unchanged("BTS far off", code!(64; "bts qword ptr [rdi - 0x200], rax"), 2, 34);
    unchanged("SIDT over two pages", code!(64; "sidt [rdi]"), 2, 5);
    let stack = |name: &str, code: &[u8], rsp: u64, error: u64| {
        let before = State::kernel(code).with(SP, rsp).with(BP, address(2)).with(AX, 5);
        let out = before.run();
        out.check(name, fault(vector::PF, error));
        report::equal(format_args!("{name}: registers"), out.gprs, before.gprs);
    };
    paging::write(5 * PAGE - 24, [address(1), selector::CODE.into(), flag::ONE]);
    stack("PUSH to an absent page", code!(64; "push rax"), end + 8, 2);
    stack("CALL to an absent page", code!(64; "call 50f", "50:"), end + 8, 2);
    stack("POP from an absent page", code!(64; "pop rax"), end, 0);
    stack("RET from an absent page", code!(64; "ret 16"), end, 0);
    stack("IRET from an absent page", code!(64; "iretq"), end - 24, 0);
    stack("ENTER to an absent page", code!(64; "enter 16, 0"), end + 8, 2);
    stack("PUSHF to an absent page", code!(64; "pushfq"), end + 8, 2);
    stack("POPF from an absent page", code!(64; "popfq"), end, 0);
    let out = State::kernel(code!(64; "leave")).with(BP, end).run();
    out.check("LEAVE from an absent page", fault(vector::PF, 0));
    report::equal("LEAVE: registers", (out.gprs[BP], out.gprs[SP]), (end, guests::long::stack()));
    let out = State::kernel(code!(64; "fxsave [rdi]")).with(DI, end - 256).run();
    out.check("FXSAVE over two pages", fault(vector::PF, 2));
    let out = State::kernel(code!(64; "fxrstor [rdi]")).with(DI, end - 256).run();
    out.check("FXRSTOR over two pages", fault(vector::PF, 0));
    paging::set(5, bit::ALL);
}
