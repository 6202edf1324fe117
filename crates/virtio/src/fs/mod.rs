//! The file system device: a shared folder that speaks FUSE. *File System Device*.

mod server;
#[cfg(test)]
mod tests;
mod wire;

pub use server::{Cache, FuseServer};

use std::sync::Arc;

use crate::share::Folder;
use crate::share::device::{Kind, ShareDevice};

/// The device; its queues are for what must not wait behind others, and for requests.
const KIND: Kind = Kind { id: 26, features: 0, queue_sizes: &[128, 1024], threads: 4 };
/// Bytes of the tag's field.
pub const MAX_TAG: usize = 36;

/// A device that shares a folder under a tag, of which [`MAX_TAG`] bytes count.
pub fn device(folder: Folder, tag: &str, cache: Cache) -> ShareDevice {
    let mut config = vec![0; MAX_TAG];
    let tag = &tag.as_bytes()[..tag.len().min(MAX_TAG)];
    config[..tag.len()].copy_from_slice(tag);
    // One queue for requests.
    config.extend_from_slice(&1u32.to_le_bytes());
    ShareDevice::new(KIND, config, Arc::new(FuseServer::new(folder, cache)))
}
