//! What the meaning of an instruction's bytes depends on.

use x86::descriptor::Attributes;
use x86::{Segment, SegmentRegister};

/// Everything besides the bytes that decoding and execution of a block depend on, packed so that two are compared in
/// one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mode(pub u32);

impl Mode {
    const LONG: u32 = 1 << 2;
    const PROTECTED: u32 = 1 << 3;
    const V86: u32 = 1 << 4;
    const VECTOR: u32 = 7;
    const VECTOR_BITS: u8 = 0x3f;
    const FLAT: u32 = 1 << 13;
    const WHOLE_FS: u32 = 1 << 14;
    const WHOLE_GS: u32 = 1 << 15;
    /// All that follows from the segments of 32-bit code.
    const SEGMENTS: u32 = Self::FLAT | Self::WHOLE_FS | Self::WHOLE_GS;

    /// Packs it. `code_size` is 16, 32 or 64.
    pub fn new(code_size: u32, long: bool, protected: bool, v86: bool, cpl: u8, vector: VectorMode) -> Self {
        let size = match code_size {
            16 => 0,
            32 => 1,
            _ => 2,
        };
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        Self(
            size | flag(long, Self::LONG)
                | flag(protected, Self::PROTECTED)
                | flag(v86, Self::V86)
                | u32::from(cpl) << 5
                | u32::from(vector.0) << Self::VECTOR,
        )
    }

    /// The same for the segments as they are now, as far as 32-bit code is concerned: see [`Mode::is_flat`].
    #[inline]
    pub fn with_segments(self, segments: &[Segment; 6]) -> Self {
        let mode = Self(self.0 & !Self::SEGMENTS);
        if mode.code_size() != 32 || mode.is_real_or_v86() {
            return mode;
        }
        let of = |register: SegmentRegister| &segments[register as usize];
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        let code = of(SegmentRegister::Cs);
        let stack = of(SegmentRegister::Ss);
        let is_flat = code.base == 0
            && code.limit == u32::MAX
            && stack.attributes.contains(Attributes::DB)
            && [SegmentRegister::Ss, SegmentRegister::Ds, SegmentRegister::Es]
                .into_iter()
                .all(|register| of(register).base == 0 && is_whole(of(register)));
        Self(
            mode.0
                | flag(is_flat, Self::FLAT)
                | flag(is_whole(of(SegmentRegister::Fs)), Self::WHOLE_FS)
                | flag(is_whole(of(SegmentRegister::Gs)), Self::WHOLE_GS),
        )
    }

    /// Whether it is 32-bit code in whole segments with base 0: code, stack, and DS and ES, which may be written too.
    #[inline(always)]
    pub fn is_flat(self) -> bool {
        self.0 & Self::FLAT != 0
    }
    /// Whether code of this mode is translated: 64-bit code, and 32-bit code in flat segments.
    #[inline(always)]
    pub fn is_translated(self) -> bool {
        self.0 & (2 | Self::FLAT) != 0
    }
    /// For flat code: whether FS is a whole segment, of any base.
    pub fn has_whole_fs(self) -> bool {
        self.0 & Self::WHOLE_FS != 0
    }
    /// The same of GS.
    pub fn has_whole_gs(self) -> bool {
        self.0 & Self::WHOLE_GS != 0
    }

    /// 16, 32 or 64.
    pub fn code_size(self) -> u32 {
        16 << (self.0 & 3)
    }
    /// Whether it is 64-bit mode.
    #[inline(always)]
    pub fn is_64(self) -> bool {
        self.0 & 3 == 2
    }
    /// Whether IA32_EFER.LMA is set: 64-bit or compatibility mode.
    pub fn is_long(self) -> bool {
        self.0 & Self::LONG != 0
    }
    /// Whether CR0.PE is set.
    pub fn is_protected(self) -> bool {
        self.0 & Self::PROTECTED != 0
    }
    /// Whether it is virtual-8086 mode.
    pub fn is_v86(self) -> bool {
        self.0 & Self::V86 != 0
    }
    /// Whether segments are loaded as in real mode.
    pub fn is_real_or_v86(self) -> bool {
        !self.is_protected() || self.is_v86()
    }
    /// Current privilege level.
    #[inline(always)]
    pub fn cpl(self) -> u8 {
        (self.0 >> 5 & 3) as u8
    }
    /// The same with another privilege level.
    pub fn with_cpl(self, cpl: u8) -> Self {
        Self(self.0 & !(3 << 5) | u32::from(cpl & 3) << 5)
    }
    /// What the control registers say of x87 and vector instructions.
    pub fn vector(self) -> VectorMode {
        VectorMode((self.0 >> Self::VECTOR) as u8 & Self::VECTOR_BITS)
    }
}

/// Whether a segment allows loads and stores at all offsets.
fn is_whole(segment: &Segment) -> bool {
    let needed = Attributes::S | Attributes::WRITABLE | Attributes::P;
    let asked = needed | Attributes::CODE | Attributes::EXPAND_DOWN | Attributes::UNUSABLE;
    segment.limit == u32::MAX && segment.attributes & asked == needed
}

/// What CR0, CR4 and XCR0 say of x87 and vector instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VectorMode(pub u8);

impl VectorMode {
    /// CR0.EM.
    pub const EM: u8 = 1;
    /// CR0.TS.
    pub const TS: u8 = 2;
    /// CR0.MP.
    pub const MP: u8 = 4;
    /// CR4.OSFXSR.
    pub const OSFXSR: u8 = 8;
    /// CR4.OSXSAVE with XCR0's SSE and AVX bits.
    pub const AVX: u8 = 16;
    /// As above, with the AVX-512 bits.
    pub const AVX512: u8 = 32;

    /// Whether a bit is set.
    pub fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }
}
