//! The Linux boot protocol, 64-bit: `boot_params` and the command line.
//! The Linux/x86 Boot Protocol, *64-bit Boot Protocol*.

use std::ops::Range;

use guest_memory::GuestMemory;
use linux_loader::loader::bootparam::{
    CAN_USE_HEAP, SETUP_RNG_SEED, boot_e820_entry, boot_params, setup_header,
};
use vm_memory::ByteValued;
use x86::Gpr;

use super::bzimage::BzImage;
use super::error::{BootError, ImageError};
use super::low_memory::{self, BOOT_PARAMS, CMDLINE, SETUP_DATA};
use super::{BootPayload, Loaded, Protocol, initrd, long_mode};
use crate::layout;

/// type_of_loader: one without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// vid_mode: the mode that is set.
const VIDEO_MODE_NORMAL: u16 = 0xffff;
/// Offset of the 64-bit entry from the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;

/// Enters an unpacked kernel, loaded at `range`, at its entry. The header is that of its bzImage, where it has one.
pub(super) fn load_unpacked(
    memory: &GuestMemory,
    payload: &BootPayload<'_>,
    (range, entry): (Range<u64>, u64),
    (header, rsdp): (Option<setup_header>, u64),
) -> Result<Loaded, BootError> {
    let header = header.unwrap_or_else(default_header);
    // The kernel's own figure counts what it allocates before it reads the memory map.
    let init_end = header.pref_address.saturating_add(header.init_size.into());
    let kernel = range.start..range.end.max(init_end.min(low_memory::ram_end_below_4_gib(memory)));
    enter(memory, payload, header, Placement { kernel, entry, rsdp, protocol: Protocol::Linux64 })
}

/// Enters a bzImage's decompressor.
pub(super) fn load_stub(
    memory: &GuestMemory,
    payload: &BootPayload<'_>,
    image: &BzImage<'_>,
    rsdp: u64,
) -> Result<Loaded, BootError> {
    let mut header = image.header;
    if !image.has_64_bit_entry() {
        return Err(BootError::No64BitEntry(header.xloadflags));
    }
    let (start, kernel) = stub_placement(&header, image.protected.len() as u64)?;
    low_memory::check_kernel_range(memory, &kernel)?;
    low_memory::write(memory, start, image.protected)?;
    header.code32_start = start as u32;
    let entry = start + ENTRY_64;
    enter(memory, payload, header, Placement { kernel, entry, rsdp, protocol: Protocol::Stub })
}

/// Where the protected-mode code goes, and all that the decompressor and the kernel need.
///
/// A relocatable kernel is loaded where it prefers to run. Others are loaded at 1 MiB and move themselves there.
fn stub_placement(header: &setup_header, len: u64) -> Result<(u64, Range<u64>), ImageError> {
    let bad = |field, value, expected| ImageError::BadHeader { field, value, expected };
    let (alignment, preferred) = (u64::from(header.kernel_alignment), header.pref_address);
    let run = if header.relocatable_kernel != 0 {
        preferred
            .max(layout::HIGH_RAM_START)
            .checked_next_multiple_of(alignment)
            .ok_or_else(|| bad("pref_address", preferred, ", past the address space"))?
    } else {
        preferred
    };
    let start = if header.relocatable_kernel != 0 { run } else { layout::HIGH_RAM_START };
    let run_end = run.checked_add(header.init_size.into());
    let run_end = run_end.filter(|&end| end < layout::MMIO_HOLE.end && run >= start);
    let run_end = run_end.ok_or_else(|| bad("pref_address", preferred, ", not between 1 MiB and 4 GiB"))?;
    Ok((start, start..run_end.max(start.saturating_add(len))))
}

/// What has been decided about a Linux guest.
struct Placement {
    kernel: Range<u64>,
    entry: u64,
    rsdp: u64,
    protocol: Protocol,
}

fn enter(
    memory: &GuestMemory,
    payload: &BootPayload<'_>,
    header: setup_header,
    placement: Placement,
) -> Result<Loaded, BootError> {
    let Placement { kernel, entry, rsdp, protocol } = placement;
    let initrd = initrd::load(memory, payload.initrd, &kernel, header.initrd_addr_max.into())?;
    low_memory::write_cmdline(memory, payload.cmdline, header.cmdline_size as usize)?;
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags |= CAN_USE_HEAP;
    params.hdr.heap_end_ptr = 0xfe00;
    params.hdr.vid_mode = VIDEO_MODE_NORMAL;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.ramdisk_image = initrd.start as u32;
    params.hdr.ramdisk_size = (initrd.end - initrd.start) as u32;
    params.hdr.setup_data = match payload.seed {
        Some(seed) => write_seed(memory, &seed)?,
        None => 0,
    };
    fill_memory_map(memory, &mut params);
    low_memory::write(memory, BOOT_PARAMS, params.as_slice())?;
    let mut state = long_mode::enter_64_bit(memory, entry)?;
    state.gprs[Gpr::Rsi as usize] = BOOT_PARAMS;
    Ok(Loaded { state, protocol, kernel, initrd })
}

/// The header of a kernel that comes without a bzImage.
fn default_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: 1,
        initrd_addr_max: initrd::DEFAULT_ADDRESS_MAX as u32,
        kernel_alignment: 0x20_0000,
        cmdline_size: low_memory::DEFAULT_CMDLINE_SIZE as u32,
        ..setup_header::default()
    }
}

/// Writes the setup_data entry with random bytes; gives its address.
fn write_seed(memory: &GuestMemory, seed: &[u8; 32]) -> Result<u64, BootError> {
    let mut entry = Vec::with_capacity(48);
    entry.extend_from_slice(&0u64.to_le_bytes());
    entry.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    entry.extend_from_slice(&(seed.len() as u32).to_le_bytes());
    entry.extend_from_slice(seed);
    low_memory::write(memory, SETUP_DATA, &entry)?;
    Ok(SETUP_DATA)
}

fn fill_memory_map(memory: &GuestMemory, params: &mut boot_params) {
    let map = layout::memory_map(memory.regions());
    let mut table = params.e820_table;
    let count = map.len().min(table.len());
    for (entry, from) in table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: from.start, size: from.len, r#type: from.kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = count as u8;
}
