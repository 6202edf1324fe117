//! Segmentation: which selectors may be loaded, what LAR, LSL, VERR and VERW tell of them, limits, and far transfers.
//!
//! What each descriptor allows is worked out here from the manual's conditions and compared for every type, privilege
//! level and presence. SDM vol. 3, *Protection*; SDM vol. 2, the instructions' pages.
#![no_std]
#![no_main]

mod transfers;

use guests::cpu::{flag, vector};
use guests::descriptor::{BIG, PAGES, PRESENT, dpl, kind, segment};
use guests::legacy::selector::LDT;
use guests::legacy::{State, selector, tables};
use guests::long::reg::{AX, BP, BX, DI, SP};
use guests::long::{END, Event, event, fault};
use guests::report::Many;
use guests::{code, long, report, tables as long_tables};

guests::guest!(main);

const FREE: u16 = selector::FREE;

fn main() {
    tables().reset();
    loads();
    looks();
    long_looks();
    special_selectors();
    limits();
    access_rights();
    code_limits();
    transfers::far_jumps();
    transfers::call_gates();
    transfers::returns();
    transfers::interrupt_returns();
    transfers::long_transfers();
}

/// A descriptor in every combination.
#[derive(Clone, Copy, Debug)]
struct Case {
    /// The type with the S bit above it.
    kind: u64,
    dpl: u64,
    present: bool,
    rpl: u64,
    cpl: u64,
}

impl Case {
    fn all(mut each: impl FnMut(Self)) {
        for kind in 0..32 {
            for dpl in 0..4 {
                for present in [true, false] {
                    for rpl in 0..4 {
                        for cpl in [0, 3] {
                            each(Self { kind, dpl, present, rpl, cpl });
                        }
                    }
                }
            }
        }
    }

    fn descriptor(&self, base: u64, limit: u64, flags: u64) -> u64 {
        let present = if self.present { PRESENT } else { 0 };
        segment(base, limit, self.kind | dpl(self.dpl) | present, flags)
    }

    fn is_code(&self) -> bool {
        self.kind & 0x18 == 0x18
    }

    fn is_data(&self) -> bool {
        self.kind & 0x18 == 0x10
    }

    fn is_conforming(&self) -> bool {
        self.kind & 0x1c == 0x1c
    }

    fn is_readable(&self) -> bool {
        self.is_data() || self.is_code() && self.kind & 2 != 0
    }

    fn is_writable(&self) -> bool {
        self.is_data() && self.kind & 2 != 0
    }

    /// Whether its privilege level admits the program; conforming code admits all.
    fn is_admitted(&self) -> bool {
        self.is_conforming() || self.dpl >= self.cpl && self.dpl >= self.rpl
    }

    fn selector(&self) -> u16 {
        FREE | self.rpl as u16
    }

    fn error(&self, vector: u64) -> Event {
        event(vector, FREE.into())
    }

    fn load_ds(&self) -> Event {
        match () {
            _ if !self.is_readable() || !self.is_admitted() => self.error(vector::GP),
            _ if !self.present => self.error(vector::NP),
            _ => END,
        }
    }

    fn load_ss(&self) -> Event {
        match () {
            _ if self.rpl != self.cpl || !self.is_writable() || self.dpl != self.cpl => {
                self.error(vector::GP)
            }
            _ if !self.present => self.error(vector::SS),
            _ => END,
        }
    }

    fn has_rights(&self, long: bool) -> bool {
        let system: &[u64] = if long { &[2, 9, 11, 12] } else { &[1, 2, 3, 4, 5, 9, 11, 12] };
        (self.kind >= 16 || system.contains(&self.kind)) && self.is_admitted()
    }

    fn has_limit(&self, long: bool) -> bool {
        let system: &[u64] = if long { &[2, 9, 11] } else { &[1, 2, 3, 9, 11] };
        (self.kind >= 16 || system.contains(&self.kind)) && self.is_admitted()
    }
}

fn in_ring(cpl: u64, code: &[u8]) -> State {
    if cpl == 0 { State::protected(code) } else { State::user(code) }
}

fn loads() {
    let (ds, ss) = (code!(32; "mov ds, ax"), code!(32; "mov ss, ax", "nop"));
    let (mut ds_cases, mut ss_cases) = (Many::new("MOV DS"), Many::new("MOV SS"));
    let mut accessed = Many::new("loading sets the accessed bit");
    Case::all(|case| {
        // A segment that grows down has all but its first page.
        let limit = if case.kind & 0x1c == kind::DOWN_READ { 0 } else { 0xf_ffff };
        let descriptor = case.descriptor(0, limit, PAGES | BIG);
        tables().set(FREE, descriptor);
        let out = in_ring(case.cpl, ds).with(AX, case.selector().into()).run();
        let error = |out: &State| Event { error: u64::from(out.error), ..out.event_like(END) };
        ds_cases.equal(format_args!("{case:?}"), error(&out), case.load_ds());
        let marked = if case.load_ds() == END { descriptor | 1 << 40 } else { descriptor };
        accessed.equal(format_args!("DS {case:?}"), tables().get(FREE), marked);
        tables().set(FREE, descriptor);
        let out = in_ring(case.cpl, ss).with(AX, case.selector().into()).run();
        ss_cases.equal(format_args!("{case:?}"), error(&out), case.load_ss());
        let marked = if case.load_ss() == END { descriptor | 1 << 40 } else { descriptor };
        accessed.equal(format_args!("SS {case:?}"), tables().get(FREE), marked);
    });
    ds_cases.finish();
    ss_cases.finish();
    accessed.finish();
}

const MARK: u32 = 0x1234_5678;

fn looks() {
    let (lar, lsl) = (code!(32; "lar ebx, eax"), code!(32; "lsl ebx, eax"));
    let (verr, verw) = (code!(32; "verr ax"), code!(32; "verw ax"));
    let names = ["LAR", "LSL", "VERR", "VERW"];
    let mut many = names.map(Many::new);
    Case::all(|case| {
        let descriptor = case.descriptor(0x12_3456, 0xabcd, PAGES | BIG);
        tables().set(FREE, descriptor);
        let limit = 0xabc_dfff;
        let rights = (descriptor >> 32) as u32 & 0x00f0_ff00;
        let expected = [
            (case.has_rights(false), rights),
            (case.has_limit(false), limit),
            (case.is_readable() && case.is_admitted(), MARK),
            (case.is_writable() && case.is_admitted(), MARK),
        ];
        for ((code, (set, value)), many) in [lar, lsl, verr, verw].into_iter().zip(expected).zip(&mut many) {
            let out = in_ring(case.cpl, code).with(AX, case.selector().into()).with(BX, MARK).run();
            let mask = if code.as_ptr() == lar.as_ptr() && set { 0x00f0_ff00 } else { u32::MAX };
            let got = (out.vector, out.eflags & flag::ZF as u32 != 0, out.gprs[BX] & mask);
            many.equal(
                format_args!("{case:?}"),
                got,
                (vector::END as u32, set, if set { value } else { MARK }),
            );
        }
    });
    many.into_iter().for_each(Many::finish);
}

fn long_looks() {
    let (lar, lsl) = (code!(64; "lar rbx, rax"), code!(64; "lsl rbx, rax"));
    let mut many = ["LAR in 64-bit mode", "LSL in 64-bit mode"].map(Many::new);
    let mark = 0x1234_5678_9abc_def0u64;
    let free = long_tables::selector::FREE;
    Case::all(|case| {
        let descriptor = case.descriptor(0, 0xabcd, PAGES | BIG);
        long_tables::set_gdt(free, descriptor);
        long_tables::set_gdt(free + 8, 0);
        let expected =
            [(case.has_rights(true), descriptor >> 32 & 0x00f0_ff00), (case.has_limit(true), 0xabc_dfff)];
        for ((code, (set, value)), many) in [lar, lsl].into_iter().zip(expected).zip(&mut many) {
            let state = if case.cpl == 0 { long::State::kernel(code) } else { long::State::user(code) };
            let out = state.with(AX, u64::from(free) | case.rpl).with(BX, mark).run();
            let mask = if code.as_ptr() == lar.as_ptr() && set { 0x00f0_ff00 } else { u64::MAX };
            let got = (out.vector, out.rflags & flag::ZF != 0, out.gprs[BX] & mask);
            many.equal(format_args!("{case:?}"), got, (vector::END, set, if set { value } else { mark }));
        }
    });
    many.into_iter().for_each(Many::finish);
}

fn special_selectors() {
    tables().reset();
    let load = |name: &str, code: &[u8], selector: u32, expected: Event| {
        State::protected(code).with(AX, selector).run().check(name, expected);
    };
    let ds = code!(32; "mov ds, ax");
    load("DS of NULL", ds, 3, END);
    load("SS of NULL", code!(32; "mov ss, ax"), 0, fault(vector::GP, 0));
    load("DS beyond the GDT", ds, 0x200, fault(vector::GP, 0x200));
    load("DS from an LDT that is not there", ds, 0x0c, fault(vector::GP, 0x0c));
    load("DS of the GDT's entry 0 in the LDT", ds, 4, fault(vector::GP, 4));
    tables().ldt[1] = segment(0, 0xf_ffff, PRESENT | kind::DATA, PAGES | BIG);
    let mut state = State::protected(ds).with(AX, 0x0c);
    state.ldtr = LDT.into();
    state.run().check("DS from the LDT", END);
    state.with(AX, 0x84).run().check("DS beyond the LDT", fault(vector::GP, 0x84));
    load("LLDT of NULL", code!(32; "lldt ax"), 0, END);
    load("LLDT", code!(32; "lldt ax"), LDT.into(), END);
    load(
        "LLDT of a TSS",
        code!(32; "lldt ax"),
        selector::TSS.into(),
        fault(vector::GP, selector::TSS.into()),
    );
    load("LLDT from the LDT", code!(32; "lldt ax"), 0x4c, fault(vector::GP, 0x4c));
    tables().set(FREE, tables().get(LDT) & !(PRESENT << 40));
    load("LLDT of an absent LDT", code!(32; "lldt ax"), FREE.into(), fault(vector::NP, FREE.into()));
    let ltr = code!(32; "ltr ax");
    load("LTR of NULL", ltr, 0, fault(vector::GP, 0));
    load("LTR of a busy TSS", ltr, selector::TSS.into(), fault(vector::GP, selector::TSS.into()));
    load("LTR", ltr, selector::DF_TSS.into(), END);
    report::holds("LTR makes it busy", tables().is_busy(selector::DF_TSS), tables().get(selector::DF_TSS));
    tables().reset();
    load("LTR of data", ltr, selector::DATA.into(), fault(vector::GP, selector::DATA.into()));
    tables().set(FREE, tables().get(selector::DF_TSS) & !(PRESENT << 40));
    load("LTR of an absent TSS", ltr, FREE.into(), fault(vector::NP, FREE.into()));
    tables().set(FREE, segment(0x10_0000, 103, PRESENT | kind::TSS16, 0));
    load("LTR of a 16-bit TSS", ltr, FREE.into(), END);
    tables().reset();
}

/// Reads and writes around each segment's limits.
fn limits() {
    let codes: [(u64, bool, &[u8]); 6] = [
        (1, false, code!(32; "mov al, ds:[edi]")),
        (2, false, code!(32; "mov ax, ds:[edi]")),
        (4, false, code!(32; "mov eax, ds:[edi]")),
        (1, true, code!(32; "mov ss:[edi], al")),
        (2, true, code!(32; "mov ss:[edi], ax")),
        (4, true, code!(32; "mov ss:[edi], eax")),
    ];
    let mut many = Many::new("limits");
    let base = 0x80_0000;
    for (down, flags, limit) in [
        (false, BIG, 0x1000u64),
        (false, BIG, 0),
        (false, BIG, 0xf_ffff),
        (false, BIG | PAGES, 0),
        (false, BIG | PAGES, 7),
        (false, 0, 0xffff),
        (true, BIG, 0x1000),
        (true, BIG, 0),
        (true, 0, 0x1000),
        (true, 0, 0xfffc),
        (true, BIG | PAGES, 1),
        (true, PAGES, 1),
        (true, 0, 0xffff),
    ] {
        let access = PRESENT | if down { kind::DOWN } else { kind::DATA };
        tables().set(FREE, segment(base, limit, access, flags));
        let effective = if flags & PAGES != 0 { limit << 12 | 0xfff } else { limit };
        let top = if flags & BIG != 0 { 0xffff_ffff } else { 0xffff };
        for (size, stack, code) in codes {
            for around in [0, effective, effective + 1, 0x8000, 0x1_0000] {
                for offset in (around.saturating_sub(5)..=around + 5).filter(|offset| *offset < 0x100_0000) {
                    let last = offset + size - 1;
                    let fits = if down { offset > effective && last <= top } else { last <= effective };
                    let mut state = State::protected(code).with(DI, offset as u32);
                    if stack {
                        state.ss = FREE.into();
                        // The runner's frame is there too; a stack that has no room for it is none.
                        state.gprs[SP] = if down { top as u32 & 0xf0_ffe0 } else { effective as u32 & !31 };
                        if !down && effective < 0x200 || down && effective > 0xf000 && top < 0x1_0000 {
                            continue;
                        }
                    } else {
                        state.ds = FREE.into();
                    }
                    let out = state.run();
                    let wrong = if stack { vector::SS } else { vector::GP };
                    let expected = if fits { END } else { event(wrong, 0) };
                    let case = (down, flags, limit, size, stack, offset);
                    many.equal(format_args!("{case:x?}"), out.event_like(expected), expected);
                }
            }
        }
    }
    many.finish();
}

/// Reads and writes through each type of segment.
fn access_rights() {
    let read = code!(32; "mov eax, ds:[edi]");
    let write = code!(32; "mov ds:[edi], eax");
    let change = code!(32; "inc dword ptr ds:[edi]");
    let data = 0x80_0000u32;
    let cases = [
        ("read-only data", kind::DATA_READ, true, false),
        ("writable data", kind::DATA, true, true),
        ("readable code", kind::CODE_READ, true, false),
        ("readable conforming code", kind::CONFORMING_READ, true, false),
    ];
    for (name, access, readable, writable) in cases {
        tables().set(FREE, segment(0, 0xf_ffff, PRESENT | access, PAGES | BIG));
        for (what, code, fine) in
            [("read", read, readable), ("written", write, writable), ("changed", change, writable)]
        {
            let mut state = State::protected(code).with(DI, data);
            state.ds = FREE.into();
            state.run().check(format_args!("{name}, {what}"), if fine { END } else { fault(vector::GP, 0) });
        }
    }
    let mut state = State::protected(read).with(DI, data);
    state.ds = 0;
    state.run().check("a load through NULL", fault(vector::GP, 0));
    State::protected(code!(32; "mov cs:[edi], eax"))
        .with(DI, data)
        .run()
        .check("a store through CS", fault(vector::GP, 0));
    State::protected(code!(32; "mov eax, cs:[edi]")).with(DI, data).run().check("a load through CS", END);
    tables().set(FREE, segment(0, 0xf_ffff, PRESENT | kind::CODE, PAGES | BIG));
    let mut state = State::protected(code!(32; "mov eax, cs:[edi]")).with(DI, data);
    state.cs = FREE.into();
    state.run().check("a load through execute-only CS", fault(vector::GP, 0));
    let out = State::protected(code!(32; "mov eax, [ebp]")).with(BP, data).run();
    out.check("EBP addresses the stack segment", END);
}

fn code_limits() {
    let code = code!(32; "jmp eax", "nop");
    let base = code.as_ptr() as u64;
    let small = |limit: u64| {
        tables().set(FREE, segment(base, limit, PRESENT | kind::CODE_READ, BIG));
        let mut state = State::protected(code);
        (state.eip, state.cs) = (0, FREE.into());
        state
    };
    let at = |state: State| (state.vector, state.error, state.eip);
    report::equal("a jump to the limit", at(small(0x10).with(AX, 2).run()), (0x30, 0, 5));
    report::equal("a jump beyond the limit", at(small(0x10).with(AX, 0x11).run()), (13, 0, 0));
    report::equal("execution up to the limit", at(small(4).with(AX, 2).run()), (0x30, 0, 5));
    report::equal("an instruction that crosses the limit", at(small(3).with(AX, 2).run()), (13, 0, 3));
    report::equal("an instruction beyond the limit", at(small(2).with(AX, 2).run()), (13, 0, 3));
}
