//! Locks of files. Each owner in the guest has an open file description of its own on the host, whose locks keep out the
//! others, programs of the host and other guests alike. Waiting is not done here: a lock that cannot be had now is
//! refused, and asked for again by who waits.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FlockOperation, OFlags, flock};

use super::ownership::kind;
use super::{Errno, Folder, Identity, NodeId, Result, reopen};

/// Whose lock it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LockOwner {
    /// The file.
    pub node: NodeId,
    /// Who in the guest.
    pub owner: u64,
    /// Whether it is a lock of the whole file in the manner of `flock`; those do not see the others.
    pub whole: bool,
}

/// What a lock is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// No lock: it is given back.
    Unlock,
    /// Others may have it too.
    Shared,
    /// Nobody else may.
    Exclusive,
}

/// The bytes that a lock is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockRange {
    /// The first.
    pub start: u64,
    /// The last; `i64::MAX` for all that follow.
    pub end: u64,
}

/// The owners that have locks, or had.
#[derive(Debug)]
pub(super) struct Locks {
    owners: Mutex<HashMap<LockOwner, Arc<File>>>,
    limit: usize,
}

impl Locks {
    pub(super) fn new(limit: usize) -> Self {
        Self { owners: Mutex::default(), limit }
    }

    fn owners(&self) -> MutexGuard<'_, HashMap<LockOwner, Arc<File>>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn clear(&self) {
        self.owners().clear();
    }

    /// Gives back the locks of files that the guest knows no more.
    pub(super) fn forget(&self, nodes: &[NodeId]) {
        let mut owners = self.owners();
        if !owners.is_empty() && !nodes.is_empty() {
            owners.retain(|owner, _| !nodes.contains(&owner.node));
        }
    }
}

impl Folder {
    /// Takes or gives back a lock.
    ///
    /// # Errors
    /// `EAGAIN` where somebody else has it; the host's.
    pub fn lock(&self, owner: LockOwner, kind: LockKind, range: LockRange) -> Result<()> {
        if kind == LockKind::Unlock && !self.locks.owners().contains_key(&owner) {
            return Ok(());
        }
        let file = self.lock_file(owner)?;
        if owner.whole {
            let operation = match kind {
                LockKind::Unlock => FlockOperation::NonBlockingUnlock,
                LockKind::Shared => FlockOperation::NonBlockingLockShared,
                LockKind::Exclusive => FlockOperation::NonBlockingLockExclusive,
            };
            return flock(&*file, operation);
        }
        ofd::set(file.as_fd(), kind, range)
    }

    /// Who would keep a lock from being taken: the kind and the bytes of theirs.
    ///
    /// # Errors
    /// The host's.
    pub fn test_lock(
        &self,
        owner: LockOwner,
        kind: LockKind,
        range: LockRange,
    ) -> Result<Option<(LockKind, LockRange)>> {
        ofd::get(self.lock_file(owner)?.as_fd(), kind, range)
    }

    /// Gives back all locks of an owner.
    pub fn unlock_all(&self, owner: LockOwner) {
        self.locks.owners().remove(&owner);
    }

    fn lock_file(&self, owner: LockOwner) -> Result<Arc<File>> {
        if let Some(file) = self.locks.owners().get(&owner) {
            return Ok(file.clone());
        }
        let Identity { kind, closed, .. } = self.nodes().identity(owner.node)?;
        if closed || !matches!(kind, kind::FILE | kind::FOLDER) {
            return Err(Errno::INVAL);
        }
        if self.locks.owners().len() >= self.locks.limit {
            return Err(Errno::NOLCK);
        }
        let descriptor = self.descriptor(owner.node)?;
        let both =
            if self.settings.read_only { Err(Errno::ROFS) } else { reopen(descriptor.as_fd(), OFlags::RDWR) };
        let file: Arc<File> = match both {
            Ok(file) => Arc::new(file.into()),
            Err(_) => Arc::new(reopen(descriptor.as_fd(), OFlags::RDONLY)?.into()),
        };
        Ok(self.locks.owners().entry(owner).or_insert(file).clone())
    }
}

/// Locks of open file descriptions, which the libraries at hand do not have with ranges.
mod ofd {
    #![allow(unsafe_code)]

    use std::os::fd::{AsRawFd, BorrowedFd};

    use super::{Errno, LockKind, LockRange, Result};

    pub(super) fn set(file: BorrowedFd<'_>, kind: LockKind, range: LockRange) -> Result<()> {
        call(file, libc::F_OFD_SETLK, kind, range).map(drop).map_err(|error| match error {
            Errno::ACCESS => Errno::AGAIN,
            other => other,
        })
    }

    pub(super) fn get(
        file: BorrowedFd<'_>,
        kind: LockKind,
        range: LockRange,
    ) -> Result<Option<(LockKind, LockRange)>> {
        let found = call(file, libc::F_OFD_GETLK, kind, range)?;
        let kind = match i32::from(found.l_type) {
            libc::F_UNLCK => return Ok(None),
            libc::F_RDLCK => LockKind::Shared,
            _ => LockKind::Exclusive,
        };
        let start = found.l_start as u64;
        let end = if found.l_len == 0 { i64::MAX as u64 } else { start + (found.l_len as u64 - 1) };
        Ok(Some((kind, LockRange { start, end })))
    }

    fn call(file: BorrowedFd<'_>, command: i32, kind: LockKind, range: LockRange) -> Result<libc::flock> {
        let last = i64::MAX as u64;
        if range.start > range.end || range.start > last {
            return Err(Errno::INVAL);
        }
        let len = if range.end >= last { 0 } else { range.end - range.start + 1 };
        let mut lock = libc::flock {
            l_type: match kind {
                LockKind::Unlock => libc::F_UNLCK,
                LockKind::Shared => libc::F_RDLCK,
                LockKind::Exclusive => libc::F_WRLCK,
            } as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: range.start as i64,
            l_len: len as i64,
            l_pid: 0,
        };
        // SAFETY: the descriptor is open as long as it is borrowed, and the kernel reads and writes one `flock`, which
        // `lock` is.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
        if result == 0 {
            return Ok(lock);
        }
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}
