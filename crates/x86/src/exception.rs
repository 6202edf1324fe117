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

/// An exception as the processor delivers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Which one.
    pub vector: Vector,
    /// The error code, for those that push one.
    pub error_code: Option<u32>,
    /// For a page fault: the linear address that goes to CR2.
    pub address: u64,
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
