//! The boot processor's state at a kernel's entry: 64-bit with an identity map, or 32-bit without paging.

use engine::VcpuState;
use guest_memory::GuestMemory;
use x86::descriptor::Descriptor;
use x86::paging::{Entry, PAGE_SIZE};
use x86::{Cr0, Cr4, Efer, Gpr, Selector, TableRegister};

use super::error::BootError;
use super::low_memory::{self, GDT, PAGE_TABLES, STACK_TOP};

/// The selectors that the Linux boot protocol names.
const CODE: Selector = Selector(0x10);
const DATA: Selector = Selector(0x18);
const TSS: Selector = Selector(0x20);

/// Flat, present, accessed.
const CODE_64: Descriptor = Descriptor(0x00af_9b00_0000_ffff);
const CODE_32: Descriptor = Descriptor(0x00cf_9b00_0000_ffff);
const DATA_FLAT: Descriptor = Descriptor(0x00cf_9300_0000_ffff);
/// A busy 32-bit TSS at 0 of 0x68 bytes, as the PVH protocol wants it.
const TSS_BUSY: Descriptor = Descriptor(0x0000_8b00_0000_0067);

/// Bytes of the GDT.
pub(super) const GDT_SIZE: usize = 40;
/// GiB that the identity map covers.
const MAPPED_GIB: u64 = 4;
/// Bytes of a page of level 2.
const LARGE_PAGE: u64 = 2 << 20;

/// The state for a 64-bit entry: the first 4 GiB mapped one to one, interrupts off.
pub(super) fn enter_64_bit(memory: &GuestMemory, entry: u64) -> Result<VcpuState, BootError> {
    write_page_tables(memory)?;
    let mut state = flat(memory, entry, (CODE_64, GDT))?;
    state.cr0 = Cr0::PE | Cr0::ET | Cr0::NE | Cr0::PG;
    state.cr3 = PAGE_TABLES;
    state.cr4 = Cr4::PAE;
    state.efer = Efer::LME | Efer::LMA;
    Ok(state)
}

/// The state for a 32-bit entry: flat segments, no paging, interrupts off.
pub(super) fn enter_32_bit(memory: &GuestMemory, entry: u32) -> Result<VcpuState, BootError> {
    enter_32_bit_with(memory, entry, GDT)
}

/// The same with [`GDT_SIZE`] bytes of GDT at `gdt`.
pub(super) fn enter_32_bit_with(memory: &GuestMemory, entry: u32, gdt: u64) -> Result<VcpuState, BootError> {
    let mut state = flat(memory, entry.into(), (CODE_32, gdt))?;
    state.cr0 = Cr0::PE | Cr0::ET;
    Ok(state)
}

fn flat(memory: &GuestMemory, entry: u64, (code, gdt_at): (Descriptor, u64)) -> Result<VcpuState, BootError> {
    let gdt: [u64; GDT_SIZE / 8] = [0, 0, code.0, DATA_FLAT.0, TSS_BUSY.0];
    write_words(memory, gdt_at, &gdt)?;
    let data = DATA_FLAT.segment(DATA);
    let mut state = VcpuState::reset();
    state.segments = [data, code.segment(CODE), data, data, data, data];
    state.tr = TSS_BUSY.segment(TSS);
    state.gdtr = TableRegister { base: gdt_at, limit: GDT_SIZE as u16 - 1 };
    state.idtr = TableRegister { base: 0, limit: 0 };
    state.gprs = [0; 16];
    state.gprs[Gpr::Rsp as usize] = STACK_TOP;
    state.rip = entry;
    Ok(state)
}

/// Maps the first 4 GiB to themselves with 2 MiB pages, which every x86-64 processor has.
fn write_page_tables(memory: &GuestMemory) -> Result<(), BootError> {
    let table = (Entry::P | Entry::RW).bits();
    let large = (Entry::P | Entry::RW | Entry::PS).bits();
    let (pdpt, directories) = (PAGE_TABLES + PAGE_SIZE, PAGE_TABLES + 2 * PAGE_SIZE);
    low_memory::zero(memory, PAGE_TABLES..directories)?;
    write_words(memory, PAGE_TABLES, &[pdpt | table])?;
    let pdpt_entries: Vec<u64> = (0..MAPPED_GIB).map(|i| (directories + i * PAGE_SIZE) | table).collect();
    write_words(memory, pdpt, &pdpt_entries)?;
    let pages: Vec<u64> = (0..MAPPED_GIB * 512).map(|i| (i * LARGE_PAGE) | large).collect();
    write_words(memory, directories, &pages)
}

fn write_words(memory: &GuestMemory, address: u64, words: &[u64]) -> Result<(), BootError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    low_memory::write(memory, address, &bytes)
}
