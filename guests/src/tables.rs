//! GDT, IDT and TSS of 64-bit mode, one set for each processor but the IDT.

use core::arch::asm;
use core::ptr::addr_of;

use crate::descriptor::{self, PRESENT, dpl, kind};

/// The most processors that are started.
pub const MAX_CPUS: usize = 16;

/// The GDT's selectors; those up to [`DATA16`](selector::DATA16) are the boot's.
pub mod selector {
    /// 64-bit code.
    pub const CODE: u16 = 0x08;
    /// Flat data.
    pub const DATA: u16 = 0x10;
    /// Flat 32-bit code.
    pub const CODE32: u16 = 0x18;
    /// 16-bit code, 64 KiB.
    pub const CODE16: u16 = 0x20;
    /// 16-bit data, 64 KiB.
    pub const DATA16: u16 = 0x28;
    /// Flat 32-bit code for ring 3; SYSRET's base.
    pub const USER_CODE32: u16 = 0x33;
    /// Flat data for ring 3.
    pub const USER_DATA: u16 = 0x3b;
    /// 64-bit code for ring 3.
    pub const USER_CODE: u16 = 0x43;
    /// The TSS, of two entries.
    pub const TSS: u16 = 0x50;
    /// The first of those that guests fill.
    pub const FREE: u16 = 0x60;
}

const GDT_ENTRIES: usize = 64;
const STACK: usize = 0x2000;
/// A TSS up to the end of its I/O permission bitmap, which allows nothing.
pub const TSS_BYTES: usize = 104;

/// A 64-bit TSS.
#[repr(C, packed(4))]
#[derive(Clone, Copy)]
pub struct Tss {
    reserved: u32,
    /// RSP for rings 0 to 2.
    pub rsp: [u64; 3],
    reserved2: u64,
    /// The interrupt stack table.
    pub ist: [u64; 7],
    reserved3: u64,
    reserved4: u16,
    /// Where the I/O permission bitmap begins.
    pub io_map: u16,
}

#[repr(C, align(16))]
struct Stacks([[u8; STACK]; 8]);

/// Each processor's GDT.
pub static mut GDT: [[u64; GDT_ENTRIES]; MAX_CPUS] = [[0; GDT_ENTRIES]; MAX_CPUS];
/// The IDT of all processors.
pub static mut IDT: [[u64; 2]; 256] = [[0; 2]; 256];
/// Each processor's TSS.
pub static mut TSS: [Tss; MAX_CPUS] = [Tss {
    reserved: 0,
    rsp: [0; 3],
    reserved2: 0,
    ist: [0; 7],
    reserved3: 0,
    reserved4: 0,
    io_map: TSS_BYTES as u16,
}; MAX_CPUS];
static mut STACKS: [Stacks; MAX_CPUS] = [const { Stacks([[0; STACK]; 8]) }; MAX_CPUS];

unsafe extern "C" {
    static long_entries: [u8; 0];
    static mut long_handlers: [usize; 256];
}

/// The limit and base that LGDT and LIDT take.
#[repr(C, packed)]
pub struct Pointer {
    /// Bytes, less 1.
    pub limit: u16,
    /// Linear address.
    pub base: u64,
}

/// Loads all of them on this processor.
pub fn load(cpu: usize) {
    unsafe {
        fill_tss(cpu);
        fill_gdt(cpu);
        if cpu == 0 {
            reset_idt();
        }
        let pointer = Pointer { limit: GDT_ENTRIES as u16 * 8 - 1, base: addr_of!(GDT[cpu]) as u64 };
        asm!("lgdt [{}]", in(reg) &pointer, options(nostack));
        load_idt();
        asm!("ltr {:x}", in(reg) selector::TSS, options(nostack));
    }
}

/// Loads the IDT.
pub fn load_idt() {
    let pointer = Pointer { limit: 256 * 16 - 1, base: addr_of!(IDT) as u64 };
    unsafe { asm!("lidt [{}]", in(reg) &pointer, options(nostack)) }
}

unsafe fn fill_tss(cpu: usize) {
    unsafe {
        let stack = |index: usize| addr_of!(STACKS[cpu].0[index]) as u64 + STACK as u64;
        TSS[cpu].rsp = [stack(0); 3];
        for index in 0..7 {
            TSS[cpu].ist[index] = stack(index + 1);
        }
    }
}

unsafe fn fill_gdt(cpu: usize) {
    use descriptor::{BIG, LONG, PAGES, segment};
    let code = PRESENT | kind::CODE_READ | 1;
    let data = PRESENT | kind::DATA | 1;
    let flat = 0xf_ffff;
    let tss = addr_of!(TSS) as u64 + (cpu * size_of::<Tss>()) as u64;
    let entries = [
        0,
        segment(0, flat, code, PAGES | LONG),
        segment(0, flat, data, PAGES | BIG),
        segment(0, flat, code, PAGES | BIG),
        segment(0, 0xffff, code, 0),
        segment(0, 0xffff, data, 0),
        segment(0, flat, code | dpl(3), PAGES | BIG),
        segment(0, flat, data | dpl(3), PAGES | BIG),
        segment(0, flat, code | dpl(3), PAGES | LONG),
        0,
        segment(tss, TSS_BYTES as u64 - 1, PRESENT | kind::TSS, 0),
        tss >> 32,
    ];
    unsafe { GDT[cpu][..entries.len()].copy_from_slice(&entries) }
}

/// The stack of the interrupt stack table that a vector's gate uses: interrupts do not overwrite what an exception found.
fn ist(vector: usize) -> u64 {
    match vector {
        2 => 2,
        0x40.. => 3 + (vector as u64 >> 4) % 4,
        _ => 1,
    }
}

/// Makes all gates as they were.
pub fn reset_idt() {
    for vector in 0..256 {
        let level = if matches!(vector, 3 | 4 | 0x30) { 3 } else { 0 };
        set_gate(vector, PRESENT | dpl(level) | kind::INTERRUPT, ist(vector));
    }
}

/// Makes a vector's gate, which leads to its entry.
pub fn set_gate(vector: usize, access: u64, ist: u64) {
    unsafe {
        let entry = addr_of!(long_entries) as u64 + 16 * vector as u64;
        IDT[vector] = [descriptor::gate(selector::CODE, entry, access, ist), entry >> 32];
    }
}

/// What a handler of interrupts finds: vector, error code, RIP, CS, RFLAGS, RSP, SS. It may change the latter five.
pub type Frame = [u64; 7];

/// Handles a vector's events from now on, instead of ending a snippet.
pub fn handle(vector: usize, handler: extern "C" fn(&mut Frame)) {
    unsafe { long_handlers[vector] = handler as usize }
}

/// Leaves a vector to snippets again.
pub fn unhandle(vector: usize) {
    unsafe { long_handlers[vector] = 0 }
}

/// Writes an entry of this processor's GDT; `selector` names it.
pub fn set_gdt(selector: u16, entry: u64) {
    unsafe { (&raw mut GDT[0][usize::from(selector >> 3)]).write_volatile(entry) }
}

/// An entry of the boot processor's GDT.
pub fn gdt(selector: u16) -> u64 {
    unsafe { (&raw const GDT[0][usize::from(selector >> 3)]).read_volatile() }
}
