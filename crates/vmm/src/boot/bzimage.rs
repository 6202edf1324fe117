//! The bzImage: setup code, protected-mode code, and the compressed kernel in it.
//! The Linux/x86 Boot Protocol, *The Real-Mode Kernel Header*.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::error::ImageError;
use super::unpack;

/// Where the setup header starts in the file.
const HEADER: usize = 0x1f1;
/// The boot sector's signature, and its place.
const BOOT_FLAG: (usize, u16) = (0x1fe, 0xaa55);
/// The header's magic number, and its place.
const MAGIC: (usize, &[u8; 4]) = (0x202, b"HdrS");
/// Holds the header's length, counted from the magic number.
const HEADER_LENGTH: usize = 0x201;
/// Bytes of a sector of the setup code.
const SECTOR: usize = 512;
/// The first version with a payload that can be found (2.08).
const MIN_VERSION: u16 = 0x208;
/// The first version whose flags tell a 64-bit kernel (2.12).
const XLOADFLAGS_VERSION: u16 = 0x20c;
/// loadflags: the protected-mode code is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// xloadflags: the kernel has a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1;

/// A bzImage whose header is checked.
pub(super) struct BzImage<'a> {
    /// The setup header; what the file's version does not have is zero.
    pub(super) header: setup_header,
    /// The protected-mode code, to the file's end.
    pub(super) protected: &'a [u8],
    /// The compressed kernel and the four bytes of its unpacked size.
    payload: &'a [u8],
}

impl<'a> BzImage<'a> {
    /// Parses a bzImage; `None` where the file is none at all.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Option<Self>, ImageError> {
        let flag = bytes.get(BOOT_FLAG.0..BOOT_FLAG.0 + 2);
        if flag != Some(&BOOT_FLAG.1.to_le_bytes()) {
            return Ok(None);
        }
        let header_end = match bytes.get(MAGIC.0..MAGIC.0 + 4) {
            Some(magic) if magic == MAGIC.1 => MAGIC.0 + usize::from(bytes[HEADER_LENGTH]),
            Some(_) => return Ok(None),
            None => return Err(truncated("the setup header", HEADER + size_of::<setup_header>(), bytes)),
        };
        let header = read_header(bytes, header_end)?;
        check_header(&header)?;
        let sectors = if header.setup_sects == 0 { 4 } else { usize::from(header.setup_sects) };
        let setup_len = (sectors + 1) * SECTOR;
        let protected = bytes
            .get(setup_len..)
            .filter(|p| !p.is_empty())
            .ok_or_else(|| truncated("the setup code", setup_len + 1, bytes))?;
        let payload = payload(&header, protected)
            .map_err(|end| truncated("the compressed kernel", setup_len.saturating_add(end), bytes))?;
        Ok(Some(Self { header, protected, payload }))
    }

    /// The ELF file in it, of at most `limit` bytes.
    pub(super) fn unpack(&self, limit: u64) -> Result<Vec<u8>, ImageError> {
        let vmlinux = unpack::unpack(self.payload, limit)?;
        if !vmlinux.starts_with(&super::image::ELF_MAGIC) {
            return Err(ImageError::Damaged {
                format: "unpacked",
                reason: "it does not hold an ELF file".to_owned(),
            });
        }
        super::image::check_elf_architecture(&vmlinux)?;
        Ok(vmlinux)
    }

    /// Whether the protected-mode code can be entered in 64-bit mode, 0x200 bytes after its start.
    pub(super) fn has_64_bit_entry(&self) -> bool {
        let flags = self.header.xloadflags;
        self.header.version >= XLOADFLAGS_VERSION && flags & XLF_KERNEL_64 != 0
    }
}

/// Copies the header out; it ends where the file says it does.
fn read_header(bytes: &[u8], end: usize) -> Result<setup_header, ImageError> {
    let mut header = setup_header::default();
    let len = end.saturating_sub(HEADER).min(size_of::<setup_header>());
    let source =
        bytes.get(HEADER..HEADER + len).ok_or_else(|| truncated("the setup header", HEADER + len, bytes))?;
    header.as_mut_slice()[..len].copy_from_slice(source);
    Ok(header)
}

fn check_header(header: &setup_header) -> Result<(), ImageError> {
    let bad = |field, value, expected| Err(ImageError::BadHeader { field, value, expected });
    let (version, alignment) = (header.version, header.kernel_alignment);
    if version < MIN_VERSION {
        return bad("version", version.into(), ", older than 2.08 (Linux 2.6.26)");
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return bad("loadflags", header.loadflags.into(), ", a zImage that is loaded low");
    }
    if header.relocatable_kernel != 0 && !alignment.is_power_of_two() {
        return bad("kernel_alignment", alignment.into(), ", not a power of two");
    }
    Ok(())
}

/// The payload; else where it would end in the protected-mode code.
fn payload<'a>(header: &setup_header, protected: &'a [u8]) -> Result<&'a [u8], usize> {
    let (offset, len) = (header.payload_offset as usize, header.payload_length as usize);
    let end = offset.saturating_add(len);
    protected.get(offset..end).ok_or(end)
}

fn truncated(what: &'static str, needs: usize, bytes: &[u8]) -> ImageError {
    ImageError::Truncated { what, needs: needs as u64, has: bytes.len() as u64 }
}
