//! The two ways to a device's registers, and what they have in common: negotiation, queues, notifications.

mod core;
pub mod mmio;
pub mod pci;

#[cfg(any(test, feature = "testing"))]
pub(crate) use core::Core;
pub use core::{Event, Interrupts, Status};
