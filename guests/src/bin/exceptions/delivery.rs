//! How an exception is delivered: the gates and their errors, and what comes of a second exception meanwhile.

use guests::cpu::{flag, vector};
use guests::descriptor::{PRESENT, dpl, kind};
use guests::long::reg::{BX, DI, R8, SP};
use guests::long::{Event, State, event_at, fault};
use guests::paging::{PAGE, address, bit};
use guests::tables::selector;
use guests::{code, paging, report, tables};

use super::NOT_CANONICAL;

pub fn gates() {
    let out = State::user(code!(64; "int 0x30")).flags(flag::IF).run();
    report::equal("the flags before are pushed", out.rflags & 0xffff, flag::IF | flag::ONE);
    tables::set_gate(0x50, PRESENT | dpl(3) | kind::INTERRUPT, 0);
    let out = State::kernel(code!(64; "int 0x50")).with(SP, address(1) - 3).run();
    report::equal("a frame is aligned to 16 bytes", out.frame, (address(1) - 3) & !15);
    report::equal("and has the old RSP", out.gprs[SP], address(1) - 3);
    let out = State::user(code!(64; "int 0x50")).run();
    let rsp0 = unsafe { (&raw const tables::TSS[0].rsp[0]).read_unaligned() };
    report::equal("from ring 3 the stack is RSP0", out.frame, rsp0);
    report::equal("and SS is the user's in the frame", out.ss, selector::USER_DATA.into());
    tables::set_gate(0x50, PRESENT | dpl(3) | kind::INTERRUPT, 5);
    let out = State::user(code!(64; "int 0x50")).run();
    let ist = unsafe { (&raw const tables::TSS[0].ist[4]).read_unaligned() };
    report::equal("an IST entry is used from ring 3", out.frame, ist);
    report::equal("an IST entry is used from ring 0", State::kernel(code!(64; "int 0x50")).run().frame, ist);
    for (name, access, expected) in [("interrupt", kind::INTERRUPT, 0), ("trap", kind::TRAP, flag::IF)] {
        tables::set_gate(0x50, PRESENT | access, 0);
        tables::handle(0x50, flags_in_handler);
        let dirty = flag::IF | flag::DF;
        let out = State::kernel(code!(64; "int 0x50", "pushfq", "pop rbx")).flags(dirty).run();
        report::equal(
            format_args!("flags in an {name} gate"),
            handler_flags() & 0xffff,
            flag::ONE | expected,
        );
        report::equal(format_args!("flags after an {name} gate"), out.gprs[BX] & 0xfff, flag::ONE | dirty);
        tables::unhandle(0x50);
    }
    tables::set_gate(0x50, PRESENT | dpl(3) | kind::INTERRUPT, 0);
    tables::handle(0x50, ss_in_handler);
    State::user(code!(64; "int 0x50")).run();
    report::equal("from ring 3 SS is NULL in the handler", handler_flags(), 0);
    tables::unhandle(0x50);
    tables::reset_idt();
}

static mut HANDLER_FLAGS: u64 = 0;

fn handler_flags() -> u64 {
    unsafe { (&raw const HANDLER_FLAGS).read_volatile() }
}

extern "C" fn flags_in_handler(_: &mut tables::Frame) {
    // DF was cleared on the way here; the events' entry leaves the rest.
    unsafe { core::arch::asm!("pushfq", "pop {}", out(reg) HANDLER_FLAGS) };
    unsafe { HANDLER_FLAGS &= flag::IF | flag::TF | flag::NT | flag::RF | flag::ONE };
}

extern "C" fn ss_in_handler(_: &mut tables::Frame) {
    unsafe { core::arch::asm!("mov {:e}, ss", out(reg) HANDLER_FLAGS) };
}

/// The gate of vector 0x51 in each way that it can be wrong, by INT n.
pub fn gate_errors() {
    let entry = |selector: u16, access: u64| {
        tables::set_gate(0x51, access, 0);
        unsafe { tables::IDT[0x51][0] = tables::IDT[0x51][0] & !0xffff_0000 | u64::from(selector) << 16 };
    };
    let vector_error = 0x51 * 8 + 2;
    let cases = [
        ("not present", selector::CODE, kind::INTERRUPT, fault(vector::NP, vector_error)),
        ("a data type", selector::CODE, PRESENT | kind::DATA, fault(vector::GP, vector_error)),
        ("a call gate", selector::CODE, PRESENT | kind::CALL, fault(vector::GP, vector_error)),
        ("a task gate", selector::CODE, PRESENT | kind::TASK, fault(vector::GP, vector_error)),
        ("a 16-bit gate", selector::CODE, PRESENT | kind::INTERRUPT16, fault(vector::GP, vector_error)),
        ("a gate to NULL", 0, PRESENT | kind::INTERRUPT, fault(vector::GP, 0)),
        ("a gate to data", selector::DATA, PRESENT | kind::INTERRUPT, fault(vector::GP, 0x10)),
        ("a gate to 32-bit code", selector::CODE32, PRESENT | kind::INTERRUPT, fault(vector::GP, 0x18)),
        (
            "a gate to 64-bit code of ring 3",
            selector::USER_CODE,
            PRESENT | kind::INTERRUPT,
            fault(vector::GP, 0x40),
        ),
        ("a gate beyond the GDT", 0x1000, PRESENT | kind::INTERRUPT, fault(vector::GP, 0x1000)),
        ("a gate to the LDT", 0x0c, PRESENT | kind::INTERRUPT, fault(vector::GP, 0x0c)),
    ];
    for (name, selector, access, expected) in cases {
        entry(selector, access);
        State::kernel(code!(64; "int 0x51")).run().check(name, expected);
    }
    tables::set_gdt(selector::FREE, tables::gdt(selector::CODE) & !(PRESENT << 40));
    entry(selector::FREE, PRESENT | kind::INTERRUPT);
    let out = State::kernel(code!(64; "int 0x51")).run();
    out.check("a gate to absent code", fault(vector::NP, selector::FREE.into()));
    // An exception's own error codes say that the event was external to the program.
    let external = |name, vector: usize, code, expected: Event| {
        tables::set_gate(vector, kind::INTERRUPT, 1);
        State::kernel(code).run().check(name, expected);
        tables::reset_idt();
    };
    external("#UD through an absent gate", 6, code!(64; "ud2"), fault(vector::NP, 6 * 8 + 3));
    external("INT1 through an absent gate", 1, code!(64; ".byte 0xf1"), fault(vector::NP, 8 + 3));
    external("INT3 through an absent gate", 3, code!(64; "int3"), fault(vector::NP, 3 * 8 + 2));
    external("INT 6 through an absent gate", 6, code!(64; "int 6"), fault(vector::NP, 6 * 8 + 2));
    let short = tables::Pointer { limit: 0x51 * 16 - 1, base: (&raw const tables::IDT) as u64 };
    unsafe { core::arch::asm!("lidt [{}]", in(reg) &short) };
    State::kernel(code!(64; "int 0x51")).run().check("beyond the IDT", fault(vector::GP, vector_error));
    let short = tables::Pointer { limit: 0x51 * 16 + 14, base: (&raw const tables::IDT) as u64 };
    unsafe { core::arch::asm!("lidt [{}]", in(reg) &short) };
    State::kernel(code!(64; "int 0x51"))
        .run()
        .check("a gate's last byte beyond the IDT", fault(vector::GP, vector_error));
    tables::load_idt();
    // A stack that RSP0 cannot be.
    let rsp0 = (&raw mut tables::TSS) as u64 + 4;
    let usual = unsafe { (rsp0 as *const u64).read_unaligned() };
    tables::set_gate(0x51, PRESENT | dpl(3) | kind::INTERRUPT, 0);
    unsafe { (rsp0 as *mut u64).write_unaligned(NOT_CANONICAL + PAGE) };
    State::user(code!(64; "int 0x51")).run().check("RSP0 is not canonical", fault(vector::SS, 0));
    unsafe { (rsp0 as *mut u64).write_unaligned(usual) };
    tables::reset_idt();
}

pub fn double_faults() {
    // Not present as gates: the second exception is #NP, which is contributory.
    let twice = |name, vector: usize, code, expected: Event| {
        tables::set_gate(vector, kind::INTERRUPT, 1);
        let out = State::kernel(code).with(DI, NOT_CANONICAL).with(R8, address(3)).run();
        out.check(name, expected);
        tables::reset_idt();
    };
    paging::set(3, 0);
    twice("#DE, then #NP", 0, code!(64; "div ecx"), fault(vector::DF, 0));
    twice("#GP, then #NP", 13, code!(64; "mov eax, [rdi]"), fault(vector::DF, 0));
    twice("#SS, then #NP", 12, code!(64; "mov rbp, rdi", "mov eax, [rbp]"), event_at(vector::DF, 0, 3));
    twice("#PF, then #NP", 14, code!(64; "mov eax, [r8]"), fault(vector::DF, 0));
    twice(
        "#NM, then #NP",
        7,
        code!(64; "mov rax, cr0", "or eax, 8", "mov cr0, rax", "fld1"),
        event_at(vector::NP, 7 * 8 + 3, 9),
    );
    // An IDT whose first page is absent up to, or from, a vector.
    let at_page = |absent_from: u64, present_first: bool| {
        let base = address(10) + PAGE - 16 * absent_from;
        unsafe {
            let to = (paging::FRAMES + base - paging::WINDOW) as *mut u8;
            core::ptr::copy_nonoverlapping((&raw const tables::IDT).cast::<u8>(), to, 4096);
        }
        paging::set(if present_first { 11 } else { 10 }, 0);
        let pointer = tables::Pointer { limit: 4095, base };
        unsafe { core::arch::asm!("lidt [{}]", in(reg) &pointer) };
        base
    };
    let close = || {
        tables::load_idt();
        paging::set(10, bit::ALL);
        paging::set(11, bit::ALL);
    };
    let base = at_page(6, false);
    let out = State::kernel(code!(64; "int3")).run();
    out.check("INT3, then #PF of the IDT", fault(vector::PF, 0));
    report::equal("its CR2 is the gate", out.cr2, base + 3 * 16);
    let out = State::user(code!(64; "div ecx")).run();
    out.check("#DE, then #PF of the IDT", fault(vector::PF, 0));
    close();
    at_page(14, true);
    let out = State::kernel(code!(64; "mov eax, [r8]")).with(R8, address(3)).run();
    out.check("#PF, then #PF of the IDT", fault(vector::DF, 0));
    report::equal("a double fault pushes RF", out.rflags & flag::RF, flag::RF);
    close();
    // The stack of the handler is absent.
    tables::set_gate(6, PRESENT | kind::INTERRUPT, 0);
    tables::set_gate(14, PRESENT | kind::INTERRUPT, 1);
    let out = State::kernel(code!(64; "ud2")).with(SP, address(3) + 64).run();
    out.check("#UD, then #PF of the stack", fault(vector::PF, 2));
    report::equal("its RSP is as before", out.gprs[SP], address(3) + 64);
    tables::set_gate(14, PRESENT | kind::INTERRUPT, 0);
    let out = State::kernel(code!(64; "ud2")).with(SP, address(3) + 64).run();
    out.check("#UD, then #PF of the stack twice", fault(vector::DF, 0));
    tables::reset_idt();
    paging::set(3, bit::ALL);
}
