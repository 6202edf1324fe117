//! What the meaning of an instruction's bytes depends on.

/// Everything besides the bytes that decoding and execution of a block depend on, packed so that two are compared in
/// one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mode(pub u32);

impl Mode {
    const LONG: u32 = 1 << 2;
    const PROTECTED: u32 = 1 << 3;
    const V86: u32 = 1 << 4;
    const VECTOR: u32 = 7;

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
        VectorMode((self.0 >> Self::VECTOR) as u8)
    }
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
