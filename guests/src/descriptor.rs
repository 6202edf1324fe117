//! Segment and gate descriptors of legacy form.

/// The S bit and the types of code and data segments; add them to [`PRESENT`] and [`dpl`].
pub mod kind {
    /// Data, read-only.
    pub const DATA_READ: u64 = 0x10;
    /// Data, writable.
    pub const DATA: u64 = 0x12;
    /// Data, expand-down, read-only.
    pub const DOWN_READ: u64 = 0x14;
    /// Data, expand-down, writable.
    pub const DOWN: u64 = 0x16;
    /// Code, execute-only.
    pub const CODE: u64 = 0x18;
    /// Code, readable.
    pub const CODE_READ: u64 = 0x1a;
    /// Code, conforming, execute-only.
    pub const CONFORMING: u64 = 0x1c;
    /// Code, conforming, readable.
    pub const CONFORMING_READ: u64 = 0x1e;
    /// 16-bit TSS.
    pub const TSS16: u64 = 1;
    /// LDT.
    pub const LDT: u64 = 2;
    /// 16-bit TSS, busy.
    pub const TSS16_BUSY: u64 = 3;
    /// 16-bit call gate.
    pub const CALL16: u64 = 4;
    /// Task gate.
    pub const TASK: u64 = 5;
    /// 16-bit interrupt gate.
    pub const INTERRUPT16: u64 = 6;
    /// 16-bit trap gate.
    pub const TRAP16: u64 = 7;
    /// TSS.
    pub const TSS: u64 = 9;
    /// Busy TSS.
    pub const TSS_BUSY: u64 = 11;
    /// Call gate.
    pub const CALL: u64 = 12;
    /// Interrupt gate.
    pub const INTERRUPT: u64 = 14;
    /// Trap gate.
    pub const TRAP: u64 = 15;
}

/// The accessed bit of code and data segments.
pub const ACCESSED: u64 = 1;
/// Present.
pub const PRESENT: u64 = 0x80;
/// In `flags`: 64-bit code.
pub const LONG: u64 = 2;
/// In `flags`: 32 bits.
pub const BIG: u64 = 4;
/// In `flags`: the limit is in pages.
pub const PAGES: u64 = 8;

/// A privilege level's bits.
pub const fn dpl(level: u64) -> u64 {
    level << 5
}

/// A segment: `access` is its byte of type, level and presence, `flags` the four bits above the limit.
pub const fn segment(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

/// A gate of 8 bytes; `count` is a call gate's parameter count.
pub const fn gate(selector: u16, offset: u64, access: u64, count: u64) -> u64 {
    offset & 0xffff | (selector as u64) << 16 | count << 32 | access << 40 | (offset >> 16 & 0xffff) << 48
}
