//! The walk: what is referred to, and what the refcounts say of it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::path::Path;

use super::Header;
use super::rebuild::rebuild;
use super::tables::{COPIED, Entry, OFFSET, is_hole, read_table};
use crate::error::{Error, Reason};
use crate::lock::lock;
use crate::open::open_file;

/// So many errors are told by name.
const TOLD: usize = 32;
/// Entries of all snapshots' level 1 tables together.
const MAX_SNAPSHOT_ENTRIES: u64 = 1 << 23;
/// Counts are kept in pages of so many clusters.
const PAGE: u64 = 1024;

/// What a walk found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Places where the tables are wrong: data may be lost.
    pub errors: u64,
    /// The first of them.
    pub told: Vec<String>,
    /// Clusters that take up space, and to which nothing refers.
    pub leaks: u64,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Clusters of the disk.
    pub clusters: u64,
    /// Those of them that have data in the image.
    pub allocated: u64,
    /// Those of them that are compressed.
    pub compressed: u64,
    /// The image is marked as not closed properly.
    pub dirty: bool,
    /// The image is marked as damaged.
    pub corrupt: bool,
}

impl Findings {
    /// Whether there is nothing to repair.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.leaks == 0 && !self.dirty && !self.corrupt
    }

    fn error(&mut self, text: impl FnOnce() -> String) {
        self.errors += 1;
        if self.told.len() < TOLD {
            self.told.push(text());
        }
    }
}

/// Looks for errors and leaks in an image that nobody writes.
///
/// # Errors
/// What keeps it from being looked at.
pub fn check(path: &Path) -> Result<Findings, Error> {
    let walk = || -> Result<Findings, Reason> {
        let (file, _) = open_file(path, false)?;
        lock(&file, false)?;
        let header = Header::read(&file)?;
        Ok(Walk::new(&file, &header)?.findings()?.0)
    };
    walk().map_err(|reason| reason.at(path))
}

/// Makes the refcounts what they should be, and takes the marks away; gives what was found before and is found after.
/// Entries that point to nowhere stay as they are.
///
/// # Errors
/// What keeps it from being repaired.
pub fn repair(path: &Path) -> Result<(Findings, Findings), Error> {
    let walk = || -> Result<(Findings, Findings), Reason> {
        let (file, _) = open_file(path, true)?;
        lock(&file, true)?;
        let header = Header::read(&file)?;
        let (before, references) = Walk::new(&file, &header)?.findings()?;
        if before.is_clean() {
            return Ok((before.clone(), before));
        }
        rebuild(&file, &header, references)?;
        let header = Header::read(&file)?;
        let after = Walk::new(&file, &header)?.findings()?.0;
        Ok((before, after))
    };
    walk().map_err(|reason| reason.at(path))
}

/// Whether there are errors, in an image that is open and locked.
pub(crate) fn has_errors(file: &File, header: &Header) -> Result<bool, Reason> {
    Ok(Walk::new(file, header)?.findings()?.0.errors > 0)
}

/// How often each cluster is referred to; only pages with references are kept.
#[derive(Debug, Default)]
pub(super) struct Counts(BTreeMap<u64, Box<[u32]>>);

impl Counts {
    pub(super) fn add(&mut self, cluster: u64, count: u32) {
        let page = self.0.entry(cluster / PAGE).or_insert_with(|| vec![0; PAGE as usize].into());
        let slot = &mut page[(cluster % PAGE) as usize];
        *slot = slot.saturating_add(count);
    }

    pub(super) fn get(&self, cluster: u64) -> u32 {
        self.0.get(&(cluster / PAGE)).map_or(0, |page| page[(cluster % PAGE) as usize])
    }

    /// The clusters with references, in their order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u32)> {
        self.0.iter().flat_map(|(page, counts)| {
            (page * PAGE..).zip(counts.iter().copied()).filter(|&(_, count)| count > 0)
        })
    }
}

/// References, without and with those of the refcounts' own clusters.
pub(super) struct References {
    /// What the disk and its snapshots refer to, and the header.
    pub(super) contents: Counts,
}

struct Walk<'a> {
    file: &'a File,
    header: &'a Header,
    /// Bytes of the file.
    len: u64,
    counts: Counts,
    found: Findings,
    /// How often each level 2 table is referred to.
    tables: HashMap<u64, u32>,
}

impl<'a> Walk<'a> {
    fn new(file: &'a File, header: &'a Header) -> Result<Self, Reason> {
        let found = Findings {
            cluster_size: header.cluster_size(),
            clusters: header.size.div_ceil(header.cluster_size()),
            dirty: header.is_dirty(),
            corrupt: header.is_corrupt(),
            ..Findings::default()
        };
        let len = file.metadata()?.len();
        Ok(Self { file, header, len, counts: Counts::default(), found, tables: HashMap::new() })
    }

    fn findings(mut self) -> Result<(Findings, References), Reason> {
        self.refer(0, self.header.cluster_size(), 1, "the header");
        let active = self.l1((self.header.l1_offset, self.header.l1_entries), "the level 1 table")?;
        self.snapshots()?;
        let active: HashSet<u64> = active.into_iter().map(|entry| entry & OFFSET).collect();
        let mut tables: Vec<(u64, u32)> = self.tables.drain().collect();
        tables.sort_unstable();
        for &(table, count) in &tables {
            self.l2(table, count, active.contains(&table))?;
        }
        // The refcounts' own clusters are counted apart: a repair replaces them.
        let contents = std::mem::take(&mut self.counts);
        for (cluster, count) in contents.iter() {
            self.counts.add(cluster, count);
        }
        let actual = self.refcounts()?;
        self.compare(&actual);
        self.copied(&actual)?;
        Ok((self.found, References { contents }))
    }

    /// Notes references to all clusters of a range; `false` where it is not in the file.
    fn refer(&mut self, offset: u64, len: u64, count: u32, what: &str) -> bool {
        let end = offset.saturating_add(len);
        if offset >= self.len || end > self.len.next_multiple_of(self.header.cluster_size()) {
            let file = self.len;
            self.found.error(|| format!("{what} at {offset:#x} is not in the file of {file:#x} bytes"));
            return false;
        }
        let bits = self.header.cluster_bits;
        for cluster in offset >> bits..=(end - 1) >> bits {
            self.counts.add(cluster, count);
        }
        true
    }

    /// A cluster that has to begin where one begins.
    fn refer_cluster(&mut self, offset: u64, count: u32, what: &str) -> bool {
        if !offset.is_multiple_of(self.header.cluster_size()) {
            self.found.error(|| format!("{what} at {offset:#x} is not on a cluster"));
            return false;
        }
        self.refer(offset, self.header.cluster_size(), count, what)
    }

    /// Reads a level 1 table and notes the level 2 tables.
    fn l1(&mut self, (offset, entries): (u64, u32), what: &str) -> Result<Vec<u64>, Reason> {
        if entries == 0 || !self.refer(offset, u64::from(entries) * 8, 1, what) {
            return Ok(Vec::new());
        }
        let table = read_table(self.file, offset, entries as usize)?;
        for entry in &table {
            if entry & OFFSET != 0 {
                *self.tables.entry(entry & OFFSET).or_default() += 1;
            }
        }
        Ok(table)
    }

    /// Notes what the snapshots refer to.
    fn snapshots(&mut self) -> Result<(), Reason> {
        let (start, mut at, mut entries) = (self.header.snapshots_offset, self.header.snapshots_offset, 0);
        for _ in 0..self.header.snapshots {
            let head = read_table(self.file, at, 5)?;
            let (l1, sizes, extra) = (head[0], head[1], head[4] as u32);
            let (l1_entries, id, name) = ((sizes >> 32) as u32, sizes as u32 >> 16, sizes as u32 & 0xffff);
            entries += u64::from(l1_entries);
            if entries > MAX_SNAPSHOT_ENTRIES {
                return Err(Reason::Header { what: "the size of the snapshots' tables", value: entries });
            }
            if l1.is_multiple_of(self.header.cluster_size()) {
                self.l1((l1, l1_entries), "a snapshot's level 1 table")?;
            } else {
                self.found.error(|| format!("a snapshot's level 1 table at {l1:#x} is not on a cluster"));
            }
            at = (at + 40 + u64::from(extra) + u64::from(id + name)).next_multiple_of(8);
            if at > self.len {
                return Err(Reason::Truncated { what: "its snapshot table", end: at, len: self.len });
            }
        }
        if at > start {
            self.refer(start, at - start, 1, "the snapshot table");
        }
        Ok(())
    }

    /// Notes what a level 2 table refers to, which itself is referred to `count` times.
    fn l2(&mut self, table: u64, count: u32, active: bool) -> Result<(), Reason> {
        let size = self.header.cluster_size();
        if !self.refer_cluster(table, count, "a level 2 table") || is_hole(self.file, table, size) {
            return Ok(());
        }
        for entry in read_table(self.file, table, size as usize / 8)? {
            let kind = Entry::parse(entry, self.header.cluster_bits);
            if active && kind != Entry::Nothing {
                self.found.allocated += 1;
            }
            match kind {
                Entry::Nothing => {}
                Entry::Cluster(offset) => {
                    self.refer_cluster(offset, count, "a cluster of data");
                }
                Entry::Compressed(offset, len) => {
                    self.found.compressed += u64::from(active);
                    // Its last sector may be cut off with the file.
                    let len = len.min(self.len.saturating_sub(offset).max(1));
                    self.refer(offset, len, count, "compressed data");
                }
            }
        }
        Ok(())
    }

    /// Reads the refcounts of all clusters, and notes the clusters that they are in.
    fn refcounts(&mut self) -> Result<Counts, Reason> {
        let (bits, order) = (self.header.cluster_bits, self.header.refcount_order);
        let table_len = u64::from(self.header.refcount_clusters) << bits;
        let mut actual = Counts::default();
        if table_len == 0 || !self.refer(self.header.refcount_table, table_len, 1, "the refcount table") {
            return Ok(actual);
        }
        let table = read_table(self.file, self.header.refcount_table, (table_len / 8) as usize)?;
        let (mut seen, per_block) = (HashSet::new(), 1u64 << (bits + 3 - order));
        for (index, offset) in (0u64..).zip(table).filter(|&(_, offset)| offset != 0) {
            if !self.refer_cluster(offset, 1, "a block of refcounts") || !seen.insert(offset) {
                continue;
            }
            if is_hole(self.file, offset, self.header.cluster_size()) {
                continue;
            }
            let words = read_table(self.file, offset, 1 << (bits - 3))?;
            for at in 0..per_block {
                let count = refcount(&words, at, order);
                if count > 0 {
                    actual.add(index * per_block + at, count);
                }
            }
        }
        Ok(actual)
    }

    /// Compares refcounts with references.
    fn compare(&mut self, actual: &Counts) {
        let Self { counts, found, .. } = self;
        for (cluster, is) in actual.iter() {
            if is > counts.get(cluster) {
                found.leaks += 1;
            }
        }
        for (cluster, should) in counts.iter() {
            let is = actual.get(cluster);
            if is < should {
                found.error(|| format!("cluster {cluster} has refcount {is}, but {should} references"));
            }
        }
    }

    /// Looks whether what is marked as having one reference has one, and the other way round.
    fn copied(&mut self, actual: &Counts) -> Result<(), Reason> {
        let (file, header) = (self.file, self.header);
        let Self { counts, found, .. } = self;
        each_flag(file, header, |entry, cluster, _| {
            let (is, should) = (entry & COPIED != 0, actual.get(cluster) == 1);
            // Where the refcount is wrong itself that was told.
            if is != should && actual.get(cluster) >= counts.get(cluster) {
                found.error(|| {
                    let count = actual.get(cluster);
                    format!("cluster {cluster} has refcount {count}, but its entry's mark says otherwise")
                });
            }
            Ok(())
        })
    }
}

/// Calls `action` with each entry of the active tables whose mark of one reference counts, the cluster that it refers to, and
/// where in the file the entry is.
pub(super) fn each_flag(
    file: &File,
    header: &Header,
    mut action: impl FnMut(u64, u64, u64) -> Result<(), Reason>,
) -> Result<(), Reason> {
    let (bits, size, len) = (header.cluster_bits, header.cluster_size(), file.metadata()?.len());
    let mut seen = HashSet::new();
    let l1 = read_table(file, header.l1_offset, header.l1_entries as usize)?;
    for (at, entry) in (header.l1_offset..).step_by(8).zip(l1) {
        let table = entry & OFFSET;
        if table == 0 || table >= len || !table.is_multiple_of(size) {
            continue;
        }
        action(entry, table >> bits, at)?;
        if !seen.insert(table) || is_hole(file, table, size) {
            continue;
        }
        for (at, entry) in (table..).step_by(8).zip(read_table(file, table, size as usize / 8)?) {
            if let Entry::Cluster(offset) = Entry::parse(entry, bits)
                && offset < len
                && offset.is_multiple_of(size)
            {
                action(entry, offset >> bits, at)?;
            }
        }
    }
    Ok(())
}

/// One refcount of a block that was read as big-endian words; counts that are too large are the largest.
fn refcount(words: &[u64], at: u64, order: u32) -> u32 {
    let width = 1u32 << order;
    let bit = at << order;
    let word = words[(bit / 64) as usize];
    let value = if width < 8 {
        // Within a byte the first count is in the lowest bits.
        let byte = (word >> (56 - bit % 64 / 8 * 8)) as u8;
        u64::from(byte >> (bit % 8)) & ((1 << width) - 1)
    } else if width == 64 {
        word
    } else {
        (word >> (64 - u64::from(width) - bit % 64)) & ((1 << width) - 1)
    };
    u32::try_from(value).unwrap_or(u32::MAX)
}
