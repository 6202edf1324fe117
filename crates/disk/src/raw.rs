//! Raw images: a file's bytes are the disk's.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::{Close, Direct, Disk, Extent, Geometry, InPlace};

/// How a qcow2 image begins.
pub(crate) const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// What offsets, lengths and addresses are multiples of where the host's page cache is not used.
const DIRECT_ALIGNMENT: usize = 4096;
/// Zeros are written so many at a time.
const ZEROS: usize = 64 << 10;

/// A disk whose bytes are a file's.
#[derive(Debug)]
pub(crate) struct RawDisk {
    file: File,
    /// The same file without the page cache.
    uncached: Option<File>,
    len: u64,
    read_only: bool,
    /// Whether the format was found out rather than told: then the guest must not make it look like another.
    probed: bool,
    granularity: u32,
}

impl RawDisk {
    pub(crate) fn new(file: File, len: u64, read_only: bool, probed: bool) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let granularity = if metadata.file_type().is_block_device() { 512 } else { 4096 };
        Ok(Self { file, uncached: None, len, read_only, probed, granularity })
    }

    /// Moves data past the page cache, through this second handle.
    pub(crate) fn uncached(self, file: File) -> Self {
        Self { uncached: Some(file), ..self }
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        loop {
            match fallocate(&self.file, flags, offset, len) {
                Err(Errno::INTR) => {}
                done => return Ok(done?),
            }
        }
    }

    /// Writes that begin below this offset have to be looked at.
    fn guarded(&self) -> u64 {
        u64::from(self.probed)
    }

    fn refuse_disguise(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.probed && offset == 0 && data.starts_with(&QCOW2_MAGIC) {
            return Err(io::Error::other(
                "the guest would make a qcow2 image of a raw one whose format was not told; say format=raw to let it",
            ));
        }
        Ok(())
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL))
}

impl Close for RawDisk {
    fn close(&self) -> io::Result<()> {
        Ok(())
    }
}

impl InPlace for RawDisk {
    fn is_cached(&self) -> bool {
        self.uncached.is_none()
    }

    fn in_place(
        &self,
        (offset, _): (u64, u64),
        write: bool,
        action: &mut dyn FnMut(&File, u64) -> io::Result<usize>,
    ) -> Option<io::Result<usize>> {
        let guarded = write && offset < self.guarded();
        (self.is_cached() && !guarded).then(|| action(&self.file, offset))
    }
}

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.len
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn direct(&self) -> Option<Direct<'_>> {
        let (file, alignment) = match &self.uncached {
            Some(file) => (file, DIRECT_ALIGNMENT),
            None => (&self.file, 1),
        };
        Some(Direct { file, guarded: self.guarded(), alignment })
    }

    fn geometry(&self) -> Geometry {
        let logical = if self.uncached.is_some() { DIRECT_ALIGNMENT as u32 } else { 512 };
        // A disk that ends within a block has to have smaller ones.
        let logical = if self.len.is_multiple_of(logical.into()) { logical } else { 512 };
        Geometry { logical, physical: 4096, granularity: self.granularity }
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.refuse_disguise(offset, data)?;
        self.file.write_all_at(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
            // A hint: a file system that cannot give the space back need not.
            Err(error) if is_unsupported(&error) => Ok(()),
            done => done,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let flags = match unmap {
            true => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            false => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        match self.allocate(flags, offset, len) {
            Err(error) if is_unsupported(&error) => {}
            done => return done,
        }
        let zeros = vec![0; ZEROS];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(ZEROS as u64);
            self.file.write_all_at(&zeros[..part as usize], offset + done)?;
            done += part;
        }
        Ok(())
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        let rest = self.len.saturating_sub(offset);
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok(Extent { len: rest.min(data - offset), zeros: true }),
            Ok(_) => match seek(&self.file, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => Ok(Extent { len: rest.min(hole - offset), zeros: false }),
                _ => Ok(Extent { len: rest, zeros: false }),
            },
            Err(Errno::NXIO) => Ok(Extent { len: rest, zeros: true }),
            // A device, or a file system that does not know.
            Err(_) => Ok(Extent { len: rest, zeros: false }),
        }
    }
}
