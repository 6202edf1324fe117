//! The one place that touches guest memory.
#![allow(unsafe_code)] // The mapping and the accesses to it.

use core::arch::asm;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use vm_memory::{MmapRegion, mmap::MmapRegionBuilder};

use crate::{MemoryError, Offset, PageTracker};

mod sealed {
    pub trait Sealed: Copy {
        /// # Safety
        /// `from` is mapped for the scalar's width.
        unsafe fn load(from: *const u8) -> Self;
        /// # Safety
        /// `to` is mapped and writable for the scalar's width.
        unsafe fn store(to: *mut u8, value: Self);
        /// # Safety
        /// `at` is mapped and writable for the scalar's width.
        unsafe fn compare_exchange(at: *mut u8, expected: Self, new: Self) -> Self;
        /// # Safety
        /// `to` is mapped and writable for `count` scalars.
        unsafe fn fill(to: *mut u8, value: Self, count: usize);
    }
}

/// u8, u16, u32 and u64: what one instruction loads or stores, at any alignment.
pub trait Scalar: sealed::Sealed {}

macro_rules! scalar {
    ($type:ty, $class:ident, $accumulator:tt, $load:literal, $store:literal, $exchange:literal, $fill:literal) => {
        impl Scalar for $type {}
        impl sealed::Sealed for $type {
            #[inline(always)]
            unsafe fn load(from: *const u8) -> Self {
                let value: $type;
                // SAFETY: mapped by the caller's promise; the instruction has no other effect.
                unsafe {
                    asm!($load, out($class) value, in(reg) from, options(nostack, preserves_flags, readonly));
                }
                value
            }
            #[inline(always)]
            unsafe fn store(to: *mut u8, value: Self) {
                // SAFETY: writable by the caller's promise; the instruction has no other effect.
                unsafe {
                    asm!($store, in(reg) to, in($class) value, options(nostack, preserves_flags));
                }
            }
            #[inline(always)]
            unsafe fn compare_exchange(at: *mut u8, expected: Self, new: Self) -> Self {
                let held: $type;
                // SAFETY: writable by the caller's promise; the instruction has no other effect.
                unsafe {
                    asm!($exchange, in(reg) at, in($class) new,
                        inout($accumulator) expected => held, options(nostack));
                }
                held
            }
            #[inline]
            unsafe fn fill(to: *mut u8, value: Self, count: usize) {
                // SAFETY: writable by the caller's promise; the direction flag is clear in Rust code.
                unsafe {
                    asm!($fill, in($accumulator) value, inout("rdi") to => _, inout("rcx") count => _,
                        options(nostack, preserves_flags));
                }
            }
        }
    };
}

scalar!(
    u8,
    reg_byte,
    "al",
    "mov {0}, byte ptr [{1}]",
    "mov byte ptr [{0}], {1}",
    "lock cmpxchg byte ptr [{0}], {1}",
    "rep stosb"
);
scalar!(
    u16,
    reg,
    "ax",
    "mov {0:x}, word ptr [{1}]",
    "mov word ptr [{0}], {1:x}",
    "lock cmpxchg word ptr [{0}], {1:x}",
    "rep stosw"
);
scalar!(
    u32,
    reg,
    "eax",
    "mov {0:e}, dword ptr [{1}]",
    "mov dword ptr [{0}], {1:e}",
    "lock cmpxchg dword ptr [{0}], {1:e}",
    "rep stosd"
);
scalar!(
    u64,
    reg,
    "rax",
    "mov {0:r}, qword ptr [{1}]",
    "mov qword ptr [{0}], {1:r}",
    "lock cmpxchg qword ptr [{0}], {1:r}",
    "rep stosq"
);

/// The host mapping behind all of the RAM.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: u64,
}

// SAFETY: the mapping belongs to the value, and it is only accessed by single instructions and volatile copies, for
// which concurrent access is what the guest's own processors do.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeroed pages, committed on first use.
    pub(crate) fn anonymous(len: u64) -> Result<Self, MemoryError> {
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), (len as usize).max(1), prot, flags, -1, 0) };
        match NonNull::new(start.cast::<u8>()) {
            Some(at) if start != libc::MAP_FAILED => {
                // Fewer of the host's page faults, where it has huge pages to give; a hint that may be refused.
                // SAFETY: the mapping that was just made.
                unsafe { libc::madvise(start, len as usize, libc::MADV_HUGEPAGE) };
                Ok(Self { start: at, len })
            }
            _ => Err(MemoryError::Map { bytes: len, source: std::io::Error::last_os_error() }),
        }
    }

    /// Puts the first `len` bytes of a file in the place of zeroed pages: what is stored there goes into the file, or
    /// stays in memory.
    pub(crate) fn map_file(
        &self,
        offset: Offset,
        len: u64,
        (file, shared): (&File, bool),
    ) -> Result<(), MemoryError> {
        let at = self.at(offset, len);
        let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_NORESERVE };
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let fd = file.as_raw_fd();
        // SAFETY: `at` checked the range, which nobody has used yet; the file's pages are accessed as all others are.
        let mapped = unsafe { libc::mmap(at.cast(), len as usize, prot, flags | libc::MAP_FIXED, fd, 0) };
        match mapped {
            libc::MAP_FAILED => Err(MemoryError::File(std::io::Error::last_os_error())),
            _ => Ok(()),
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn host_address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    pub(crate) fn vm_region(
        &self,
        offset: Offset,
        len: u64,
        tracker: PageTracker,
    ) -> Result<MmapRegion<PageTracker>, MemoryError> {
        let builder = MmapRegionBuilder::new_with_bitmap(len as usize, tracker)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: the range lies within the mapping (placed by the caller), which every region keeps
        // alive through its tracker.
        unsafe { builder.with_raw_mmap_pointer(self.at(offset, len)).build() }
            .map_err(|_| MemoryError::BadRegion { start: offset, len })
    }

    #[inline(always)]
    pub(crate) fn load<T: Scalar>(&self, offset: Offset) -> T {
        // SAFETY: `at` checked the range.
        unsafe { T::load(self.at(offset, size_of::<T>() as u64)) }
    }

    #[inline(always)]
    pub(crate) fn store<T: Scalar>(&self, offset: Offset, value: T) {
        // SAFETY: `at` checked the range.
        unsafe { T::store(self.at(offset, size_of::<T>() as u64), value) }
    }

    #[inline(always)]
    pub(crate) fn compare_exchange<T: Scalar>(&self, offset: Offset, expected: T, new: T) -> T {
        // SAFETY: `at` checked the range.
        unsafe { T::compare_exchange(self.at(offset, size_of::<T>() as u64), expected, new) }
    }

    pub(crate) fn compare_exchange_16(&self, offset: Offset, expected: u128, new: u128) -> u128 {
        assert!(offset.is_multiple_of(16), "CMPXCHG16B at a misaligned offset");
        let at = self.at(offset, 16);
        let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
        // SAFETY: `at` checked the range, the address is aligned, and every x86-64 processor that Ringside supports has
        // CMPXCHG16B; RBX is restored.
        unsafe {
            asm!(
                "xchg rbx, {new_low}", "lock cmpxchg16b xmmword ptr [{at}]", "mov rbx, {new_low}",
                at = in(reg) at, new_low = inout(reg) new as u64 => _, in("rcx") (new >> 64) as u64,
                inout("rax") low, inout("rdx") high, options(nostack),
            );
        }
        u128::from(low) | u128::from(high) << 64
    }

    pub(crate) fn read_bytes(&self, offset: Offset, data: &mut [u8]) {
        // What rings and requests consist of: an instruction or two instead of a string instruction's start.
        match data.len() {
            1 => data[0] = self.load(offset),
            2 => data.copy_from_slice(&self.load::<u16>(offset).to_ne_bytes()),
            4 => data.copy_from_slice(&self.load::<u32>(offset).to_ne_bytes()),
            8 => data.copy_from_slice(&self.load::<u64>(offset).to_ne_bytes()),
            16 => {
                // The bound is checked for all of them first.
                self.at(offset, 16);
                data[..8].copy_from_slice(&self.load::<u64>(offset).to_ne_bytes());
                data[8..].copy_from_slice(&self.load::<u64>(offset + 8).to_ne_bytes());
            }
            _ => self.copy_out(offset, data),
        }
    }

    fn copy_out(&self, offset: Offset, data: &mut [u8]) {
        let from = self.at(offset, data.len() as u64);
        // SAFETY: `at` checked the source; the destination is a Rust slice, which guest memory never is. The copy is in
        // assembly, so that a concurrent change gives some bytes of either and nothing worse.
        unsafe {
            asm!("rep movsb", inout("rcx") data.len() => _, inout("rsi") from => _,
                inout("rdi") data.as_mut_ptr() => _, options(nostack, preserves_flags));
        }
    }

    pub(crate) fn write_bytes(&self, offset: Offset, data: &[u8]) {
        match *data {
            [byte] => self.store(offset, byte),
            [a, b] => self.store(offset, u16::from_ne_bytes([a, b])),
            [a, b, c, d] => self.store(offset, u32::from_ne_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => self.store(offset, u64::from_ne_bytes([a, b, c, d, e, f, g, h])),
            _ if data.len() == 16 => {
                // The bound is checked for all of them first.
                self.at(offset, 16);
                let (words, _) = data.as_chunks::<8>();
                self.store(offset, u64::from_ne_bytes(words[0]));
                self.store(offset + 8, u64::from_ne_bytes(words[1]));
            }
            _ => self.copy_in(offset, data),
        }
    }

    fn copy_in(&self, offset: Offset, data: &[u8]) {
        let to = self.at(offset, data.len() as u64);
        // SAFETY: as in `copy_out`, the other way round.
        unsafe {
            asm!("rep movsb", inout("rcx") data.len() => _, inout("rsi") data.as_ptr() => _,
                inout("rdi") to => _, options(nostack, preserves_flags));
        }
    }

    /// Gives pages back to the host: they are zeros from now on.
    pub(crate) fn discard(&self, offset: Offset, len: u64) {
        let at = self.at(offset, len);
        // SAFETY: `at` checked the range; the mapping is private and anonymous, so its pages become zeros and stay mapped.
        let done = unsafe { libc::madvise(at.cast(), len as usize, libc::MADV_DONTNEED) };
        if done != 0 {
            // Locked memory, or an odd offset: the guest is promised nothing but zeros.
            self.fill(offset, 0u8, len);
        }
    }

    pub(crate) fn fill<T: Scalar>(&self, offset: Offset, value: T, count: u64) {
        let len = count.saturating_mul(size_of::<T>() as u64);
        // SAFETY: `at` checked the range.
        unsafe { T::fill(self.at(offset, len), value, count as usize) }
    }

    pub(crate) fn copy_forward(&self, from: Offset, to: Offset, len: u64) {
        let (from, to) = (self.at(from, len), self.at(to, len));
        // SAFETY: `at` checked both ranges; both are guest memory, where any interleaving is allowed.
        unsafe {
            asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
                options(nostack, preserves_flags));
        }
    }

    #[inline(always)]
    fn at(&self, offset: Offset, len: u64) -> *mut u8 {
        assert!(offset <= self.len && len <= self.len - offset, "guest memory access outside the RAM");
        // SAFETY: within the mapping by the line above.
        unsafe { self.start.as_ptr().add(offset as usize) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping of `anonymous`, unmapped once.
        unsafe { libc::munmap(self.start.as_ptr().cast(), (self.len as usize).max(1)) };
    }
}
