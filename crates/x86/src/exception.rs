//! Exceptions. SDM vol. 3, *Interrupt and Exception Handling*.

/// The vector of an architectural exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Vector {
    DivideError = 0,
    Debug = 1,
    Nmi = 2,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    X87FloatingPoint = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    SimdFloatingPoint = 19,
    Virtualization = 20,
    ControlProtection = 21,
}

impl Vector {
    /// The mnemonic: "#GP".
    pub const fn mnemonic(self) -> &'static str {
        match self {
            Self::DivideError => "#DE",
            Self::Debug => "#DB",
            Self::Nmi => "NMI",
            Self::Breakpoint => "#BP",
            Self::Overflow => "#OF",
            Self::BoundRange => "#BR",
            Self::InvalidOpcode => "#UD",
            Self::DeviceNotAvailable => "#NM",
            Self::DoubleFault => "#DF",
            Self::InvalidTss => "#TS",
            Self::SegmentNotPresent => "#NP",
            Self::StackFault => "#SS",
            Self::GeneralProtection => "#GP",
            Self::PageFault => "#PF",
            Self::X87FloatingPoint => "#MF",
            Self::AlignmentCheck => "#AC",
            Self::MachineCheck => "#MC",
            Self::SimdFloatingPoint => "#XM",
            Self::Virtualization => "#VE",
            Self::ControlProtection => "#CP",
        }
    }

    /// Whether it counts as contributory where it meets another. SDM vol. 3, *Double Fault Exception*.
    pub const fn is_contributory(self) -> bool {
        matches!(
            self,
            Self::DivideError
                | Self::InvalidTss
                | Self::SegmentNotPresent
                | Self::StackFault
                | Self::GeneralProtection
                | Self::ControlProtection
        )
    }

    /// Whether it counts as a page fault where it meets another.
    pub const fn is_page_fault(self) -> bool {
        matches!(self, Self::PageFault | Self::Virtualization)
    }
}

/// An exception as the processor delivers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Which one.
    pub vector: Vector,
    /// The error code, for those that push one.
    pub error_code: Option<u32>,
    /// For a page fault: the linear address that goes to CR2. For a debug exception: the bits to set in DR6.
    pub address: u64,
}

impl core::fmt::Display for Exception {
    /// "#PF(0x2) at 0x1000".
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.vector.mnemonic())?;
        if let Some(code) = self.error_code {
            write!(f, "({code:#x})")?;
        }
        if self.vector.is_page_fault() { write!(f, " at {:#x}", self.address) } else { Ok(()) }
    }
}

impl Exception {
    /// An exception without an error code.
    pub const fn new(vector: Vector) -> Self {
        Self { vector, error_code: None, address: 0 }
    }

    /// An exception with an error code.
    pub const fn with_code(vector: Vector, code: u32) -> Self {
        Self { vector, error_code: Some(code), address: 0 }
    }

    /// #GP with an error code.
    pub const fn gp(code: u32) -> Self {
        Self::with_code(Vector::GeneralProtection, code)
    }

    /// #UD.
    pub const fn ud() -> Self {
        Self::new(Vector::InvalidOpcode)
    }

    /// #DB with the bits of DR6 that say why.
    pub const fn debug(dr6: u64) -> Self {
        Self { vector: Vector::Debug, error_code: None, address: dr6 }
    }

    /// #PF at a linear address.
    pub const fn page_fault(address: u64, code: PageFaultCode) -> Self {
        Self { vector: Vector::PageFault, error_code: Some(code.bits()), address }
    }
}

bitflags::bitflags! {
    /// The error code of a page fault. SDM vol. 3, *Page-Fault Exceptions*.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct PageFaultCode: u32 {
        /// The translation was present: a matter of rights.
        const PRESENT = 1 << 0;
        /// A write.
        const WRITE = 1 << 1;
        /// A user-mode access.
        const USER = 1 << 2;
        /// A reserved bit was set in an entry.
        const RESERVED = 1 << 3;
        /// An instruction fetch.
        const FETCH = 1 << 4;
        /// A protection key forbade it.
        const KEY = 1 << 5;
    }
}
