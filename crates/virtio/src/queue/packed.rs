//! The packed virtqueue: one ring of descriptors, in which the device overwrites what it has used. *Packed Virtqueues*.

use super::chain::{Chain, DESCRIPTOR_SIZE, Descriptor, flag};
use super::{Abilities, QueueConfig, QueueError, check_area, passed};
use crate::memory::DmaMemory;

/// A descriptor's flags for availability and use, which are compared with the wrap counters.
const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Offset of the flags in a descriptor.
const FLAGS: u64 = 14;
/// Bytes of an event suppression structure: a place in the ring, then what is wanted.
const EVENT_SIZE: u64 = 4;
const EVENT_FLAGS: u64 = 2;
/// What is wanted: every event, none, or the one of a descriptor.
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const DESCRIPTOR: u16 = 2;
/// A place's bit for the wrap counter.
const WRAP: u16 = 1 << 15;

/// A place in the ring with its wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    const START: Self = Self { index: 0, wrap: true };

    fn advance(&mut self, entries: u16, size: u16) {
        let index = u32::from(self.index) + u32::from(entries);
        if index >= u32::from(size) {
            self.wrap = !self.wrap;
        }
        self.index = (index % u32::from(size)) as u16;
    }
}

/// One packed queue.
pub(super) struct PackedRing {
    config: QueueConfig,
    abilities: Abilities,
    memory: DmaMemory,
    next_available: Place,
    /// Whether the driver is to notify.
    notifications: bool,
    next_used: Place,
    /// Entries that were used since notifications were last thought about.
    unnotified: u16,
    /// Where the flags of the first used entry go that the driver is not to see yet, and what they are.
    unshown: Option<(u64, u16)>,
}

impl PackedRing {
    pub(super) fn new(
        config: &QueueConfig,
        abilities: Abilities,
        memory: DmaMemory,
    ) -> Result<Self, QueueError> {
        let QueueConfig { size, descriptors, driver, device } = *config;
        if size == 0 || size > super::MAX_SIZE {
            return Err(QueueError::Size(size));
        }
        check_area(&memory, (descriptors, DESCRIPTOR_SIZE * u64::from(size), 16), true)?;
        check_area(&memory, (driver, EVENT_SIZE, 4), false)?;
        check_area(&memory, (device, EVENT_SIZE, 4), true)?;
        Ok(Self {
            config: *config,
            abilities,
            memory,
            next_available: Place::START,
            notifications: true,
            next_used: Place::START,
            unnotified: 0,
            unshown: None,
        })
    }

    pub(super) fn memory(&self) -> &DmaMemory {
        &self.memory
    }

    fn at(&self, index: u16) -> u64 {
        self.config.descriptors + DESCRIPTOR_SIZE * u64::from(index)
    }

    pub(super) fn has_available(&self) -> Result<bool, QueueError> {
        let Place { index, wrap } = self.next_available;
        let flags = self.memory.load_u16(self.at(index) + FLAGS)?;
        Ok((flags & AVAILABLE != 0) == wrap && (flags & USED != 0) != wrap)
    }

    pub(super) fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let asks = self.notifications && self.abilities.event_index;
        if !(self.has_available()? || asks && self.arm()?) {
            return Ok(None);
        }
        let chain = self.chain()?;
        self.next_available.advance(chain.entries, self.config.size);
        Ok(Some(chain))
    }

    /// Asks for a notification at the next entry. Gives whether one came meanwhile, which brings none.
    fn arm(&self) -> Result<bool, QueueError> {
        let Place { index, wrap } = self.next_available;
        let place = index | if wrap { WRAP } else { 0 };
        self.memory.store_u16(self.config.device, place)?;
        self.memory.store_u16(self.config.device + EVENT_FLAGS, DESCRIPTOR)?;
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.has_available()
    }

    pub(super) fn disable_notifications(&mut self) -> Result<(), QueueError> {
        self.notifications = false;
        self.memory.store_u16(self.config.device + EVENT_FLAGS, DISABLE)
    }

    pub(super) fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        self.notifications = true;
        if self.abilities.event_index {
            return Ok(self.has_available()? || self.arm()?);
        }
        self.memory.store_u16(self.config.device + EVENT_FLAGS, ENABLE)?;
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.has_available()
    }

    /// The chain at the next available entry. Its other entries need no look at their availability: the first one's was
    /// set last.
    fn chain(&self) -> Result<Chain, QueueError> {
        let size = self.config.size;
        let mut chain = Chain::new(0, 0);
        for step in 0..size {
            let index = ((u32::from(self.next_available.index) + u32::from(step)) % u32::from(size)) as u16;
            let descriptor = Descriptor::read(&self.memory, self.at(index), true)?;
            (chain.id, chain.entries) = (descriptor.number, step + 1);
            if descriptor.flags & flag::INDIRECT != 0 {
                if !self.abilities.indirect || step > 0 {
                    return Err(QueueError::Indirect { len: descriptor.len, flags: descriptor.flags });
                }
                chain.push_indirect(&self.memory, &descriptor, true)?;
                return Ok(chain);
            }
            chain.push(&self.memory, &descriptor)?;
            if descriptor.flags & flag::NEXT == 0 {
                return Ok(chain);
            }
        }
        Err(QueueError::Endless(size.into()))
    }

    /// Puts a chain into the ring as used; the driver sees it when [`Self::show`] was called.
    pub(super) fn put(&mut self, chain: &Chain, written: u32) -> Result<(), QueueError> {
        let at = self.at(self.next_used.index);
        self.memory.write(at + 8, &written.to_le_bytes())?;
        self.memory.write(at + 12, &chain.id.to_le_bytes())?;
        let mut flags = if self.next_used.wrap { AVAILABLE | USED } else { 0 };
        if written > 0 {
            flags |= flag::WRITE;
        }
        // The driver looks at them in their order: those behind the first are not seen before it.
        match self.unshown {
            None => self.unshown = Some((at + FLAGS, flags)),
            Some(_) => self.memory.store_u16(at + FLAGS, flags)?,
        }
        self.next_used.advance(chain.entries, self.config.size);
        self.unnotified = self.unnotified.saturating_add(chain.entries);
        Ok(())
    }

    pub(super) fn show(&mut self) -> Result<(), QueueError> {
        match self.unshown.take() {
            Some((at, flags)) => self.memory.store_u16(at, flags),
            None => Ok(()),
        }
    }

    pub(super) fn needs_notification(&mut self) -> Result<bool, QueueError> {
        let entries = std::mem::take(&mut self.unnotified);
        if entries == 0 {
            return Ok(false);
        }
        // The driver writes its wish and then looks at the ring; here it is the other way round.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        match self.memory.load_u16(self.config.driver + EVENT_FLAGS)? {
            DISABLE => Ok(false),
            DESCRIPTOR if self.abilities.event_index => {
                let place = self.memory.load_u16(self.config.driver)?;
                let (mut event, wrap) = (place & !WRAP, place & WRAP != 0);
                if wrap != self.next_used.wrap {
                    event = event.wrapping_sub(self.config.size);
                }
                let new = self.next_used.index;
                Ok(passed(event, new, new.wrapping_sub(entries)))
            }
            _ => Ok(true),
        }
    }
}
