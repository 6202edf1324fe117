//! The two ways to a device's registers, and what they have in common: negotiation, queues, notifications.

mod core;
pub mod mmio;
pub mod pci;

pub use core::Event;
