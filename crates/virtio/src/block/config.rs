//! The configuration space. *Device configuration layout*.

use disk::Disk;

use super::SECTOR;
use super::request::{MAX_RANGES, MAX_SECTORS};

/// The cache's mode: the one field that the driver may write.
pub(super) const WRITEBACK: u64 = 32;
/// The most bytes of a buffer, and the most buffers of data in a request: more than any queue has entries for, because of
/// indirect tables.
const SIZE_MAX: u32 = 4 << 20;
const SEG_MAX: u32 = 254;

/// The bytes of the whole space.
pub(super) fn bytes(disk: &dyn Disk, queues: u16, writeback: bool) -> [u8; 60] {
    let geometry = disk.geometry();
    let mut config = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(disk.size() / SECTOR).to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &geometry.logical.to_le_bytes());
    // Logical blocks in a physical one, as a power of two; the first is aligned; what is best at least and at most.
    put(24, &[(geometry.physical / geometry.logical).max(1).ilog2() as u8, 0]);
    put(26, &((geometry.physical / geometry.logical).max(1) as u16).to_le_bytes());
    put(WRITEBACK as usize, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());
    put(36, &MAX_SECTORS.to_le_bytes());
    put(40, &(MAX_RANGES as u32).to_le_bytes());
    put(44, &(geometry.granularity.max(geometry.logical) / SECTOR as u32).to_le_bytes());
    put(48, &MAX_SECTORS.to_le_bytes());
    put(52, &(MAX_RANGES as u32).to_le_bytes());
    put(56, &[1]);
    config
}
