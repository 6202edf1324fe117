//! The 9P transport device: a shared folder that speaks 9P2000.L. *9P Transport Device*.

mod server;
#[cfg(test)]
mod tests;
mod wire;

pub use server::P9Server;

use std::sync::Arc;

use crate::share::Folder;
use crate::share::device::{Kind, ShareDevice};

/// The configuration has a tag.
const MOUNT_TAG: u64 = 1;
/// The device. Linux's driver makes its largest message from the one queue's entries. There is one thread, so that an
/// answer to FLUSH comes after that to what it is about.
const KIND: Kind = Kind { id: 9, features: MOUNT_TAG, queue_sizes: &[128], threads: 1 };
/// The longest tag, in bytes.
pub const MAX_TAG: usize = 31;

/// A device that shares a folder under a tag, of which [`MAX_TAG`] bytes count.
pub fn device(folder: Folder, tag: &str) -> ShareDevice {
    let tag = &tag.as_bytes()[..tag.len().min(MAX_TAG)];
    let config = [&(tag.len() as u16).to_le_bytes()[..], tag].concat();
    ShareDevice::new(KIND, config, Arc::new(P9Server::new(folder)))
}
