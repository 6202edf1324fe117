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
/// Bytes in the smallest page.
pub const PAGE_SIZE: u64 = 4096;
