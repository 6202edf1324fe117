//! The device of a shared folder, whichever protocol it speaks: a tag, queues, and threads that answer.

use std::sync::Arc;

use super::serve::{Server, Workers};
use crate::{Activation, Device, read_config_bytes};

/// What tells the devices of the protocols apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Its device id.
    pub id: u16,
    /// Feature bits of its own.
    pub features: u64,
    /// The most entries of each of its queues.
    pub queue_sizes: &'static [u16],
    /// Threads that answer. With one, requests are answered in the order in which they came.
    pub threads: usize,
}

/// A shared folder as a device.
pub struct ShareDevice {
    kind: Kind,
    config: Vec<u8>,
    server: Arc<dyn Server>,
    workers: Option<Workers>,
}

impl ShareDevice {
    /// A device with this configuration space, whose requests the server answers.
    pub fn new(kind: Kind, config: Vec<u8>, server: Arc<dyn Server>) -> Self {
        Self { kind, config, server, workers: None }
    }
}

impl Device for ShareDevice {
    fn id(&self) -> u16 {
        self.kind.id
    }

    fn features(&self) -> u64 {
        self.kind.features
    }

    fn queue_sizes(&self) -> &[u16] {
        self.kind.queue_sizes
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) {
        let queues = activation.queues.into_iter().flatten().collect();
        // Half of the entries are left to requests that wait for nobody.
        let entries = self.kind.queue_sizes.iter().copied().max().unwrap_or(0);
        self.workers =
            Workers::begin(self.server.clone(), queues, self.kind.threads, usize::from(entries) / 2);
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
