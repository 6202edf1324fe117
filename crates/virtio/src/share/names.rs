//! Names: making, linking, moving and removing them.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Gid, OFlags, Uid};

use super::nodes::{Identity, NodeId};
use super::ownership::{self, Caller, Ownership, kind};
use super::{
    Entry, Errno, Folder, HandleId, Open, Result, check_name, key_of, link_to, open_path, reopen, stat,
};

pub use rustix::fs::RenameFlags;

/// The longest text of a symbolic link, in bytes.
pub(super) const MAX_LINK: usize = 4095;

impl Folder {
    /// Makes a file and opens it, or opens the one that is there unless the flags want it to be new.
    ///
    /// # Errors
    /// The host's.
    pub fn create(
        &self,
        parent: NodeId,
        name: &[u8],
        flags: OFlags,
        mode: u32,
        caller: Caller,
    ) -> Result<(Entry, HandleId)> {
        self.writable()?;
        check_name(name)?;
        let folder = self.folder(parent)?;
        self.check_room()?;
        let mode = self.new_mode(&folder, kind::FILE | mode & !kind::MASK, caller);
        match self.make_file(&folder, name, flags, mode) {
            Ok(file) => {
                let entry = self.found(parent, &folder, name, (mode, 0), caller)?;
                match self.add(Open::File(entry.node, Arc::new(file.into()))) {
                    Ok(handle) => Ok((entry, handle)),
                    Err(error) => self.give_back(entry, error),
                }
            }
            Err(Errno::EXIST) if !flags.contains(OFlags::EXCL) => {
                let entry = self.find(parent, &folder, name)?;
                match self.open_file(entry.node, flags) {
                    Ok(handle) => Ok((entry, handle)),
                    Err(error) => self.give_back(entry, error),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Takes back the reference of an entry that the guest does not get.
    fn give_back<T>(&self, entry: Entry, error: Errno) -> Result<T> {
        self.forget(entry.node, 1);
        Err(error)
    }

    /// Makes a file without a name, open; it is gone with its handle unless it is linked before.
    ///
    /// # Errors
    /// The host's; `EOPNOTSUPP` where its file system has no such files.
    pub fn create_unnamed(
        &self,
        parent: NodeId,
        flags: OFlags,
        mode: u32,
        caller: Caller,
    ) -> Result<(Entry, HandleId)> {
        self.writable()?;
        let folder = self.folder(parent)?;
        self.check_room()?;
        let mode = self.new_mode(&folder, kind::FILE | mode & !kind::MASK, caller);
        let host = self.ids.host_mode(mode, kind::FILE);
        let flags = self.allowed(flags)? | flags & OFlags::EXCL;
        let file = rustix::fs::openat(&*folder, ".", flags | OFlags::TMPFILE | OFlags::CLOEXEC, host.into())?;
        let file = Arc::new(file);
        let made = stat(file.as_fd(), b"")?;
        let natural = self.ids.natural(&made);
        let wanted = self.belongs_to(parent, (mode, 0), caller)?;
        if natural != wanted {
            self.own(&file, &made, natural, wanted)?;
        }
        // It has no way: its descriptor is what there is of it.
        let descriptor = Arc::new(reopen(file.as_fd(), OFlags::PATH)?);
        let identity = Identity { key: key_of(&made), kind: kind::FILE, closed: false };
        let node = self.nodes().take_unnamed(identity, parent, &descriptor)?;
        let stat = stat(file.as_fd(), b"")?;
        let owner = self.ownership(file.as_fd(), b"", &stat);
        let entry = Entry { node, attributes: self.attributes_of(&stat, owner) };
        let file = Arc::try_unwrap(file).map_err(|_| Errno::IO)?;
        match self.add(Open::File(node, Arc::new(file.into()))) {
            Ok(handle) => Ok((entry, handle)),
            Err(error) => self.give_back(entry, error),
        }
    }

    /// A new file, open.
    fn make_file(&self, folder: &OwnedFd, name: &[u8], flags: OFlags, mode: u32) -> Result<OwnedFd> {
        let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
        let flags = self.allowed(flags)? - OFlags::TRUNC;
        rustix::fs::openat(folder, name, flags | new, self.ids.host_mode(mode, kind::FILE).into())
    }

    /// Makes a file, a pipe, a socket or a device; a device is an empty file on the host.
    ///
    /// # Errors
    /// The host's; `EPERM` for a device that cannot be noted beside its file.
    pub fn make_node(
        &self,
        parent: NodeId,
        name: &[u8],
        mode: u32,
        rdev: u32,
        caller: Caller,
    ) -> Result<Entry> {
        self.writable()?;
        check_name(name)?;
        let folder = self.folder(parent)?;
        let mode = if mode & kind::MASK == 0 { mode | kind::FILE } else { mode };
        let mode = self.new_mode(&folder, mode, caller);
        let rdev = match mode & kind::MASK {
            kind::FILE => {
                self.make_file(&folder, name, OFlags::WRONLY, mode)?;
                0
            }
            kind::FIFO | kind::SOCKET => {
                self.make_pipe(&folder, name, self.belongs_to(parent, (mode, 0), caller)?)?;
                0
            }
            kind::CHAR | kind::BLOCK => {
                self.make_file(&folder, name, OFlags::WRONLY, mode)?;
                rdev
            }
            _ => return Err(Errno::INVAL),
        };
        let made = self.found(parent, &folder, name, (mode, rdev), caller);
        if matches!(mode & kind::MASK, kind::CHAR | kind::BLOCK) {
            let shown = made
                .as_ref()
                .is_ok_and(|entry| entry.attributes.owner.mode & kind::MASK == mode & kind::MASK);
            if !shown {
                if let Ok(entry) = made {
                    self.forget(entry.node, 1);
                }
                rustix::fs::unlinkat(&*folder, name, AtFlags::empty())?;
                return Err(Errno::PERM);
            }
        }
        made
    }

    /// Makes a pipe or a socket.
    fn make_pipe(&self, folder: &OwnedFd, name: &[u8], wanted: Ownership) -> Result<()> {
        let mode = wanted.mode;
        if self.has_to_be_file(wanted) {
            match self.make_kept(folder, name, b"", wanted) {
                Err(Errno::PERM) => {}
                other => return other,
            }
        }
        let kind = FileType::from_raw_mode(mode & kind::MASK);
        let host = self.ids.host_mode(mode, mode & kind::MASK);
        rustix::fs::mknodat(folder, name, kind, host.into(), 0)
    }

    /// Makes a folder.
    ///
    /// # Errors
    /// The host's.
    pub fn make_folder(&self, parent: NodeId, name: &[u8], mode: u32, caller: Caller) -> Result<Entry> {
        self.writable()?;
        check_name(name)?;
        let folder = self.folder(parent)?;
        let mut mode = self.new_mode(&folder, kind::FOLDER | mode & !kind::MASK, caller);
        if self.nodes().inherits_group(parent) {
            mode |= ownership::SET_GROUP;
        }
        rustix::fs::mkdirat(&*folder, name, self.ids.host_mode(mode, kind::FOLDER).into())?;
        self.found(parent, &folder, name, (mode, 0), caller)
    }

    /// Makes a symbolic link; its text is for the guest to understand.
    ///
    /// # Errors
    /// The host's.
    pub fn make_link(&self, parent: NodeId, name: &[u8], text: &[u8], caller: Caller) -> Result<Entry> {
        self.writable()?;
        check_name(name)?;
        if text.len() > MAX_LINK {
            return Err(Errno::NAMETOOLONG);
        }
        let folder = self.folder(parent)?;
        let mode = kind::LINK | 0o777;
        let wanted = self.belongs_to(parent, (mode, 0), caller)?;
        let is_kept = self.has_to_be_file(wanted)
            && match self.make_kept(&folder, name, text, wanted) {
                Err(Errno::PERM) => false,
                other => other.map(|()| true)?,
            };
        if !is_kept {
            rustix::fs::symlinkat(text, &*folder, name)?;
        }
        self.found(parent, &folder, name, (mode, 0), caller)
    }

    /// What was just made, given to whom it belongs. Where the host can have that nowhere, it is as the host made it.
    fn found(
        &self,
        parent: NodeId,
        folder: &Arc<OwnedFd>,
        name: &[u8],
        (mode, rdev): (u32, u32),
        caller: Caller,
    ) -> Result<Entry> {
        let stat = stat(folder.as_fd(), name)?;
        let natural = self.ids.natural(&stat);
        let wanted = self.belongs_to(parent, (mode, rdev), caller)?;
        let is_link = natural.mode & kind::MASK == kind::LINK;
        let same = natural == wanted || (is_link && (natural.uid, natural.gid) == (wanted.uid, wanted.gid));
        if !same && let Err(error) = self.adopt(folder, name, natural, wanted) {
            log::debug!("share: what was made cannot belong to {}:{}: {error}", wanted.uid, wanted.gid);
        }
        self.find(parent, folder, name)
    }

    /// Whom something belongs to that is made in a folder.
    fn belongs_to(&self, parent: NodeId, (mode, rdev): (u32, u32), caller: Caller) -> Result<Ownership> {
        let inherits = self.nodes().inherits_group(parent);
        let gid = if inherits { self.attributes(parent)?.owner.gid } else { caller.gid };
        Ok(Ownership { uid: caller.uid, gid, mode, rdev })
    }

    /// Gives what has just been made to whom it is to belong.
    fn adopt(&self, folder: &Arc<OwnedFd>, name: &[u8], natural: Ownership, wanted: Ownership) -> Result<()> {
        if natural.mode & kind::MASK == kind::LINK {
            if !self.ids.is_root() {
                return Err(Errno::PERM);
            }
            let (uid, gid) = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
            return rustix::fs::chownat(&**folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW);
        }
        let file = Arc::new(open_path(folder.as_fd(), name)?);
        let stat = stat(file.as_fd(), b"")?;
        self.own(&file, &stat, natural, wanted)
    }

    /// Gives a file one more name.
    ///
    /// # Errors
    /// The host's.
    pub fn link(&self, node: NodeId, parent: NodeId, name: &[u8]) -> Result<Entry> {
        self.writable()?;
        check_name(name)?;
        let (file, folder) = (self.descriptor(node)?, self.folder(parent)?);
        if self.nodes().identity(node)?.kind == kind::FOLDER {
            return Err(Errno::PERM);
        }
        let path = link_to(file.as_fd());
        rustix::fs::linkat(rustix::fs::CWD, path, &*folder, name, AtFlags::SYMLINK_FOLLOW)?;
        self.find(parent, &folder, name)
    }

    /// Removes a name: a folder's, which must be empty, or another file's.
    ///
    /// # Errors
    /// The host's.
    pub fn remove(&self, parent: NodeId, name: &[u8], is_folder: bool) -> Result<()> {
        self.writable()?;
        check_name(name)?;
        let folder = self.folder(parent)?;
        self.keep_usable(&folder, name);
        let flags = if is_folder { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(&*folder, name, flags)
    }

    /// Moves a name, or exchanges two.
    ///
    /// # Errors
    /// The host's; `EINVAL` for what the host would do beside moving.
    pub fn rename(&self, from: (NodeId, &[u8]), to: (NodeId, &[u8]), flags: RenameFlags) -> Result<()> {
        self.writable()?;
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        check_name(from.1)?;
        check_name(to.1)?;
        let (source, target) = (self.folder(from.0)?, self.folder(to.0)?);
        let moved = self.known(&source, from.1);
        let other = self.known(&target, to.1);
        if !flags.contains(RenameFlags::EXCHANGE) && moved != other {
            self.keep_usable(&target, to.1);
        }
        rustix::fs::renameat_with(&*source, from.1, &*target, to.1, flags)?;
        let mut nodes = self.nodes();
        if let Some(moved) = moved {
            nodes.place(moved, to.0, to.1);
        }
        if let Some(other) = other.filter(|_| flags.contains(RenameFlags::EXCHANGE)) {
            nodes.place(other, from.0, from.1);
        }
        Ok(())
    }

    /// The node of a name, where the guest knows it.
    fn known(&self, folder: &Arc<OwnedFd>, name: &[u8]) -> Option<NodeId> {
        let key = key_of(&stat(folder.as_fd(), name).ok()?);
        self.nodes().find(key)
    }

    /// Keeps a descriptor of a file whose name goes away while the guest uses it, or that has other names.
    fn keep_usable(&self, folder: &Arc<OwnedFd>, name: &[u8]) {
        let Ok(stat) = stat(folder.as_fd(), name) else { return };
        let Some(node) = self.nodes().find(key_of(&stat)) else { return };
        let is_file = u32::from(stat.stx_mode) & kind::MASK == kind::FILE;
        let used = stat.stx_nlink > 1 || !is_file || self.is_open(node);
        if used && self.descriptor(node).is_ok() {
            self.nodes().pin(node);
        }
    }
}
