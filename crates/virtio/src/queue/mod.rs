//! Virtqueues: requests from the driver, in rings that lie in guest memory. *Virtqueues*.
//!
//! ```text
//!            driver                               device
//!  descriptors: buffers, in chains ────────pop──────────> Chain: what to read, where to write
//!                                  <──────complete(chain, bytes written)
//!                                  <──interrupt? ── needs_notification
//! ```
//!
//! [`Queue`] is one ring of either format; what differs is in [`split`] and [`packed`]. The guest may write anything
//! anywhere at any time: what was read once is not read again, and each rule that a driver breaks is a [`QueueError`].

mod chain;
mod packed;
mod split;
#[cfg(test)]
mod tests;

pub use chain::{Chain, Segment};

use crate::features;
use crate::memory::DmaMemory;
use packed::PackedRing;
use split::SplitRing;

/// The most entries of a queue.
pub const MAX_SIZE: u16 = 32768;

/// Where a queue lies, as the driver says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueConfig {
    /// Entries.
    pub size: u16,
    /// Guest-physical address of the descriptors: the descriptor table, or the packed ring.
    pub descriptors: u64,
    /// That of the driver's area: the available ring, or the driver's event suppression.
    pub driver: u64,
    /// That of the device's area: the used ring, or the device's event suppression.
    pub device: u64,
}

/// A rule that a driver broke.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// A size that no queue has.
    #[error("a queue of {0} entries")]
    Size(u16),
    /// An area that is not aligned as it has to be.
    #[error("a queue's area at {address:#x}, not on a multiple of {alignment}")]
    Alignment {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        alignment: u64,
    },
    /// Memory that is not there, or cannot be written.
    #[error("memory at {address:#x} of {len:#x} bytes that is not there or cannot be written")]
    Memory {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// More available entries than the ring has.
    #[error("the available index jumped from {from} to {to} in a ring of {size}")]
    IndexJump {
        /// What the device has seen.
        from: u16,
        /// What the driver says.
        to: u16,
        /// Entries.
        size: u16,
    },
    /// A descriptor that is not in its table.
    #[error("descriptor {index} of a table of {size}")]
    NoDescriptor {
        /// The descriptor's number.
        index: u32,
        /// Descriptors in the table.
        size: u32,
    },
    /// A chain that goes round, or has more descriptors than it may.
    #[error("a chain of more than {0} descriptors")]
    Endless(u32),
    /// An indirect table that cannot be.
    #[error("an indirect table of {len} bytes with flags {flags:#x}")]
    Indirect {
        /// Its bytes.
        len: u32,
        /// The flags of the descriptor that points to it, or of the one in it.
        flags: u16,
    },
    /// A buffer to be read after one to be written.
    #[error("a buffer for the device to read comes after one for it to write")]
    Order,
    /// A buffer without bytes.
    #[error("a buffer of no bytes")]
    EmptyBuffer,
    /// More bytes in all than a length can tell.
    #[error("buffers of more than 4 GiB in one chain")]
    TooLong,
    /// More requests at a time than the ring has room for.
    #[error("more than {0} entries of requests that it has not got back")]
    InFlight(u16),
    /// A request that is none of the device's.
    #[error("a request that the device does not have: {0}")]
    Request(&'static str),
}

/// One queue, ready.
pub struct Queue {
    ring: Ring,
    size: u16,
    /// Ring entries of chains that were taken and not yet given back.
    in_flight: u32,
}

enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

impl Queue {
    /// A queue where the driver says, of the format and with the abilities that were negotiated.
    ///
    /// # Errors
    /// [`QueueError`] for an address or a size that cannot be.
    pub fn new(config: &QueueConfig, negotiated: u64, memory: &DmaMemory) -> Result<Self, QueueError> {
        let abilities = Abilities {
            indirect: negotiated & features::INDIRECT_DESC != 0,
            event_index: negotiated & features::EVENT_IDX != 0,
        };
        let ring = if negotiated & features::RING_PACKED != 0 {
            Ring::Packed(PackedRing::new(config, abilities, memory.clone())?)
        } else {
            Ring::Split(SplitRing::new(config, abilities, memory.clone())?)
        };
        Ok(Self { ring, size: config.size, in_flight: 0 })
    }

    /// Entries of its ring: the most requests that can be on their way.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The memory that the queue's buffers are in.
    pub fn memory(&self) -> &DmaMemory {
        match &self.ring {
            Ring::Split(ring) => ring.memory(),
            Ring::Packed(ring) => ring.memory(),
        }
    }

    /// Takes the next chain of buffers; `None` where there is none now, and then the driver is asked to notify, unless
    /// [`Self::disable_notifications`] was called.
    ///
    /// # Errors
    /// [`QueueError`] for a chain that breaks the rules; the queue is not to be used any more.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let popped = match &mut self.ring {
            Ring::Split(ring) => ring.pop(),
            Ring::Packed(ring) => ring.pop(),
        }?;
        if let Some(chain) = &popped {
            self.in_flight += u32::from(chain.entries);
            if self.in_flight > self.size.into() {
                return Err(QueueError::InFlight(self.size));
            }
        }
        Ok(popped)
    }

    /// Asks the driver not to notify: whoever calls it looks at the queue by himself. The driver may still do it.
    ///
    /// # Errors
    /// [`QueueError::Memory`] where the ring is not there any more.
    pub fn disable_notifications(&mut self) -> Result<(), QueueError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.disable_notifications(),
            Ring::Packed(ring) => ring.disable_notifications(),
        }
    }

    /// Asks the driver to notify again. Gives whether there is something in the queue already, for which no notification
    /// may come.
    ///
    /// # Errors
    /// [`QueueError`] for a ring that breaks the rules.
    pub fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.enable_notifications(),
            Ring::Packed(ring) => ring.enable_notifications(),
        }
    }

    /// Whether there is a chain to take.
    ///
    /// # Errors
    /// [`QueueError`] for a ring that breaks the rules.
    pub fn has_available(&mut self) -> Result<bool, QueueError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.has_available(),
            Ring::Packed(ring) => ring.has_available(),
        }
    }

    /// Gives a chain back, with so many bytes written to it.
    ///
    /// # Errors
    /// [`QueueError::Memory`] where the ring is not there any more.
    pub fn complete(&mut self, chain: &Chain, written: u32) -> Result<(), QueueError> {
        self.put(chain, written)?;
        self.show()
    }

    /// Gives chains back, each with the bytes written to it. The driver sees all of them at once, and the ring's index is
    /// written once.
    ///
    /// # Errors
    /// As [`Self::complete`].
    pub fn complete_all(&mut self, chains: impl IntoIterator<Item = (Chain, u32)>) -> Result<(), QueueError> {
        for (chain, written) in chains {
            self.put(&chain, written)?;
        }
        self.show()
    }

    fn put(&mut self, chain: &Chain, written: u32) -> Result<(), QueueError> {
        self.in_flight = self.in_flight.saturating_sub(chain.entries.into());
        match &mut self.ring {
            Ring::Split(ring) => ring.put(chain, written),
            Ring::Packed(ring) => ring.put(chain, written),
        }
    }

    fn show(&mut self) -> Result<(), QueueError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.show(),
            Ring::Packed(ring) => ring.show(),
        }
    }

    /// Whether the driver wants an interrupt for what was completed since this was last asked.
    ///
    /// # Errors
    /// [`QueueError::Memory`] where the ring is not there any more.
    pub fn needs_notification(&mut self) -> Result<bool, QueueError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.needs_notification(),
            Ring::Packed(ring) => ring.needs_notification(),
        }
    }
}

/// What was negotiated of rings.
#[derive(Clone, Copy, Debug)]
struct Abilities {
    indirect: bool,
    event_index: bool,
}

/// Whether an index that went from `old` to `new` passed `event`. *Used Buffer Notification Suppression*.
fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Checks an area's alignment and that all of it is RAM.
fn check_area(
    memory: &DmaMemory,
    (address, len, alignment): (u64, u64, u64),
    writable: bool,
) -> Result<(), QueueError> {
    if !address.is_multiple_of(alignment) {
        return Err(QueueError::Alignment { address, alignment });
    }
    memory.check(address, len, writable)
}
