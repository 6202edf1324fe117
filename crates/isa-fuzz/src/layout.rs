//! Where code and data of a case lie, and the segments: the same in the oracle's address space and in the emulator's.

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Linear address of the data: two pages that may be written, then one that may only be read. What is around them is
/// not mapped.
pub const ARENA: u64 = 0x1000_0000;
/// Bytes of data that are mapped.
pub const ARENA_LEN: usize = 3 * PAGE;
/// Linear address of the page of code: it may be read and executed.
pub const CODE: u64 = 0x1010_0000;
/// Where in the page of code the instruction is.
pub const CODE_AT: u64 = 0x200;
/// What the rest of the page of code is full of: INT3.
pub const FILLER: u8 = 0xcc;
/// Where in the page of code cases leave to: 64-bit code that jumps to [`EXIT`]. The address in it is aligned, for it
/// is read with the case's alignment checks.
pub const BRIDGE_AT: u64 = 0xf02;
/// Where code leaves to: a page of the oracle's, out of reach of 32-bit code, where nothing is mapped for the emulator.
pub const EXIT: u64 = 0x6000_0000_0002;

/// The code segments that Linux gives a process, and its data segment.
pub const USER_CODE32: u16 = 0x23;
/// Data and stack.
pub const USER_DATA: u16 = 0x2b;
/// 64-bit code.
pub const USER_CODE64: u16 = 0x33;

/// The size of code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Mode {
    /// 16-bit protected mode, as compatibility mode has it.
    Bits16 = 16,
    /// 32-bit protected mode, as compatibility mode has it.
    Bits32 = 32,
    /// 64-bit mode.
    Bits64 = 64,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Bits64, Self::Bits32, Self::Bits16];

    /// 16, 32 or 64.
    pub fn bits(self) -> u32 {
        self as u32
    }

    /// From 16, 32 or 64.
    pub fn from_bits(bits: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.bits() == bits)
    }

    /// The code segment.
    pub fn code_selector(self) -> u16 {
        match self {
            Self::Bits16 => local(LDT_CODE16),
            Self::Bits32 => local(LDT_CODE32),
            Self::Bits64 => USER_CODE64,
        }
    }

    /// RIP of the instruction.
    pub fn rip(self) -> u64 {
        if self == Self::Bits16 { CODE_AT } else { CODE + CODE_AT }
    }
}

/// The code that leaves a case, as it stands behind `len` bytes of the case's own.
pub fn leave(mode: Mode, len: usize) -> ([u8; 8], usize) {
    const BRIDGE: [u8; 4] = ((CODE + BRIDGE_AT) as u32).to_le_bytes();
    const TO: u8 = USER_CODE64 as u8;
    const FAR: [u8; 8] = [0x66, 0xea, BRIDGE[0], BRIDGE[1], BRIDGE[2], BRIDGE[3], TO, 0];
    match mode {
        Mode::Bits64 => {
            let distance = (BRIDGE_AT as i32 - (CODE_AT as i32 + len as i32 + 5)).to_le_bytes();
            ([0xe9, distance[0], distance[1], distance[2], distance[3], FILLER, FILLER, FILLER], 5)
        }
        Mode::Bits32 => ([0xea, BRIDGE[0], BRIDGE[1], BRIDGE[2], BRIDGE[3], TO, 0, FILLER], 7),
        Mode::Bits16 => (FAR, 8),
    }
}

/// The page of code where no case is.
pub fn code_page() -> Vec<u8> {
    let mut page = vec![FILLER; PAGE];
    let at = BRIDGE_AT as usize;
    page[at..at + 6].copy_from_slice(&[0xff, 0x25, 0, 0, 0, 0]);
    page[at + 6..at + 14].copy_from_slice(&EXIT.to_le_bytes());
    page
}

/// What the upper half of ESP may be with a 16-bit stack segment: IRET does not load it. Where the oracle's IRET is
/// has it in its address ([`entry_stack`]).
pub const UPPER_HALVES: [u16; 4] = [0, 0x1000, 0x8000, 0xffff];

/// The page that the oracle enters a case from, by the upper half of ESP.
pub const fn entry_stack(upper: u16) -> u64 {
    (EXIT & !0xfff) + (1 << 32) + ((upper as u64) << 16)
}

/// Whether a selector in SS makes 16-bit code's or 32-bit code's stack pointer a 16-bit one.
pub fn is_narrow_stack(selector: u16) -> bool {
    selector & 4 != 0 && LDT.get(usize::from(selector >> 3)).is_some_and(|entry| !entry.big)
}

/// What kind of segment a descriptor makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data that may be written.
    Data,
    /// Data that may only be read.
    ReadOnly,
    /// Data with its limit below it.
    ExpandDown,
    /// Code that may be read.
    Code,
    /// Code that may not.
    ExecuteOnly,
    /// Data, not present.
    Absent,
}

/// A descriptor of the local table.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Linear address of offset 0.
    pub base: u32,
    /// The limit as the descriptor holds it.
    pub limit: u32,
    /// Whether the limit counts pages.
    pub pages: bool,
    /// The D or B flag.
    pub big: bool,
    /// The type.
    pub kind: Kind,
}

const LDT_CODE32: u16 = 0;
const LDT_CODE16: u16 = 1;

const fn entry(base: u64, limit: u32, big: bool, kind: Kind) -> Entry {
    Entry { base: base as u32, limit, pages: false, big, kind }
}

const fn flat(big: bool, kind: Kind) -> Entry {
    Entry { base: 0, limit: 0xf_ffff, pages: true, big, kind }
}

/// The local descriptor table.
pub const LDT: [Entry; 17] = [
    flat(true, Kind::Code),
    entry(CODE, 0xffff, false, Kind::Code),
    flat(true, Kind::Data),
    entry(ARENA, 0x2fff, true, Kind::Data),
    entry(ARENA, 0x2fff, true, Kind::ReadOnly),
    entry(ARENA, 0x07ff, true, Kind::ExpandDown),
    entry(ARENA, 0x07ff, false, Kind::ExpandDown),
    entry(ARENA - 0x1000, 0x1ffb, false, Kind::Data),
    entry(ARENA, 0x2fff, true, Kind::Code),
    entry(ARENA, 0x2fff, true, Kind::ExecuteOnly),
    entry(ARENA, 0x2fff, true, Kind::Absent),
    Entry { base: ARENA as u32 + 0x800, limit: 1, pages: true, big: true, kind: Kind::Data },
    entry(ARENA, 0xffff, false, Kind::Data),
    flat(false, Kind::Data),
    entry(CODE, 0x03ff, true, Kind::Code),
    flat(true, Kind::ReadOnly),
    Entry { base: ARENA as u32 + 0x400, ..flat(true, Kind::Data) },
];

/// The selector of an entry of [`LDT`].
pub const fn local(index: u16) -> u16 {
    index << 3 | 7
}

/// Selectors that a data-segment register may hold when an instruction begins.
pub const DATA_SELECTORS: [u16; 12] = [
    local(2),
    local(2),
    local(3),
    local(3),
    local(12),
    local(4),
    local(5),
    local(6),
    local(8),
    local(11),
    local(13),
    0,
];
/// Selectors that SS may hold when an instruction begins.
pub const STACK_SELECTORS: [u16; 9] =
    [local(2), local(2), local(3), local(12), local(7), local(5), local(6), local(13), USER_DATA];
/// Selectors that an instruction may find in its operands.
pub const ANY_SELECTORS: [u16; 28] = [
    0,
    1,
    3,
    0x10,
    0x18,
    USER_CODE32,
    USER_DATA,
    USER_CODE64,
    0x33,
    0x43,
    0x53,
    0x60,
    0x8b,
    local(0),
    local(1),
    local(2),
    local(3),
    local(4),
    local(5),
    local(6),
    local(8),
    local(9),
    local(10),
    local(12),
    local(14),
    local(15),
    0x87,
    0x14,
];

impl Entry {
    /// The descriptor. Linux sets the accessed flag itself; all are for CPL 3.
    pub fn descriptor(&self) -> u64 {
        let kind: u64 = match self.kind {
            Kind::Data | Kind::Absent => 0x3,
            Kind::ReadOnly => 0x1,
            Kind::ExpandDown => 0x7,
            Kind::Code => 0xb,
            Kind::ExecuteOnly => 0x9,
        };
        let present = u64::from(self.kind != Kind::Absent);
        let (base, limit) = (u64::from(self.base), u64::from(self.limit));
        limit & 0xffff
            | (base & 0xff_ffff) << 16
            | (kind | 0x10 | 3 << 5 | present << 7) << 40
            | (limit >> 16 & 0xf) << 48
            | u64::from(self.big) << 54
            | u64::from(self.pages) << 55
            | (base >> 24) << 56
    }

    /// The last offset that the limit names.
    pub fn last(&self) -> u32 {
        if self.pages { self.limit << 12 | 0xfff } else { self.limit }
    }
}

/// Linux's global descriptor table: what a process can see of it.
pub fn gdt() -> [u64; 16] {
    let mut table = [0; 16];
    table[1] = 0x00cf_9b00_0000_ffff;
    table[2] = 0x00af_9b00_0000_ffff;
    table[3] = 0x00cf_9300_0000_ffff;
    table[4] = 0x00cf_fb00_0000_ffff;
    table[5] = 0x00cf_f300_0000_ffff;
    table[6] = 0x00af_fb00_0000_ffff;
    // The busy task-state segment and the local table; their bases are nobody's business here.
    table[8] = 0x0000_8b00_0000_206f;
    table[10] = 0x0000_8200_0000_007f;
    // The processor's number as a limit.
    table[15] = 0x0040_f500_0000_0000;
    table
}

/// The base of the segment that a selector stands for, where it is a data segment of a process.
pub fn base_of(selector: u16) -> u64 {
    if selector & 4 != 0 {
        LDT.get(usize::from(selector >> 3)).map_or(0, |entry| u64::from(entry.base))
    } else {
        0
    }
}

/// What the data pages hold before a case's own bytes go in.
pub fn pristine() -> Vec<u8> {
    (0..ARENA_LEN)
        .map(|at| (at as u32).wrapping_mul(0x9e37_79b1).to_be_bytes()[0] ^ (at >> 8) as u8)
        .collect()
}
