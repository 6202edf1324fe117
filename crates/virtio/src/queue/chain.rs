use guest_memory::HostSlices;
use smallvec::SmallVec;

use super::QueueError;
use crate::memory::DmaMemory;

/// The most descriptors of an indirect table.
const MAX_INDIRECT: u32 = 1024;
/// Bytes of a descriptor, in either format.
pub(super) const DESCRIPTOR_SIZE: u64 = 16;

/// A descriptor's flags.
pub(super) mod flag {
    pub(in super::super) const NEXT: u16 = 1;
    pub(in super::super) const WRITE: u16 = 2;
    pub(in super::super) const INDIRECT: u16 = 4;
}

/// A buffer in guest memory, checked to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
}

/// A request: buffers for the device to read, then buffers for it to write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// How the ring knows it: the head descriptor, or the buffer's id.
    pub(super) id: u16,
    /// Ring entries that it takes.
    pub(super) entries: u16,
    readable: Segments,
    writable: Segments,
}

/// Buffers of one direction. Most requests have few: those need no allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Segments {
    list: SmallVec<[Segment; 2]>,
    /// Bytes of all of them.
    len: u64,
}

/// A descriptor, as both formats have it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) len: u32,
    /// The next descriptor's number, or the buffer's id.
    pub(super) number: u16,
    pub(super) flags: u16,
}

impl Descriptor {
    /// Reads one whose fields have this order: the split ring's is address, length, flags, next; the packed ring's has the
    /// id before the flags.
    pub(super) fn read(memory: &DmaMemory, at: u64, packed: bool) -> Result<Self, QueueError> {
        let mut bytes = [0; DESCRIPTOR_SIZE as usize];
        memory.read(at, &mut bytes)?;
        let word = u128::from_le_bytes(bytes);
        let (first, second) = ((word >> 96) as u16, (word >> 112) as u16);
        let (flags, number) = if packed { (second, first) } else { (first, second) };
        Ok(Self { address: word as u64, len: (word >> 64) as u32, number, flags })
    }
}

impl Chain {
    /// An empty one that the ring knows so.
    pub(super) fn new(id: u16, entries: u16) -> Self {
        Self { id, entries, ..Self::default() }
    }

    /// The buffers to read.
    pub fn readable(&self) -> &[Segment] {
        &self.readable.list
    }

    /// The buffers to write.
    pub fn writable(&self) -> &[Segment] {
        &self.writable.list
    }

    /// Bytes to read in all.
    pub fn readable_len(&self) -> u64 {
        self.readable.len
    }

    /// Bytes to write in all.
    pub fn writable_len(&self) -> u64 {
        self.writable.len
    }

    /// Reads bytes from `offset` of what is to be read; how many there were.
    ///
    /// # Errors
    /// [`QueueError::Memory`].
    pub fn read(&self, memory: &DmaMemory, offset: u64, data: &mut [u8]) -> Result<usize, QueueError> {
        let mut done = 0;
        for (address, len) in parts(&self.readable.list, offset, data.len()) {
            memory.read(address, &mut data[done..done + len])?;
            done += len;
        }
        Ok(done)
    }

    /// Writes bytes from `offset` of what is to be written; how many there was room for.
    ///
    /// # Errors
    /// [`QueueError::Memory`].
    pub fn write(&self, memory: &DmaMemory, offset: u64, data: &[u8]) -> Result<usize, QueueError> {
        let mut done = 0;
        for (address, len) in parts(&self.writable.list, offset, data.len()) {
            memory.write(address, &data[done..done + len])?;
            done += len;
        }
        Ok(done)
    }

    /// Appends a range (an offset and bytes) of what is to be read to a list, for the host's kernel to read it without a
    /// copy. What the chain does not have of it is left out.
    ///
    /// # Errors
    /// [`QueueError::Memory`].
    pub fn add_readable(
        &self,
        memory: &DmaMemory,
        range: (u64, u64),
        slices: &mut HostSlices,
    ) -> Result<(), QueueError> {
        add(&self.readable.list, memory, range, (slices, false))
    }

    /// Appends a range of what is to be written to a list, for the host's kernel to write there. As [`Self::add_readable`].
    ///
    /// # Errors
    /// As there.
    pub fn add_writable(
        &self,
        memory: &DmaMemory,
        range: (u64, u64),
        slices: &mut HostSlices,
    ) -> Result<(), QueueError> {
        add(&self.writable.list, memory, range, (slices, true))
    }

    /// Appends a buffer.
    pub(super) fn push(&mut self, memory: &DmaMemory, descriptor: &Descriptor) -> Result<(), QueueError> {
        let Descriptor { address, len, flags, .. } = *descriptor;
        if len == 0 {
            return Err(QueueError::EmptyBuffer);
        }
        let writable = flags & flag::WRITE != 0;
        if !writable && !self.writable.list.is_empty() {
            return Err(QueueError::Order);
        }
        let total = self.readable_len() + self.writable_len() + u64::from(len);
        if total > u64::from(u32::MAX) {
            return Err(QueueError::TooLong);
        }
        memory.check(address, len.into(), writable)?;
        let buffers = if writable { &mut self.writable } else { &mut self.readable };
        buffers.list.push(Segment { address, len });
        buffers.len += u64::from(len);
        Ok(())
    }

    /// Appends the buffers of an indirect table: in the split format linked by number, in the packed one in their order.
    pub(super) fn push_indirect(
        &mut self,
        memory: &DmaMemory,
        descriptor: &Descriptor,
        packed: bool,
    ) -> Result<(), QueueError> {
        let Descriptor { address, len, flags, .. } = *descriptor;
        let count = len / DESCRIPTOR_SIZE as u32;
        let whole = len != 0 && u64::from(len).is_multiple_of(DESCRIPTOR_SIZE) && count <= MAX_INDIRECT;
        if !whole || flags & flag::NEXT != 0 {
            return Err(QueueError::Indirect { len, flags });
        }
        memory.check(address, len.into(), false)?;
        let mut index = 0;
        for _ in 0..count {
            let entry = Descriptor::read(memory, address + DESCRIPTOR_SIZE * u64::from(index), packed)?;
            if entry.flags & flag::INDIRECT != 0 {
                return Err(QueueError::Indirect { len, flags: entry.flags });
            }
            self.push(memory, &entry)?;
            index = match (packed, entry.flags & flag::NEXT != 0) {
                (true, _) => index + 1,
                (false, true) => entry.number.into(),
                (false, false) => return Ok(()),
            };
            if !packed && index >= count {
                return Err(QueueError::NoDescriptor { index, size: count });
            }
        }
        if packed { Ok(()) } else { Err(QueueError::Endless(count)) }
    }
}

/// Appends a range of a list of buffers to slices, writable ones or not.
fn add(
    segments: &[Segment],
    memory: &DmaMemory,
    (offset, len): (u64, u64),
    (slices, writable): (&mut HostSlices, bool),
) -> Result<(), QueueError> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    parts(segments, offset, len)
        .try_for_each(|(address, part)| memory.add_slice(slices, (address, part as u64), writable))
}

/// The guest-physical parts of `len` bytes from `offset` of a list of buffers.
fn parts(segments: &[Segment], mut offset: u64, mut len: usize) -> impl Iterator<Item = (u64, usize)> {
    segments.iter().filter_map(move |segment| {
        let size = u64::from(segment.len);
        if offset >= size {
            offset -= size;
            return None;
        }
        let part = ((size - offset) as usize).min(len);
        let address = segment.address + std::mem::take(&mut offset);
        len -= part;
        (part > 0).then_some((address, part))
    })
}
