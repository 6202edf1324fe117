//! Files: their attributes and their contents.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FallocateFlags, Gid, OFlags, SeekFrom, Statx, Timespec, Timestamps, Uid};

use super::ownership::{self, Ownership, kind};
use super::{Attributes, Errno, Folder, HandleId, NodeId, Open, Result, Time, link_to, reopen, stat};

/// The most bytes that are copied at once: the guest asks again.
const MAX_COPY: usize = 16 << 20;

/// What of a file is to be changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Permissions.
    pub mode: Option<u32>,
    /// User.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Bytes.
    pub size: Option<u64>,
    /// When it was last read.
    pub accessed: Option<SetTime>,
    /// When its contents last changed.
    pub modified: Option<SetTime>,
    /// Whether a program is to lose its privileges.
    pub kill_privileges: bool,
}

/// A point in time to be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The host's.
    Now,
    /// This.
    To(Time),
}

impl Folder {
    /// Changes what a file is; `handle` is an open one of it, where the guest has one.
    ///
    /// # Errors
    /// The host's; `EPERM` for owners and privileges that can be kept nowhere.
    pub fn change(&self, node: NodeId, handle: Option<HandleId>, changes: &Changes) -> Result<Attributes> {
        self.writable()?;
        let mut descriptor = self.descriptor(node)?;
        if let Some(size) = changes.size {
            self.truncate(node, handle, &descriptor, size)?;
        }
        if changes.mode.is_some() || changes.uid.is_some() || changes.gid.is_some() || changes.kill_privileges
        {
            let stat = stat(descriptor.as_fd(), b"")?;
            let now = self.ownership(descriptor.as_fd(), b"", &stat);
            let wanted = wanted(now, changes);
            if wanted != now {
                match self.own(&descriptor, &stat, now, wanted) {
                    Err(Errno::PERM) => {
                        self.replace(node, &stat, wanted)?;
                        descriptor = self.descriptor(node)?;
                    }
                    other => other?,
                }
            }
            if changes.kill_privileges || changes.uid.is_some() || changes.gid.is_some() {
                self.kill_capability(node);
            }
        }
        if changes.accessed.is_some() || changes.modified.is_some() {
            let times = Timestamps {
                last_access: timestamp(changes.accessed),
                last_modification: timestamp(changes.modified),
            };
            rustix::fs::utimensat(descriptor.as_fd(), "", &times, AtFlags::EMPTY_PATH)?;
        }
        self.attributes_at(node, descriptor.as_fd())
    }

    fn truncate(&self, node: NodeId, handle: Option<HandleId>, file: &Arc<OwnedFd>, size: u64) -> Result<()> {
        if let Some(Open::File(of, open)) = handle.and_then(|handle| self.handle(handle).ok())
            && of == node
        {
            return rustix::fs::ftruncate(&*open, size);
        }
        match self.nodes().identity(node)? {
            super::Identity { kind: kind::FILE, closed: false, .. } => {}
            super::Identity { kind: kind::FOLDER, .. } => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        rustix::fs::ftruncate(reopen(file.as_fd(), OFlags::WRONLY)?, size)
    }

    /// Takes the privileges of a program that is written to.
    ///
    /// # Errors
    /// The host's.
    pub fn kill_privileges(&self, node: NodeId) -> Result<()> {
        let changes = Changes { kill_privileges: true, ..Changes::default() };
        self.change(node, None, &changes).map(drop)
    }

    /// Makes a file belong to someone: what the host can have there, the rest beside the file.
    pub(super) fn own(
        &self,
        file: &Arc<OwnedFd>,
        stat: &Statx,
        now: Ownership,
        wanted: Ownership,
    ) -> Result<()> {
        let path = link_to(file.as_fd());
        let kind_on_host = u32::from(stat.stx_mode) & kind::MASK;
        let is_link = kind_on_host == kind::LINK;
        let mut shown = self.ids.natural(stat);
        let host = self.ids.host_mode(wanted.mode, kind_on_host);
        let mut is_set = u32::from(stat.stx_mode) & !kind::MASK == host;
        if self.ids.is_root() && (stat.stx_uid, stat.stx_gid) != (wanted.uid, wanted.gid) {
            let (uid, gid) = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
            match rustix::fs::chownat(file, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH) {
                Ok(()) => {
                    (shown.uid, shown.gid) = (wanted.uid, wanted.gid);
                    // The host takes such bits with the owner.
                    is_set &= host & 0o6000 == 0;
                }
                // A root without its powers, or with those of a user namespace, keeps owners as others do.
                Err(Errno::PERM | Errno::INVAL) => {}
                Err(error) => return Err(error),
            }
        }
        if !is_link && !is_set {
            rustix::fs::chmod(&*path, host.into())?;
        }
        shown.mode = if is_link { wanted.mode } else { kind_on_host | host };
        if shown == wanted {
            // Only what is not as the host has it has anything beside it.
            return if self.ids.natural(stat) == now { Ok(()) } else { ownership::remove_kept(&path) };
        }
        if !matches!(kind_on_host, kind::FILE | kind::FOLDER) {
            return Err(Errno::PERM);
        }
        ownership::write_kept(&path, wanted)
    }

    /// Reserves, frees or clears a part of a file.
    ///
    /// # Errors
    /// The host's.
    pub fn allocate(&self, handle: HandleId, mode: u32, offset: u64, len: u64) -> Result<()> {
        self.writable()?;
        let flags = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        let file = self.file(handle)?;
        rustix::fs::fallocate(&*file, flags, offset, len)
    }

    /// The next data or hole from a position on.
    ///
    /// # Errors
    /// The host's; `ENXIO` where there is none.
    pub fn seek(&self, handle: HandleId, offset: u64, whence: u32) -> Result<u64> {
        let file = self.file(handle)?;
        let to = match whence {
            3 => SeekFrom::Data(offset),
            4 => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        i64::try_from(offset).map_err(|_| Errno::NXIO)?;
        rustix::fs::seek(&*file, to)
    }

    /// Copies from one open file to another on the host; gives how many bytes.
    ///
    /// # Errors
    /// The host's.
    pub fn copy(&self, from: (HandleId, u64), to: (HandleId, u64), len: u64) -> Result<u64> {
        self.writable()?;
        let (source, target) = (self.file(from.0)?, self.file(to.0)?);
        let (mut at, mut into) = (from.1, to.1);
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(MAX_COPY);
        rustix::fs::copy_file_range(&*source, Some(&mut at), &*target, Some(&mut into), len)
            .map(|len| len as u64)
    }

    /// Makes everything of the folder's file system durable.
    ///
    /// # Errors
    /// The host's.
    pub fn sync_all(&self) -> Result<()> {
        let root = self.descriptor(super::ROOT)?;
        rustix::fs::syncfs(reopen(root.as_fd(), OFlags::DIRECTORY)?)
    }
}

/// Whom a file shall belong to, after a change.
fn wanted(now: Ownership, changes: &Changes) -> Ownership {
    let mut wanted =
        Ownership { uid: changes.uid.unwrap_or(now.uid), gid: changes.gid.unwrap_or(now.gid), ..now };
    if changes.kill_privileges || (wanted.uid, wanted.gid) != (now.uid, now.gid) {
        wanted = wanted.without_privileges();
    }
    if let Some(mode) = changes.mode {
        wanted.mode = wanted.mode & kind::MASK | mode & !kind::MASK;
    }
    wanted
}

fn timestamp(time: Option<SetTime>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
        // A nanosecond of the guest's that is none is not one of the two above.
        Some(SetTime::To(time)) => {
            Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.min(999_999_999).into() }
        }
    }
}
