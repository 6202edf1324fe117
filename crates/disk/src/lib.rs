//! Disk images: what a guest's block device has behind it.
//!
//! ```text
//!   open(Options) ──> checks every file of the image first: kind, header, backing files, locks
//!        │
//!        └──> dyn Disk ─┬─ raw: a file (or a block device) whose bytes are the disk's
//!                       ├─ qcow2: clusters, allocated when they are written; backing files
//!                       └─ snapshot: either of them, below a temporary qcow2 overlay
//! ```
//!
//! An image is hostile input: its header may claim anything, and name any file as its backing file. [`open`] parses it
//! with [`qcow2::Header`] before the library that reads and writes it (`imago`) sees it. What the guest does to a disk
//! that is open can only end in an [`std::io::Error`].
//!
//! This crate knows no guest, no memory of it and no device. Sizes and offsets are bytes.

mod convert;
mod create;
mod error;
mod info;
mod lock;
mod open;
pub mod qcow2;
mod raw;
mod temporary;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;

pub use convert::{Conversion, convert};
pub use create::{Creation, create, resize};
pub use error::{Error, Name, Reason};
pub use info::{Info, Layer, info};
pub use open::{Cache, Format, Options, PlainFile, open, open_plain};

/// Bytes of a sector: every disk has a multiple of them.
pub const SECTOR: u64 = 512;

/// What there is to do when nobody changes a disk for a while.
pub trait Close {
    /// Leaves the image as one that was closed properly, until the next change. Raw ones always are.
    ///
    /// # Errors
    /// The host cannot write it.
    fn close(&self) -> io::Result<()>;
}

/// Data that need no copy and no waiting: they are in one piece of a file, and in the host's page cache.
pub trait InPlace {
    /// Whether there may be such data: the page cache is used.
    fn is_cached(&self) -> bool;

    /// Calls `action` with the file that has these bytes (an offset and their number), and with their offset there, which
    /// stays as long as it runs. A file that bytes are to be written to has room for them. `None` where they are in several
    /// pieces or nowhere, where writing them changes more than themselves, and where somebody has to be waited for.
    fn in_place(
        &self,
        bytes: (u64, u64),
        write: bool,
        action: &mut dyn FnMut(&File, u64) -> io::Result<usize>,
    ) -> Option<io::Result<usize>>;
}

/// Where a disk's bytes are. Ranges that are asked for lie within the disk.
pub trait Disk: Close + InPlace + Send + Sync {
    /// Bytes; a multiple of [`SECTOR`].
    fn size(&self) -> u64;
    /// Whether it can only be read.
    fn is_read_only(&self) -> bool;
    /// The file whose bytes are the disk's, where there is one.
    fn direct(&self) -> Option<Direct<'_>>;
    /// What it likes best.
    fn geometry(&self) -> Geometry;
    /// Reads.
    ///
    /// # Errors
    /// The host's, or what is wrong with the image.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes.
    ///
    /// # Errors
    /// The host's, or what is wrong with the image.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Comes back when all that was written is durable.
    ///
    /// # Errors
    /// The host's.
    fn flush(&self) -> io::Result<()>;
    /// The bytes are not needed any more. Where the host can, its space is given back; then they read as zeros.
    ///
    /// # Errors
    /// The host's.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes the bytes zeros; with `unmap` their space may be given back to the host.
    ///
    /// # Errors
    /// The host's.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
    /// What is at `offset`: data, or bytes that are known to be zeros without reading them.
    ///
    /// # Errors
    /// The host's, or what is wrong with the image.
    fn extent(&self, offset: u64) -> io::Result<Extent>;
}

/// A file whose bytes are the disk's: data can be moved between it and memory without a copy in between.
#[derive(Clone, Copy, Debug)]
pub struct Direct<'a> {
    /// The file.
    pub file: &'a File,
    /// Writes that begin below this offset go through [`Disk::write`] all the same.
    pub guarded: u64,
    /// Of what the memory's addresses, the offset and all lengths are multiples; 1 where that is of no concern. What is
    /// not aligned so goes through the disk's methods.
    pub alignment: usize,
}

/// What a disk likes best, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Requests of less are slow: the block size that the guest is told.
    pub logical: u32,
    /// Requests of less may have to read what they do not write.
    pub physical: u32,
    /// What is discarded or allocated at a time.
    pub granularity: u32,
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; not zero but at the end of the disk.
    pub len: u64,
    /// Whether all of them are zeros.
    pub zeros: bool,
}
