//! The split virtqueue: a table of descriptors, a ring of available chains, a ring of used ones. *Split Virtqueues*.

use super::chain::{Chain, DESCRIPTOR_SIZE, Descriptor, flag};
use super::{Abilities, QueueConfig, QueueError, check_area, passed};
use crate::memory::DmaMemory;

/// Offsets in both rings.
const INDEX: u64 = 2;
const RING: u64 = 4;
/// Bytes of a used ring's element.
const USED_SIZE: u64 = 8;
/// The available ring's flag: the driver wants no interrupts.
const NO_INTERRUPT: u16 = 1;
/// The used ring's flag: the device wants no notifications.
const NO_NOTIFY: u16 = 1;

/// One split queue.
pub(super) struct SplitRing {
    config: QueueConfig,
    abilities: Abilities,
    memory: DmaMemory,
    /// The available ring's index up to which chains were taken.
    next_available: u16,
    /// What the available ring's index was when it was last read.
    available: u16,
    /// Whether the driver is to notify.
    notifications: bool,
    /// The used ring's index, and what it was when notifications were last thought about.
    next_used: u16,
    notified: u16,
}

impl SplitRing {
    pub(super) fn new(
        config: &QueueConfig,
        abilities: Abilities,
        memory: DmaMemory,
    ) -> Result<Self, QueueError> {
        let QueueConfig { size, descriptors, driver, device } = *config;
        if !size.is_power_of_two() || size > super::MAX_SIZE {
            return Err(QueueError::Size(size));
        }
        let entries = u64::from(size);
        check_area(&memory, (descriptors, entries * DESCRIPTOR_SIZE, 16), false)?;
        check_area(&memory, (driver, RING + 2 * entries + 2, 2), false)?;
        check_area(&memory, (device, RING + USED_SIZE * entries + 2, 4), true)?;
        Ok(Self {
            config: *config,
            abilities,
            memory,
            next_available: 0,
            available: 0,
            notifications: true,
            next_used: 0,
            notified: 0,
        })
    }

    pub(super) fn memory(&self) -> &DmaMemory {
        &self.memory
    }

    /// Whether there is a chain, after another look at the ring where all that was seen is taken.
    pub(super) fn has_available(&mut self) -> Result<bool, QueueError> {
        if self.available != self.next_available {
            return Ok(true);
        }
        let (from, size) = (self.next_available, self.config.size);
        let to = self.memory.load_u16(self.config.driver + INDEX)?;
        if to.wrapping_sub(from) > size {
            return Err(QueueError::IndexJump { from, to, size });
        }
        self.available = to;
        Ok(to != from)
    }

    pub(super) fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let asks = self.notifications && self.abilities.event_index;
        if !(self.has_available()? || asks && self.arm()?) {
            return Ok(None);
        }
        let slot = u64::from(self.next_available % self.config.size);
        let head = self.memory.load_u16(self.config.driver + RING + 2 * slot)?;
        let chain = self.chain(head)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    /// Asks for a notification at the next entry. Gives whether one came meanwhile, which brings none.
    fn arm(&mut self) -> Result<bool, QueueError> {
        let event = self.config.device + RING + USED_SIZE * u64::from(self.config.size);
        self.memory.store_u16(event, self.next_available)?;
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.has_available()
    }

    pub(super) fn disable_notifications(&mut self) -> Result<(), QueueError> {
        self.notifications = false;
        // With event indices the one that was named last is behind, and says as much.
        if self.abilities.event_index { Ok(()) } else { self.memory.store_u16(self.config.device, NO_NOTIFY) }
    }

    pub(super) fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        self.notifications = true;
        if self.abilities.event_index {
            return Ok(self.has_available()? || self.arm()?);
        }
        self.memory.store_u16(self.config.device, 0)?;
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.has_available()
    }

    fn chain(&self, head: u16) -> Result<Chain, QueueError> {
        let size = self.config.size;
        let mut chain = Chain::new(head, 1);
        let mut index = head;
        for _ in 0..size {
            if index >= size {
                return Err(QueueError::NoDescriptor { index: index.into(), size: size.into() });
            }
            let at = self.config.descriptors + DESCRIPTOR_SIZE * u64::from(index);
            let descriptor = Descriptor::read(&self.memory, at, false)?;
            if descriptor.flags & flag::INDIRECT != 0 {
                if !self.abilities.indirect {
                    return Err(QueueError::Indirect { len: descriptor.len, flags: descriptor.flags });
                }
                chain.push_indirect(&self.memory, &descriptor, false)?;
                return Ok(chain);
            }
            chain.push(&self.memory, &descriptor)?;
            if descriptor.flags & flag::NEXT == 0 {
                return Ok(chain);
            }
            index = descriptor.number;
        }
        Err(QueueError::Endless(size.into()))
    }

    /// Puts a chain into the used ring; the driver sees it when [`Self::show`] was called.
    pub(super) fn put(&mut self, chain: &Chain, written: u32) -> Result<(), QueueError> {
        let slot = u64::from(self.next_used % self.config.size);
        let element = u64::from(written) << 32 | u64::from(chain.id);
        self.memory.write(self.config.device + RING + USED_SIZE * slot, &element.to_le_bytes())?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    pub(super) fn show(&mut self) -> Result<(), QueueError> {
        self.memory.store_u16(self.config.device + INDEX, self.next_used)
    }

    pub(super) fn needs_notification(&mut self) -> Result<bool, QueueError> {
        let (old, new) = (std::mem::replace(&mut self.notified, self.next_used), self.next_used);
        if old == new {
            return Ok(false);
        }
        // The driver writes its wish and then looks at the index; here it is the other way round.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        if self.abilities.event_index {
            let event = self.config.driver + RING + 2 * u64::from(self.config.size);
            return Ok(passed(self.memory.load_u16(event)?, new, old));
        }
        Ok(self.memory.load_u16(self.config.driver)? & NO_INTERRUPT == 0)
    }
}
