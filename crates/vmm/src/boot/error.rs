use std::path::PathBuf;

/// Why a file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The host says no.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: std::io::Error,
    },
    /// A directory, a device, a socket.
    #[error("{} is {what}, not a file", path.display())]
    NotAFile {
        /// What was named.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Nothing in it.
    #[error("{} is empty", .0.display())]
    Empty(PathBuf),
    /// More than the guest can take.
    #[error("{} is too big for the memory: it has {bytes} bytes, there is room for {limit}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size, in bytes.
        bytes: u64,
        /// The limit, in bytes.
        limit: u64,
    },
}

/// Why a file cannot be firmware.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its size is none that an image has.
    #[error("{} is no firmware image: it has {bytes} bytes, {what}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size, in bytes.
        bytes: u64,
        /// What is wrong with that.
        what: &'static str,
    },
}

/// Why a kernel file cannot be booted, whatever the machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// No bytes at all.
    #[error("the kernel is empty")]
    Empty,
    /// Something else.
    #[error("neither a bzImage nor an ELF file: it starts with {}", hex(start))]
    NotAKernel {
        /// The first bytes.
        start: Vec<u8>,
    },
    /// A kernel for another processor.
    #[error("the kernel is for {0}, not for x86-64")]
    WrongArchitecture(String),
    /// The file ends before what its header names.
    #[error("the kernel is truncated: {what} ends at byte {needs} but the file has {has} bytes")]
    Truncated {
        /// The part that is cut.
        what: &'static str,
        /// The file's size that it takes, in bytes.
        needs: u64,
        /// The file's size, in bytes.
        has: u64,
    },
    /// A bzImage's setup header that makes no sense.
    #[error("bad bzImage: {field} is {value:#x}{}", .expected)]
    BadHeader {
        /// The field, as the Linux boot protocol names it.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it has to be, as the end of a sentence.
        expected: &'static str,
    },
    /// A Multiboot header whose addresses make no sense.
    #[error("bad Multiboot header: {field} is {value:#x}{expected}")]
    BadMultiboot {
        /// The field, as the specification names it.
        field: &'static str,
        /// Its value.
        value: u32,
        /// What is wrong with it, as the end of a sentence.
        expected: &'static str,
    },
    /// A payload in no known format.
    #[error("the bzImage's payload is in no known compression: it starts with {}", hex(start))]
    UnknownCompression {
        /// The first bytes.
        start: Vec<u8>,
    },
    /// A payload that its decompressor refuses.
    #[error("the bzImage's {format} payload is damaged: {reason}")]
    Damaged {
        /// The compression's name.
        format: &'static str,
        /// What the decompressor says.
        reason: String,
    },
    /// A payload that unpacks to more than a kernel can be.
    #[error("the bzImage's payload unpacks to more than {limit} bytes")]
    UnpackedTooLarge {
        /// The limit, in bytes.
        limit: u64,
    },
    /// A broken ELF file.
    #[error(transparent)]
    Elf(ElfError),
}

/// Why an ELF file cannot be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// A structure that lies outside the file or has an impossible size.
    #[error("bad ELF file: {0}")]
    Malformed(String),
    /// Not an executable.
    #[error("bad ELF file: its type is {0}, not an executable (2) or a shared object (3)")]
    NotExecutable(u16),
    /// A segment's bytes that the file does not have.
    #[error(
        "the ELF file is truncated: its segment {index} takes {len:#x} bytes at offset {offset:#x}, the file has {has:#x}"
    )]
    SegmentTruncated {
        /// The segment's place in the program header table.
        index: usize,
        /// Offset in the file.
        offset: u64,
        /// Bytes in the file.
        len: u64,
        /// The file's size, in bytes.
        has: u64,
    },
    /// A segment with more bytes in the file than in memory, or past the address space.
    #[error(
        "bad ELF file: its segment {index} at {start:#x} has {file} bytes in the file and {memory} in memory"
    )]
    BadSegment {
        /// The segment's place in the program header table.
        index: usize,
        /// Guest-physical address.
        start: u64,
        /// Bytes in the file.
        file: u64,
        /// Bytes in memory.
        memory: u64,
    },
    /// Nothing to load.
    #[error("the ELF file has no segment to load")]
    NoSegments,
    /// An entry in no segment.
    #[error("the ELF file's entry {0:#x} lies in none of its segments")]
    EntryOutside(u64),
}

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file itself.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Not a protocol.
    #[error("unknown boot protocol {0:?}: auto, pvh, linux64, stub and multiboot are known")]
    UnknownProtocol(String),
    /// PVH was asked for.
    #[error("the kernel has no PVH entry (no ELF note of type 18 by \"Xen\"); --boot linux64 does without")]
    NoPvhEntry,
    /// The stub was asked for.
    #[error("an ELF file has no decompressor stub; --boot stub needs a bzImage")]
    NoStub,
    /// Multiboot was asked for.
    #[error("the kernel has no Multiboot header in its first 8 KiB")]
    NoMultibootHeader,
    /// The image needs a loader that knows more.
    #[error("the Multiboot header asks for what is not known here: flags {0:#x}")]
    MultibootFlags(u32),
    /// Neither an ELF file nor a header that tells where the image goes.
    #[error("the Multiboot image is no ELF file, and its header has no addresses (flag 0x10000)")]
    MultibootNoAddresses,
    /// Modules for a kernel that takes an initrd alone.
    #[error("the kernel is no Multiboot image: it takes an initrd, and no modules")]
    ModulesNotTaken,
    /// A module's arguments that would end early.
    #[error("a module's arguments have a NUL at byte {0}")]
    ModuleNul(usize),
    /// A stub that can only be entered in 32-bit mode.
    #[error("the bzImage has no 64-bit entry: xloadflags is {0:#x}")]
    No64BitEntry(u16),
    /// The kernel ends above the RAM.
    #[error(
        "the kernel is too big for the memory: it takes {start:#x} to {end:#x}, the RAM below 4 GiB ends at {ram_end:#x}"
    )]
    KernelTooBig {
        /// First guest-physical address.
        start: u64,
        /// First address after it.
        end: u64,
        /// First address after the RAM.
        ram_end: u64,
    },
    /// The kernel is linked to where there is no RAM or the loader has its own structures.
    #[error("the kernel is linked to {start:#x} to {end:#x}, which is not free RAM")]
    KernelOutsideRam {
        /// First guest-physical address.
        start: u64,
        /// First address after it.
        end: u64,
    },
    /// The initrd does not fit beside the kernel.
    #[error("the initrd of {bytes} bytes is too big for the memory: the machine needs at least {} MiB", needs >> 20)]
    InitrdTooBig {
        /// The initrd's size, in bytes.
        bytes: u64,
        /// The memory with which it would fit, in bytes.
        needs: u64,
    },
    /// The initrd does not fit in any machine.
    #[error("the initrd of {bytes} bytes does not fit below {limit:#x}, where the kernel wants it")]
    InitrdTooBigForKernel {
        /// The initrd's size, in bytes.
        bytes: u64,
        /// First guest-physical address above it.
        limit: u64,
    },
    /// The kernel would cut it.
    #[error("the command line has {len} bytes, the kernel takes {limit}")]
    CmdlineTooLong {
        /// Its length, in bytes.
        len: usize,
        /// The kernel's limit, in bytes.
        limit: usize,
    },
    /// A NUL would end it early.
    #[error("the command line has a NUL at byte {0}")]
    CmdlineNul(usize),
    /// A machine without the RAM that the loader needs.
    #[error("no RAM at {0:#x} for the loader")]
    NoRam(u64),
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}
