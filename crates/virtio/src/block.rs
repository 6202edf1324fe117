//! The block device: a disk of 512-byte sectors. *Block Device*.

use std::io;

use crate::memory::DmaMemory;
use crate::queue::{Chain, QueueError};
use crate::{Activation, Device, QueueHandle, read_config_bytes};

/// Its device id.
const ID: u16 = 2;
/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// The one queue's entries.
const SIZES: [u16; 1] = [256];
/// The most buffers of data in a request: the queue's entries without those of header and status.
const SEGMENTS: u32 = 254;
/// Bytes that are moved at a time.
const CHUNK: usize = 64 << 10;
/// Bytes of a request's header, and of the disk's name.
const HEADER: usize = 16;
const NAME: usize = 20;

/// Feature bits.
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const READ_ONLY: u64 = 1 << 5;
    pub(super) const BLOCK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
}

/// Kinds of requests.
mod request {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
}

/// How a request went.
mod status {
    pub(super) const OK: u8 = 0;
    pub(super) const IO_ERROR: u8 = 1;
    pub(super) const UNSUPPORTED: u8 = 2;
}

/// Where a disk's bytes are.
pub trait Disk: Send {
    /// Bytes; a multiple of [`SECTOR`].
    fn len(&self) -> u64;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Whether it can only be read.
    fn is_read_only(&self) -> bool;
    /// Reads at a byte offset; all of it lies within the disk.
    ///
    /// # Errors
    /// The host's.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes at a byte offset; all of it lies within the disk.
    ///
    /// # Errors
    /// The host's.
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Comes back when all that was written is durable.
    ///
    /// # Errors
    /// The host's.
    fn flush(&mut self) -> io::Result<()>;
}

/// A disk for the guest.
pub struct Block {
    queue: Option<QueueHandle>,
    requests: Requests,
}

/// The disk, and how requests are carried out on it.
struct Requests {
    disk: Box<dyn Disk>,
    /// What the guest is told as the disk's serial number, with zeros behind it.
    name: [u8; NAME],
    buffer: Vec<u8>,
}

/// What a request came to: its status and the bytes written before it.
type Done = (u8, u64);

impl Block {
    /// A disk whose serial number begins with `name`, of which 20 bytes count.
    pub fn new(disk: Box<dyn Disk>, name: &str) -> Self {
        let mut field = [0; NAME];
        let len = name.len().min(NAME);
        field[..len].copy_from_slice(&name.as_bytes()[..len]);
        Self { queue: None, requests: Requests { disk, name: field, buffer: vec![0; CHUNK] } }
    }
}

impl Requests {
    /// The configuration space: capacity, the most buffers, the block size; the rest is zero.
    fn config(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&(self.disk.len() / SECTOR).to_le_bytes());
        bytes[12..16].copy_from_slice(&SEGMENTS.to_le_bytes());
        bytes[20..].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        bytes
    }

    /// Carries out a request; gives the bytes written to its buffers.
    fn request(&mut self, memory: &DmaMemory, chain: &Chain) -> Result<u32, QueueError> {
        let mut header = [0; HEADER];
        if chain.read(memory, 0, &mut header)? < HEADER {
            return Err(QueueError::Request("a header of less than 16 bytes"));
        }
        let Some(room) = chain.writable_len().checked_sub(1) else {
            return Err(QueueError::Request("no room for the status"));
        };
        let word = u128::from_le_bytes(header);
        let (kind, sector) = (word as u32, (word >> 64) as u64);
        let data = chain.readable_len() - HEADER as u64;
        let (status, written) = match kind {
            request::IN => match self.range(sector, room) {
                Some(offset) => self.read(memory, chain, offset, room)?,
                None => (status::IO_ERROR, 0),
            },
            request::OUT if !self.disk.is_read_only() => match self.range(sector, data) {
                Some(offset) => self.write(memory, chain, offset, data)?,
                None => (status::IO_ERROR, 0),
            },
            request::OUT => (status::IO_ERROR, 0),
            request::FLUSH => (outcome(self.disk.flush(), "flush"), 0),
            request::GET_ID => {
                let len = (room as usize).min(NAME);
                (status::OK, chain.write(memory, 0, &self.name[..len])? as u64)
            }
            _ => (status::UNSUPPORTED, 0),
        };
        chain.write(memory, room, &[status])?;
        // What lies between, if anything, was not written; a driver looks at the status first.
        Ok(if written == room { room as u32 + 1 } else { written as u32 })
    }

    /// The byte offset of sectors that are all on the disk.
    fn range(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        (len.is_multiple_of(SECTOR) && end <= self.disk.len()).then_some(offset)
    }

    fn read(&mut self, memory: &DmaMemory, chain: &Chain, offset: u64, len: u64) -> Result<Done, QueueError> {
        let mut done = 0;
        while done < len {
            let part = &mut self.buffer[..CHUNK.min((len - done) as usize)];
            let status = outcome(self.disk.read(offset + done, part), "read");
            if status != status::OK {
                return Ok((status, done));
            }
            done += chain.write(memory, done, part)? as u64;
        }
        Ok((status::OK, done))
    }

    fn write(
        &mut self,
        memory: &DmaMemory,
        chain: &Chain,
        offset: u64,
        len: u64,
    ) -> Result<Done, QueueError> {
        let mut done = 0;
        while done < len {
            let part = &mut self.buffer[..CHUNK.min((len - done) as usize)];
            chain.read(memory, HEADER as u64 + done, part)?;
            let status = outcome(self.disk.write(offset + done, part), "write");
            if status != status::OK {
                return Ok((status, 0));
            }
            done += part.len() as u64;
        }
        Ok((status::OK, 0))
    }
}

/// The status of what the host did; its error is in the log.
fn outcome(result: io::Result<()>, what: &str) -> u8 {
    match result {
        Ok(()) => status::OK,
        Err(error) => {
            log::error!("virtio-blk: a {what} of the disk failed: {error}; the guest sees an I/O error");
            status::IO_ERROR
        }
    }
}

impl Device for Block {
    fn id(&self) -> u16 {
        ID
    }

    fn features(&self) -> u64 {
        let read_only = if self.requests.disk.is_read_only() { feature::READ_ONLY } else { 0 };
        feature::SEG_MAX | feature::BLOCK_SIZE | feature::FLUSH | read_only
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.requests.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) {
        self.queue = activation.queue(0);
    }

    fn notify(&mut self, _index: u16) {
        if let Some(queue) = &self.queue {
            queue.serve(|memory, chain| self.requests.request(memory, chain));
        }
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::features::{INDIRECT_DESC, RING_PACKED};
    use crate::testing::*;
    use crate::transport::{Event, Status};

    /// Four sectors in memory; sector 3 cannot be read or written.
    #[derive(Clone)]
    struct Fake(Arc<Mutex<Vec<u8>>>, bool);

    impl Disk for Fake {
        fn len(&self) -> u64 {
            4 * SECTOR
        }
        fn is_read_only(&self) -> bool {
            self.1
        }
        fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
            if offset + data.len() as u64 > 3 * SECTOR {
                return Err(io::Error::other("bad sector"));
            }
            data.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..data.len()]);
            Ok(())
        }
        fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
            if offset + data.len() as u64 > 3 * SECTOR {
                return Err(io::Error::other("bad sector"));
            }
            self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
            Ok(())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Bench {
        rig: Rig,
        bytes: Arc<Mutex<Vec<u8>>>,
    }

    const DATA: u64 = BUFFERS + 0x1000;
    const STATUS: u64 = BUFFERS + 0x100;

    impl Bench {
        fn new(negotiated: u64, read_only: bool) -> Self {
            let bytes = Arc::new(Mutex::new((0..4 * SECTOR).map(|at| (at / 7) as u8).collect::<Vec<_>>()));
            let block = Block::new(Box::new(Fake(bytes.clone(), read_only)), "disk0");
            Self { rig: Rig::new(Box::new(block), 16, negotiated), bytes }
        }

        /// Sends a request with `len` bytes of data for the device to write or read; its status and the used length.
        fn request(&mut self, kind: u32, sector: u64, (len, write): (u32, bool)) -> (u8, u32) {
            let header = u128::from(kind) | u128::from(sector) << 64;
            self.rig.drivers[0].put(BUFFERS, &header.to_le_bytes());
            self.rig.drivers[0].put(STATUS, &[0xaa]);
            let mut buffers = vec![(BUFFERS, 16, false), (DATA, len, write), (STATUS, 1, true)];
            buffers.retain(|buffer| buffer.1 > 0);
            self.rig.send(0, &buffers);
            let (_, used) = self.rig.wait_used(0);
            (self.rig.drivers[0].bytes(STATUS, 1)[0], used)
        }
    }

    #[test]
    fn sectors_are_read_and_written() {
        for format in [INDIRECT_DESC, INDIRECT_DESC | RING_PACKED] {
            let mut bench = Bench::new(format, false);
            assert_eq!(bench.request(request::IN, 1, (1024, true)), (status::OK, 1025));
            assert_eq!(bench.rig.drivers[0].bytes(DATA, 1024), bench.bytes.lock().unwrap()[512..1536]);
            bench.rig.drivers[0].put(DATA, &[0x5a; 512]);
            assert_eq!(bench.request(request::OUT, 2, (512, false)), (status::OK, 1));
            assert_eq!(bench.bytes.lock().unwrap()[1024..1536], [0x5a; 512]);
            assert_eq!(bench.request(request::FLUSH, 0, (0, true)), (status::OK, 1));
            assert_eq!(bench.request(request::GET_ID, 0, (20, true)), (status::OK, 21));
            assert_eq!(&bench.rig.drivers[0].bytes(DATA, 6), b"disk0\0");
        }
    }

    #[test]
    fn what_is_not_on_the_disk_or_fails_on_the_host_is_an_io_error() {
        let mut bench = Bench::new(INDIRECT_DESC, false);
        for (kind, sector, data) in [
            (request::IN, 4, (512, true)),
            (request::IN, 3, (1024, true)),
            (request::IN, u64::MAX, (512, true)),
            (request::IN, 0, (511, true)),
            (request::IN, 3, (512, true)),
            (request::OUT, 3, (512, false)),
            (request::OUT, 4, (512, false)),
        ] {
            assert_eq!(bench.request(kind, sector, data).0, status::IO_ERROR, "{kind} {sector}");
        }
        assert_eq!(bench.request(99, 0, (512, true)).0, status::UNSUPPORTED);
    }

    #[test]
    fn a_read_only_disk_says_so_and_is_not_written() {
        let mut bench = Bench::new(INDIRECT_DESC, true);
        let block = Block::new(Box::new(Fake(bench.bytes.clone(), true)), "");
        assert_eq!(block.features() & feature::READ_ONLY, feature::READ_ONLY);
        let before = bench.bytes.lock().unwrap().clone();
        assert_eq!(bench.request(request::OUT, 0, (512, false)).0, status::IO_ERROR);
        assert_eq!(*bench.bytes.lock().unwrap(), before);
    }

    #[test]
    fn requests_without_a_header_or_a_status_break_the_rules() {
        for buffers in [&[(BUFFERS, 15, false), (STATUS, 1, true)][..], &[(BUFFERS, 16, false)]] {
            let mut bench = Bench::new(INDIRECT_DESC, false);
            bench.rig.send(0, buffers);
            assert!(bench.rig.status().contains(Status::NEEDS_RESET));
            assert_eq!(bench.rig.take_events(), [Event::Config]);
        }
    }

    #[test]
    fn the_configuration_tells_the_capacity() {
        let mut bench = Bench::new(0, false);
        assert_eq!(bench.rig.config(0, 8), [4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bench.rig.config(u64::MAX, 8), [0; 8]);
    }
}
