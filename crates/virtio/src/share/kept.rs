//! Files of the host that are something else in the guest: devices always; symbolic links, pipes and sockets where the
//! host cannot give them to whom they belong. The attribute beside the file says what it is, a link's text is its contents.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, OFlags, Statx, Timespec, Timestamps};

use super::names::MAX_LINK;
use super::nodes::Identity;
use super::ownership::{self, Ownership, kind};
use super::{Errno, Folder, NodeId, Result, key_of, link_to, reopen, stat};

impl Folder {
    /// Whether a link, pipe or socket has to be a file on the host to belong to someone.
    pub(super) fn has_to_be_file(&self, wanted: Ownership) -> bool {
        self.settings.keep_all && !self.ids.can_give_to(wanted.uid, wanted.gid)
    }

    /// Makes a file that is to be something else: its contents are a link's text, or nothing.
    pub(super) fn make_kept(
        &self,
        folder: &OwnedFd,
        name: &[u8],
        text: &[u8],
        kept: Ownership,
    ) -> Result<()> {
        let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(folder, name, new, 0o600.into())?;
        let written = ownership::write_kept(&link_to(file.as_fd()), kept)
            .and_then(|()| File::from(file).write_all(text).map_err(|error| io_errno(&error)));
        written.inspect_err(|_| {
            let _ = rustix::fs::unlinkat(folder, name, AtFlags::empty());
        })
    }

    /// The text of a symbolic link that is a file on the host.
    pub(super) fn read_kept_link(&self, file: BorrowedFd<'_>) -> Result<Vec<u8>> {
        let stat = stat(file, b"")?;
        if self.ownership(file, b"", &stat).mode & kind::MASK != kind::LINK {
            return Err(Errno::INVAL);
        }
        let mut text = Vec::new();
        let file = File::from(reopen(file, OFlags::RDONLY)?);
        file.take(MAX_LINK as u64).read_to_end(&mut text).map_err(|error| io_errno(&error))?;
        Ok(text)
    }

    /// Puts a file in the place of a link, pipe or socket that is to belong to someone for whom the host has none.
    ///
    /// # Errors
    /// `EPERM` where it must stay what it is; the host's.
    pub(super) fn replace(&self, node: NodeId, stat_now: &Statx, wanted: Ownership) -> Result<()> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let kind_on_host = u32::from(stat_now.stx_mode) & kind::MASK;
        let is_replaceable = matches!(kind_on_host, kind::LINK | kind::FIFO | kind::SOCKET);
        if !self.settings.keep_all || !is_replaceable || stat_now.stx_nlink != 1 {
            return Err(Errno::PERM);
        }
        let (parent, name) = self.place(node)?;
        let folder = self.folder(parent)?;
        if key_of(&stat(folder.as_fd(), &name)?) != key_of(stat_now) {
            return Err(Errno::STALE);
        }
        let text = match kind_on_host {
            kind::LINK => rustix::fs::readlinkat(&*folder, &*name, Vec::new())?.into_bytes(),
            _ => Vec::new(),
        };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let temporary = format!(".ringside-{}-{number}", std::process::id());
        self.make_kept(&folder, temporary.as_bytes(), &text, wanted)?;
        let moved = times(&folder, &temporary, stat_now)
            .and_then(|()| stat(folder.as_fd(), temporary.as_bytes()))
            .and_then(|made| {
                rustix::fs::renameat(&*folder, &*temporary, &*folder, &*name)?;
                Ok(made)
            });
        let made = moved.inspect_err(|_| {
            let _ = rustix::fs::unlinkat(&*folder, &*temporary, AtFlags::empty());
        })?;
        let identity = Identity { key: key_of(&made), kind: kind::FILE, closed: false };
        self.nodes().replaced(node, identity);
        Ok(())
    }
}

/// Gives a file the times of what it stands for.
fn times(folder: &OwnedFd, name: &str, of: &Statx) -> Result<()> {
    let time =
        |time: rustix::fs::StatxTimestamp| Timespec { tv_sec: time.tv_sec, tv_nsec: time.tv_nsec.into() };
    let times = Timestamps { last_access: time(of.stx_atime), last_modification: time(of.stx_mtime) };
    rustix::fs::utimensat(folder, name, &times, AtFlags::SYMLINK_NOFOLLOW)
}

fn io_errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
