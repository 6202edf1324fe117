//! The vocabulary of the x86-64 architecture: registers, flags, control registers, model-specific registers,
//! descriptors, exceptions, page-table entries, APIC registers and exit reasons.
//!
//! Plain data with the names of Intel's Software Developer's Manual ("SDM"). This crate knows nothing of Ringside:
//! every other crate may depend on it, and it depends on none of them.
#![no_std]

pub mod apic;
pub mod control;
pub mod descriptor;
pub mod exception;
pub mod exit_reason;
pub mod flags;
pub mod msr;
pub mod paging;
pub mod register;

pub use control::{Cr0, Cr3, Cr4, Efer, Xcr0};
pub use descriptor::{Descriptor, Segment, Selector, SystemType, TableRegister};
pub use exception::{Exception, Vector};
pub use exit_reason::ExitReason;
pub use flags::Flags;
pub use register::{Gpr, SegmentRegister};
