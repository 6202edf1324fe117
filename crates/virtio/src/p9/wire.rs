//! 9P2000.L messages: little-endian numbers and counted texts, one after the other.

use crate::share::ownership::kind;
use crate::share::{Attributes, Errno, Result};

/// Kinds of requests; an answer's is one more.
pub mod kind_of {
    pub const LERROR: u8 = 6;
    pub const STATFS: u8 = 8;
    pub const LOPEN: u8 = 12;
    pub const LCREATE: u8 = 14;
    pub const SYMLINK: u8 = 16;
    pub const MKNOD: u8 = 18;
    pub const RENAME: u8 = 20;
    pub const READLINK: u8 = 22;
    pub const GETATTR: u8 = 24;
    pub const SETATTR: u8 = 26;
    pub const XATTRWALK: u8 = 30;
    pub const XATTRCREATE: u8 = 32;
    pub const READDIR: u8 = 40;
    pub const FSYNC: u8 = 50;
    pub const LOCK: u8 = 52;
    pub const GETLOCK: u8 = 54;
    pub const LINK: u8 = 70;
    pub const MKDIR: u8 = 72;
    pub const RENAMEAT: u8 = 74;
    pub const UNLINKAT: u8 = 76;
    pub const VERSION: u8 = 100;
    pub const AUTH: u8 = 102;
    pub const ATTACH: u8 = 104;
    pub const FLUSH: u8 = 108;
    pub const WALK: u8 = 110;
    pub const READ: u8 = 116;
    pub const WRITE: u8 = 118;
    pub const CLUNK: u8 = 120;
    pub const REMOVE: u8 = 122;
}

/// Which attributes SETATTR sets.
pub mod set {
    pub const MODE: u32 = 1;
    pub const UID: u32 = 2;
    pub const GID: u32 = 4;
    pub const SIZE: u32 = 8;
    pub const ATIME: u32 = 0x10;
    pub const MTIME: u32 = 0x20;
    pub const ATIME_SET: u32 = 0x80;
    pub const MTIME_SET: u32 = 0x100;
}

/// What GETATTR answers: all but the last three, the time of birth, and nothing of the rest.
pub const BASIC: u64 = 0x7ff;
pub const BTIME: u64 = 0x800;

/// Kinds of locks, and what comes of one.
pub mod lock {
    pub const SHARED: u8 = 0;
    pub const EXCLUSIVE: u8 = 1;
    pub const UNLOCK: u8 = 2;
    pub const BLOCK: u32 = 1;
    pub const SUCCESS: u8 = 0;
    pub const BLOCKED: u8 = 1;
}

/// Bytes before each message's own: its length, kind and tag.
pub const HEADER: usize = 7;
/// Bytes of a READ's answer and of a WRITE before the data.
pub const READ_HEADER: usize = HEADER + 4;
pub const WRITE_HEADER: usize = HEADER + 16;

/// A request's fields, one after the other.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.bytes(N)?.try_into().map_err(|_| Errno::INVAL)
    }

    pub fn u8(&mut self) -> Result<u8> {
        self.number().map(u8::from_le_bytes)
    }

    pub fn u16(&mut self) -> Result<u16> {
        self.number().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Result<u32> {
        self.number().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64> {
        self.number().map(u64::from_le_bytes)
    }

    pub fn text(&mut self) -> Result<&'a [u8]> {
        let len = self.u16()?;
        self.bytes(len.into())
    }
}

/// What tells files apart for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qid {
    kind: u8,
    version: u32,
    path: u64,
}

impl Qid {
    pub fn of(attributes: &Attributes) -> Self {
        // Contents that changed are another version.
        let changed = attributes.modified;
        let version = (changed.seconds as u32) ^ changed.nanoseconds << 2;
        Self { version, ..Self::new(attributes.owner.mode & kind::MASK, attributes.inode) }
    }

    pub fn new(kind: u32, inode: u64) -> Self {
        let kind = match kind {
            kind::FOLDER => 0x80,
            kind::LINK => 2,
            _ => 0,
        };
        Self { kind, version: 0, path: inode }
    }
}

/// An answer's fields.
#[derive(Default)]
pub struct Out(pub Vec<u8>);

impl Out {
    pub fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub fn text(self, value: &[u8]) -> Self {
        let value = &value[..value.len().min(u16::MAX.into())];
        let mut out = self.u16(value.len() as u16);
        out.0.extend_from_slice(value);
        out
    }

    pub fn qid(self, qid: Qid) -> Self {
        self.u8(qid.kind).u32(qid.version).u64(qid.path)
    }
}
