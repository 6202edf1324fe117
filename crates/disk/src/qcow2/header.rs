//! The header: what an image claims about itself, checked against the file that it is in.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::error::Reason;
use crate::raw::QCOW2_MAGIC;

/// The header's bytes in version 2, and the least in version 3.
const SIZE_V2: usize = 72;
const SIZE_V3: usize = 104;
/// The most bytes of a level 1 table and of a refcount table: what QEMU opens.
const MAX_L1: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// The most snapshots.
const MAX_SNAPSHOTS: u32 = 65536;
/// The most bytes of a backing file's name.
const MAX_NAME: u32 = 1023;
/// Where offsets in the file end.
const MAX_OFFSET: u64 = 1 << 56;

/// Bits of the features without which an image cannot be understood.
mod incompatible {
    pub(super) const DIRTY: u64 = 1 << 0;
    pub(super) const CORRUPT: u64 = 1 << 1;
    pub(super) const EXTERNAL_DATA: u64 = 1 << 2;
    pub(super) const COMPRESSION: u64 = 1 << 3;
    pub(super) const EXTENDED_L2: u64 = 1 << 4;
}

/// Types of header extensions.
mod extension {
    pub(super) const END: u32 = 0;
    pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
}

/// An image's header. Offsets and sizes in bytes; its tables lie within the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The cluster size is 2 to the power of this: 9 to 21.
    pub cluster_bits: u32,
    /// The disk's bytes.
    pub size: u64,
    /// Entries of the level 1 table.
    pub l1_entries: u32,
    /// Where it lies.
    pub l1_offset: u64,
    /// Where the refcount table lies.
    pub refcount_table: u64,
    /// Its clusters.
    pub refcount_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where their table lies.
    pub snapshots_offset: u64,
    /// A refcount has 2 to the power of this many bits: 0 to 6.
    pub refcount_order: u32,
    /// Feature bits.
    pub incompatible: u64,
    /// Feature bits that need not be known.
    pub compatible: u64,
    /// The backing file's name, as it is written.
    pub backing: Option<String>,
    /// Its format, where that is told.
    pub backing_format: Option<String>,
}

impl Header {
    /// Reads and checks the header of an image.
    ///
    /// # Errors
    /// What is wrong with it. [`Header::allow_use`] tells more.
    pub fn read(file: &File) -> Result<Self, Reason> {
        let len = file.metadata()?.len();
        let mut bytes = [0; SIZE_V3];
        let got = read_up_to(file, &mut bytes, 0)?;
        if got < QCOW2_MAGIC.len() || bytes[..4] != QCOW2_MAGIC {
            return Err(Reason::NotQcow2);
        }
        if got < SIZE_V2 {
            return Err(Reason::Truncated { what: "its header", end: SIZE_V2 as u64, len });
        }
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
        let version = word(4);
        let least = match version {
            2 => SIZE_V2,
            3 => SIZE_V3,
            version => return Err(Reason::Version(version)),
        };
        if got < least {
            return Err(Reason::Truncated { what: "its header", end: least as u64, len });
        }
        let v3 = version == 3;
        let header_len = if v3 { word(100) } else { SIZE_V2 as u32 };
        let mut header = Self {
            version,
            cluster_bits: word(20),
            size: long(24),
            l1_entries: word(36),
            l1_offset: long(40),
            refcount_table: long(48),
            refcount_clusters: word(56),
            snapshots: word(60),
            snapshots_offset: long(64),
            refcount_order: if v3 { word(96) } else { 4 },
            incompatible: if v3 { long(72) } else { 0 },
            compatible: if v3 { long(80) } else { 0 },
            backing: None,
            backing_format: None,
        };
        header.check_features(word(32))?;
        header.check_values(header_len)?;
        header.check_places(len)?;
        header.read_backing(file, (long(8), word(16)), header_len)?;
        Ok(header)
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether its refcounts may be wrong.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & incompatible::DIRTY != 0
    }

    /// Whether it is marked as damaged.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & incompatible::CORRUPT != 0
    }

    /// The feature bits of an image that is neither dirty nor damaged.
    pub(super) fn clean_features(&self) -> u64 {
        self.incompatible & !(incompatible::DIRTY | incompatible::CORRUPT)
    }

    /// Whether it can be used as a disk as it is.
    ///
    /// # Errors
    /// What has to be done first.
    pub fn allow_use(&self) -> Result<(), Reason> {
        if self.is_corrupt() {
            return Err(Reason::Corrupt);
        }
        if self.is_dirty() { Err(Reason::Dirty) } else { Ok(()) }
    }

    fn check_features(&self, encryption: u32) -> Result<(), Reason> {
        if encryption != 0 {
            return Err(Reason::Encrypted);
        }
        let unsupported = [
            (incompatible::EXTERNAL_DATA, "an external data file"),
            (incompatible::COMPRESSION, "a compression other than deflate"),
            (incompatible::EXTENDED_L2, "extended level 2 entries"),
        ];
        for (bit, what) in unsupported {
            if self.incompatible & bit != 0 {
                return Err(Reason::Unsupported(what.into()));
            }
        }
        match self.clean_features() {
            0 => Ok(()),
            bits => Err(Reason::Unsupported(format!("the incompatible features {bits:#x}"))),
        }
    }

    fn check_values(&self, header_len: u32) -> Result<(), Reason> {
        let wrong = |what, value: u64| Err(Reason::Header { what, value });
        if !(9..=21).contains(&self.cluster_bits) {
            return wrong("the number of cluster bits", self.cluster_bits.into());
        }
        let long_enough = self.version == 2 || header_len as usize >= SIZE_V3;
        if !long_enough || u64::from(header_len) > self.cluster_size() {
            return wrong("its length", header_len.into());
        }
        if self.refcount_order > 6 {
            return wrong("the refcounts' width", self.refcount_order.into());
        }
        if self.size > i64::MAX as u64 {
            return wrong("the disk's size", self.size);
        }
        if u64::from(self.l1_entries) * 8 > MAX_L1 {
            return wrong("the size of the level 1 table", self.l1_entries.into());
        }
        let covered = u128::from(self.l1_entries) << (2 * self.cluster_bits - 3);
        if covered < u128::from(self.size) {
            return wrong("the size of the level 1 table, too small for the disk,", self.l1_entries.into());
        }
        if u64::from(self.refcount_clusters) << self.cluster_bits > MAX_REFCOUNT_TABLE {
            return wrong("the size of the refcount table", self.refcount_clusters.into());
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return wrong("the number of snapshots", self.snapshots.into());
        }
        Ok(())
    }

    /// Looks whether the tables lie in the file, on whole clusters.
    fn check_places(&self, len: u64) -> Result<(), Reason> {
        let refcounts = u64::from(self.refcount_clusters) << self.cluster_bits;
        let places = [
            ("its level 1 table", self.l1_offset, u64::from(self.l1_entries) * 8),
            ("its refcount table", self.refcount_table, refcounts),
            ("its snapshot table", self.snapshots_offset, 40 * u64::from(self.snapshots)),
        ];
        for (what, offset, size) in places {
            if size == 0 {
                continue;
            }
            if !offset.is_multiple_of(self.cluster_size()) || offset == 0 || offset >= MAX_OFFSET {
                return Err(Reason::Header { what, value: offset });
            }
            if offset + size > len {
                return Err(Reason::Truncated { what, end: offset + size, len });
            }
        }
        Ok(())
    }

    /// Reads the backing file's name, and its format from among the header's extensions.
    fn read_backing(&mut self, file: &File, name: (u64, u32), header_len: u32) -> Result<(), Reason> {
        let (offset, size) = name;
        if offset != 0 {
            let inside = offset.checked_add(size.into()).is_some_and(|end| end <= self.cluster_size());
            if size == 0 || size > MAX_NAME || !inside {
                return Err(Reason::Header { what: "the backing file's name's length", value: size.into() });
            }
            self.backing = Some(read_text(file, offset, size as usize)?);
        }
        if self.version == 2 {
            return Ok(());
        }
        let mut at = u64::from(header_len).next_multiple_of(8);
        let end = if offset == 0 { self.cluster_size() } else { offset };
        while at + 8 <= end {
            let mut head = [0; 8];
            read_up_to(file, &mut head, at)?;
            let kind = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
            let size = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
            at += 8;
            if kind == extension::END {
                break;
            }
            if at + u64::from(size) > end {
                return Err(Reason::Header { what: "the length of an extension", value: size.into() });
            }
            if kind == extension::BACKING_FORMAT {
                self.backing_format = Some(read_text(file, at, size as usize)?);
            }
            at += u64::from(size).next_multiple_of(8);
        }
        Ok(())
    }
}

/// Reads what there is; the rest stays as it is.
fn read_up_to(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < bytes.len() {
        match file.read_at(&mut bytes[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

/// Reads a name of a few bytes.
fn read_text(file: &File, offset: u64, len: usize) -> Result<String, Reason> {
    let mut bytes = vec![0; len];
    if read_up_to(file, &mut bytes, offset)? < len {
        let (end, len) = (offset + len as u64, file.metadata()?.len());
        return Err(Reason::Truncated { what: "its header", end, len });
    }
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(Reason::Header { what: "a name that is no text at byte", value: offset }),
    }
}
