//! A request, as the driver's buffers say it. *Device Operation*.

use disk::Disk;

use super::{SECTOR, status};
use crate::memory::DmaMemory;
use crate::queue::{Chain, QueueError};

/// Bytes of a request's header, and of a range to be discarded or zeroed.
pub(super) const HEADER: usize = 16;
const RANGE: usize = 16;
/// The most ranges of a request, and the most sectors of each.
pub(super) const MAX_RANGES: usize = 64;
pub(super) const MAX_SECTORS: u32 = 1 << 22;

/// Kinds of requests.
pub(super) mod kind {
    pub(in super::super) const IN: u32 = 0;
    pub(in super::super) const OUT: u32 = 1;
    pub(in super::super) const FLUSH: u32 = 4;
    pub(in super::super) const GET_ID: u32 = 8;
    pub(in super::super) const DISCARD: u32 = 11;
    pub(in super::super) const WRITE_ZEROES: u32 = 13;
}

/// The flag of a range that may be given back to the host.
const UNMAP: u32 = 1;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Bytes of the disk into the buffers.
    Read { offset: u64 },
    /// Bytes of the buffers onto the disk.
    Write { offset: u64 },
    /// What was written is to be durable.
    Flush,
    /// The serial number.
    Identify,
    /// Ranges that are not needed any more.
    Discard(Vec<Range>),
    /// Ranges that are to be zeros.
    WriteZeroes(Vec<Range>),
    /// Nothing: this status.
    Refuse(u8),
}

/// Bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) unmap: bool,
}

/// A request.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) chain: Chain,
    pub(super) action: Action,
    /// Bytes of data: to be read by the device, or to be written by it.
    pub(super) len: u64,
    /// Where among the bytes to be written the status goes.
    pub(super) room: u64,
}

impl Request {
    /// Reads a request's header, and what tells its ranges.
    pub(super) fn parse(memory: &DmaMemory, chain: Chain, disk: &dyn Disk) -> Result<Self, QueueError> {
        let mut header = [0; HEADER];
        if chain.read(memory, 0, &mut header)? < HEADER {
            return Err(QueueError::Request("a header of less than 16 bytes"));
        }
        let Some(room) = chain.writable_len().checked_sub(1) else {
            return Err(QueueError::Request("no room for the status"));
        };
        let word = u128::from_le_bytes(header);
        let (kind, sector) = (word as u32, (word >> 64) as u64);
        let len = match kind {
            kind::IN => room,
            _ => chain.readable_len() - HEADER as u64,
        };
        let refused = Action::Refuse(status::IO_ERROR);
        let place = || place(disk, sector, len);
        let action = match kind {
            kind::IN => place().map_or(refused, |offset| Action::Read { offset }),
            kind::OUT | kind::DISCARD | kind::WRITE_ZEROES if disk.is_read_only() => refused,
            kind::OUT => place().map_or(refused, |offset| Action::Write { offset }),
            kind::FLUSH => Action::Flush,
            kind::GET_ID => Action::Identify,
            kind::DISCARD | kind::WRITE_ZEROES => match ranges(memory, &chain, kind, disk)? {
                Err(status) => Action::Refuse(status),
                Ok(ranges) if kind == kind::DISCARD => Action::Discard(ranges),
                Ok(ranges) => Action::WriteZeroes(ranges),
            },
            _ => Action::Refuse(status::UNSUPPORTED),
        };
        Ok(Self { chain, action, len, room })
    }

    /// Writes the status; gives how many bytes were written to the buffers, of which `data` are the disk's.
    pub(super) fn finish(&self, memory: &DmaMemory, status: u8, data: u64) -> Result<u32, QueueError> {
        self.chain.write(memory, self.room, &[status])?;
        // What lies between, if anything, was not written; a driver looks at the status first.
        Ok(if data == self.room { self.room as u32 + 1 } else { data as u32 })
    }
}

/// The byte offset of sectors that are all on the disk.
fn place(disk: &dyn Disk, sector: u64, len: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    let end = offset.checked_add(len)?;
    (len.is_multiple_of(SECTOR) && end <= disk.size()).then_some(offset)
}

/// The ranges of a request, or the status for one whose ranges cannot be.
fn ranges(
    memory: &DmaMemory,
    chain: &Chain,
    kind: u32,
    disk: &dyn Disk,
) -> Result<Result<Vec<Range>, u8>, QueueError> {
    let len = chain.readable_len() - HEADER as u64;
    if len == 0 || !len.is_multiple_of(RANGE as u64) || len > (MAX_RANGES * RANGE) as u64 {
        return Ok(Err(status::IO_ERROR));
    }
    let mut bytes = vec![0; len as usize];
    chain.read(memory, HEADER as u64, &mut bytes)?;
    let (words, _) = bytes.as_chunks::<RANGE>();
    let mut ranges = Vec::with_capacity(words.len());
    for word in words {
        let word = u128::from_le_bytes(*word);
        let (sector, sectors, flags) = (word as u64, (word >> 64) as u32, (word >> 96) as u32);
        let allowed = if kind == kind::DISCARD { 0 } else { UNMAP };
        if flags & !allowed != 0 {
            return Ok(Err(status::UNSUPPORTED));
        }
        let len = u64::from(sectors) * SECTOR;
        match place(disk, sector, len) {
            Some(offset) if sectors <= MAX_SECTORS => {
                ranges.push(Range { offset, len, unmap: flags & UNMAP != 0 });
            }
            _ => return Ok(Err(status::IO_ERROR)),
        }
    }
    Ok(Ok(ranges))
}
