//! The 9P transport device: a shared folder that speaks 9P2000.L. *9P Transport Device*.

mod server;
#[cfg(test)]
mod tests;
mod wire;

pub use server::P9Server;

use std::sync::Arc;

use crate::share::Folder;
use crate::share::serve::{Server, Workers};
use crate::{Activation, Device, read_config_bytes};

/// Its device id.
const ID: u16 = 9;
/// The one queue's entries: Linux's driver makes its largest message from them.
const SIZES: [u16; 1] = [128];
/// The configuration has a tag.
const MOUNT_TAG: u64 = 1;
/// The longest tag, in bytes.
pub const MAX_TAG: usize = 31;

/// The device.
pub struct P9 {
    server: Arc<dyn Server>,
    /// The tag's length, then the tag.
    config: Vec<u8>,
    workers: Option<Workers>,
}

impl P9 {
    /// A device that shares a folder under a tag, of which [`MAX_TAG`] bytes count.
    pub fn new(folder: Folder, tag: &str) -> Self {
        let tag = &tag.as_bytes()[..tag.len().min(MAX_TAG)];
        let config = [&(tag.len() as u16).to_le_bytes()[..], tag].concat();
        Self { server: Arc::new(P9Server::new(folder)), config, workers: None }
    }
}

impl Device for P9 {
    fn id(&self) -> u16 {
        ID
    }

    fn features(&self) -> u64 {
        MOUNT_TAG
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) {
        // One thread: an answer to FLUSH comes after that to what it is about.
        let queues = activation.queues.into_iter().flatten().collect();
        self.workers = Workers::begin(self.server.clone(), queues, 1, usize::from(SIZES[0]) / 2);
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
