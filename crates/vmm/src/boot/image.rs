//! What a kernel file is.

use super::bzimage::BzImage;
use super::error::ImageError;

/// ELF's magic number.
pub(super) const ELF_MAGIC: [u8; 4] = *b"\x7fELF";

/// A kernel file, told apart but not yet checked beyond its header.
pub(super) enum KernelImage<'a> {
    /// A Linux kernel with its setup code and its compressed payload.
    BzImage(BzImage<'a>),
    /// A 64-bit x86 ELF file.
    Elf(&'a [u8]),
}

impl<'a> KernelImage<'a> {
    /// Tells what the file is.
    pub(super) fn identify(bytes: &'a [u8]) -> Result<Self, ImageError> {
        if bytes.is_empty() {
            return Err(ImageError::Empty);
        }
        if bytes.starts_with(&ELF_MAGIC) {
            check_elf_architecture(bytes)?;
            return Ok(Self::Elf(bytes));
        }
        if let Some(image) = BzImage::parse(bytes)? {
            return Ok(Self::BzImage(image));
        }
        match foreign(bytes) {
            Some(name) => Err(ImageError::WrongArchitecture(name.to_owned())),
            None => Err(ImageError::NotAKernel { start: bytes[..bytes.len().min(8)].to_vec() }),
        }
    }
}

/// The architecture of Linux images that are neither: their header has a magic number at byte 56.
fn foreign(bytes: &[u8]) -> Option<&'static str> {
    match bytes.get(56..60)? {
        b"ARM\x64" => Some("AArch64 (an arm64 Image)"),
        b"RSC\x05" => Some("RISC-V (a riscv Image)"),
        _ => None,
    }
}

/// Refuses ELF files of another class, byte order or processor. System V ABI, *ELF Header*.
pub(super) fn check_elf_architecture(bytes: &[u8]) -> Result<(), ImageError> {
    const CLASS: usize = 4;
    const DATA: usize = 5;
    const MACHINE: usize = 18;
    const EHDR_SIZE: usize = 64;

    let truncated = |needs: usize| ImageError::Truncated {
        what: "the ELF header",
        needs: needs as u64,
        has: bytes.len() as u64,
    };
    let machine = match bytes.get(MACHINE..MACHINE + 2) {
        Some(&[a, b]) if bytes[DATA] == 2 => u16::from_be_bytes([a, b]),
        Some(&[a, b]) => u16::from_le_bytes([a, b]),
        _ => return Err(truncated(EHDR_SIZE)),
    };
    match (bytes[CLASS], bytes[DATA], machine) {
        (2, 1, object::elf::EM_X86_64) if bytes.len() < EHDR_SIZE => Err(truncated(EHDR_SIZE)),
        (2, 1, object::elf::EM_X86_64) => Ok(()),
        (class, _, machine) => Err(ImageError::WrongArchitecture(machine_name(class, machine))),
    }
}

fn machine_name(class: u8, machine: u16) -> String {
    use object::elf::*;
    match machine {
        EM_386 => "32-bit x86 (i386)".to_owned(),
        EM_X86_64 if class == 1 => "the x32 ABI".to_owned(),
        EM_AARCH64 => "AArch64".to_owned(),
        EM_ARM => "32-bit ARM".to_owned(),
        EM_RISCV => "RISC-V".to_owned(),
        EM_PPC64 => "PowerPC64".to_owned(),
        EM_S390 => "s390".to_owned(),
        EM_LOONGARCH => "LoongArch".to_owned(),
        other => format!("ELF machine {other} of class {class}"),
    }
}
