use serde::{Deserialize, Serialize};
use x86::ExitReason;

/// One exit: why, and at what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Exit {
    /// Why the guest left.
    pub reason: ExitReason,
    /// What it left at.
    pub detail: Detail,
}

impl Exit {
    /// An exit whose reason says it all.
    pub const fn new(reason: ExitReason) -> Self {
        Self { reason, detail: Detail::None }
    }

    /// An exit with its detail.
    pub const fn at(reason: ExitReason, detail: Detail) -> Self {
        Self { reason, detail }
    }
}

/// What an exit was at. Its reason tells whose vocabulary it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", content = "at", rename_all = "snake_case")]
pub enum Detail {
    /// Nothing to tell.
    #[default]
    None,
    /// An I/O port.
    Port {
        /// Its number.
        port: u16,
        /// Bytes accessed.
        size: u8,
        /// Whether the guest wrote.
        write: bool,
    },
    /// A guest-physical address.
    Memory {
        /// The address.
        address: u64,
        /// Bytes accessed.
        size: u8,
        /// Whether the guest wrote.
        write: bool,
    },
    /// A model-specific register's index.
    Msr(u32),
    /// A control register.
    ControlRegister {
        /// Its number.
        number: u8,
        /// Whether the guest wrote.
        write: bool,
    },
    /// The vector of an exception or an interrupt.
    Vector(u8),
    /// A leaf of CPUID.
    Leaf(u32),
    /// A hypercall's number.
    Hypercall(u64),
}
