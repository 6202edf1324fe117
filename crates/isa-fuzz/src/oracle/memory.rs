//! Memory shared between the tester and its child.
#![allow(unsafe_code)] // mmap.

use std::ptr::{NonNull, null_mut};

use super::{OracleError, host_error};

/// Zeroed memory that a child process keeps sharing.
pub struct SharedMemory<T> {
    at: NonNull<T>,
}

impl<T> SharedMemory<T> {
    /// Maps it.
    pub fn new() -> Result<Self, OracleError> {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let at = unsafe { libc::mmap(null_mut(), size_of::<T>(), protection, flags, -1, 0) };
        match NonNull::new(at.cast::<T>()) {
            Some(at) if at.as_ptr().cast::<libc::c_void>() != libc::MAP_FAILED => Ok(Self { at }),
            _ => Err(host_error("mapping shared memory")),
        }
    }

    /// Where it is.
    pub fn as_ptr(&self) -> *mut T {
        self.at.as_ptr()
    }
}

impl<T> Drop for SharedMemory<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size.
        unsafe { libc::munmap(self.at.as_ptr().cast(), size_of::<T>()) };
    }
}
