//! The entropy device: whatever the driver asks for is filled with random bytes of the host. *Entropy Device*.

use std::io::Read;

use crate::memory::DmaMemory;
use crate::queue::{Chain, QueueError};
use crate::{Activation, Device, QueueHandle, features};

/// Its device id.
const ID: u16 = 4;
/// The one queue's entries.
const SIZES: [u16; 1] = [64];
/// The most bytes that a request gets: a driver asks again for more.
const MOST: u64 = 64 << 10;
/// Bytes that are fetched at a time.
const CHUNK: usize = 4096;

/// A source of random bytes for the guest.
pub struct Rng {
    source: Source,
    queue: Option<QueueHandle>,
}

struct Source {
    bytes: Box<dyn Read + Send>,
    failed: bool,
}

impl Rng {
    /// A device that gives the bytes of `source`.
    pub fn new(source: Box<dyn Read + Send>) -> Self {
        Self { source: Source { bytes: source, failed: false }, queue: None }
    }
}

impl Source {
    /// Bytes from the source; fewer where it fails.
    fn fetch(&mut self, chunk: &mut [u8]) -> usize {
        match self.bytes.read(chunk) {
            Ok(count) => count,
            Err(error) => {
                if !std::mem::replace(&mut self.failed, true) {
                    log::warn!("virtio-rng: no random bytes: {error}");
                }
                0
            }
        }
    }

    /// Fills a request's buffers; gives the bytes written.
    fn answer(&mut self, memory: &DmaMemory, chain: &Chain) -> Result<u32, QueueError> {
        let mut chunk = [0; CHUNK];
        let wanted = chain.writable_len().min(MOST);
        if wanted == 0 {
            return Err(QueueError::Request("an entropy request without room"));
        }
        let mut done = 0;
        while done < wanted {
            let len = CHUNK.min((wanted - done) as usize);
            let count = self.fetch(&mut chunk[..len]);
            if count == 0 {
                break;
            }
            done += chain.write(memory, done, &chunk[..count])? as u64;
        }
        Ok(done as u32)
    }
}

impl Device for Rng {
    fn id(&self) -> u16 {
        ID
    }

    fn features(&self) -> u64 {
        features::IN_ORDER
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) {
        self.queue = activation.queue(0);
    }

    fn notify(&mut self, _index: u16) {
        if let Some(queue) = &self.queue {
            queue.serve(|memory, chain| self.source.answer(memory, chain));
        }
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}
