//! Task switches: by CALL, JMP, INT and IRET, through TSSs and task gates, what they save and load, and how they fail.
//!
//! SDM vol. 3, *Task Management*.
#![no_std]
#![no_main]

use core::fmt::Arguments;

use guests::cpu::{self, flag, vector};
use guests::descriptor::{BIG, PAGES, PRESENT, dpl, gate, kind, segment};
use guests::legacy::selector::{CODE, DATA, FREE, LDT, TSS, USER_CODE, USER_DATA};
use guests::legacy::{State, Tss, low, stack, tables};
use guests::long::reg::{AX, BX, CX, DI, DX, SP};
use guests::long::{END, Event, event, fault};
use guests::{code, report};

guests::guest!(main);

/// The TSSs of the guest's two tasks.
const FIRST: u16 = FREE;
const SECOND: u16 = FREE + 8;
/// A task gate to the first.
const GATE: u16 = FREE + 16;
/// A segment that a check makes wrong.
const WRONG: u16 = FREE + 24;

fn main() {
    calls();
    jumps();
    gates();
    interrupts();
    returns();
    other_rings();
    switched_state();
    sixteen_bits();
    refused();
    invalid_states();
    trap_flag();
    virtual_8086();
}

fn tss_descriptor(tss: &Tss) -> u64 {
    segment(core::ptr::from_ref(tss) as u64, Tss::LIMIT, PRESENT | kind::TSS, 0)
}

/// Fresh tables, whose first task executes a snippet on a stack of its own.
fn task(code: &[u8]) {
    let tables = tables();
    tables.reset();
    tables.tasks[0] = Tss::task(code.as_ptr() as u32, stack() - 0x400);
    tables.tasks[0].eax = 0x1111;
    tables.tasks[0].edi = 0x7777;
    let descriptors = [tss_descriptor(&tables.tasks[0]), tss_descriptor(&tables.tasks[1])];
    tables.set(FIRST, descriptors[0]);
    tables.set(SECOND, descriptors[1]);
    tables.set(GATE, gate(FIRST, 0, PRESENT | kind::TASK, 0));
}

/// A far pointer to a selector; its offset means nothing to task switches.
fn pointer(selector: u16) -> u32 {
    let at = 0x80_0000;
    // SAFETY: memory that nobody uses.
    unsafe { low::<[u32; 2]>(at).write_volatile([0xf4f4_f4f4, selector.into()]) };
    at
}

fn to(code: &[u8], selector: u16) -> State {
    State::protected(code).with(DI, pointer(selector)).with(BX, 0xbbbb).with(CX, 0xcccc)
}

#[inline(never)] // One copy, whose address checks compare.
fn call() -> &'static [u8] {
    code!(32; "lcall [edi]", "nop")
}

#[inline(never)] // One copy, whose address checks compare.
fn jump() -> &'static [u8] {
    code!(32; "ljmp [edi]", "nop")
}

fn read<T>(part: &T) -> T
where
    T: Copy,
{
    // SAFETY: the processor writes TSSs as well.
    unsafe { core::ptr::from_ref(part).read_volatile() }
}

fn calls() {
    let body = code!(32; "mov ebx, eax", "nop");
    task(body);
    let before = to(call(), FIRST).flags(flag::CF);
    let out = before.run();
    report::equal("CALL to a TSS enters its task", (out.vector, out.eip), (0x30, body.as_ptr() as u32 + 5));
    report::equal(
        "with its registers",
        (out.gprs[BX], out.gprs[DI], out.gprs[SP]),
        (0x1111, 0x7777, stack() - 0x400),
    );
    report::equal("with NT", out.eflags & 0xffff, flag::NT as u32 | 2);
    report::equal("in TR", out.tr, FIRST.into());
    report::equal("its back link is the caller", read(&tables().tasks[0].link), TSS.into());
    report::holds("both TSSs are busy", tables().is_busy(TSS) && tables().is_busy(FIRST), tables().get(TSS));
    report::equal("CR0.TS is set", out.cr0 & 8, 8);
    let saved = read(&tables().tss);
    let gprs = [saved.eax, saved.ecx, saved.edx, saved.ebx, saved.esp, saved.ebp, saved.esi, saved.edi];
    report::equal("the caller's registers are saved", gprs, before.gprs);
    report::equal("its EIP is the next instruction's", saved.eip, call().as_ptr() as u32 + 2);
    report::equal("its flags have no NT", saved.eflags & 0xffff, 3);
    let segments =
        [saved.es, saved.cs, saved.ss, saved.ds, saved.fs, saved.gs].map(|selector| selector & 0xffff);
    let data = DATA.into();
    report::equal("its selectors", segments, [data, CODE.into(), data, data, data, data]);
    // And back.
    let body = code!(32; "iretd", "mov eax, 0x99");
    task(body);
    let out = to(call(), FIRST).run();
    report::equal("IRET returns behind the CALL", (out.vector, out.eip), (0x30, call().as_ptr() as u32 + 5));
    report::equal("with the caller's registers", (out.gprs[BX], out.gprs[CX]), (0xbbbb, 0xcccc));
    report::holds(
        "only the caller is busy",
        tables().is_busy(TSS) && !tables().is_busy(FIRST),
        tables().get(FIRST),
    );
    report::equal("NT was cleared in the task's flags", read(&tables().tasks[0].eflags) & flag::NT as u32, 0);
    report::equal("where the task goes on", read(&tables().tasks[0].eip), body.as_ptr() as u32 + 1);
    // Called again, it goes on there.
    let twice = code!(32; "lcall [edi]", "lcall [edi]", "nop");
    let out = to(twice, FIRST).run();
    report::equal("a task called again goes on behind its IRET", (out.vector, out.gprs[AX]), (0x30, 0x99));
}

fn jumps() {
    let body = code!(32; "nop");
    task(body);
    let out = to(jump(), FIRST).flags(flag::NT).run();
    report::equal(
        "JMP to a TSS",
        (out.vector, out.tr, out.eip),
        (0x30, FIRST.into(), body.as_ptr() as u32 + 3),
    );
    report::equal("without NT", out.eflags & 0xffff, 2);
    report::holds(
        "the old task is not busy",
        !tables().is_busy(TSS) && tables().is_busy(FIRST),
        tables().get(TSS),
    );
    report::equal("the back link is as it was", read(&tables().tasks[0].link), 0);
    report::equal(
        "the old task's flags keep NT",
        read(&tables().tss.eflags) & flag::NT as u32,
        flag::NT as u32,
    );
    // There and back.
    let body = code!(32; "ljmp [edi]");
    task(body);
    tables().tasks[0].edi = 0x80_0008;
    // SAFETY: memory that nobody uses.
    unsafe { low::<[u32; 2]>(0x80_0008).write_volatile([0, TSS.into()]) };
    let out = to(jump(), FIRST).run();
    report::equal("JMP back", (out.vector, out.tr, out.eip), (0x30, TSS.into(), jump().as_ptr() as u32 + 5));
}

fn gates() {
    let body = code!(32; "nop");
    for (name, code) in [("CALL", call()), ("JMP", jump())] {
        task(body);
        let out = to(code, GATE).run();
        report::equal(format_args!("{name} to a task gate"), (out.vector, out.tr), (0x30, FIRST.into()));
    }
    task(body);
    tables().ldt[2] = gate(FIRST, 0, PRESENT | kind::TASK, 0);
    let mut state = to(call(), 0x14);
    state.ldtr = LDT.into();
    let out = state.run();
    report::equal("a task gate in the LDT", (out.vector, out.tr), (0x30, FIRST.into()));
    task(body);
    tables().set(GATE, gate(FIRST, 0, PRESENT | kind::TASK | dpl(3), 0));
    let out = State::user(call()).with(DI, pointer(GATE | 3)).run();
    report::equal(
        "a task gate from ring 3 to a TSS of ring 0",
        (out.vector, out.tr, out.cs),
        (0x30, FIRST.into(), CODE.into()),
    );
    let gate_error = |name: &str, entry: u64, user: bool, expected: Event| {
        task(body);
        tables().set(GATE, entry);
        let state = if user { State::user(call()) } else { State::protected(call()) };
        state.with(DI, pointer(GATE)).run().check(name, expected);
    };
    let error = u64::from(GATE);
    gate_error(
        "a task gate of ring 0 from ring 3",
        gate(FIRST, 0, PRESENT | kind::TASK, 0),
        true,
        fault(vector::GP, error),
    );
    gate_error("an absent task gate", gate(FIRST, 0, kind::TASK, 0), false, fault(vector::NP, error));
    gate_error("a task gate to NULL", gate(0, 0, PRESENT | kind::TASK, 0), false, fault(vector::GP, 0));
    gate_error("a task gate to data", gate(DATA, 0, PRESENT | kind::TASK, 0), false, fault(vector::GP, 0x10));
    gate_error(
        "a task gate to the LDT",
        gate(0x0c, 0, PRESENT | kind::TASK, 0),
        false,
        fault(vector::GP, 0x0c),
    );
    gate_error(
        "a task gate beyond the GDT",
        gate(0x400, 0, PRESENT | kind::TASK, 0),
        false,
        fault(vector::GP, 0x400),
    );
    gate_error(
        "a task gate to a busy TSS",
        gate(TSS, 0, PRESENT | kind::TASK, 0),
        false,
        fault(vector::GP, TSS.into()),
    );
}

fn interrupts() {
    let gate_for = |number: usize, body: &[u8], level: u64| {
        task(body);
        tables().idt[number] = gate(FIRST, 0, PRESENT | kind::TASK | dpl(level), 0);
    };
    let body = code!(32; "nop");
    gate_for(0x55, body, 0);
    let interrupting = code!(32; "int 0x55", "nop");
    let out = State::protected(interrupting).flags(flag::IF | flag::CF).run();
    report::equal("INT n through a task gate", (out.vector, out.tr), (0x30, FIRST.into()));
    report::equal(
        "with NT and the back link",
        (out.eflags & 0xffff, read(&tables().tasks[0].link)),
        (flag::NT as u32 | 2, TSS.into()),
    );
    report::equal(
        "the old flags are saved",
        read(&tables().tss.eflags) & 0xffff,
        (flag::IF | flag::CF) as u32 | 2,
    );
    report::equal("the old EIP is behind INT n", read(&tables().tss.eip), interrupting.as_ptr() as u32 + 2);
    gate_for(0x55, code!(32; "iretd"), 0);
    let out = State::protected(interrupting).with(BX, 5).run();
    report::equal(
        "and IRET returns there",
        (out.vector, out.gprs[BX], out.eip),
        (0x30, 5, interrupting.as_ptr() as u32 + 5),
    );
    gate_for(0x55, body, 0);
    State::user(interrupting)
        .run()
        .check("INT n through a task gate of ring 0 from ring 3", fault(vector::GP, 0x55 * 8 + 2));
    gate_for(0x55, body, 3);
    let out = State::user(interrupting).run();
    report::equal("through one of ring 3", (out.vector, out.tr, out.cs), (0x30, FIRST.into(), CODE.into()));
    // A fault with an error code: it is on the new task's stack.
    let body = code!(32; "mov ebx, [esp]");
    gate_for(13, body, 0);
    let faulting = code!(32; "mov ds, eax");
    let out = State::protected(faulting).with(AX, 0x400).run();
    report::equal(
        "a fault's task",
        (out.vector, out.tr, out.gprs[SP]),
        (0x30, FIRST.into(), stack() - 0x404),
    );
    report::equal("has the error code on its stack", out.gprs[BX], 0x400);
    report::equal(
        "the faulting instruction's EIP is saved",
        read(&tables().tss.eip),
        faulting.as_ptr() as u32,
    );
    report::equal("with RF", read(&tables().tss.eflags) & flag::RF as u32, flag::RF as u32);
    gate_for(0, body, 0);
    let out = State::protected(code!(32; "div ecx")).run();
    report::equal("a fault without error code", (out.vector, out.gprs[SP]), (0x30, stack() - 0x400));
    gate_for(3, body, 3);
    let out = State::protected(code!(32; "int3")).run();
    report::equal("INT3 through a task gate", (out.vector, out.tr), (0x30, FIRST.into()));
    report::equal("its RF is as it was", read(&tables().tss.eflags) & flag::RF as u32, 0);
    // Again while it is busy.
    gate_for(0x55, code!(32; "int 0x55"), 0);
    let out = State::protected(interrupting).run();
    report::equal("a task that is busy is not entered", (out.vector, out.error), (13, u32::from(FIRST)));
}

fn returns() {
    let code = code!(32; "iretd", "nop");
    let body = code!(32; "nop");
    task(body);
    tables().set(FIRST, tables().get(FIRST) | 2 << 40);
    tables().tss.link = FIRST.into();
    let out = State::protected(code).flags(flag::NT).run();
    report::equal(
        "IRET with NT enters the task of the back link",
        (out.vector, out.tr),
        (0x30, FIRST.into()),
    );
    report::equal("without NT there", out.eflags & 0xffff, 2);
    report::holds(
        "the old task is not busy",
        !tables().is_busy(TSS) && tables().is_busy(FIRST),
        tables().get(TSS),
    );
    report::equal("its saved flags have no NT", read(&tables().tss.eflags) & flag::NT as u32, 0);
    let wrong = |name: &str, link: u32, expected: Event| {
        task(body);
        tables().tss.link = link;
        State::protected(code).flags(flag::NT).run().check(name, expected);
    };
    wrong("a back link of NULL", 0, fault(vector::TS, 0));
    wrong("a back link to a TSS that is not busy", FIRST.into(), fault(vector::TS, FIRST.into()));
    wrong("a back link to data", DATA.into(), fault(vector::TS, 0x10));
    wrong("a back link to the LDT", 0x0c, fault(vector::TS, 0x0c));
    wrong("a back link beyond the GDT", 0x400, fault(vector::TS, 0x400));
    task(body);
    tables().set(FIRST, (tables().get(FIRST) | 2 << 40) & !(PRESENT << 40));
    tables().tss.link = FIRST.into();
    State::protected(code)
        .flags(flag::NT)
        .run()
        .check("a back link to an absent TSS", fault(vector::NP, FIRST.into()));
}

fn other_rings() {
    let body = code!(32; "nop");
    task(body);
    let tables = tables();
    let (user, data) = (USER_CODE.into(), USER_DATA.into());
    let task = &mut tables.tasks[0];
    (task.cs, task.ss, task.ds, task.es, task.fs, task.gs) = (user, data, data, data, data, 0);
    task.eflags = 0x3202;
    (task.esp0, task.ss0) = (stack() - 0x800, DATA.into());
    let out = to(call(), FIRST).run();
    report::equal("a task in ring 3", (out.vector, out.cs, out.ss, out.gs), (0x30, user, data, 0));
    report::equal("with its IOPL and IF", out.eflags & 0xffff, 0x3202 | flag::NT as u32);
    report::equal("its interrupts use its own ESP0", out.frame, stack() - 0x800 - 20);
    // Conforming code: its RPL may be any above its DPL.
    self::task(body);
    tables.set(WRONG, segment(0, 0xf_ffff, PRESENT | kind::CONFORMING_READ, PAGES | BIG));
    let task = &mut tables.tasks[0];
    (task.cs, task.ss, task.ds, task.es, task.fs, task.gs) =
        (u32::from(WRONG) | 3, data, data, data, data, data);
    (task.esp0, task.ss0) = (stack() - 0x800, DATA.into());
    let out = to(call(), FIRST).run();
    report::equal(
        "a task in conforming code with RPL 3",
        (out.vector, out.cs, out.ss),
        (0x30, u32::from(WRONG) | 3, data),
    );
}

fn switched_state() {
    let body = code!(32; "mov edx, cr3", "sldt ebx", "pushfd", "pop ecx");
    task(body);
    let tables = tables();
    tables.tasks[0].ldt = LDT.into();
    tables.tasks[0].eflags = 0x8d7 & !(flag::TF as u32);
    tables.ldt[1] = segment(0, 0xf_ffff, PRESENT | kind::DATA, PAGES | BIG);
    tables.tasks[0].es = 0x0c;
    tables.tasks[0].cr3 = 0x1234_5000;
    let out = to(call(), FIRST).run();
    report::equal(
        "the task's LDT and a segment of it",
        (out.vector, out.gprs[BX], out.es),
        (0x30, LDT.into(), 0x0c),
    );
    report::equal("its flags", out.gprs[CX] & 0xffff, flag::NT as u32 | 0x8d7);
    report::equal("CR3 is not loaded without paging", out.gprs[DX], 0);
    // With paging, CR3 is loaded: 4 MiB pages one to one.
    static mut DIRECTORIES: [guests::paging::Table; 2] = [const { guests::paging::Table([0; 512]) }; 2];
    let directory = |index: usize| unsafe { (&raw mut DIRECTORIES[index]).cast::<u32>() };
    for index in 0..2 {
        for entry in 0..1024usize {
            // SAFETY: a page of ours.
            unsafe { directory(index).add(entry).write_volatile((entry as u32) << 22 | 0x87) };
        }
    }
    task(body);
    tables.tasks[0].cr3 = directory(1) as u32;
    let mut state = to(call(), FIRST);
    (state.cr0, state.cr3, state.cr4) = (0x8000_0031, directory(0) as u32, 0x10);
    let out = state.run();
    report::equal("CR3 is loaded with paging", (out.vector, out.gprs[DX]), (0x30, directory(1) as u32));
    report::equal("CR3 is not saved", read(&tables.tss.cr3), 0);
    // Local breakpoints end with the task.
    task(code!(32; "mov edx, dr7"));
    let mut state = to(call(), FIRST);
    state.dr7 = 0x700 | 0b1111;
    let out = state.run();
    report::equal("local breakpoints are disabled", out.gprs[DX], 0x400 | 0b1010 | 0x200);
}

fn sixteen_bits() {
    // A 16-bit TSS: words. Its code must lie below 64 KiB of its segment's base.
    let body = code!(32; "mov ebx, eax", "nop");
    task(body);
    let tables = tables();
    tables.set(WRONG, segment(body.as_ptr() as u64, 0xffff, PRESENT | kind::CODE_READ, BIG));
    let words = core::ptr::from_mut(&mut tables.tasks[1]).cast::<u16>();
    let data = DATA;
    let image = [
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        2,
        0xaaaa,
        0xcccc,
        0xdddd,
        0xbbbb,
        (stack() - 0x400) as u16,
        0,
        0,
        0,
        data,
        WRONG,
        data,
        data,
        0,
    ];
    for (index, word) in image.into_iter().enumerate() {
        // SAFETY: within the TSS.
        unsafe { words.add(index).write_volatile(word) };
    }
    tables.set(FIRST, segment(words as u64, 43, PRESENT | kind::TSS16, 0));
    // Its stack is 16 bits of an address: a segment that makes up for it.
    let base = u64::from(stack()) & !0xffff;
    tables.set(SECOND, segment(base, 0xffff, PRESENT | kind::DATA, 0));
    // SAFETY: within the TSS.
    unsafe { words.add(19).write_volatile(SECOND) };
    let before = to(call(), FIRST);
    let out = before.run();
    report::equal(
        "CALL to a 16-bit TSS",
        (out.vector, out.tr, out.gprs[BX] & 0xffff),
        (0x30, FIRST.into(), 0xaaaa),
    );
    report::equal("its back link", unsafe { words.read_volatile() }, TSS);
    report::equal("FS and GS are NULL", (out.fs, out.gs), (0, 0));
    report::equal("the 32-bit task is saved whole", read(&tables.tss.ebx), before.gprs[BX]);
    let iret = code!(32; "iretd");
    tables.set(WRONG, segment(iret.as_ptr() as u64, 0xffff, PRESENT | kind::CODE_READ, BIG));
    tables.set(FIRST, segment(words as u64, 43, PRESENT | kind::TSS16, 0));
    unsafe { words.add(7).write_volatile(0) };
    let out = before.run();
    report::equal("IRET from it", (out.vector, out.tr, out.gprs[CX]), (0x30, TSS.into(), 0xcccc));
}

/// What is wrong before the switch is a fault of the old task.
fn refused() {
    let body = code!(32; "nop");
    let wrong = |name: Arguments<'_>, code: &[u8], entry: u64, expected: Event| {
        task(body);
        tables().set(FIRST, entry);
        let out = to(code, FIRST).run();
        out.check(name, expected);
        report::equal(format_args!("{name}: still the old task"), out.tr, TSS.into());
    };
    task(body);
    let usual = tables().get(FIRST);
    let error = u64::from(FIRST);
    for (name, code) in [("CALL", call()), ("JMP", jump())] {
        wrong(format_args!("{name} to a busy TSS"), code, usual | 2 << 40, fault(vector::GP, error));
        wrong(
            format_args!("{name} to an absent TSS"),
            code,
            usual & !(PRESENT << 40),
            fault(vector::NP, error),
        );
        wrong(
            format_args!("{name} to a TSS that is too short"),
            code,
            usual & !0xffff | 102,
            fault(vector::TS, error),
        );
    }
    task(body);
    tables().set(FIRST, usual & !0xffff | 103);
    let out = to(call(), FIRST).run();
    report::equal("a TSS of 104 bytes", (out.vector, out.tr), (0x30, FIRST.into()));
    task(body);
    State::user(call())
        .with(DI, pointer(FIRST))
        .run()
        .check("CALL to a TSS of ring 0 from ring 3", fault(vector::GP, error));
    task(body);
    tables().set(FIRST, usual | 3 << 45);
    let out = State::user(call()).with(DI, pointer(FIRST | 3)).run();
    report::equal("CALL to a TSS of ring 3 from ring 3", (out.vector, out.tr & !3), (0x30, FIRST.into()));
    task(body);
    tables().set(FIRST, usual | 2 << 45);
    let state = to(call(), FIRST | 3);
    state.run().check("CALL to a TSS with RPL above its DPL", fault(vector::GP, error));
}

/// What is wrong with the new task's state is a fault in the new task.
fn invalid_states() {
    let body = code!(32; "nop");
    let wrong = |name: &str, change: fn(&mut Tss), entry: u64, expected: Event| {
        task(body);
        tables().set(WRONG, entry);
        route(expected.vector);
        change(&mut tables().tasks[0]);
        let out = to(call(), FIRST).run();
        report::equal(name, (out.vector, out.error), (expected.vector as u32, expected.error as u32));
        let linked = (read(&tables().df_tss.link), read(&tables().tasks[0].eip));
        report::equal(format_args!("{name}: in the new task"), linked, (FIRST.into(), body.as_ptr() as u32));
    };
    let flat = |access: u64| segment(0, 0xf_ffff, access, PAGES | BIG);
    let ts = |selector: u16| event(vector::TS, selector.into());
    wrong("LDT of data", |task| task.ldt = DATA.into(), 0, ts(DATA));
    wrong("LDT in an LDT", |task| task.ldt = 0x4c, 0, ts(0x4c));
    wrong("LDT beyond the GDT", |task| task.ldt = 0x400, 0, ts(0x400));
    wrong("an absent LDT", |task| task.ldt = WRONG.into(), segment(0, 7, kind::LDT, 0), ts(WRONG));
    wrong("CS of NULL", |task| task.cs = 0, 0, ts(0));
    wrong("CS of data", |task| task.cs = DATA.into(), 0, ts(DATA));
    wrong("CS beyond the GDT", |task| task.cs = 0x400, 0, ts(0x400));
    wrong(
        "CS of another ring",
        |task| task.cs = WRONG.into(),
        flat(PRESENT | kind::CODE_READ | dpl(2)),
        ts(WRONG),
    );
    wrong("absent CS", |task| task.cs = WRONG.into(), flat(kind::CODE_READ), event(vector::NP, WRONG.into()));
    wrong("SS of NULL", |task| task.ss = 0, 0, ts(0));
    wrong("SS of code", |task| task.ss = CODE.into(), 0, ts(CODE));
    wrong("SS that is read-only", |task| task.ss = WRONG.into(), flat(PRESENT | kind::DATA_READ), ts(WRONG));
    wrong("SS of ring 3", |task| task.ss = USER_DATA.into(), 0, ts(USER_DATA & !3));
    wrong("absent SS", |task| task.ss = WRONG.into(), flat(kind::DATA), event(vector::SS, WRONG.into()));
    wrong("DS of a TSS", |task| task.ds = TSS.into(), 0, ts(TSS));
    wrong("ES beyond the GDT", |task| task.es = 0x400, 0, ts(0x400));
    wrong("FS that is execute-only", |task| task.fs = WRONG.into(), flat(PRESENT | kind::CODE), ts(WRONG));
    wrong("absent GS", |task| task.gs = WRONG.into(), flat(kind::DATA), event(vector::NP, WRONG.into()));
    // EIP beyond its segment: after the switch.
    task(body);
    route(vector::GP);
    tables().set(WRONG, segment(0, 0xfff, PRESENT | kind::CODE_READ, BIG));
    tables().tasks[0].cs = WRONG.into();
    let out = to(call(), FIRST).run();
    report::equal("EIP beyond CS", (out.vector, out.error), (13, 0));
}

/// Leads a vector, and no other, to a task of its own: a fault in a new task may find no stack there.
fn route(number: u64) {
    let tables = tables();
    tables.set_gate(vector::DF as usize, PRESENT | kind::INTERRUPT);
    tables.set_task_gate(number as usize, true);
}

fn trap_flag() {
    let body = code!(32; "nop");
    task(body);
    tables().tasks[0].trap = 1;
    unsafe { cpu::set_dr6(0) };
    let out = to(call(), FIRST).run();
    report::equal(
        "the T bit traps before the first instruction",
        (out.vector, out.eip),
        (1, body.as_ptr() as u32),
    );
    report::equal("with BT in DR6", out.dr6, 0xffff_0ff0 | 1 << 15);
    unsafe { cpu::set_dr6(0) };
    task(body);
    let mut state = to(call(), FIRST).flags(flag::TF);
    state.gprs[AX] = 1;
    let out = state.run();
    report::equal("TF traps after the switch, in the new task", (out.vector, out.tr), (1, FIRST.into()));
    unsafe { cpu::set_dr6(0) };
}

fn virtual_8086() {
    // A task in virtual-8086 mode, which faults back.
    task(code!(32; "nop"));
    let low_state = State::v86(code!(16; "mov ax, ds", "hlt"));
    let tables = tables();
    let task = &mut tables.tasks[0];
    *task = Tss { eflags: flag::VM as u32 | 2, eip: 0, ..*task };
    (task.cs, task.ss, task.esp) = (low_state.cs, 0x3000, 0x100);
    (task.ds, task.es, task.fs, task.gs) = (0x1234, 0x2345, 0x3456, 0x4567);
    (task.esp0, task.ss0) = (stack() - 0x800, DATA.into());
    let out = to(call(), FIRST).run();
    report::equal("a task in virtual-8086 mode", (out.vector, out.error, out.eip), (13, 0, 2));
    report::equal("its segments", [out.ds, out.es, out.fs, out.gs], [0x1234, 0x2345, 0x3456, 0x4567]);
    report::equal("DS is its selector", out.gprs[AX] & 0xffff, 0x1234);
    // From virtual-8086 mode through a task gate, and back to it.
    self::task(code!(32; "iretd"));
    tables.idt[0x55] = gate(FIRST, 0, PRESENT | kind::TASK | dpl(3), 0);
    let out = State::v86(code!(16; "int 0x55", "mov bx, 7")).run();
    out.check("INT n from virtual-8086 mode through a task gate", END);
    report::equal("and back", (out.gprs[BX], out.eflags & flag::VM as u32), (7, flag::VM as u32));
}
