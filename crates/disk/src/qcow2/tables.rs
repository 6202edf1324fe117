//! What lies in an image's tables: big-endian words that point to clusters.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::Header;
use crate::error::Reason;

/// The offset in an entry of a table.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster has one reference, so that it may be written where it is.
pub(super) const COPIED: u64 = 1 << 63;
/// The cluster is compressed.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Level 2 tables of so many bytes are looked at when an image is opened.
const LOOKED_AT: u64 = 64 << 20;

/// What a level 2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing: the backing file's bytes, or zeros.
    Nothing,
    /// A cluster at this offset.
    Cluster(u64),
    /// Compressed bytes: offset and length.
    Compressed(u64, u64),
}

impl Entry {
    pub(super) fn parse(entry: u64, cluster_bits: u32) -> Self {
        if entry & COMPRESSED != 0 {
            let split = 62 - (cluster_bits - 8);
            let offset = entry & ((1 << split) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> split;
            return Self::Compressed(offset, 512 - offset % 512 + 512 * sectors);
        }
        match entry & OFFSET {
            0 => Self::Nothing,
            offset => Self::Cluster(offset),
        }
    }
}

/// Reads a table's entries; what lies behind the end of the file is zeros.
pub(super) fn read_table(file: &File, offset: u64, entries: usize) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; entries * 8];
    let mut got = 0;
    while got < bytes.len() {
        match file.read_at(&mut bytes[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let word = |bytes: &[u8]| bytes.iter().fold(0, |word, &byte| word << 8 | u64::from(byte));
    Ok(bytes.chunks_exact(8).map(word).collect())
}

/// Whether the file has no bytes there: a table in a hole is empty, and need not be read.
pub(super) fn is_hole(file: &File, offset: u64, len: u64) -> bool {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(data) => data >= offset + len,
        Err(error) => error == Errno::NXIO,
    }
}

/// Looks whether what the tables point to is in the file, at least where it begins: a file that was cut off is found
/// before it is used, not when the guest reads zeros from it.
pub(crate) fn check_reachable(file: &File, header: &Header, write: bool) -> Result<(), Reason> {
    let len = file.metadata()?.len();
    let inside = |what, offset: u64| match offset < len {
        true => Ok(()),
        false => Err(Reason::Truncated { what, end: offset + header.cluster_size(), len }),
    };
    let (cluster_size, mut looked_at) = (header.cluster_size(), 0);
    check_refcounts(file, header, write)?;
    for entry in read_table(file, header.l1_offset, header.l1_entries as usize)? {
        let table = entry & OFFSET;
        if table == 0 {
            continue;
        }
        if !table.is_multiple_of(cluster_size) {
            return Err(Reason::Damaged(format!("a level 2 table at {table:#x} is not on a cluster")));
        }
        inside("one of its level 2 tables", table)?;
        if looked_at >= LOOKED_AT || is_hole(file, table, cluster_size) {
            continue;
        }
        looked_at += cluster_size;
        for entry in read_table(file, table, cluster_size as usize / 8)? {
            match Entry::parse(entry, header.cluster_bits) {
                Entry::Nothing => {}
                Entry::Cluster(offset) | Entry::Compressed(offset, _) => {
                    inside("one of its clusters", offset)?;
                }
            }
        }
    }
    Ok(())
}

/// Looks whether the blocks of refcounts are in the file, and where it is to be written whether there is one for each of its
/// clusters: nothing could be allocated without.
fn check_refcounts(file: &File, header: &Header, write: bool) -> Result<(), Reason> {
    let len = file.metadata()?.len();
    let entries = u64::from(header.refcount_clusters) << (header.cluster_bits - 3);
    let covered = 1u64 << (2 * header.cluster_bits + 3 - header.refcount_order);
    let needed = if write { len.div_ceil(covered) } else { 0 };
    let missing =
        || Reason::Damaged("refcounts are missing; `ringside disk check --repair` makes them".into());
    if entries < needed {
        return Err(missing());
    }
    let table = read_table(file, header.refcount_table, entries as usize)?;
    for (index, block) in (0..).zip(table) {
        if !block.is_multiple_of(header.cluster_size()) {
            return Err(Reason::Damaged(format!("a block of refcounts at {block:#x} is not on a cluster")));
        }
        if block >= len {
            let end = block.saturating_add(header.cluster_size());
            return Err(Reason::Truncated { what: "one of its blocks of refcounts", end, len });
        }
        if block == 0 && index < needed {
            return Err(missing());
        }
    }
    Ok(())
}
