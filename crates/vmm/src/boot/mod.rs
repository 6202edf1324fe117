//! Bringing a guest's kernel into memory, and the state in which the boot processor enters it.
//!
//! A kernel file is parsed first ([`image`]): a bzImage ([`bzimage`]) or an ELF file ([`elf`]). A bzImage is unpacked
//! on the host ([`unpack`]), so that the guest spends no time on it. Then one of the protocols loads and enters it:
//!
//! | protocol | enters | with |
//! |---|---|---|
//! | [`pvh`] | the ELF note's 32-bit entry | paging off, EBX at `hvm_start_info` |
//! | [`linux`], unpacked | the ELF entry, 64-bit | identity paging, RSI at `boot_params` |
//! | [`linux`], stub | the bzImage's own decompressor | the same |
//! | [`multiboot`] | the image's 32-bit entry | paging off, EBX at its information |
//!
//! [`firmware`] goes another way: it is entered as a processor is after a reset, and boots what it finds.
//!
//! All that the loader writes besides kernel and initrd lies in low memory ([`low_memory`]).

mod bzimage;
mod elf;
mod error;
mod file;
pub mod firmware;
mod image;
mod initrd;
mod linux;
mod long_mode;
mod low_memory;
mod lzop;
mod multiboot;
mod pvh;
#[cfg(test)]
mod tests;
mod unpack;

use std::ops::Range;
use std::str::FromStr;

use engine::VcpuState;
pub use error::{BootError, ElfError, FileError, FirmwareError, ImageError};
pub use file::read_file;
use guest_memory::GuestMemory;
use image::KernelImage;
pub use unpack::MAX_UNPACKED;

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// PVH where the kernel has the note for it, Multiboot where it has the header for that and is no bzImage, else the
    /// Linux 64-bit protocol.
    ///
    /// The note is the one documented way into an unpacked kernel, Linux (since 5.0) or not, and it comes to the same
    /// for a bzImage and for what was unpacked from it before.
    #[default]
    Auto,
    /// The unpacked kernel at its PVH entry.
    Pvh,
    /// The unpacked kernel at its 64-bit entry, by the Linux boot protocol.
    Linux64,
    /// The bzImage's own decompressor at its 64-bit entry, as a boot loader enters it.
    Stub,
    /// A Multiboot image at its 32-bit entry.
    Multiboot,
}

impl FromStr for Protocol {
    type Err = BootError;

    fn from_str(name: &str) -> Result<Self, BootError> {
        match name {
            "auto" => Ok(Self::Auto),
            "pvh" => Ok(Self::Pvh),
            "linux64" => Ok(Self::Linux64),
            "stub" => Ok(Self::Stub),
            "multiboot" => Ok(Self::Multiboot),
            _ => Err(BootError::UnknownProtocol(name.to_owned())),
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Pvh => "pvh",
            Self::Linux64 => "linux64",
            Self::Stub => "stub",
            Self::Multiboot => "multiboot",
        })
    }
}

/// A file for a Multiboot image.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// What is in it.
    pub bytes: &'a [u8],
    /// What the image is told of it: by convention its path or name, then arguments.
    pub text: &'a str,
}

/// What is to be booted.
#[derive(Clone, Copy, Debug)]
pub struct BootPayload<'a> {
    /// The kernel file: a bzImage, an ELF file, for example what [`unpack_kernel`] gave, or a Multiboot image.
    pub kernel: &'a [u8],
    /// Its path or name, which a Multiboot image is told.
    pub kernel_name: &'a str,
    /// The initial RAM file system.
    pub initrd: Option<&'a [u8]>,
    /// Its path or name, which a Multiboot image is told.
    pub initrd_name: &'a str,
    /// More files, which a Multiboot image has as its modules after the initrd. Others take none.
    pub modules: &'a [Module<'a>],
    /// The kernel's command line, without a NUL.
    pub cmdline: &'a str,
    /// How to enter the kernel.
    pub protocol: Protocol,
    /// Random bytes for the kernel's random number generator; the Linux protocols carry them.
    pub seed: Option<[u8; 32]>,
}

/// A guest in memory, ready to run.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The boot processor's state.
    pub state: VcpuState,
    /// The protocol that was chosen; never [`Protocol::Auto`].
    pub protocol: Protocol,
    /// The guest-physical addresses that the kernel needs before it has a memory allocator.
    pub kernel: Range<u64>,
    /// Where the initrd or the modules lie; empty where there is none.
    pub initrd: Range<u64>,
}

/// Loads a guest. `rsdp` is the guest-physical address of the ACPI root pointer, 0 where there are no tables.
///
/// Memory that the guest may have used before is loaded over: everything that the kernel expects to be zero is zeroed.
///
/// # Errors
/// [`BootError`] where the kernel is none, is broken, or does not fit with its initrd into the memory.
pub fn load(memory: &GuestMemory, payload: &BootPayload<'_>, rsdp: u64) -> Result<Loaded, BootError> {
    if let Some(header) = multiboot::header_for(payload)? {
        return multiboot::load(memory, payload, &header);
    }
    if !payload.modules.is_empty() {
        return Err(BootError::ModulesNotTaken);
    }
    match KernelImage::identify(payload.kernel)? {
        KernelImage::BzImage(image) if payload.protocol == Protocol::Stub => {
            linux::load_stub(memory, payload, &image, rsdp)
        }
        KernelImage::BzImage(image) => {
            let vmlinux = image.unpack(memory.ram_len().min(MAX_UNPACKED))?;
            load_elf(memory, payload, (&vmlinux, Some(&image)), rsdp)
        }
        KernelImage::Elf(_) if payload.protocol == Protocol::Stub => Err(BootError::NoStub),
        KernelImage::Elf(bytes) => load_elf(memory, payload, (bytes, None), rsdp),
    }
}

/// Loads an ELF kernel, with the bzImage that it came in.
fn load_elf(
    memory: &GuestMemory,
    payload: &BootPayload<'_>,
    (bytes, image): (&[u8], Option<&bzimage::BzImage<'_>>),
    rsdp: u64,
) -> Result<Loaded, BootError> {
    let kernel = elf::Kernel::parse(bytes).map_err(ImageError::Elf)?;
    let pvh_entry = kernel.pvh_entry;
    match (payload.protocol, pvh_entry) {
        (Protocol::Pvh, None) => Err(BootError::NoPvhEntry),
        (Protocol::Pvh | Protocol::Auto, Some(entry)) => {
            let range = kernel.load(memory, low_memory::END)?;
            pvh::load(memory, payload, (range, entry), rsdp)
        }
        _ => {
            let range = kernel.load(memory, low_memory::END)?;
            let header = image.map(|i| i.header);
            linux::load_unpacked(memory, payload, (range, kernel.entry), (header, rsdp))
        }
    }
}

/// Unpacks a kernel: the ELF file inside a bzImage, for a cache that spares the next start the work. An ELF file is
/// given back as it is.
///
/// # Errors
/// [`ImageError`] where it is neither, or is broken, or would be larger than [`MAX_UNPACKED`].
pub fn unpack_kernel(kernel: &[u8]) -> Result<Vec<u8>, ImageError> {
    match KernelImage::identify(kernel)? {
        KernelImage::BzImage(image) => image.unpack(MAX_UNPACKED),
        KernelImage::Elf(bytes) => Ok(bytes.to_vec()),
    }
}
