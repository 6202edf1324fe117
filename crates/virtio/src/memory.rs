//! Guest memory as devices reach it: bounds checked, ROM never written.

use std::sync::atomic::{Ordering, fence};

use guest_memory::{GuestMemory, HostSlices, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use crate::queue::QueueError;

/// The guest's RAM. Clones share it.
#[derive(Clone, Debug)]
pub struct DmaMemory(GuestMemory);

impl DmaMemory {
    /// The RAM of a machine.
    pub fn new(memory: GuestMemory) -> Self {
        Self(memory)
    }

    /// Checks that a range is RAM, and RAM that may be written where the device is to write it.
    ///
    /// # Errors
    /// [`QueueError::Memory`].
    pub fn check(&self, address: u64, len: u64, writable: bool) -> Result<(), QueueError> {
        let error = QueueError::Memory { address, len };
        let Some(last) = len.checked_sub(1).and_then(|more| address.checked_add(more)) else {
            return if len == 0 { Ok(()) } else { Err(error) };
        };
        // Most ranges lie in one region, whose end is looked at once.
        if self.0.plain(address, len).is_some() {
            return Ok(());
        }
        let mut pages = address / PAGE_SIZE..=last / PAGE_SIZE;
        let allowed = pages.all(|page| {
            self.0.locate(page * PAGE_SIZE).is_some_and(|location| !(writable && location.read_only))
        });
        if allowed { Ok(()) } else { Err(error) }
    }

    /// The RAM itself.
    pub fn guest(&self) -> &GuestMemory {
        &self.0
    }

    /// An empty list of ranges for the host's kernel, to be filled by [`Self::add_slice`].
    pub fn slices(&self) -> HostSlices {
        self.0.host_slices()
    }

    /// Appends a range to such a list, checked as [`Self::check`] does.
    ///
    /// # Errors
    /// [`QueueError::Memory`].
    pub fn add_slice(
        &self,
        slices: &mut HostSlices,
        (address, len): (u64, u64),
        writable: bool,
    ) -> Result<(), QueueError> {
        slices.push(address, len, writable).map_err(|_| QueueError::Memory { address, len })
    }

    /// Copies bytes out of RAM.
    ///
    /// # Errors
    /// [`QueueError::Memory`].
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), QueueError> {
        let len = data.len() as u64;
        // Without a slice of `vm-memory` where it is plain RAM: each of those counts a reference that all threads share.
        if let Some(offset) = self.0.plain(address, len) {
            self.0.read_bytes(offset, data);
            return Ok(());
        }
        self.0.vm().read_slice(data, GuestAddress(address)).map_err(|_| QueueError::Memory { address, len })
    }

    /// Copies bytes into RAM that was checked to be writable.
    ///
    /// # Errors
    /// [`QueueError::Memory`].
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), QueueError> {
        let len = data.len() as u64;
        if let Some(offset) = self.0.plain(address, len) {
            self.0.write_bytes(offset, data);
            self.0.marks().device_wrote(offset, len);
            return Ok(());
        }
        self.0.vm().write_slice(data, GuestAddress(address)).map_err(|_| QueueError::Memory { address, len })
    }

    /// Gives the host's memory of whole pages back; the guest finds zeros there.
    ///
    /// # Errors
    /// [`QueueError::Memory`] for what is not RAM that the guest may write.
    pub fn discard(&self, address: u64, len: u64) -> Result<(), QueueError> {
        self.0.discard(address, len).map_err(|_| QueueError::Memory { address, len })
    }

    /// Loads a ring's half word, before anything that is read after it.
    pub(crate) fn load_u16(&self, address: u64) -> Result<u16, QueueError> {
        if let Some(offset) = self.0.plain(address, 2) {
            let value = u16::from_le(self.0.load(offset));
            fence(Ordering::Acquire);
            return Ok(value);
        }
        let error = |_| QueueError::Memory { address, len: 2 };
        self.0.vm().load(GuestAddress(address), Ordering::Acquire).map(u16::from_le).map_err(error)
    }

    /// Stores a ring's half word, after everything that was written before it.
    pub(crate) fn store_u16(&self, address: u64, value: u16) -> Result<(), QueueError> {
        if let Some(offset) = self.0.plain(address, 2) {
            fence(Ordering::Release);
            self.0.store(offset, value.to_le());
            self.0.marks().device_wrote(offset, 2);
            return Ok(());
        }
        let error = |_| QueueError::Memory { address, len: 2 };
        self.0.vm().store(value.to_le(), GuestAddress(address), Ordering::Release).map_err(error)
    }
}
