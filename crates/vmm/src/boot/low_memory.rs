//! What the loader writes into low memory, and writing in general.
//!
//! ```text
//! 0x0_1000  GDT
//! 0x0_2000  PVH: hvm_start_info, module list, memory map
//! 0x0_6000  Linux: setup_data with the seed
//! 0x0_7000  Linux: boot_params, the "zero page"
//! 0x0_8000  a page of stack
//! 0x0_9000  page tables, 6 pages
//! 0x2_0000  command line
//! 0x3_0000  the end
//! ```

use std::ops::Range;

use guest_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::error::BootError;
use crate::layout;

pub(super) const GDT: u64 = 0x1000;
pub(super) const START_INFO: u64 = 0x2000;
pub(super) const SETUP_DATA: u64 = 0x6000;
pub(super) const BOOT_PARAMS: u64 = 0x7000;
pub(super) const STACK_TOP: u64 = 0x9000;
pub(super) const PAGE_TABLES: u64 = 0x9000;
pub(super) const CMDLINE: u64 = 0x2_0000;
/// First address that a kernel may be linked to.
pub(super) const END: u64 = 0x3_0000;

/// The most bytes of command line, without the NUL, that Linux keeps; the loader has room for more.
pub(super) const DEFAULT_CMDLINE_SIZE: usize = 2047;
const MAX_CMDLINE_SIZE: usize = (END - CMDLINE) as usize - 1;

/// Copies bytes to RAM.
pub(super) fn write(memory: &GuestMemory, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory.vm().write_slice(bytes, GuestAddress(address)).map_err(|_| BootError::NoRam(address))
}

/// Zeroes RAM.
pub(super) fn zero(memory: &GuestMemory, range: Range<u64>) -> Result<(), BootError> {
    static ZEROS: [u8; 0x1_0000] = [0; 0x1_0000];
    let mut address = range.start;
    while address < range.end {
        let len = (range.end - address).min(ZEROS.len() as u64);
        write(memory, address, &ZEROS[..len as usize])?;
        address += len;
    }
    Ok(())
}

/// First address above the RAM below 4 GiB.
pub(super) fn ram_end_below_4_gib(memory: &GuestMemory) -> u64 {
    let below = memory.regions().filter(|r| !r.read_only && r.start < layout::MMIO_HOLE.start);
    below.map(|r| r.start + r.len).max().unwrap_or(0)
}

/// Checks that a kernel may lie there: writable RAM below 4 GiB, which is what is mapped at its entry, and none of the
/// loader's.
pub(super) fn check_kernel_range(memory: &GuestMemory, range: &Range<u64>) -> Result<(), BootError> {
    check_range(memory, range, END)
}

/// The same for the guests of a loader that keeps the addresses below `lowest` to itself.
pub(super) fn check_range(memory: &GuestMemory, range: &Range<u64>, lowest: u64) -> Result<(), BootError> {
    let Range { start, end } = *range;
    let fits = |r: guest_memory::Region| {
        let below = !r.read_only && r.start < layout::MMIO_HOLE.start;
        below && start >= r.start.max(lowest) && end <= r.start.saturating_add(r.len)
    };
    if memory.regions().any(fits) && !(start < layout::LOW_RAM_END && end > layout::FACS) {
        return Ok(());
    }
    let ram_end = ram_end_below_4_gib(memory);
    if (layout::HIGH_RAM_START..layout::MMIO_HOLE.start).contains(&start) && end > ram_end {
        return Err(BootError::KernelTooBig { start, end, ram_end });
    }
    Err(BootError::KernelOutsideRam { start, end })
}

/// Writes the command line with its NUL; `limit` is the kernel's, in bytes without the NUL.
pub(super) fn write_cmdline(memory: &GuestMemory, cmdline: &str, limit: usize) -> Result<(), BootError> {
    let limit = limit.min(MAX_CMDLINE_SIZE);
    if cmdline.len() > limit {
        return Err(BootError::CmdlineTooLong { len: cmdline.len(), limit });
    }
    if let Some(at) = cmdline.find('\0') {
        return Err(BootError::CmdlineNul(at));
    }
    write(memory, CMDLINE, cmdline.as_bytes())?;
    write(memory, CMDLINE + cmdline.len() as u64, &[0])
}
