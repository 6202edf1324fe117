//! Page-table entries. SDM vol. 3, *Paging*.

use bitflags::bitflags;

bitflags! {
    /// A page-table entry of any level.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Entry: u64 {
        /// Present.
        const P = 1 << 0;
        /// Writable.
        const RW = 1 << 1;
        /// Accessible in user mode.
        const US = 1 << 2;
        /// Page-level write-through.
        const PWT = 1 << 3;
        /// Page-level cache disable.
        const PCD = 1 << 4;
        /// Accessed.
        const A = 1 << 5;
        /// Dirty.
        const D = 1 << 6;
        /// Page size: the entry maps a page above level 1.
        const PS = 1 << 7;
        /// Global.
        const G = 1 << 8;
        /// Execute disable.
        const XD = 1 << 63;
    }
}

/// Bits 12 to 51: the physical address in an entry.
pub const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;
/// Whether all bits of a linear address from the highest of `bits` (48 or 57) on are the same.
#[inline]
pub const fn is_canonical(address: u64, bits: u32) -> bool {
    sign_extended(address, bits) == address
}

/// The lowest `bits` of an address, with the highest of them in all above.
#[inline]
pub const fn sign_extended(address: u64, bits: u32) -> u64 {
    ((address << (64 - bits)) as i64 >> (64 - bits)) as u64
}

/// Bytes in the smallest page.
pub const PAGE_SIZE: u64 = 4096;
