//! What a fid can be besides a file: an attribute of one, and the owner of locks.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Answer, Fid, Opened, P9Server, done};
use crate::p9::wire::{Fields, Out, kind_of, lock};
use crate::share::{Errno, LockKind, LockOwner, LockRange, Result};

/// Bytes of an attribute's value, of its name, and of all those that fids hold at a time, at most.
const MAX_VALUE: u64 = 64 << 10;
const MAX_ATTRIBUTE_NAME: usize = 255;
const MAX_HELD: usize = 16 << 20;

/// Room for an attribute's value, as long as a fid has it.
#[derive(Debug)]
pub(super) struct Room {
    bytes: usize,
    held: Arc<AtomicUsize>,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl P9Server {
    /// Room for so many bytes of an attribute.
    fn room(&self, bytes: usize) -> Result<Room> {
        // What a fid takes besides counts as well.
        let bytes = bytes + MAX_ATTRIBUTE_NAME;
        let room = Room { bytes, held: self.held.clone() };
        if self.held.fetch_add(bytes, Ordering::Relaxed) + bytes > MAX_HELD {
            return Err(Errno::NOMEM);
        }
        Ok(room)
    }

    pub(super) fn extended(&self, kind: u8, mut fields: Fields<'_>) -> Result<Answer> {
        let number = fields.u32()?;
        let fid = self.state().fids.get(&number).cloned().ok_or(Errno::BADF)?;
        if kind == kind_of::XATTRWALK {
            let (new, name) = (fields.u32()?, fields.text()?);
            let value = match name {
                b"" => self.folder.attribute_names(fid.node, fid.uid)?,
                name => self.folder.attribute(fid.node, name)?,
            };
            let (size, room) = (value.len(), self.room(value.len())?);
            self.folder.retain(fid.node)?;
            self.insert(new, Fid { open: Opened::Value(Arc::new((value, room))), ..fid })?;
            return Ok(Answer::Message(Out::default().u64(size as u64)));
        }
        let (name, size, flags) = (fields.text()?, fields.u64()?, fields.u32()?);
        if !matches!(fid.open, Opened::Not) {
            return Err(Errno::BADF);
        }
        if size > MAX_VALUE {
            return Err(Errno::TOOBIG);
        }
        if name.len() > MAX_ATTRIBUTE_NAME {
            return Err(Errno::RANGE);
        }
        if self.folder.is_read_only() {
            return Err(Errno::ROFS);
        }
        let size = size as usize;
        let (name, _room) = (name.to_vec(), Arc::new(self.room(size)?));
        let open = Opened::Attribute { name, size, flags, value: Vec::new(), _room };
        self.state().fids.insert(number, Fid { open, ..fid });
        Ok(done(()))
    }

    pub(super) fn lock(&self, message: u8, mut fields: Fields<'_>) -> Result<Answer> {
        let fid = self.fid(&mut fields)?;
        let kind = match fields.u8()? {
            lock::SHARED => LockKind::Shared,
            lock::EXCLUSIVE => LockKind::Exclusive,
            lock::UNLOCK => LockKind::Unlock,
            _ => return Err(Errno::INVAL),
        };
        let flags = if message == kind_of::LOCK { fields.u32()? } else { 0 };
        let (start, len, process, client) = (fields.u64()?, fields.u64()?, fields.u32()?, fields.text()?);
        let end = if len == 0 { i64::MAX as u64 } else { start.saturating_add(len - 1) };
        let mut hasher = DefaultHasher::new();
        (process, client).hash(&mut hasher);
        let owner = LockOwner { node: fid.node, owner: hasher.finish(), whole: false };
        let range = LockRange { start, end };
        if message == kind_of::LOCK {
            return match self.folder.lock(owner, kind, range) {
                Err(Errno::AGAIN) if flags & lock::BLOCK != 0 => Ok(Answer::Wait),
                Err(Errno::AGAIN) => Ok(Answer::Message(Out::default().u8(lock::BLOCKED))),
                other => other.map(|()| Answer::Message(Out::default().u8(lock::SUCCESS))),
            };
        }
        let found = self.folder.test_lock(owner, kind, range)?;
        let (kind, range) = found.unwrap_or((LockKind::Unlock, range));
        let kind = match kind {
            LockKind::Shared => lock::SHARED,
            LockKind::Exclusive => lock::EXCLUSIVE,
            LockKind::Unlock => lock::UNLOCK,
        };
        let len = if range.end >= i64::MAX as u64 { 0 } else { range.end - range.start + 1 };
        let out = Out::default().u8(kind).u64(range.start).u64(len);
        Ok(Answer::Message(out.u32(process).text(client)))
    }
}
