//! ELF kernels: their segments, their entry, and the PVH note.

use std::ops::Range;

use guest_memory::GuestMemory;
use object::LittleEndian;
use object::elf::{ET_DYN, ET_EXEC, FileHeader32, FileHeader64, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};

use super::error::{BootError, ElfError};
use super::low_memory;

const LE: LittleEndian = LittleEndian;

/// The note that holds the PVH entry: its name and type. Xen public headers, *elfnote.h*.
const PVH_NOTE: (&[u8], u32) = (b"Xen", 18);

/// An ELF kernel whose segments are checked against its file.
pub(super) struct Kernel<'a> {
    segments: Vec<Segment<'a>>,
    /// Guest-physical address of the file's entry.
    pub(super) entry: u64,
    /// Guest-physical address of the PVH entry.
    pub(super) pvh_entry: Option<u32>,
}

/// Bytes to be loaded.
struct Segment<'a> {
    /// Guest-physical address.
    start: u64,
    /// Bytes in memory: those of the file, then zeros.
    len: u64,
    bytes: &'a [u8],
}

impl<'a> Kernel<'a> {
    /// Parses an ELF file of 64 bits.
    pub(super) fn parse(file: &'a [u8]) -> Result<Self, ElfError> {
        Self::parse_class::<FileHeader64<LittleEndian>>(file)
    }

    /// Parses an ELF file of 32 bits.
    pub(super) fn parse_32(file: &'a [u8]) -> Result<Self, ElfError> {
        Self::parse_class::<FileHeader32<LittleEndian>>(file)
    }

    /// What a file that is not ELF holds: `bytes`, to be loaded at `start` with zeros up to `len`.
    pub(super) fn flat(start: u64, len: u64, bytes: &'a [u8], entry: u64) -> Self {
        Self { segments: vec![Segment { start, len, bytes }], entry, pvh_entry: None }
    }

    fn parse_class<H: FileHeader<Endian = LittleEndian>>(file: &'a [u8]) -> Result<Self, ElfError> {
        let malformed = |error: object::Error| ElfError::Malformed(error.to_string());
        let header = H::parse(file).map_err(malformed)?;
        let kind = header.e_type(LE);
        if kind != ET_EXEC && kind != ET_DYN {
            return Err(ElfError::NotExecutable(kind));
        }
        let headers = header.program_headers(LE, file).map_err(malformed)?;
        let mut segments = Vec::new();
        for (index, header) in headers.iter().enumerate() {
            if header.p_type(LE) == PT_LOAD && header.p_memsz(LE).into() != 0 {
                segments.push(segment(index, header, file)?);
            }
        }
        if segments.is_empty() {
            return Err(ElfError::NoSegments);
        }
        let entry = physical_entry(header.e_entry(LE).into(), headers)?;
        let pvh_entry = pvh_entry(headers, file)?;
        if let Some(pvh) = pvh_entry
            && !segments.iter().any(|s| u64::from(pvh).wrapping_sub(s.start) < s.len)
        {
            return Err(ElfError::EntryOutside(pvh.into()));
        }
        Ok(Self { segments, entry, pvh_entry })
    }

    /// Loads the segments, of which none may lie below `lowest`; gives the addresses from the first to the last.
    pub(super) fn load(&self, memory: &GuestMemory, lowest: u64) -> Result<Range<u64>, BootError> {
        let (mut start, mut end) = (u64::MAX, 0);
        for segment in &self.segments {
            let range = segment.start..segment.start + segment.len;
            low_memory::check_range(memory, &range, lowest)?;
            (start, end) = (start.min(range.start), end.max(range.end));
        }
        for segment in &self.segments {
            low_memory::write(memory, segment.start, segment.bytes)?;
            let file_end = segment.start + segment.bytes.len() as u64;
            low_memory::zero(memory, file_end..segment.start + segment.len)?;
        }
        Ok(start..end)
    }
}

fn segment<'a>(
    index: usize,
    header: &impl ProgramHeader<Endian = LittleEndian>,
    file: &'a [u8],
) -> Result<Segment<'a>, ElfError> {
    let (start, len): (u64, u64) = (header.p_paddr(LE).into(), header.p_memsz(LE).into());
    let (offset, file_len): (u64, u64) = (header.p_offset(LE).into(), header.p_filesz(LE).into());
    if file_len > len || start.checked_add(len).is_none() {
        return Err(ElfError::BadSegment { index, start, file: file_len, memory: len });
    }
    let bytes = header.data(LE, file).map_err(|()| ElfError::SegmentTruncated {
        index,
        offset,
        len: file_len,
        has: file.len() as u64,
    })?;
    Ok(Segment { start, len, bytes })
}

/// The entry as a guest-physical address. Linux's is one already; others link it to the virtual address.
fn physical_entry<P: ProgramHeader<Endian = LittleEndian>>(
    entry: u64,
    headers: &[P],
) -> Result<u64, ElfError> {
    let loaded = || headers.iter().filter(|h| h.p_type(LE) == PT_LOAD);
    let offset_from = |start: P::Word, header: &P| {
        Some(entry.wrapping_sub(start.into())).filter(|&offset| offset < header.p_memsz(LE).into())
    };
    if loaded().any(|h| offset_from(h.p_paddr(LE), h).is_some()) {
        return Ok(entry);
    }
    loaded()
        .find_map(|h| h.p_paddr(LE).into().checked_add(offset_from(h.p_vaddr(LE), h)?))
        .ok_or(ElfError::EntryOutside(entry))
}

/// The PVH note's entry. A note whose descriptor is too short for an address is an error.
fn pvh_entry<P: ProgramHeader<Endian = LittleEndian>>(
    headers: &[P],
    file: &[u8],
) -> Result<Option<u32>, ElfError> {
    let malformed = |error: object::Error| ElfError::Malformed(error.to_string());
    for header in headers.iter().filter(|h| h.p_type(LE) == PT_NOTE) {
        let Some(mut notes) = header.notes(LE, file).map_err(malformed)? else { continue };
        while let Some(note) = notes.next().map_err(malformed)? {
            if (note.name(), note.n_type(LE)) == PVH_NOTE {
                let entry = note.desc().first_chunk().ok_or_else(|| {
                    ElfError::Malformed(format!("its PVH note has {} bytes", note.desc().len()))
                })?;
                return Ok(Some(u32::from_le_bytes(*entry)));
            }
        }
    }
    Ok(None)
}
