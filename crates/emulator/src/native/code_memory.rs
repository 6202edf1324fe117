//! Memory for generated code: one mapping to write it, another to execute it, never both in one.
#![allow(unsafe_code)] // Two mappings of one memory file, and the writes through one of them.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Code that starts on a boundary of this many bytes.
const ALIGNMENT: usize = 32;

/// A bounded arena of generated code.
#[derive(Debug)]
pub struct CodeMemory {
    writable: Mapping,
    executable: Mapping,
    used: usize,
}

#[derive(Debug)]
struct Mapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: the mappings belong to the value alone and are not tied to a thread.
unsafe impl Send for CodeMemory {}
// SAFETY: a shared reference only gives out addresses; writing needs `&mut`.
unsafe impl Sync for CodeMemory {}

impl CodeMemory {
    /// Maps `len` bytes (a multiple of the page size) twice.
    ///
    /// # Errors
    /// The host refuses the memory file or a mapping of it.
    pub fn new(len: usize) -> io::Result<Self> {
        Self::near(len, 0)
    }

    /// The same, to be executed within 2 GiB of an address where there is room.
    ///
    /// # Errors
    /// As [`CodeMemory::new`].
    pub fn near(len: usize, address: u64) -> io::Result<Self> {
        let file = memory_file()?;
        // SAFETY: sets the size of a file that nothing else knows.
        if unsafe { libc::ftruncate(file.as_raw_fd(), len as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let writable = Mapping::new(&file, len, libc::PROT_READ | libc::PROT_WRITE)?;
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        let executable = match Mapping::near(&file, len, protection, address) {
            Some(near) => near,
            None => Mapping::new(&file, len, protection)?,
        };
        Ok(Self { writable, executable, used: 0 })
    }

    /// Appends code and gives its offset, or `None` if it does not fit.
    pub fn push(&mut self, code: &[u8]) -> Option<u32> {
        let start = self.used.next_multiple_of(ALIGNMENT);
        let end = start.checked_add(code.len()).filter(|&end| end <= self.writable.len)?;
        // SAFETY: `start..end` lies within the writable mapping, which nothing else points into.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.start.add(start), code.len()) };
        self.used = end;
        u32::try_from(start).ok()
    }

    /// Where the next code that is pushed will start.
    pub fn next(&self) -> usize {
        self.used.next_multiple_of(ALIGNMENT)
    }

    /// Replaces bytes of code that was pushed before. Only the thread that runs the code may do so.
    ///
    /// # Panics
    /// Where the bytes do not lie within what was pushed.
    pub fn patch(&mut self, offset: usize, bytes: &[u8]) {
        assert!(
            offset.checked_add(bytes.len()).is_some_and(|end| end <= self.used),
            "a patch outside the code"
        );
        // SAFETY: within the writable mapping by the line above.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.writable.start.add(offset), bytes.len());
        }
    }

    /// Forgets all code; its memory is used anew.
    pub fn clear(&mut self) {
        self.used = 0;
        // Code at these addresses may have been prefetched: CPUID serializes. SDM vol. 3, *Handling Self- and
        // Cross-Modifying Code*.
        std::hint::black_box(std::arch::x86_64::__cpuid(0));
    }

    /// The executable address of an offset that [`CodeMemory::push`] gave.
    #[inline(always)]
    pub fn address(&self, offset: u32) -> *const u8 {
        self.executable.start.wrapping_add(offset as usize)
    }
}

impl Mapping {
    /// A mapping within 1 GiB of an address; `None` where there is no room, or the address is 0.
    fn near(file: &OwnedFd, len: usize, protection: i32, address: u64) -> Option<Self> {
        const STEP: u64 = 32 << 20;
        const STEPS: u64 = 32;
        let start = (address != 0).then_some(address & !(STEP - 1))?;
        let below = (1..STEPS).filter_map(|n| start.checked_sub(n * STEP));
        below.chain((1..STEPS).map(|n| start + n * STEP)).find_map(|hint| {
            let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
            // SAFETY: a new shared mapping; it replaces no other.
            let start = unsafe { libc::mmap(hint as *mut _, len, protection, flags, file.as_raw_fd(), 0) };
            let mapping = (start != libc::MAP_FAILED).then(|| Self { start: start.cast(), len })?;
            // Kernels before 4.17 take the address for a wish.
            (start as u64 == hint).then_some(mapping)
        })
    }

    fn new(file: &OwnedFd, len: usize, protection: i32) -> io::Result<Self> {
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; the owner is going away, and so is every user of the address.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// A memory file that may be mapped executable. Kernels before 6.3 do not know the flag that says so and need none.
fn memory_file() -> io::Result<OwnedFd> {
    const MFD_EXEC: libc::c_uint = 0x10;
    for flags in [libc::MFD_CLOEXEC | MFD_EXEC, libc::MFD_CLOEXEC] {
        // SAFETY: the name is a terminated string; the call gives a new descriptor or -1.
        let fd = unsafe { libc::memfd_create(c"ringside-code".as_ptr(), flags) };
        if fd >= 0 {
            // SAFETY: a descriptor that was just created and that nothing else owns.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_bounded_and_clearing_makes_room() {
        let mut memory = CodeMemory::new(4096).unwrap();
        assert_eq!(memory.push(&[0xc3]), Some(0));
        assert_eq!(memory.push(&[0xc3; 4000]), Some(32));
        assert_eq!(memory.push(&[0xc3; 100]), None);
        memory.clear();
        assert_eq!(memory.push(&[0xc3; 100]), Some(0));
    }

    #[test]
    fn no_mapping_is_writable_and_executable() {
        let _memory = CodeMemory::new(4096).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let ours: Vec<_> = maps.lines().filter(|line| line.contains("ringside-code")).collect();
        assert!(ours.len() >= 2);
        assert!(ours.iter().all(|line| !line.contains("rwx")), "{ours:?}");
    }
}
