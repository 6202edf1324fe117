//! The Multiboot protocol, version 1: images for many boot loaders, test suites and small operating systems among them.
//! *Multiboot Specification version 0.6.96*.
//!
//! An image has a header in its first 8 KiB. Where the header tells addresses the file is flat, else it is ELF: one of
//! 32 bits (which may well hold 64-bit code), or one of 64 bits with a 32-bit entry. Image, modules and information lie
//! so:
//!
//! ```text
//! image        where it is linked to, from address 0 on
//! modules      on pages after the image, from 1 MiB on
//! information  at 0x1_0000; where the image is there below 0x9_f000, and else after the modules
//! ```
//!
//! Images look for room of their own at the end of conventional memory, which is why the information is not there.

use std::ops::Range;

use devices::serial;
use guest_memory::{GuestMemory, PAGE_SIZE};
use x86::Gpr;

use super::elf::Kernel;
use super::error::{BootError, ImageError};
use super::image::{ELF_MAGIC, KernelImage};
use super::low_memory;
use super::{BootPayload, Loaded, Module, Protocol, long_mode};
use crate::layout;

/// What EAX tells the image.
pub(super) const LOADER_MAGIC: u64 = 0x2bad_b002;
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The header lies within so many of the file's first bytes, on a multiple of 4.
const SEARCHED: usize = 8192;
/// Where the information lies if it can, guest-physical.
const LOW_INFORMATION: u64 = 0x1_0000;
/// What images read of a BIOS's data area, guest-physical: COM1's and COM2's ports, the conventional memory in KiB.
const BIOS_DATA: [(u64, u16); 3] = [
    (0x400, serial::COM1_BASE as u16),
    (0x402, serial::COM2_BASE as u16),
    (0x413, (layout::FACS >> 10) as u16),
];
const BIOS_DATA_END: u64 = 0x500;
/// The loader's name, as the information has it.
const LOADER_NAME: &str = "Ringside";
/// The most bytes of command line, without the NUL.
const MAX_CMDLINE: usize = 0x7fff;

/// The header's flags.
mod wants {
    /// Modules on page boundaries, memory information, a video mode: what is always given, or may be refused.
    pub(super) const KNOWN: u32 = 0b111 | ADDRESSES;
    /// Whatever a loader that does not know it must refuse.
    pub(super) const REQUIRED: u32 = 0xffff;
    /// The header's address fields are valid.
    pub(super) const ADDRESSES: u32 = 1 << 16;
}

/// The information's flags: which of its fields are valid.
mod has {
    pub(super) const MEMORY: u32 = 1 << 0;
    pub(super) const CMDLINE: u32 = 1 << 2;
    pub(super) const MODULES: u32 = 1 << 3;
    pub(super) const MEMORY_MAP: u32 = 1 << 6;
    pub(super) const LOADER_NAME: u32 = 1 << 9;
}

/// The information's fields, as offsets in bytes.
mod info {
    pub(super) const FLAGS: usize = 0;
    /// KiB from address 0.
    pub(super) const MEM_LOWER: usize = 4;
    /// KiB from 1 MiB.
    pub(super) const MEM_UPPER: usize = 8;
    pub(super) const CMDLINE: usize = 16;
    pub(super) const MODS_COUNT: usize = 20;
    pub(super) const MODS_ADDR: usize = 24;
    pub(super) const MMAP_LENGTH: usize = 44;
    pub(super) const MMAP_ADDR: usize = 48;
    pub(super) const BOOT_LOADER_NAME: usize = 64;
    /// Bytes, up to the fields of the framebuffer.
    pub(super) const SIZE: usize = 120;
}

/// An image's header.
pub(super) struct Header {
    /// Where in the file it begins.
    offset: usize,
    flags: u32,
    addresses: Addresses,
}

/// The address fields, guest-physical; meaningless in a header without [`wants::ADDRESSES`].
struct Addresses {
    header: u32,
    load: u32,
    /// First address after the bytes of the file; 0 for all of them.
    load_end: u32,
    /// First address after the zeros behind them; 0 for none.
    bss_end: u32,
    entry: u32,
}

impl Header {
    /// Looks for a header.
    pub(super) fn find(file: &[u8]) -> Option<Self> {
        let searched = &file[..file.len().min(SEARCHED)];
        (0..searched.len()).step_by(4).find_map(|offset| {
            let word = |index: usize| word(searched, offset + 4 * index);
            let (magic, flags, checksum) = (word(0)?, word(1)?, word(2)?);
            if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
                return None;
            }
            let field = |index: usize| word(index).unwrap_or(0);
            let addresses = Addresses {
                header: field(3),
                load: field(4),
                load_end: field(5),
                bss_end: field(6),
                entry: field(7),
            };
            Some(Self { offset, flags, addresses })
        })
    }

    /// The image's bytes and where they go.
    fn image<'a>(&self, file: &'a [u8]) -> Result<Kernel<'a>, BootError> {
        let unknown = self.flags & wants::REQUIRED & !wants::KNOWN;
        if unknown != 0 {
            return Err(BootError::MultibootFlags(unknown));
        }
        if self.flags & wants::ADDRESSES != 0 {
            return self.flat(file).map_err(BootError::Image);
        }
        if !file.starts_with(&ELF_MAGIC) {
            return Err(BootError::MultibootNoAddresses);
        }
        const CLASS: usize = 4;
        let parsed = if file.get(CLASS) == Some(&1) { Kernel::parse_32(file) } else { Kernel::parse(file) };
        parsed.map_err(|error| ImageError::Elf(error).into())
    }

    /// A flat image. *Multiboot Specification*, *The address fields of Multiboot header*.
    fn flat<'a>(&self, file: &'a [u8]) -> Result<Kernel<'a>, ImageError> {
        let Addresses { header, load, load_end, bss_end, entry } = self.addresses;
        let bad = |field, value: u32, expected| ImageError::BadMultiboot { field, value, expected };
        let before = header.checked_sub(load).map(|len| len as usize);
        let Some(start) = before.and_then(|before| self.offset.checked_sub(before)) else {
            return Err(bad("load_addr", load, ": the file does not begin early enough for it"));
        };
        let len = match load_end {
            0 => file.len() - start,
            end => end.checked_sub(load).ok_or(bad("load_end_addr", end, ", below load_addr"))? as usize,
        };
        let needs = start.saturating_add(len);
        let truncated =
            ImageError::Truncated { what: "the image", needs: needs as u64, has: file.len() as u64 };
        let bytes = file.get(start..needs).ok_or(truncated)?;
        let end = (u64::from(load) + len as u64).max(bss_end.into());
        if !(u64::from(load)..end).contains(&entry.into()) {
            return Err(bad("entry_addr", entry, ", outside of the image"));
        }
        Ok(Kernel::flat(load.into(), end - u64::from(load), bytes, entry.into()))
    }
}

/// The little-endian word at `offset`.
fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().map(|word| u32::from_le_bytes(*word))
}

/// The header by which the file is to be booted. Where no protocol was asked for, one that says more of the file comes
/// first: Linux's own, and PVH.
pub(super) fn header_for(payload: &BootPayload<'_>) -> Result<Option<Header>, BootError> {
    let header = Header::find(payload.kernel);
    match payload.protocol {
        Protocol::Multiboot => header.map(Some).ok_or(BootError::NoMultibootHeader),
        Protocol::Auto if header.is_some() => match KernelImage::identify(payload.kernel) {
            Ok(KernelImage::BzImage(_)) => Ok(None),
            Ok(KernelImage::Elf(bytes)) if has_pvh_entry(bytes) => Ok(None),
            _ => Ok(header),
        },
        _ => Ok(None),
    }
}

fn has_pvh_entry(bytes: &[u8]) -> bool {
    Kernel::parse(bytes).is_ok_and(|kernel| kernel.pvh_entry.is_some())
}

/// Loads an image with its modules, and enters it.
pub(super) fn load(
    memory: &GuestMemory,
    payload: &BootPayload<'_>,
    header: &Header,
) -> Result<Loaded, BootError> {
    let image = header.image(payload.kernel)?;
    let Ok(entry) = u32::try_from(image.entry) else {
        return Err(ImageError::Elf(super::ElfError::EntryOutside(image.entry)).into());
    };
    let kernel = image.load(memory, 0)?;
    if kernel.start >= BIOS_DATA_END {
        for (address, value) in BIOS_DATA {
            low_memory::write(memory, address, &value.to_le_bytes())?;
        }
    }
    let modules = load_modules(memory, payload, &kernel)?;
    let told = |at| information(memory, payload, &modules, at);
    let all = modules.first().map_or(kernel.end, |first| first.0.start)
        ..modules.last().map_or(kernel.end, |last| last.0.end);
    let gdt_offset = told(0)?.len().next_multiple_of(8);
    let at = place_information(memory, &kernel, &all, (gdt_offset + long_mode::GDT_SIZE) as u64)?;
    low_memory::write(memory, at, &told(at)?)?;
    let mut state = long_mode::enter_32_bit_with(memory, entry, at + gdt_offset as u64)?;
    state.gprs[Gpr::Rax as usize] = LOADER_MAGIC;
    state.gprs[Gpr::Rbx as usize] = at;
    Ok(Loaded { state, protocol: Protocol::Multiboot, kernel, initrd: all })
}

/// Loads the modules one after another behind the image, where loaders put them; gives where each is and its text.
fn load_modules<'a>(
    memory: &GuestMemory,
    payload: &BootPayload<'a>,
    kernel: &Range<u64>,
) -> Result<Vec<(Range<u64>, &'a str)>, BootError> {
    let initrd = payload.initrd.filter(|bytes| !bytes.is_empty());
    let initrd = initrd.map(|bytes| Module { bytes, text: payload.initrd_name });
    let mut next = kernel.end.max(layout::HIGH_RAM_START).next_multiple_of(PAGE_SIZE);
    let mut loaded = Vec::new();
    for Module { bytes, text } in initrd.into_iter().chain(payload.modules.iter().copied()) {
        if let Some(at) = text.find('\0') {
            return Err(BootError::ModuleNul(at));
        }
        let len = bytes.len() as u64;
        let end = next.saturating_add(len);
        if end > low_memory::ram_end_below_4_gib(memory) {
            let needs = end.next_multiple_of(layout::MIB);
            return Err(BootError::InitrdTooBig { bytes: len, needs });
        }
        low_memory::write(memory, next, bytes)?;
        loaded.push((next..end, text));
        next = end.next_multiple_of(PAGE_SIZE);
    }
    Ok(loaded)
}

/// Finds room for the information, on a page.
fn place_information(
    memory: &GuestMemory,
    kernel: &Range<u64>,
    modules: &Range<u64>,
    len: u64,
) -> Result<u64, BootError> {
    let top = (layout::FACS - len) / PAGE_SIZE * PAGE_SIZE;
    let is_free = |start: &u64| kernel.end <= *start || kernel.start >= start + len;
    if let Some(low) = [LOW_INFORMATION, top].into_iter().find(is_free) {
        return Ok(low);
    }
    let high = modules.end.max(layout::HIGH_RAM_START).next_multiple_of(PAGE_SIZE);
    if high.saturating_add(len) > low_memory::ram_end_below_4_gib(memory) {
        return Err(BootError::NoRam(high));
    }
    Ok(high)
}

/// The command line: by convention the image's own name comes first.
fn cmdline(payload: &BootPayload<'_>) -> Result<String, BootError> {
    let cmdline = format!("{} {}", payload.kernel_name, payload.cmdline).trim_end().to_owned();
    match cmdline.find('\0') {
        Some(at) => Err(BootError::CmdlineNul(at)),
        None if cmdline.len() > MAX_CMDLINE => {
            Err(BootError::CmdlineTooLong { len: cmdline.len(), limit: MAX_CMDLINE })
        }
        None => Ok(cmdline),
    }
}

/// What the image is told, with all that it refers to, for the address `at`.
fn information(
    memory: &GuestMemory,
    payload: &BootPayload<'_>,
    modules: &[(Range<u64>, &str)],
    at: u64,
) -> Result<Vec<u8>, BootError> {
    let mut block = Block { at, bytes: vec![0; info::SIZE] };
    block.put(info::MEM_LOWER, layout::FACS >> 10);
    let upper = low_memory::ram_end_below_4_gib(memory).saturating_sub(layout::HIGH_RAM_START);
    block.put(info::MEM_UPPER, upper >> 10);
    let map = memory_map(memory);
    block.put(info::MMAP_LENGTH, map.len() as u64);
    let map = block.append(&map);
    block.put(info::MMAP_ADDR, map);
    let mut flags = has::MEMORY | has::CMDLINE | has::MEMORY_MAP | has::LOADER_NAME;
    if !modules.is_empty() {
        flags |= has::MODULES;
        let mut list = Vec::new();
        for (range, text) in modules {
            let text = block.append_string(text);
            list.extend([range.start, range.end, text, 0].map(|word| (word as u32).to_le_bytes()).concat());
        }
        let list = block.append(&list);
        block.put(info::MODS_COUNT, modules.len() as u64);
        block.put(info::MODS_ADDR, list);
    }
    let cmdline = block.append_string(&cmdline(payload)?);
    block.put(info::CMDLINE, cmdline);
    let name = block.append_string(LOADER_NAME);
    block.put(info::BOOT_LOADER_NAME, name);
    block.put(info::FLAGS, flags.into());
    Ok(block.bytes)
}

/// Bytes that refer to each other by address.
struct Block {
    /// Guest-physical address of the first.
    at: u64,
    bytes: Vec<u8>,
}

impl Block {
    /// Sets the 32-bit field at an offset; all that is put here lies below 4 GiB.
    fn put(&mut self, field: usize, value: u64) {
        self.bytes[field..field + 4].copy_from_slice(&(value as u32).to_le_bytes());
    }

    /// Appends bytes on a multiple of 8; gives their address.
    fn append(&mut self, bytes: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let address = self.at + self.bytes.len() as u64;
        self.bytes.extend(bytes);
        address
    }

    /// Appends a string with its NUL.
    fn append_string(&mut self, text: &str) -> u64 {
        let address = self.append(text.as_bytes());
        self.bytes.push(0);
        address
    }
}

/// The memory map: for each range the size of what follows, its start, its length and its kind.
fn memory_map(memory: &GuestMemory) -> Vec<u8> {
    const RANGE_SIZE: u32 = 20;
    let mut bytes = Vec::new();
    for entry in layout::memory_map(memory.regions()) {
        bytes.extend(RANGE_SIZE.to_le_bytes());
        bytes.extend(entry.start.to_le_bytes());
        bytes.extend(entry.len.to_le_bytes());
        bytes.extend((entry.kind as u32).to_le_bytes());
    }
    bytes
}
