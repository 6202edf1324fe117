//! Paravirtual devices, as *Virtual I/O Device (VIRTIO) Version 1.2* has them.
//!
//! ```text
//!  guest's driver ──registers──> transport (pci, mmio) ── Core: status, features, queues
//!        │                                                  │ process(queue)
//!        └──rings in guest memory──> queue (split, packed) ─┴─> Device: block, rng, …
//! ```
//!
//! A [`Device`] sees requests, never rings or registers: [`transport`] negotiates and notifies, [`queue`] reads and
//! writes the rings. Everything in guest memory is hostile: a ring that breaks the rules ends in
//! [`queue::QueueError`], which puts the device into the state that asks the driver for a reset, with the reason in the
//! log, and never more. Devices know no terminal, file or thread of the machine; what they need of the host is passed in.

pub mod block;
pub mod features;
pub mod memory;
pub mod queue;
pub mod rng;
pub mod transport;

#[cfg(test)]
mod testing;

use queue::{Queue, QueueError};

/// What a device is behind its transport.
pub trait Device: Send {
    /// Its device id. *Device Types*.
    fn id(&self) -> u16;
    /// Feature bits of its own, below 24 and from 50 on; those of rings and transport are added to them.
    fn features(&self) -> u64;
    /// The most entries of each of its queues: powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// Reads its configuration space; zeros where there is none.
    fn read_config(&mut self, offset: u64, data: &mut [u8]);
    /// Writes its configuration space.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// The driver is ready, with these features of those that were offered.
    fn activate(&mut self, features: u64);
    /// The driver has put something into queue `index`: takes what is there.
    ///
    /// # Errors
    /// [`QueueError`] for a ring or a request that breaks the rules.
    fn process(&mut self, index: u16, queue: &mut Queue) -> Result<(), QueueError>;
    /// The driver or the machine resets the device.
    fn reset(&mut self);
}
