//! Running a snippet outside long mode: protected mode of 32 and 16 bits, virtual-8086 mode and real mode.
//!
//! Each run has a GDT, an IDT and a TSS that a guest may have changed since [`Tables::reset`]. The way into a snippet is
//! an IRET, so that every register, privilege level and flag can be given.

use core::fmt;
use core::ptr::addr_of;

use crate::cpu::{flag, vector};
use crate::descriptor::{ACCESSED, BIG, PAGES, PRESENT, dpl, gate, kind, segment};
use crate::long::Event;

/// The GDT's selectors.
pub mod selector {
    /// Flat code.
    pub const CODE: u16 = 0x08;
    /// Flat data.
    pub const DATA: u16 = 0x10;
    /// Code of 16 bits, 64 KiB at 0.
    pub const CODE16: u16 = 0x18;
    /// Data of 16 bits, 64 KiB at 0.
    pub const DATA16: u16 = 0x20;
    /// Flat code for ring 3.
    pub const USER_CODE: u16 = 0x2b;
    /// Flat data for ring 3.
    pub const USER_DATA: u16 = 0x33;
    /// The TSS.
    pub const TSS: u16 = 0x38;
    /// The TSS of double faults.
    pub const DF_TSS: u16 = 0x40;
    /// The LDT, empty.
    pub const LDT: u16 = 0x48;
    /// The first of those that guests fill.
    pub const FREE: u16 = 0x50;
}

const GDT_ENTRIES: usize = 64;
/// Where snippets of real and virtual-8086 mode are copied to, as a segment.
pub const REAL_SEGMENT: u16 = 0x2000;
/// The stack's segment in these modes.
pub const REAL_STACK: u16 = 0x3000;
/// A segment for data in these modes.
pub const REAL_DATA: u16 = 0x4000;

/// A 32-bit TSS with its interrupt redirection and I/O permission bitmaps.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)] // The names are the manual's.
pub struct Tss {
    pub link: u32,
    pub esp0: u32,
    pub ss0: u32,
    pub esp1: u32,
    pub ss1: u32,
    pub esp2: u32,
    pub ss2: u32,
    pub cr3: u32,
    pub eip: u32,
    pub eflags: u32,
    pub eax: u32,
    pub ecx: u32,
    pub edx: u32,
    pub ebx: u32,
    pub esp: u32,
    pub ebp: u32,
    pub esi: u32,
    pub edi: u32,
    pub es: u32,
    pub cs: u32,
    pub ss: u32,
    pub ds: u32,
    pub fs: u32,
    pub gs: u32,
    pub ldt: u32,
    pub trap: u16,
    pub io_map: u16,
    /// One bit for each vector: INT n of virtual-8086 mode goes through the IDT.
    pub redirection: [u8; 32],
    /// One bit for each of the first ports, and the byte of ones after them.
    pub ports: [u8; 129],
}

impl Tss {
    /// Its I/O permission bitmap's offset, and its limit.
    pub const IO_MAP: u16 = 104 + 32;
    /// The last byte.
    pub const LIMIT: u64 = 104 + 32 + 128;

    /// A task in ring 0 with flat segments that begins at `eip`.
    pub fn task(eip: u32, esp: u32) -> Self {
        let mut tss = Self::EMPTY;
        let data = selector::DATA.into();
        (tss.eip, tss.esp, tss.eflags) = (eip, esp, 2);
        (tss.cs, tss.ss, tss.ds, tss.es, tss.fs, tss.gs) =
            (selector::CODE.into(), data, data, data, data, data);
        tss
    }

    const EMPTY: Self = {
        // SAFETY: plain numbers.
        let mut tss: Self = unsafe { core::mem::zeroed() };
        tss.io_map = Self::IO_MAP;
        tss.redirection = [0; 32];
        tss.ports = [0xff; 129];
        tss
    };
}

/// What legacy modes refer to.
#[repr(C, align(4096))]
pub struct Tables {
    /// The TSS that snippets run in.
    pub tss: Tss,
    /// The TSS of the double fault's handler.
    pub df_tss: Tss,
    /// Two TSSs for a guest's tasks.
    pub tasks: [Tss; 2],
    /// The GDT.
    pub gdt: [u64; GDT_ENTRIES],
    /// The IDT.
    pub idt: [u64; 256],
    /// The LDT.
    pub ldt: [u64; 16],
    stack0: [u8; 0x1000],
    stack1: [u8; 0x400],
    stack2: [u8; 0x400],
    df_stack: [u8; 0x400],
}

static mut TABLES: Tables = unsafe { core::mem::zeroed() };

/// The tables.
pub fn tables() -> &'static mut Tables {
    // SAFETY: one processor alone runs guests' checks, and holds no reference across a run.
    unsafe { &mut *(&raw mut TABLES) }
}

unsafe extern "C" {
    fn legacy_run();
    static legacy_entries: [u8; 0];
    static real_entries: [u8; 0];
    static legacy_task_error: [u8; 0];
    static legacy_task_plain: [u8; 0];
    static mut LEGACY_STATE: State;
}

fn end<T>(part: &T) -> u32 {
    addr_of!(*part) as u32 + size_of::<T>() as u32
}

impl Tables {
    /// Makes all as it was.
    pub fn reset(&mut self) {
        let code = PRESENT | kind::CODE_READ | ACCESSED;
        let data = PRESENT | kind::DATA | ACCESSED;
        let flat = 0xf_ffff;
        self.tss = Tss::EMPTY;
        (self.tss.esp0, self.tss.ss0) = (end(&self.stack0), selector::DATA.into());
        self.tss.esp1 = end(&self.stack1);
        self.tss.esp2 = end(&self.stack2);
        self.df_tss = Tss::task(addr_of!(legacy_task_error) as u32, end(&self.df_stack));
        self.df_tss.eax = vector::DF as u32;
        self.tasks = [Tss::EMPTY; 2];
        self.gdt = [0; GDT_ENTRIES];
        self.ldt = [0; 16];
        let tss = |tss: &Tss| segment(addr_of!(*tss) as u64, Tss::LIMIT, PRESENT | kind::TSS, 0);
        let entries = [
            0,
            segment(0, flat, code, PAGES | BIG),
            segment(0, flat, data, PAGES | BIG),
            segment(0, 0xffff, code, 0),
            segment(0, 0xffff, data, 0),
            segment(0, flat, code | dpl(3), PAGES | BIG),
            segment(0, flat, data | dpl(3), PAGES | BIG),
            tss(&self.tss),
            tss(&self.df_tss),
            segment(addr_of!(self.ldt) as u64, 16 * 8 - 1, PRESENT | kind::LDT, 0),
        ];
        self.gdt[..entries.len()].copy_from_slice(&entries);
        for number in 0..256 {
            let level = if matches!(number, 3 | 4 | 0x30) { 3 } else { 0 };
            self.set_gate(number, PRESENT | dpl(level) | kind::INTERRUPT);
        }
        self.idt[vector::DF as usize] = gate(selector::DF_TSS, 0, PRESENT | kind::TASK, 0);
    }

    /// Makes a vector's gate, which leads to its entry.
    pub fn set_gate(&mut self, vector: usize, access: u64) {
        self.idt[vector] = gate(selector::CODE, entry(vector), access, 0);
    }

    /// Writes a GDT entry.
    pub fn set(&mut self, selector: u16, entry: u64) {
        self.gdt[usize::from(selector >> 3)] = entry;
    }

    /// A GDT entry.
    pub fn get(&self, selector: u16) -> u64 {
        // SAFETY: the processor writes it as well.
        unsafe { addr_of!(self.gdt[usize::from(selector >> 3)]).read_volatile() }
    }

    /// Whether a TSS is busy.
    pub fn is_busy(&self, selector: u16) -> bool {
        self.get(selector) >> 41 & 1 == 1
    }

    /// Leads a vector through a task gate to a task that reports it.
    pub fn set_task_gate(&mut self, vector: usize, has_error: bool) {
        let handler = if has_error { addr_of!(legacy_task_error) } else { addr_of!(legacy_task_plain) };
        self.df_tss.eip = handler as u32;
        self.df_tss.eax = vector as u32;
        self.idt[vector] = gate(selector::DF_TSS, 0, PRESENT | kind::TASK, 0);
    }
}

/// Where a vector's entry is.
pub fn entry(vector: usize) -> u64 {
    addr_of!(legacy_entries) as u64 + 16 * vector as u64
}

/// Writes the interrupt vector table of real mode.
pub fn reset_vectors() {
    for vector in 0..256u32 {
        // SAFETY: the first KiB is nobody's.
        unsafe { low::<u32>(4 * vector).write_volatile(addr_of!(real_entries) as u32 + 6 * vector) }
    }
}

/// A linear address below 1 MiB as a pointer.
pub fn low<T>(address: u32) -> *mut T {
    address as usize as *mut T
}

/// The registers' numbers, as instructions encode them.
pub use crate::long::reg;

/// All registers before a snippet, and after it with the event that ended it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct State {
    /// EAX to EDI.
    pub gprs: [u32; 8],
    /// EIP.
    pub eip: u32,
    /// EFLAGS.
    pub eflags: u32,
    /// CS; 16 bits of this and the others count.
    pub cs: u32,
    /// SS.
    pub ss: u32,
    /// DS.
    pub ds: u32,
    /// ES.
    pub es: u32,
    /// FS.
    pub fs: u32,
    /// GS.
    pub gs: u32,
    /// CR0.
    pub cr0: u32,
    /// CR2 after it.
    pub cr2: u32,
    /// CR3.
    pub cr3: u32,
    /// CR4.
    pub cr4: u32,
    /// DR6 after it.
    pub dr6: u32,
    /// The task register; not loaded where it is 0.
    pub tr: u32,
    /// The LDTR.
    pub ldtr: u32,
    /// The event's vector.
    pub vector: u32,
    /// Its error code; 0 where it has none.
    pub error: u32,
    real: u32,
    /// Whether the event that is expected has no error code, whatever its vector: an INT n, or one of virtual-8086 mode.
    pub plain: u32,
    gdtr: [u32; 2],
    idtr: [u32; 2],
    /// DR7.
    pub dr7: u32,
    /// Where the event's frame is: ESP, without an error code.
    pub frame: u32,
    pointer: [u32; 2],
    start: u32,
    size: u32,
}

#[repr(C, align(4096))]
struct Stack([u8; 0x2000]);

static mut STACK: Stack = Stack([0; 0x2000]);

/// Where protected-mode snippets' stacks end.
pub fn stack() -> u32 {
    addr_of!(STACK) as u32 + 0x1000
}

const CR0_PE: u32 = 1;
const CR0: u32 = 0x30;

impl State {
    /// A snippet in ring 0 of 32-bit protected mode, without paging.
    pub fn protected(code: &[u8]) -> Self {
        let data = u32::from(selector::DATA);
        let mut gprs = [0; 8];
        gprs[reg::SP] = stack();
        // SAFETY: plain numbers.
        let empty: Self = unsafe { core::mem::zeroed() };
        Self {
            gprs,
            eip: code.as_ptr() as u32,
            eflags: 2,
            cs: selector::CODE.into(),
            ss: data,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            cr0: CR0 | CR0_PE,
            tr: selector::TSS.into(),
            dr7: 0x400,
            start: code.as_ptr() as u32,
            size: code.len() as u32,
            ..empty
        }
    }

    /// A snippet in ring 3 of 32-bit protected mode.
    pub fn user(code: &[u8]) -> Self {
        let data = selector::USER_DATA.into();
        let cs = selector::USER_CODE.into();
        Self { cs, ss: data, ds: data, es: data, fs: data, gs: data, ..Self::protected(code) }
    }

    /// A snippet of 16-bit code in real mode. It is copied to [`REAL_SEGMENT`].
    pub fn real(code: &[u8]) -> Self {
        reset_vectors();
        Self { cr0: CR0, real: selector::DATA16.into(), tr: 0, ..Self::low(code) }
    }

    /// The same with data segments of 4 GiB.
    pub fn unreal(code: &[u8]) -> Self {
        Self { real: selector::DATA.into(), ..Self::real(code) }
    }

    /// A snippet of 16-bit code in virtual-8086 mode, with IOPL 3. It is copied to [`REAL_SEGMENT`].
    pub fn v86(code: &[u8]) -> Self {
        reset_vectors();
        Self { eflags: (flag::VM | flag::IOPL) as u32 | 2, ..Self::low(code) }
    }

    fn low(code: &[u8]) -> Self {
        let base = low::<u8>(u32::from(REAL_SEGMENT) << 4);
        for (index, byte) in code.iter().enumerate() {
            // SAFETY: conventional memory, which nothing else uses.
            unsafe { base.add(index).write_volatile(*byte) };
        }
        let mut state = Self::protected(code);
        state.eip = 0;
        state.start = 0;
        state.gprs[reg::SP] = 0x8000;
        let data = REAL_DATA.into();
        Self {
            cs: REAL_SEGMENT.into(),
            ss: REAL_STACK.into(),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ..state
        }
    }

    /// The same with a register.
    pub fn with(mut self, register: usize, value: u32) -> Self {
        self.gprs[register] = value;
        self
    }

    /// The same with these flags too.
    pub fn flags(mut self, flags: u64) -> Self {
        self.eflags |= flags as u32;
        self
    }

    /// The same without these flags.
    pub fn without(mut self, flags: u64) -> Self {
        self.eflags &= !(flags as u32);
        self
    }

    /// The same for an event whose vector would otherwise have an error code.
    pub fn without_error(mut self) -> Self {
        self.plain = 1;
        self
    }

    /// Runs it until an event.
    pub fn run(mut self) -> Self {
        let tables = tables();
        // The run before left its TSS busy.
        if self.tr != 0 {
            tables.gdt[self.tr as usize >> 3] &= !(2 << 40);
        }
        let pointer = |base: u64, limit: u64| [(limit as u32) << 16, base as u32];
        self.gdtr = pointer(addr_of!(tables.gdt) as u64, GDT_ENTRIES as u64 * 8 - 1);
        self.idtr = match self.real {
            0 => pointer(addr_of!(tables.idt) as u64, 0x7ff),
            _ => pointer(0, 0x3ff),
        };
        self.pointer = [self.gprs[reg::SP], self.ss];
        let mut after = unsafe {
            LEGACY_STATE = self;
            legacy_run();
            (&raw const LEGACY_STATE).read_volatile()
        };
        for register in
            [&mut after.cs, &mut after.ss, &mut after.ds, &mut after.es, &mut after.fs, &mut after.gs]
        {
            *register &= 0xffff;
        }
        after
    }

    /// What ended it; with the place, or without it where `like` has none.
    pub fn event_like(&self, like: Event) -> Event {
        let at = like.at.map(|_| u64::from(self.eip.wrapping_sub(self.start)));
        Event { vector: self.vector.into(), error: self.error.into(), at }
    }

    /// A check of what ended it.
    pub fn check(&self, name: impl fmt::Display, expected: Event) {
        crate::report::equal(name, self.event_like(expected), expected);
    }
}
