//! The file system device: a shared folder that speaks FUSE. *File System Device*.

mod server;
#[cfg(test)]
mod tests;
mod wire;

pub use server::{Cache, FuseServer};

use std::sync::Arc;

use crate::share::Folder;
use crate::share::serve::{Server, Workers};
use crate::{Activation, Device, read_config_bytes};

/// Its device id.
const ID: u16 = 26;
/// The queues: what must not wait behind others, and requests.
const SIZES: [u16; 2] = [128, 1024];
/// Threads that answer.
const THREADS: usize = 4;
/// Bytes of the tag's field.
pub const MAX_TAG: usize = 36;

/// The device.
pub struct Fs {
    server: Arc<dyn Server>,
    config: [u8; MAX_TAG + 4],
    workers: Option<Workers>,
}

impl Fs {
    /// A device that shares a folder under a tag, of which [`MAX_TAG`] bytes count.
    pub fn new(folder: Folder, tag: &str, cache: Cache) -> Self {
        let mut config = [0; MAX_TAG + 4];
        let tag = &tag.as_bytes()[..tag.len().min(MAX_TAG)];
        config[..tag.len()].copy_from_slice(tag);
        config[MAX_TAG..].copy_from_slice(&1u32.to_le_bytes());
        Self { server: Arc::new(FuseServer::new(folder, cache)), config, workers: None }
    }
}

impl Device for Fs {
    fn id(&self) -> u16 {
        ID
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) {
        let queues = activation.queues.into_iter().flatten().collect();
        self.workers = Workers::begin(self.server.clone(), queues, THREADS, usize::from(SIZES[1]) / 2);
    }

    fn notify(&mut self, _index: u16) {
        if let Some(workers) = &self.workers {
            workers.ring();
        }
    }

    fn reset(&mut self) {
        self.workers = None;
        self.server.reset();
    }
}
