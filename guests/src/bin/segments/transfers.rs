//! Far transfers: jumps, calls through gates, returns and returns from interrupts, and those of 64-bit code.

use guests::cpu::{flag, vector};
use guests::descriptor::{BIG, LONG, PAGES, PRESENT, dpl, gate, kind, segment};
use guests::legacy::selector::USER_DATA;
use guests::legacy::{State, selector, stack, tables};
use guests::long::reg::{AX, DI, SP};
use guests::long::{END, Event, event, fault};
use guests::report::Many;
use guests::{code, long, report, tables as long_tables};

use super::{Case, FREE, in_ring};

/// The landing of a far transfer, in a flat segment.
fn landing() -> &'static [u8] {
    code!(32; "nop")
}

/// Writes a far pointer, and gives where it is.
fn pointer(offset: u32, selector: u32) -> u32 {
    let at = 0x80_0000u32;
    // SAFETY: memory that nobody uses.
    unsafe { (at as usize as *mut [u32; 2]).write_volatile([offset, selector]) };
    at
}

pub fn far_jumps() {
    let (jump, call) = (code!(32; "ljmp [edi]"), code!(32; "lcall [edi]"));
    let mut many = ["JMP far", "CALL far"].map(Many::new);
    let target = landing().as_ptr() as u32;
    Case::all(|case| {
        // Gates and TSSs have checks of their own.
        if case.kind < 16 && [1, 3, 4, 5, 9, 11, 12].contains(&case.kind) {
            return;
        }
        let admitted = match case.is_conforming() {
            true => case.dpl <= case.cpl,
            false => case.rpl <= case.cpl && case.dpl == case.cpl,
        };
        let expected = match () {
            _ if !case.is_code() || !admitted => case.error(vector::GP),
            _ if !case.present => case.error(vector::NP),
            _ => END,
        };
        for (code, many) in [jump, call].into_iter().zip(&mut many) {
            tables().set(FREE, case.descriptor(0, 0xf_ffff, PAGES | BIG));
            let out = in_ring(case.cpl, code).with(DI, pointer(target, case.selector().into())).run();
            many.equal(format_args!("{case:?}"), out.event_like(expected), expected);
            if expected == END {
                let cs = u32::from(FREE) | case.cpl as u32;
                many.equal(format_args!("{case:?} CS"), (out.cs, out.eip), (cs, target + 3));
            }
        }
    });
    many.into_iter().for_each(Many::finish);
    let out = State::protected(jump).with(DI, pointer(target, 0)).run();
    out.check("JMP far to NULL", fault(vector::GP, 0));
    let out = State::protected(jump).with(DI, pointer(target, 0x1000)).run();
    out.check("JMP far beyond the GDT", fault(vector::GP, 0x1000));
    tables().set(FREE, segment(0, 0x1000, PRESENT | kind::CODE_READ, BIG));
    let out = State::protected(jump).with(DI, pointer(target, FREE.into())).run();
    out.check("JMP far beyond the segment's limit", fault(vector::GP, 0));
    let out = State::protected(call).with(DI, pointer(target, selector::CODE.into())).run();
    report::equal(
        "CALL far pushes CS and EIP",
        (out.gprs[SP], pushed(out.gprs[SP])),
        (stack() - 8, [call.as_ptr() as u32 + 2, 8]),
    );
    let out = State::protected(code!(32; ".byte 0x66", "lcall [edi]")).with(DI, pointer(0x1_0000, 0)).run();
    out.check("CALL far of 16 bits reads 4 bytes", fault(vector::GP, 0).at_zero_selector(1));
}

trait Selector {
    fn at_zero_selector(self, selector: u64) -> Event;
}

impl Selector for Event {
    /// The same with the error code of a selector.
    fn at_zero_selector(self, selector: u64) -> Event {
        Event { error: selector & !3, ..self }
    }
}

fn pushed<const N: usize>(at: u32) -> [u32; N] {
    // SAFETY: a stack of ours.
    unsafe { (at as usize as *const [u32; N]).read_volatile() }
}

const INNER: u16 = FREE + 8;

pub fn call_gates() {
    tables().reset();
    let call = code!(32; "lcall [edi]");
    let target = landing().as_ptr() as u64;
    let through = |cpl: u64, access: u64, to: u16, count: u64, rpl: u32| {
        tables().set(FREE, gate(to, target, access, count));
        in_ring(cpl, call).with(DI, pointer(0xf4f4_f4f4, u32::from(FREE) | rpl))
    };
    let wide = PRESENT | kind::CALL;
    let out = through(0, wide, selector::CODE, 3, 0).run();
    out.check("a gate to the same ring", END);
    report::equal("copies nothing", out.gprs[SP], stack() - 8);
    // From ring 3 with 3 parameters.
    let parameters = [11u32, 22, 33];
    // SAFETY: a stack of ours.
    unsafe { ((stack() - 12) as usize as *mut [u32; 3]).write_volatile(parameters) };
    let out = through(3, wide | dpl(3), selector::CODE, 3, 3).with(SP, stack() - 12).run();
    out.check("a gate to ring 0", END);
    let esp0 = tables().tss.esp0;
    let frame: [u32; 7] = pushed(esp0 - 28);
    let back = call.as_ptr() as u32 + 2;
    let expected = [back, 0x2b, 11, 22, 33, stack() - 12, USER_DATA.into()];
    report::equal("pushes SS, ESP, parameters, CS, EIP", (out.gprs[SP], frame), (esp0 - 28, expected));
    report::equal("is in ring 0", (out.cs, out.ss), (selector::CODE.into(), selector::DATA.into()));
    let out = through(3, PRESENT | kind::CALL16 | dpl(3), selector::CODE, 2, 3).with(SP, stack() - 12);
    // A 16-bit gate's offset has 16 bits: a segment that begins at the landing.
    tables().set(INNER, segment(target, 0xffff, PRESENT | kind::CODE_READ, BIG));
    tables().set(FREE, gate(INNER, 0, PRESENT | kind::CALL16 | dpl(3), 2));
    let out = out.run();
    out.check("a 16-bit gate to ring 0", END);
    report::equal("pushes words", out.gprs[SP], esp0 - 12);
    let words: [u16; 6] = unsafe { ((esp0 - 12) as usize as *const [u16; 6]).read_volatile() };
    report::equal(
        "of the parameters too",
        words,
        [back as u16, 0x2b, 11, 0, (stack() - 12) as u16, USER_DATA],
    );
    let refused = |name: &str, state: State, expected: Event| state.run().check(name, expected);
    let free = u64::from(FREE);
    refused("a gate of ring 0 from ring 3", through(3, wide, selector::CODE, 0, 0), fault(vector::GP, free));
    refused(
        "a gate whose RPL is too high",
        through(0, wide | dpl(2), selector::CODE, 0, 3),
        fault(vector::GP, free),
    );
    refused("an absent gate", through(3, kind::CALL | dpl(3), selector::CODE, 0, 3), fault(vector::NP, free));
    refused("a gate to NULL", through(0, wide, 0, 0, 0), fault(vector::GP, 0));
    refused("a gate to data", through(0, wide, selector::DATA, 0, 0), fault(vector::GP, 0x10));
    refused("a gate to an outer ring", through(0, wide, selector::USER_CODE, 0, 0), fault(vector::GP, 0x28));
    refused("a gate beyond the GDT", through(0, wide, 0x400, 0, 0), fault(vector::GP, 0x400));
    tables().set(INNER, segment(0, 0xf_ffff, kind::CODE_READ, PAGES | BIG));
    refused("a gate to absent code", through(3, wide | dpl(3), INNER, 0, 3), fault(vector::NP, INNER.into()));
    tables().set(INNER, segment(0, 0xfff, PRESENT | kind::CODE_READ, BIG));
    refused(
        "a gate beyond its segment's limit",
        through(3, wide | dpl(3), INNER, 0, 3),
        fault(vector::GP, 0),
    );
    // What is wrong with the stack of ring 0 is an invalid TSS.
    let stack_of = |name: &str, ss0: u16, expected: Event| {
        tables().tss.ss0 = ss0.into();
        // The error itself is delivered on this very stack: by a task gate.
        for number in [vector::TS, vector::SS] {
            tables().set_task_gate(number as usize, true);
        }
        let expected_vector = expected.vector;
        tables().set_task_gate(expected_vector as usize, true);
        let out = through(3, wide | dpl(3), selector::CODE, 0, 3).run();
        report::equal(name, (out.vector, out.error), (expected.vector as u32, expected.error as u32));
        tables().reset();
    };
    stack_of("SS0 is NULL", 0, event(vector::TS, 0));
    stack_of("SS0 is ring 3's", USER_DATA, event(vector::TS, u64::from(USER_DATA) & !3));
    stack_of("SS0 is code", selector::CODE, event(vector::TS, 8));
    stack_of("SS0 is beyond the GDT", 0x400, event(vector::TS, 0x400));
    tables().set(INNER, segment(0, 0xf_ffff, kind::DATA, PAGES | BIG));
    stack_of("SS0 is absent", INNER, event(vector::SS, INNER.into()));
    let target_conforming = segment(0, 0xf_ffff, PRESENT | kind::CONFORMING_READ, PAGES | BIG);
    tables().set(INNER, target_conforming);
    let out = through(3, wide | dpl(3), INNER, 0, 3).run();
    out.check("a gate to conforming code", END);
    report::equal("stays in ring 3", out.cs, u32::from(INNER) | 3);
    let jump = code!(32; "ljmp [edi]");
    tables().set(FREE, gate(selector::CODE, target, wide | dpl(3), 0));
    let state = State::user(jump).with(DI, pointer(0, u32::from(FREE) | 3));
    state.run().check("JMP through a gate to an inner ring", fault(vector::GP, 8));
    let state = State::protected(jump).with(DI, pointer(0, FREE.into()));
    state.run().check("JMP through a gate to the same ring", END);
    tables().reset();
}

/// RETF in every combination of the segment returned to, and what it does to stacks and data segments.
pub fn returns() {
    let code = code!(32; "retf");
    let mut many = Many::new("RETF");
    let target = landing().as_ptr() as u32;
    let at = stack() - 16;
    Case::all(|case| {
        tables().set(FREE, case.descriptor(0, 0xf_ffff, PAGES | BIG));
        let outer_data = tables().get(USER_DATA) & !(3 << 45) | case.rpl << 45;
        tables().set(INNER, outer_data);
        let ss = u32::from(INNER) | case.rpl as u32;
        // SAFETY: a stack of ours.
        unsafe {
            (at as usize as *mut [u32; 4]).write_volatile([target, case.selector().into(), stack(), ss])
        };
        let admitted = if case.is_conforming() { case.dpl <= case.rpl } else { case.dpl == case.rpl };
        let expected = match () {
            _ if case.rpl < case.cpl || !case.is_code() || !admitted => case.error(vector::GP),
            _ if !case.present => case.error(vector::NP),
            _ => END,
        };
        // INT 0x30 can be done from everywhere.
        let out = in_ring(case.cpl, code).with(SP, at).run();
        many.equal(format_args!("{case:?}"), out.event_like(expected), expected);
        if expected == END {
            let esp = if case.rpl > case.cpl { stack() } else { at + 8 };
            many.equal(format_args!("{case:?}"), (out.cs, out.gprs[SP]), (case.selector().into(), esp));
        }
    });
    many.finish();
    tables().reset();
    let to = |name: &str, code: &[u8], frame: &[u32], expected: Event| {
        for (index, word) in frame.iter().enumerate() {
            // SAFETY: a stack of ours.
            unsafe { ((stack() - 32) as usize as *mut u32).add(index).write_volatile(*word) };
        }
        let out = State::protected(code).with(SP, stack() - 32).run();
        out.check(name, expected);
        out
    };
    let user = u32::from(selector::USER_CODE);
    let data = u32::from(USER_DATA);
    let out = to("RETF n to ring 3", code!(32; "retf 8"), &[target, user, 0, 0, stack() - 64, data], END);
    report::equal("takes the parameters off both stacks", out.gprs[SP], stack() - 56);
    report::equal("and ring 0's data segments away", (out.ds, out.es, out.fs, out.gs), (0, 0, 0, 0));
    to("RETF to NULL", code, &[target, 0], fault(vector::GP, 0));
    to("RETF with SS NULL", code, &[target, user, stack(), 0], fault(vector::GP, 0));
    to(
        "RETF with SS of another ring",
        code,
        &[target, user, stack(), selector::DATA.into()],
        fault(vector::GP, 0x10),
    );
    to(
        "RETF with SS of ring 0 but RPL 3",
        code,
        &[target, user, stack(), u32::from(selector::DATA) | 3],
        fault(vector::GP, 0x10),
    );
    to("RETF with SS of code", code, &[target, user, stack(), user], fault(vector::GP, 0x28));
    tables().set(INNER, tables().get(USER_DATA) & !(PRESENT << 40));
    to(
        "RETF with absent SS",
        code,
        &[target, user, stack(), u32::from(INNER) | 3],
        fault(vector::SS, INNER.into()),
    );
    tables().set(INNER, segment(0, 0x1000, PRESENT | kind::CODE_READ | dpl(3), BIG));
    to("RETF beyond the limit", code, &[target, u32::from(INNER) | 3, stack(), data], fault(vector::GP, 0));
    let out = to("RETF of 16 bits", code!(32; ".byte 0x66", "retf"), &[0], fault(vector::GP, 0));
    report::equal("leaves ESP where it faults", out.gprs[SP], stack() - 32);
}

pub fn interrupt_returns() {
    let code = code!(32; "iretd");
    let target = landing().as_ptr() as u32;
    let frame = |words: &[u32]| {
        for (index, word) in words.iter().enumerate() {
            // SAFETY: a stack of ours.
            unsafe { ((stack() - 64) as usize as *mut u32).add(index).write_volatile(*word) };
        }
        State::protected(code).with(SP, stack() - 64)
    };
    let (user, data) = (u32::from(selector::USER_CODE), u32::from(USER_DATA));
    let out = frame(&[target, 8, 0x2 | flag::CF as u32]).run();
    out.check("IRET to the same ring", END);
    report::equal("takes 12 bytes", out.gprs[SP], stack() - 52);
    report::equal("and the flags", out.eflags & 0xffff, 3);
    let out = frame(&[target, user, 0x3202, stack(), data]).run();
    out.check("IRET to ring 3", END);
    report::equal("sets IF and IOPL from ring 0", out.eflags & 0xffff, 0x3202);
    frame(&[target, 0, 2]).run().check("IRET to NULL", fault(vector::GP, 0));
    frame(&[target, 0x10, 2]).run().check("IRET to data", fault(vector::GP, 0x10));
    frame(&[target, 0x400, 2]).run().check("IRET beyond the GDT", fault(vector::GP, 0x400));
    frame(&[target, 0x28, 2]).run().check("IRET to ring 3's code with RPL 0", fault(vector::GP, 0x28));
    frame(&[target, user, 2, stack(), 0]).run().check("IRET with SS NULL", fault(vector::GP, 0));
    frame(&[target, user, 2, stack(), 0x13]).run().check("IRET with SS of ring 0", fault(vector::GP, 0x10));
    let mut state = State::user(code).with(SP, stack() - 64);
    frame(&[target, user, 0x3202]);
    let out = state.run();
    out.check("IRET in ring 3", END);
    report::equal("leaves IF and IOPL there", out.eflags & 0xffff, 2);
    frame(&[target, 8, 2]);
    state.run().check("IRET to an inner ring", fault(vector::GP, 8));
    state = state.flags(flag::NT);
    frame(&[target, user, 2]);
    // NT: a return to the task in the back link, which is NULL.
    state.run().check("IRET with NT and no link", fault(vector::TS, 0));
    // To virtual-8086 mode and out of it.
    let segments = [0x1111u32, 0x2222, 0x3333, 0x4444];
    let low = State::v86(code!(16; "hlt"));
    let [es, ds, fs, gs] = segments;
    let out = frame(&[0, low.cs, flag::VM as u32 | 2, 0x100, 0x3000, es, ds, fs, gs]).run();
    report::equal("IRET to virtual-8086 mode", (out.vector, out.error), (13, 0));
    report::equal("with its segments", [out.es, out.ds, out.fs, out.gs], segments);
    report::equal("and stack", (out.ss, out.gprs[SP]), (0x3000, 0x100));
}

/// Far transfers in 64-bit mode, where gates have 16 bytes and stacks may be NULL.
pub fn long_transfers() {
    use long_tables::selector::{self, FREE};
    let landing = code!(64; "nop").as_ptr() as u64;
    let target = landing;
    let pointer = |offset: u64, selector: u64| {
        let at = 0x80_0000u64;
        // SAFETY: memory that nobody uses.
        unsafe {
            (at as *mut [u64; 2]).write_volatile([offset & 0xffff_ffff | selector << 32, selector << 16])
        };
        at
    };
    let jump = code!(64; ".byte 0xff, 0x2f");
    let run = |name: &str, code: &[u8], selector: u64, expected: Event| {
        let out = long::State::kernel(code).with(DI, pointer(target, selector)).run();
        out.check(name, expected);
        out
    };
    run("JMP far in 64-bit mode", jump, selector::CODE.into(), END);
    run("JMP far to data", jump, selector::DATA.into(), fault(vector::GP, 0x10));
    run("JMP far to the TSS", jump, selector::TSS.into(), fault(vector::GP, selector::TSS.into()));
    run("JMP far to ring 3", jump, selector::USER_CODE.into(), fault(vector::GP, 0x40));
    long_tables::set_gdt(FREE, segment(0, 0xf_ffff, PRESENT | kind::CODE_READ, PAGES | BIG | LONG));
    run("JMP far to code with both L and D", jump, FREE.into(), fault(vector::GP, FREE.into()));
    let gate_to = |access: u64, to: u16, upper: u64| {
        long_tables::set_gdt(FREE, gate(to, target, access, 0));
        long_tables::set_gdt(FREE + 8, upper);
    };
    let call = code!(64; ".byte 0xff, 0x1f");
    gate_to(PRESENT | kind::CALL, selector::CODE, 0);
    let out = run("a call gate of 64 bits", call, FREE.into(), END);
    report::equal("pushes 16 bytes", out.gprs[SP], long::stack() - 16);
    gate_to(PRESENT | kind::CALL | dpl(3), selector::CODE, 0);
    let state = long::State::user(call).with(DI, pointer(0, u64::from(FREE) | 3));
    let out = state.run();
    out.check("a call gate of 64 bits to ring 0", END);
    report::equal("loads SS with NULL", (out.cs, out.ss), (selector::CODE.into(), 0));
    gate_to(PRESENT | kind::CALL, selector::CODE, 0x1f00_0000_0000 >> 4 & 0x1f00);
    gate_to(PRESENT | kind::CALL, selector::CODE, 9 << 40);
    run("a gate whose upper half has a type", call, FREE.into(), fault(vector::GP, FREE.into()));
    gate_to(PRESENT | kind::CALL, selector::CODE32, 0);
    run("a gate to 32-bit code", call, FREE.into(), fault(vector::GP, 0x18));
    gate_to(PRESENT | kind::CALL, selector::CODE, 0x8000_0000);
    long_tables::set_gdt(FREE, gate(selector::CODE, target, PRESENT | kind::CALL, 0));
    long_tables::set_gdt(FREE + 8, 0x0100_0000);
    run("a gate to an address that is not canonical", call, FREE.into(), fault(vector::GP, 0));
    gate_to(PRESENT | kind::CALL16, selector::CODE, 0);
    run("a 16-bit gate", call, FREE.into(), fault(vector::GP, FREE.into()));
    gate_to(PRESENT | kind::TASK, selector::TSS, 0);
    run("a task gate", call, FREE.into(), fault(vector::GP, FREE.into()));
    // IRETQ.
    let frame = |words: [u64; 5]| {
        let at = 0x80_0100u64;
        // SAFETY: memory that nobody uses.
        unsafe { (at as *mut [u64; 5]).write_volatile(words) };
        long::State::kernel(code!(64; "iretq")).with(SP, at).run()
    };
    let (code, data, sp) = (selector::CODE.into(), selector::DATA.into(), long::stack());
    let (user_code, user_data) = (selector::USER_CODE.into(), selector::USER_DATA.into());
    frame([target, code, 2, sp, data]).check("IRETQ", END);
    frame([target, code, 2, sp, 0]).check("IRETQ to ring 0 with SS NULL", END);
    frame([target, user_code, 2, sp, 0]).check("IRETQ to ring 3 with SS NULL", fault(vector::GP, 0));
    frame([target, user_code, 2, sp, user_data]).check("IRETQ to ring 3", END);
    frame([target, user_code, 2, sp, data])
        .check("IRETQ to ring 3 with SS of ring 0", fault(vector::GP, 0x10));
    frame([target, 0, 2, sp, data]).check("IRETQ to NULL", fault(vector::GP, 0));
    frame([1 << 56, code, 2, sp, data])
        .check("IRETQ to an address that is not canonical", event(vector::GP, 0));
    let nested = long::State::kernel(code!(64; "iretq")).flags(flag::NT).run();
    nested.check("IRETQ with NT", fault(vector::GP, 0));
    let out = frame([target, selector::USER_CODE32.into(), 2, sp, user_data]);
    report::equal(
        "IRETQ to compatibility mode",
        (out.vector, out.cs),
        (vector::END, selector::USER_CODE32.into()),
    );
    // Loads of segments in ring 3 of 64-bit mode.
    let ss = code!(64; "mov ss, ax");
    long::State::kernel(ss).with(AX, 0).run().check("SS of NULL in ring 0 of 64-bit mode", END);
    long::State::user(ss).with(AX, 3).run().check("SS of NULL in ring 3", fault(vector::GP, 0));
    long::State::user(ss).with(AX, 0).run().check("SS of NULL with RPL 0 in ring 3", fault(vector::GP, 0));
}
