//! Guest RAM as the host's kernel reaches it without a copy: for PREADV, PWRITEV and what takes such lists later.
#![allow(unsafe_code)] // The system calls that are given the RAM's host addresses.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::{GuestMemory, MemoryError, Offset, PAGE_SIZE};

/// The most parts that one system call takes.
const MOST_PARTS: usize = 1024;

/// A part of guest RAM: what the kernel calls an `iovec`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct HostSlice(libc::iovec);

// SAFETY: an address and a length of memory that any thread may reach while the `HostSlices` that gave them lives.
unsafe impl Send for HostSlice {}
// SAFETY: as above.
unsafe impl Sync for HostSlice {}

impl HostSlice {
    /// Host address of the first byte.
    pub fn address(&self) -> u64 {
        self.0.iov_base as u64
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Ranges of guest RAM in the order in which they are read or written. It keeps the RAM.
///
/// Whoever has the kernel write there by means of its own tells with [`Self::mark_written`] how much came, before the
/// guest is told.
#[derive(Clone, Debug)]
pub struct HostSlices {
    memory: GuestMemory,
    slices: Vec<HostSlice>,
    len: u64,
}

impl GuestMemory {
    /// An empty list of ranges.
    pub fn host_slices(&self) -> HostSlices {
        HostSlices { memory: self.clone(), slices: Vec::new(), len: 0 }
    }
}

impl HostSlices {
    /// Appends guest-physical addresses; all of them must be RAM, and for `writable` ones such as the guest may write.
    ///
    /// # Errors
    /// [`MemoryError::NoRam`] for the first address that is not; the list is then as far as it went.
    pub fn push(&mut self, address: u64, len: u64, writable: bool) -> Result<(), MemoryError> {
        let mut at = address;
        let mut left = len;
        while left > 0 {
            let missing = MemoryError::NoRam(at);
            let region = self.memory.regions.iter().find(|p| at.wrapping_sub(p.region.start) < p.region.len);
            let region = region.ok_or(MemoryError::NoRam(at))?;
            let (offset, room) = if region.region.read_only {
                // Firmware area: what is behind an address may differ from page to page.
                let location = self.memory.locate(at).filter(|found| !(writable && found.read_only));
                (location.ok_or(missing)?.offset, PAGE_SIZE - at % PAGE_SIZE)
            } else {
                let within = at - region.region.start;
                (region.offset + within, region.region.len - within)
            };
            let part = left.min(room);
            self.push_offset(offset, part);
            left -= part;
            at = at.checked_add(part).filter(|_| left > 0).unwrap_or(at);
        }
        Ok(())
    }

    /// Appends bytes of the mapping, to the last part where they follow it.
    fn push_offset(&mut self, offset: Offset, len: u64) {
        let base = self.memory.ram.mapping.host_address() + offset;
        self.len += len;
        if let Some(last) = self.slices.last_mut()
            && last.address() + last.len() as u64 == base
        {
            last.0.iov_len += len as usize;
            return;
        }
        self.slices.push(HostSlice(libc::iovec { iov_base: base as *mut _, iov_len: len as usize }));
    }

    /// Appends the parts of another list for the same RAM.
    pub fn append(&mut self, other: &Self) {
        self.slices.extend_from_slice(&other.slices);
        self.len += other.len;
    }

    /// Drops all parts, for filling the list again without a new allocation.
    pub fn clear(&mut self) {
        self.slices.clear();
        self.len = 0;
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The parts. Their addresses are good while `self` or a clone lives; the guest may change what is there at any time.
    pub fn slices(&self) -> &[HostSlice] {
        &self.slices
    }

    /// The parts as the kernel takes them, and how many there are. As [`Self::slices`].
    pub fn as_iovecs(&self) -> (*const libc::iovec, usize) {
        (self.slices.as_ptr().cast(), self.slices.len())
    }

    /// Drops the first bytes.
    pub fn skip(&mut self, count: u64) {
        let mut left = count.min(self.len);
        self.len -= left;
        let whole = self.slices.iter().take_while(|slice| {
            let len = slice.len() as u64;
            let fits = len <= left;
            if fits {
                left -= len;
            }
            fits
        });
        let whole = whole.count();
        self.slices.drain(..whole);
        if let Some(first) = self.slices.first_mut() {
            first.0.iov_base = first.0.iov_base.wrapping_byte_add(left as usize);
            first.0.iov_len -= left as usize;
        }
    }

    /// Keeps the first bytes.
    pub fn truncate(&mut self, len: u64) {
        let mut left = len.min(self.len);
        self.len = left;
        self.slices.retain_mut(|slice| {
            slice.0.iov_len = slice.len().min(left as usize);
            left -= slice.len() as u64;
            !slice.is_empty()
        });
    }

    /// Says that a device wrote the first bytes: their pages are dirty, and translations of code there are stale.
    pub fn mark_written(&self, count: u64) {
        let start = self.memory.ram.mapping.host_address();
        let mut left = count;
        for slice in &self.slices {
            let part = (slice.len() as u64).min(left);
            if part == 0 {
                break;
            }
            self.memory.marks().device_wrote(slice.address() - start, part);
            left -= part;
        }
    }

    /// Reads from a file into the RAM, at `offset` or where the file stands, as READV does; the bytes read.
    ///
    /// # Errors
    /// The host's.
    pub fn read_from(&self, file: BorrowedFd<'_>, offset: Option<u64>) -> io::Result<usize> {
        let (fd, parts) = (file.as_raw_fd(), self.slices.len().min(MOST_PARTS) as i32);
        let vectors = self.as_iovecs().0;
        let done = retry(|| match offset {
            // SAFETY: the parts lie within the RAM's mapping, which `self` keeps; nobody holds a reference into it.
            Some(offset) => unsafe { libc::preadv64(fd, vectors, parts, offset as i64) },
            // SAFETY: as above.
            None => unsafe { libc::readv(fd, vectors, parts) },
        })?;
        self.mark_written(done as u64);
        Ok(done)
    }

    /// Reads from a file into the RAM what the host has in its page cache, as PREADV2 with RWF_NOWAIT does; the bytes read.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where it has nothing of it, [`io::ErrorKind::Unsupported`] where it cannot tell.
    pub fn read_now(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let (fd, parts) = (file.as_raw_fd(), self.slices.len().min(MOST_PARTS));
        let vectors = self.as_iovecs().0;
        let done = retry(|| {
            // SAFETY: as in `read_from`. The offset's upper half is nothing to a 64-bit kernel.
            unsafe {
                libc::syscall(libc::SYS_preadv2, fd, vectors, parts, offset, 0, libc::RWF_NOWAIT) as isize
            }
        })?;
        self.mark_written(done as u64);
        Ok(done)
    }

    /// Writes the RAM's bytes to a file, at `offset` or where the file stands, as WRITEV does; the bytes written.
    ///
    /// # Errors
    /// The host's.
    pub fn write_to(&self, file: BorrowedFd<'_>, offset: Option<u64>) -> io::Result<usize> {
        let (fd, parts) = (file.as_raw_fd(), self.slices.len().min(MOST_PARTS) as i32);
        let vectors = self.as_iovecs().0;
        retry(|| match offset {
            // SAFETY: as in `read_from`; the kernel only reads.
            Some(offset) => unsafe { libc::pwritev64(fd, vectors, parts, offset as i64) },
            // SAFETY: as above.
            None => unsafe { libc::writev(fd, vectors, parts) },
        })
    }

    /// Fills all of it from a file.
    ///
    /// # Errors
    /// The host's; [`io::ErrorKind::UnexpectedEof`] where the file ends before.
    pub fn read_exact_at(mut self, file: BorrowedFd<'_>, mut offset: u64) -> io::Result<()> {
        while !self.is_empty() {
            let done = self.read_from(file, Some(offset))? as u64;
            if done == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            offset += done;
            self.skip(done);
        }
        Ok(())
    }

    /// Writes all of it to a file.
    ///
    /// # Errors
    /// The host's.
    pub fn write_all_at(mut self, file: BorrowedFd<'_>, mut offset: u64) -> io::Result<()> {
        while !self.is_empty() {
            let done = self.write_to(file, Some(offset))? as u64;
            if done == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            offset += done;
            self.skip(done);
        }
        Ok(())
    }
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(done) => return Ok(done),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;
    use crate::Region;

    fn memory() -> GuestMemory {
        let region = |start, len, read_only| Region { start, len, read_only };
        GuestMemory::new(&[
            region(0, 0x4000, false),
            region(0x4000, 0x2000, true),
            region(0x10000, 0x4000, false),
        ])
        .unwrap()
    }

    fn file(bytes: &[u8]) -> std::fs::File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_file_is_read_into_scattered_ram_and_the_pages_are_marked() {
        let memory = memory();
        let generation = memory.marks().mark_code(0x3000).0;
        let mut slices = memory.host_slices();
        slices.push(0x10010, 3, true).unwrap();
        slices.push(0x3ffe, 2, true).unwrap();
        slices.push(0x1000, 4, true).unwrap();
        assert_eq!((slices.len(), slices.slices().len()), (9, 3));
        slices.read_exact_at(file(b"-abcdefghi").as_fd(), 1).unwrap();
        let bytes = |offset, len| {
            let mut bytes = vec![0; len];
            memory.read_bytes(offset, &mut bytes);
            bytes
        };
        assert_eq!(bytes(0x6010, 4), b"abc\0");
        assert_eq!((bytes(0x3ffe, 2), bytes(0x1000, 5)), (b"de".to_vec(), b"fghi\0".to_vec()));
        assert_ne!(memory.marks().generation(0x3000), generation, "its code is stale");
        let dirty: Vec<_> = (0..10).filter(|page| memory.marks().is_dirty(page * PAGE_SIZE)).collect();
        assert_eq!(dirty, [1, 3, 6]);
    }

    #[test]
    fn ram_is_written_to_a_file_from_where_it_was_cut() {
        let memory = memory();
        memory.write_bytes(0, b"0123456789");
        let mut slices = memory.host_slices();
        for address in [0, 4, 8] {
            slices.push(address, 2, false).unwrap();
        }
        slices.skip(1);
        slices.truncate(4);
        assert_eq!((slices.len(), slices.slices().len()), (4, 3));
        let file = file(b"........");
        slices.clone().write_all_at(file.as_fd(), 2).unwrap();
        let mut back = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut back, 0).unwrap();
        assert_eq!(&back, b"..1458..");
        slices.skip(99);
        assert!(slices.is_empty() && slices.slices().is_empty());
    }

    #[test]
    fn ranges_that_follow_each_other_are_one_and_cross_regions() {
        let memory = memory();
        let mut slices = memory.host_slices();
        slices.push(0x3000, 0x2000, false).unwrap();
        slices.push(0x5000, 0x1000, false).unwrap();
        assert_eq!((slices.len(), slices.slices().len()), (0x3000, 1));
    }

    #[test]
    fn what_is_no_ram_or_rom_to_be_written_is_refused() {
        let memory = memory();
        let refused = |address, len, writable| memory.host_slices().push(address, len, writable).is_err();
        assert!(refused(0x6000, 1, false) && refused(0x5fff, 2, false) && refused(0x13fff, 2, true));
        assert!(refused(0x3fff, 2, true) && !refused(0x3fff, 2, false));
        assert!(refused(u64::MAX, 2, false) && !refused(u64::MAX, 0, false));
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let memory = memory();
        let mut slices = memory.host_slices();
        slices.push(0, 8, true).unwrap();
        let error = slices.read_exact_at(file(b"abc").as_fd(), 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
