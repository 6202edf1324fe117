//! Paging: what each combination of entries, privilege and controls allows, against a model written here from the
//! manual; accessed and dirty flags; large pages; 32-bit and PAE paging.
//!
//! SDM vol. 3, *Paging*.
#![no_std]
#![no_main]

use guests::code;
use guests::cpu::{self, flag, vector};
use guests::legacy::{self, tables};
use guests::long::reg::{AX, BX, CX, DI, SP};
use guests::long::{END, State, event, fault};
use guests::paging::{self, TEST_FRAME, TEST_PAGE, address, bit};
use guests::report::{self, Many};

guests::guest!(main);

const EFER: u32 = 0xc000_0080;
const NXE: u64 = 1 << 11;
const WP: u64 = 1 << 16;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;

fn main() {
    paging::open();
    permissions();
    large_pages();
    reserved_bits();
    forgetting();
    accessed_and_dirty();
    legacy_paging();
    pae_paging();
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Access {
    Read,
    Write,
    Fetch,
}

/// One combination of everything that an access depends on.
#[derive(Clone, Copy, Debug)]
struct Case {
    directory: u64,
    table: u64,
    access: Access,
    user: bool,
    write_protect: bool,
    smep: bool,
    smap: bool,
    ac: bool,
    nxe: bool,
}

/// A bit above every physical address.
const RESERVED: u64 = 1 << 51;

impl Case {
    /// The error code, or none where the access is allowed. SDM vol. 3, *Access Rights* and *Page-Fault Exceptions*.
    fn model(&self) -> Option<u64> {
        let fetch = self.access == Access::Fetch;
        let write = self.access == Access::Write;
        let mut error = 0;
        if write {
            error |= 2;
        }
        if self.user {
            error |= 4;
        }
        if fetch && (self.nxe || self.smep) {
            error |= 16;
        }
        for entry in [self.directory, self.table] {
            if entry & bit::PRESENT == 0 {
                return Some(error);
            }
            if entry & RESERVED != 0 || entry & bit::NX != 0 && !self.nxe {
                return Some(error | 9);
            }
        }
        let both = self.directory & self.table;
        let for_users = both & bit::USER != 0;
        let writable = both & bit::WRITE != 0;
        let executable = (self.directory | self.table) & bit::NX == 0;
        let allowed = match self.access {
            Access::Fetch if self.user => for_users && executable,
            Access::Fetch => executable && !(for_users && self.smep),
            _ if self.user => for_users && (!write || writable),
            _ => (!for_users || !self.smap || self.ac) && (!write || writable || !self.write_protect),
        };
        if allowed { None } else { Some(error | 1) }
    }
}

/// The pages of a user's snippet and stack.
const USER_CODE: u64 = 100;
const USER_STACK: u64 = 102;

fn permissions() {
    let codes: [(Access, &[u8]); 3] = [
        (Access::Read, code!(64; "mov eax, [rdi]")),
        (Access::Write, code!(64; "mov [rdi], eax")),
        (Access::Fetch, code!(64; "jmp rdi")),
    ];
    for (index, (_, code)) in codes.iter().enumerate() {
        for (at, byte) in code.iter().enumerate() {
            paging::write(USER_CODE * paging::PAGE + index as u64 * 64 + at as u64, *byte);
        }
    }
    // INT 0x30, where a fetch arrives.
    // SAFETY: the test page's frame.
    unsafe { (TEST_FRAME as *mut u64).write_volatile(0x30cd) };
    for page in 0..100 {
        paging::set(page, bit::PRESENT | bit::WRITE);
    }
    paging::identity_for_users(false);
    let [_, extended, _, _] = cpu::cpuid(7, 0);
    let has = |bit: u32| extended >> bit & 1 == 1;
    let mut many = Many::new("access rights");
    let (cr0, cr4) = (cpu::cr0(), cpu::cr4());
    let efer = cpu::read_msr(EFER);
    for controls in 0..16u64 {
        let on = |bit: u64| controls >> bit & 1 == 1;
        let (write_protect, smep, smap, nxe) = (on(0), on(1), on(2), on(3));
        if smep && !has(7) || smap && !has(20) {
            continue;
        }
        unsafe {
            cpu::write_msr(EFER, efer & !NXE | if nxe { NXE } else { 0 });
            cpu::set_cr0(cr0 & !WP | if write_protect { WP } else { 0 });
            cpu::set_cr4(cr4 | if smep { SMEP } else { 0 } | if smap { SMAP } else { 0 });
        }
        for bits in 0..32 * 16u64 {
            let table = bits & 7 | (bits >> 3 & 1) << 63 | (bits >> 4 & 1) * RESERVED;
            let directory = bits >> 5 & 7 | (bits >> 8 & 1) << 63;
            for (user, ac) in [(false, false), (false, true), (true, false)] {
                for (index, (access, code)) in codes.iter().enumerate() {
                    let case =
                        Case { directory, table, access: *access, user, write_protect, smep, smap, ac, nxe };
                    one(&case, code, index as u64, &mut many);
                }
            }
        }
    }
    unsafe {
        cpu::set_cr4(cr4);
        cpu::set_cr0(cr0);
        cpu::write_msr(EFER, efer);
    }
    paging::identity_for_users(true);
    many.finish();
}

fn one(case: &Case, code: &[u8], index: u64, many: &mut Many) {
    let offset = if case.access == Access::Fetch { 0 } else { 64 };
    let state = if case.user {
        let mut state = State::user(code).with(SP, address(USER_STACK));
        state.rip = address(USER_CODE) + 64 * index;
        state
    } else {
        State::kernel(code).flags(if case.ac { flag::AC } else { 0 })
    };
    paging::test_entries(case.directory, case.table);
    let out = state.with(DI, TEST_PAGE + offset).run();
    let [directory, table] = paging::tested();
    match case.model() {
        Some(error) => {
            let got = (out.vector, out.error, out.cr2);
            many.equal(format_args!("{case:x?}"), got, (vector::PF, error, TEST_PAGE + offset));
            many.equal(format_args!("{case:x?}: dirty"), table & bit::DIRTY, 0);
        }
        None => {
            let dirty = if case.access == Access::Write { bit::DIRTY } else { 0 };
            let got = (out.vector, directory & bit::ACCESSED, table & (bit::ACCESSED | bit::DIRTY));
            many.equal(format_args!("{case:x?}"), got, (vector::END, bit::ACCESSED, bit::ACCESSED | dirty));
        }
    }
}

fn large_pages() {
    let read = code!(64; "mov eax, [rdi]");
    // SAFETY: memory that nobody uses.
    unsafe { ((TEST_FRAME & !0x1f_ffff) as *mut [u32; 2]).write_volatile([0x1234, 0x5678]) };
    let frame = TEST_FRAME & !0x1f_ffff;
    paging::test_directory(frame | bit::ALL | bit::LARGE);
    let out = State::kernel(read).with(DI, TEST_PAGE + 4).run();
    report::equal("a page of 2 MiB", (out.vector, out.gprs[AX]), (vector::END, 0x5678));
    let [directory, _] = paging::tested();
    report::equal("its accessed and dirty flags", directory & (bit::ACCESSED | bit::DIRTY), bit::ACCESSED);
    let out = State::kernel(code!(64; "mov [rdi], eax")).with(DI, TEST_PAGE + 4).run();
    out.check("a store to it", END);
    let [directory, _] = paging::tested();
    report::equal("is in its dirty flag", directory & bit::DIRTY, bit::DIRTY);
    paging::test_directory(frame | bit::ALL | bit::LARGE | 1 << 12);
    State::kernel(read).with(DI, TEST_PAGE).run().check("bit 12 of it is PAT", END);
    for at in 13..21 {
        paging::test_directory(frame & !(1 << at) | bit::ALL | bit::LARGE | 1 << at);
        let out = State::user(read).with(DI, TEST_PAGE).run();
        out.check(format_args!("bit {at} of it is reserved"), fault(vector::PF, 13));
    }
    // Accesses that cross from a large page into a small one.
    paging::test_directory(frame | bit::ALL | bit::LARGE);
    paging::set(511, bit::ALL);
    paging::write(512 * paging::PAGE - 2, 0xaaaau16);
    // SAFETY: as above.
    unsafe { (frame as *mut u16).write_volatile(0xbbbb) };
    let out = State::kernel(read).with(DI, TEST_PAGE - 2).run();
    report::equal("a load from a small page into a large one", out.gprs[AX], 0xbbbb_aaaa);
    paging::test_entries(bit::ALL, bit::ALL);
}

fn reserved_bits() {
    let width = u64::from(cpu::cpuid(0x8000_0008, 0)[0] & 0xff);
    let read = code!(64; "mov eax, [rdi]");
    for at in width..52 {
        paging::test_entries(bit::ALL, bit::ALL | 1 << at);
        let out = State::kernel(read).with(DI, TEST_PAGE).run();
        out.check(format_args!("bit {at} of an entry, above the physical addresses"), fault(vector::PF, 9));
    }
    for at in [9, 10, 11, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62] {
        paging::test_entries(bit::ALL | 1 << at, bit::ALL | 1 << at);
        let out = State::kernel(read).with(DI, TEST_PAGE).run();
        out.check(format_args!("bit {at} is ignored"), END);
    }
    paging::test_entries(bit::ALL, bit::ALL);
}

fn forgetting() {
    let read = code!(64; "mov eax, [rdi]");
    let value = |offset: u64| {
        // SAFETY: the frames of the window.
        unsafe { ((paging::FRAMES + offset) as *mut u32).write_volatile(offset as u32) }
    };
    value(0);
    value(paging::PAGE);
    let load = |di: u64| State::kernel(read).with(DI, di).run();
    paging::set(0, bit::ALL);
    report::equal("a page", load(address(0)).gprs[AX], 0);
    // The entry of page 0 shows page 1's frame: INVLPG, MOV CR3 and MOV CR4 make it so.
    let entry = |frame: u64, bits: u64| {
        let at = paging::entry_address(0) as *mut u64;
        // SAFETY: the window's table.
        unsafe { at.write_volatile(paging::FRAMES + frame | bits) };
    };
    entry(paging::PAGE, bit::ALL);
    paging::flush(address(0));
    report::equal("INVLPG", load(address(0)).gprs[AX], 0x1000);
    entry(0, bit::ALL);
    unsafe { cpu::set_cr3(cpu::cr3()) };
    report::equal("MOV CR3", load(address(0)).gprs[AX], 0);
    let cr4 = cpu::cr4();
    unsafe { cpu::set_cr4(cr4 | 1 << 7) };
    entry(0, bit::ALL | bit::GLOBAL);
    paging::flush(address(0));
    load(address(0));
    entry(paging::PAGE, bit::ALL | bit::GLOBAL);
    paging::flush(address(0));
    report::equal("INVLPG of a global page", load(address(0)).gprs[AX], 0x1000);
    entry(0, bit::ALL | bit::GLOBAL);
    unsafe { cpu::set_cr4(cr4) };
    report::equal("MOV CR4 of a global page", load(address(0)).gprs[AX], 0);
    // What was absent is never cached.
    entry(0, 0);
    paging::flush(address(0));
    load(address(0)).check("an absent page", fault(vector::PF, 0));
    entry(paging::PAGE, bit::ALL);
    report::equal("is present without any flush", load(address(0)).gprs[AX], 0x1000);
    // Nor is a missing right: the fault takes what is cached with it.
    entry(0, bit::PRESENT);
    paging::flush(address(0));
    load(address(0));
    let out = State::kernel(code!(64; "mov [rdi], eax")).with(DI, address(0)).run();
    out.check("a store to a read-only page", fault(vector::PF, 3));
    entry(0, bit::ALL);
    let out = State::kernel(code!(64; "mov [rdi], eax")).with(DI, address(0)).run();
    out.check("which has become writable", END);
    paging::set(0, bit::ALL);
}

fn accessed_and_dirty() {
    let check = |name: &str, code: &[u8], expected: u64| {
        paging::test_entries(bit::ALL, bit::ALL);
        let out = State::kernel(code).with(DI, TEST_PAGE + 128).with(CX, 0).with(BX, 1).with(AX, 2).run();
        let flags = paging::tested()[1] & (bit::ACCESSED | bit::DIRTY);
        report::equal(name, (out.vector, flags), (vector::END, expected));
    };
    // SAFETY: the test page's frame.
    unsafe { (TEST_FRAME as *mut [u8; 256]).write_volatile([0; 256]) };
    let (read, written) = (bit::ACCESSED, bit::ACCESSED | bit::DIRTY);
    check("a load", code!(64; "mov al, [rdi]"), read);
    check("a store", code!(64; "mov [rdi], al"), written);
    check("a read-modify-write", code!(64; "or [rdi], ecx"), written);
    check("CMP", code!(64; "cmp [rdi], eax"), read);
    check("CMPXCHG that fails", code!(64; "cmpxchg [rdi], ebx"), written);
    check("a store after a load", code!(64; "mov al, [rdi]", "mov [rdi], al"), written);
    check("REP STOS of nothing", code!(64; "rep stosb"), 0);
    check("PREFETCH and NOP", code!(64; "nop dword ptr [rdi]"), 0);
    check("LEA", code!(64; "lea rax, [rdi]"), 0);
    check("PUSH of memory", code!(64; "push [rdi]", "pop rax"), read);
    check("POP to memory", code!(64; "push rax", "pop [rdi]"), written);
    // A store that faults in its second page leaves the first clean.
    paging::test_directory(0);
    paging::set(511, bit::ALL);
    let out = State::kernel(code!(64; "mov [rdi], rax")).with(DI, TEST_PAGE - 4).run();
    out.check("a store into an absent page", fault(vector::PF, 2));
    report::equal(
        "does not write the page before",
        paging::read::<u32>(512 * paging::PAGE - 4) == out.gprs[AX] as u32 && out.gprs[AX] != 0,
        false,
    );
    paging::test_entries(bit::ALL, bit::ALL);
}

/// Two directories or tables of 32-bit paging.
static mut LOW: [paging::Table; 6] = [const { paging::Table([0; 512]) }; 6];

fn low_table(index: usize) -> *mut u32 {
    (unsafe { &raw mut LOW[index] }).cast()
}

fn legacy_paging() {
    tables().reset();
    let (directory, table) = (low_table(0), low_table(1));
    // SAFETY: tables of ours.
    unsafe {
        for entry in 0..1024u32 {
            directory.add(entry as usize).write_volatile(entry << 22 | 0x87);
            table.add(entry as usize).write_volatile((paging::FRAMES as u32 + (entry << 12)) | 7);
        }
        directory.add(0x200).write_volatile(table as u32 | 7);
    }
    let page = 0x8000_0000u32;
    let with = |state: legacy::State| {
        let mut state = state.with(DI, page + 0x3008);
        (state.cr0, state.cr3, state.cr4) = (0x8001_0031, directory as u32, 0x10);
        state
    };
    let (read, write) = (code!(32; "mov eax, [edi]"), code!(32; "mov [edi], eax"));
    paging::write(0x3008, 0x1357_9bdfu32);
    let out = with(legacy::State::user(read)).run();
    report::equal("32-bit paging", (out.vector, out.gprs[AX]), (0x30, 0x1357_9bdf));
    let entry = |bits: u32| unsafe { table.add(3).write_volatile(paging::FRAMES as u32 + 0x3000 | bits) };
    for (name, bits, user_read, user_write, kernel_write) in [
        ("absent", 0, 4, 6, 2),
        ("for supervisors", 3, 5, 7, 99),
        ("read-only", 5, 99, 7, 3),
        ("read-only for supervisors", 1, 5, 7, 3),
        ("open", 7, 99, 99, 99),
    ] {
        entry(bits);
        let expected = |error| if error == 99 { END } else { fault(vector::PF, error) };
        let out = with(legacy::State::user(read)).run();
        out.check(format_args!("{name}, read by a user"), expected(user_read));
        if user_read != 99 {
            report::equal(format_args!("{name}: CR2"), out.cr2, page + 0x3008);
        }
        with(legacy::State::user(write))
            .run()
            .check(format_args!("{name}, written by a user"), expected(user_write));
        with(legacy::State::protected(write))
            .run()
            .check(format_args!("{name}, written in ring 0"), expected(kernel_write));
    }
    let mut state = with(legacy::State::protected(write));
    state.cr0 &= !(WP as u32);
    entry(5);
    state.run().check("read-only in ring 0 without WP", END);
    // PSE-36: the upper bits of a large page's frame.
    unsafe { directory.add(0x201).write_volatile(0x87 | 1 << 21) };
    let out = with(legacy::State::protected(read)).with(DI, page + 0x40_0000).run();
    out.check("bit 21 of a large page is reserved", fault(vector::PF, 9));
    let mut state = with(legacy::State::protected(read)).with(DI, page + 0x40_0000);
    state.cr4 = 0;
    unsafe {
        directory.add(0).write_volatile(low_table(2) as u32 | 7);
        directory.add(1).write_volatile(low_table(3) as u32 | 7);
        for entry in 0..1024u32 {
            low_table(2).add(entry as usize).write_volatile(entry << 12 | 7);
            low_table(3).add(entry as usize).write_volatile(entry + 1024 << 12 | 7);
        }
        directory.add(0x201).write_volatile(table as u32 | 0x87);
    }
    let out = state.with(DI, page + 0x40_2008).run();
    report::equal("without PSE bit 7 is ignored", out.vector, 0x30);
    entry(7);
}

fn pae_paging() {
    tables().reset();
    let pointers = low_table(0).cast::<u64>();
    let directories = |index: usize| low_table(1 + index).cast::<u64>();
    // SAFETY: tables of ours.
    unsafe {
        for index in 0..4usize {
            pointers.add(index).write_volatile(directories(index) as u64 | 1);
            for entry in 0..512usize {
                directories(index).add(entry).write_volatile(((index << 30 | entry << 21) as u64) | 0x87);
            }
        }
        let table = low_table(5).cast::<u64>();
        for entry in 0..512u64 {
            table.add(entry as usize).write_volatile(paging::FRAMES + (entry << 12) | 7);
        }
        directories(2).write_volatile(table as u64 | 7);
    }
    let page = 0x8000_0000u32;
    let read = code!(32; "mov eax, [edi]");
    let with = |code: &[u8]| {
        let mut state = legacy::State::protected(code).with(DI, page + 0x3008);
        (state.cr0, state.cr3, state.cr4) = (0x8001_0031, pointers as u32, 0x20);
        state
    };
    paging::write(0x3008, 0x2468_ace0u32);
    let out = with(read).run();
    report::equal("PAE paging", (out.vector, out.gprs[AX]), (0x30, 0x2468_ace0));
    let table = low_table(5).cast::<u64>();
    let entry = |bits: u64| unsafe { table.add(3).write_volatile((paging::FRAMES + 0x3000) | bits) };
    entry(7 | bit::NX);
    with(code!(32; "jmp edi")).run().check("an NX page is not executed", event(vector::PF, 0x11));
    entry(7 | 1 << 62);
    with(read).run().check("bit 62 is reserved with PAE", fault(vector::PF, 9));
    entry(7);
    // The four pointers are loaded by MOV CR3.
    for at in [1, 2, 5, 6, 7, 8, 63] {
        unsafe { pointers.add(3).write_volatile(directories(3) as u64 | 1) };
        let set = code!(32; "or dword ptr [esi + 24], ebx", "or dword ptr [esi + 28], ecx", "mov cr3, esi");
        let value = 1u64 << at;
        let state = with(set)
            .with(guests::long::reg::SI, pointers as u32)
            .with(BX, value as u32)
            .with(CX, (value >> 32) as u32);
        let out = state.run();
        report::equal(format_args!("a pointer's bit {at} is reserved"), (out.vector, out.error), (13, 0));
    }
    unsafe { pointers.add(3).write_volatile(directories(3) as u64 | 1) };
    let stale = code!(32; "and dword ptr [esi + 16], -2", "mov eax, [edi]", "mov cr3, esi", "mov eax, [edi]");
    let state = with(stale).with(guests::long::reg::SI, pointers as u32);
    let out = state.run();
    report::equal(
        "a pointer is read when CR3 is loaded, not before",
        (out.vector, out.error, out.eip - code_start(stale)),
        (14, 0, 9),
    );
}

fn code_start(code: &[u8]) -> u32 {
    code.as_ptr() as u32
}
