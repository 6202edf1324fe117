//! How the C library's allocator keeps memory.
#![allow(unsafe_code)] // Its settings are a foreign function.

/// Larger blocks are mappings of their own, in bytes.
const OWN_MAPPING: libc::c_int = 2 << 20;

/// Large blocks go back to the host when they are freed, and move without being copied when they grow. Left alone, the
/// allocator takes the first large block that is freed (a kernel that was unpacked) for a sign that such blocks come and go,
/// and keeps all of that size from then on: a fifth of what a machine takes beside its RAM.
pub fn give_back_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number in the allocator, which may be done at any time; there is one thread so far.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_MAPPING);
    }
}
