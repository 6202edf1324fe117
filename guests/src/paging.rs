//! Pages of 4 KiB whose entries a guest changes: 512 of them at [`WINDOW`], far from the identity map.

use core::ptr::addr_of;

/// The first page's linear address.
pub const WINDOW: u64 = 0x80_0000_0000;
/// The first page's physical address: nobody else uses this memory.
pub const FRAMES: u64 = 0x200_0000;
/// Bytes of a page.
pub const PAGE: u64 = 0x1000;

/// Bits of an entry.
pub mod bit {
    /// Present.
    pub const PRESENT: u64 = 1;
    /// Writable.
    pub const WRITE: u64 = 2;
    /// For ring 3.
    pub const USER: u64 = 4;
    /// Accessed.
    pub const ACCESSED: u64 = 1 << 5;
    /// Dirty.
    pub const DIRTY: u64 = 1 << 6;
    /// A large page.
    pub const LARGE: u64 = 1 << 7;
    /// Global.
    pub const GLOBAL: u64 = 1 << 8;
    /// Not executable.
    pub const NX: u64 = 1 << 63;
    /// All that is allowed.
    pub const ALL: u64 = PRESENT | WRITE | USER;
}

/// A table.
#[repr(C, align(4096))]
pub struct Table(pub [u64; 512]);

static mut PDPT: Table = Table([0; 512]);
static mut PD: Table = Table([0; 512]);
static mut PT: Table = Table([0; 512]);

unsafe extern "C" {
    /// The tables of the identity map: its root, and the four directories of large pages.
    pub static mut identity_pml4: Table;
    /// Four directories.
    pub static mut identity_pd: [Table; 4];
}

/// Makes the window: all pages present and open.
pub fn open() {
    let slot = (WINDOW >> 39 & 511) as usize;
    unsafe {
        identity_pml4.0[slot] = addr_of!(PDPT) as u64 | bit::ALL;
        PDPT.0[0] = addr_of!(PD) as u64 | bit::ALL;
        PD.0[0] = addr_of!(PT) as u64 | bit::ALL;
    }
    for page in 0..512 {
        set(page, bit::ALL);
    }
}

/// A second table of the window, for [`test_entries`].
static mut TEST: Table = Table([0; 512]);

/// A page of the window that has a directory entry of its own: its linear address.
pub const TEST_PAGE: u64 = WINDOW + (1 << 21);
/// Where that page is.
pub const TEST_FRAME: u64 = FRAMES + 512 * PAGE;

/// Sets the bits of the test page's directory entry and of its table entry, and forgets what was cached.
pub fn test_entries(directory: u64, table: u64) {
    unsafe {
        (&raw mut PD.0[1]).write_volatile(addr_of!(TEST) as u64 | directory);
        (&raw mut TEST.0[0]).write_volatile(TEST_FRAME | table);
    }
    flush(TEST_PAGE);
}

/// The test page's directory entry as it is given.
pub fn test_directory(entry: u64) {
    unsafe { (&raw mut PD.0[1]).write_volatile(entry) }
    flush(TEST_PAGE);
}

/// The test page's entries.
pub fn tested() -> [u64; 2] {
    unsafe { [(&raw const PD.0[1]).read_volatile(), (&raw const TEST.0[0]).read_volatile()] }
}

/// Keeps the identity map from ring 3, or opens it.
pub fn identity_for_users(open: bool) {
    for table in 0..4 {
        for entry in 0..512 {
            unsafe {
                let entry = &raw mut identity_pd[table].0[entry];
                entry.write_volatile(entry.read_volatile() & !bit::USER | if open { bit::USER } else { 0 });
            }
        }
    }
    unsafe { crate::cpu::set_cr3(crate::cpu::cr3()) };
}

/// A page's linear address.
pub fn address(page: u64) -> u64 {
    WINDOW + page * PAGE
}

/// Sets a page's bits, and forgets what was cached of it.
pub fn set(page: u64, bits: u64) {
    unsafe { (&raw mut PT.0[page as usize]).write_volatile(FRAMES + page * PAGE | bits) }
    flush(address(page));
}

/// A page's entry.
pub fn entry(page: u64) -> u64 {
    unsafe { (&raw const PT.0[page as usize]).read_volatile() }
}

/// Forgets what is cached of an address.
pub fn flush(address: u64) {
    unsafe { core::arch::asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) }
}

/// Reads the window's memory, past its page tables.
pub fn read<T: Copy>(offset: u64) -> T {
    unsafe { ((FRAMES + offset) as *const T).read_unaligned() }
}

/// Writes it.
pub fn write<T>(offset: u64, value: T) {
    unsafe { ((FRAMES + offset) as *mut T).write_unaligned(value) }
}

/// Fills so many bytes of it.
pub fn fill(offset: u64, value: u8, len: usize) {
    unsafe { core::ptr::write_bytes((FRAMES + offset) as *mut u8, value, len) }
}

/// Where a page's entry is.
pub fn entry_address(page: u64) -> u64 {
    addr_of!(PT) as u64 + 8 * page
}
