//! The PVH boot protocol: a 32-bit entry and `hvm_start_info`.
//! Xen documentation, *x86/HVM direct boot ABI (PVH)*.

use std::ops::Range;

use guest_memory::GuestMemory;
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;
use x86::Gpr;

use super::error::BootError;
use super::low_memory::{self, CMDLINE, DEFAULT_CMDLINE_SIZE, START_INFO};
use super::{BootPayload, Loaded, Protocol, initrd, long_mode};
use crate::layout;

/// The first version with a memory map.
const VERSION: u32 = 1;

/// Enters a kernel, loaded at `kernel`, at its PVH entry.
pub(super) fn load(
    memory: &GuestMemory,
    payload: &BootPayload<'_>,
    (kernel, entry): (Range<u64>, u32),
    rsdp: u64,
) -> Result<Loaded, BootError> {
    let initrd = initrd::load(memory, payload.initrd, &kernel, initrd::DEFAULT_ADDRESS_MAX)?;
    low_memory::write_cmdline(memory, payload.cmdline, DEFAULT_CMDLINE_SIZE)?;
    write_start_info(memory, &initrd, rsdp)?;
    let mut state = long_mode::enter_32_bit(memory, entry)?;
    state.gprs[Gpr::Rbx as usize] = START_INFO;
    Ok(Loaded { state, protocol: Protocol::Pvh, kernel, initrd })
}

/// Writes the start info, the module list and the memory map, one after another.
fn write_start_info(memory: &GuestMemory, initrd: &Range<u64>, rsdp: u64) -> Result<(), BootError> {
    let modules = START_INFO + size_of::<hvm_start_info>() as u64;
    let memmap = modules + size_of::<hvm_modlist_entry>() as u64;
    let map = layout::memory_map(memory.regions());
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        nr_modules: u32::from(!initrd.is_empty()),
        modlist_paddr: if initrd.is_empty() { 0 } else { modules },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: memmap,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    let module = hvm_modlist_entry {
        paddr: initrd.start,
        size: initrd.end - initrd.start,
        ..hvm_modlist_entry::default()
    };
    let mut bytes = [info.as_slice(), module.as_slice()].concat();
    for entry in map {
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.len,
            type_: entry.kind as u32,
            ..hvm_memmap_table_entry::default()
        };
        bytes.extend_from_slice(entry.as_slice());
    }
    low_memory::write(memory, START_INFO, &bytes)
}
