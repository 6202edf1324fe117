//! New refcounts for an image whose own are wrong.
//!
//! They are written behind the end of the file and become the image's by one write to its header, so that an interrupted
//! repair changes nothing. What the old ones took up is free afterwards.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::Header;
use super::check::{Counts, References, each_flag};
use super::tables::COPIED;
use crate::error::Reason;

/// Where the header has its refcount table's place, and its features.
const REFCOUNT_TABLE: u64 = 48;
const INCOMPATIBLE: u64 = 72;
/// The most bytes of a refcount table.
const MAX_TABLE: u64 = 8 << 20;
/// And of all of its blocks.
const MAX_BLOCKS: u64 = 1 << 30;

/// Writes refcounts that say what these references do.
pub(super) fn rebuild(file: &File, header: &Header, references: References) -> Result<(), Reason> {
    let References { mut contents } = references;
    let largest = if header.refcount_order >= 5 {
        u32::MAX
    } else {
        ((1u64 << (1 << header.refcount_order)) - 1) as u32
    };
    if let Some((cluster, count)) = contents.iter().find(|&(_, count)| count > largest) {
        return Err(Reason::Damaged(format!(
            "cluster {cluster} has {count} references, more than a refcount of this image can say"
        )));
    }
    // A mark that is wrong lets data be written to a cluster that others use: these go first.
    mark(file, header, &contents, false)?;
    file.sync_data()?;
    let plan = Plan::new(file.metadata()?.len(), header, &mut contents)?;
    plan.write(file, header, &contents)?;
    file.sync_data()?;
    let mut place = plan.table_offset(header).to_be_bytes().to_vec();
    place.extend((plan.table_clusters as u32).to_be_bytes());
    file.write_all_at(&place, REFCOUNT_TABLE)?;
    if header.version >= 3 {
        file.write_all_at(&header.clean_features().to_be_bytes(), INCOMPATIBLE)?;
    }
    file.sync_data()?;
    mark(file, header, &contents, true)?;
    Ok(file.sync_all()?)
}

/// Sets or clears the marks of one reference where that is what they should be.
fn mark(file: &File, header: &Header, counts: &Counts, set: bool) -> Result<(), Reason> {
    each_flag(file, header, |entry, cluster, at| {
        let (is, should) = (entry & COPIED != 0, counts.get(cluster) == 1);
        if is != should && should == set {
            file.write_all_at(&(entry ^ COPIED).to_be_bytes(), at)?;
        }
        Ok(())
    })
}

/// Where the new refcounts go.
struct Plan {
    /// How many blocks there are: for all of the file, and for themselves.
    blocks: u64,
    /// The first new cluster: the table, then the blocks.
    first: u64,
    table_clusters: u64,
}

impl Plan {
    fn new(len: u64, header: &Header, counts: &mut Counts) -> Result<Self, Reason> {
        let per_block = 1u64 << (header.cluster_bits + 3 - header.refcount_order);
        let first = len.div_ceil(header.cluster_size());
        let (mut blocks, mut table_clusters) = (0, 0);
        loop {
            let end = first + table_clusters + blocks;
            let needed = end.div_ceil(per_block).max(1);
            let table = (needed * 8).div_ceil(header.cluster_size());
            if table << header.cluster_bits > MAX_TABLE || needed << header.cluster_bits > MAX_BLOCKS {
                return Err(Reason::Damaged("the file is too large for new refcounts".into()));
            }
            if (needed, table) == (blocks, table_clusters) {
                break;
            }
            (blocks, table_clusters) = (needed, table);
        }
        for cluster in first..first + table_clusters + blocks {
            counts.add(cluster, 1);
        }
        Ok(Self { blocks, first, table_clusters })
    }

    fn table_offset(&self, header: &Header) -> u64 {
        self.first << header.cluster_bits
    }

    fn write(&self, file: &File, header: &Header, counts: &Counts) -> Result<(), Reason> {
        let size = header.cluster_size() as usize;
        let per_block = 1u64 << (header.cluster_bits + 3 - header.refcount_order);
        let mut table = vec![0; self.table_clusters as usize * size];
        for (offset, block) in (self.first + self.table_clusters..).zip(0..self.blocks) {
            let offset = offset << header.cluster_bits;
            table[block as usize * 8..][..8].copy_from_slice(&offset.to_be_bytes());
            let mut bytes = vec![0; size];
            for at in 0..per_block {
                put(&mut bytes, at, header.refcount_order, counts.get(block * per_block + at));
            }
            file.write_all_at(&bytes, offset)?;
        }
        Ok(file.write_all_at(&table, self.table_offset(header))?)
    }
}

/// Puts a refcount into a block.
fn put(block: &mut [u8], at: u64, order: u32, count: u32) {
    let bit = at << order;
    if order < 3 {
        block[(bit / 8) as usize] |= (count as u8) << (bit % 8);
    } else {
        let bytes = 1 << (order - 3);
        let value = u64::from(count).to_be_bytes();
        block[(bit / 8) as usize..][..bytes].copy_from_slice(&value[8 - bytes..]);
    }
}
