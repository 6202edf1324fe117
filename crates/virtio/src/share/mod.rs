//! A folder of the host for the guest, which cannot leave it: what virtio-fs and 9P have in common.
//!
//! ```text
//!  fs (FUSE) ──┐                         nodes: number → way from the folder, descriptor while there is room
//!              ├─ Folder: one operation ─┤ handles: number → open file, folder being listed
//!  p9 (9P) ────┘        │                └ locks: (file, owner) → open file description of its own
//!                openat, statx … below a descriptor of the folder, one name at a time
//! ```
//!
//! **Nobody leaves.** The host resolves one name at a time, below a descriptor that the share opened itself, and never
//! follows a symbolic link: links are text that the guest resolves in its own tree. `.` and `..` are no names here. A
//! file is opened anew through its own descriptor, after its kind was looked at: what is not a file or a folder (devices,
//! pipes, sockets) is shown and never opened. Below a mount of the host's kernel (`/proc`, `/sys` …) nothing is shown.
//!
//! **Nothing grows without bound.** A node keeps its way, not its descriptor: descriptors are a cache. A file whose way
//! was changed on the host behind the guest's back is stale. Nodes, handles and locks have limits.
//!
//! Whom files belong to is in [`ownership`].

pub mod device;
mod files;
#[cfg(test)]
pub(crate) mod fuzz;
mod handles;
mod kept;
mod lists;
mod locks;
mod names;
mod nodes;
pub mod ownership;
pub mod serve;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod xattrs;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags, Statx, StatxFlags};

pub use files::{Changes, SetTime};
pub use handles::{DirEntry, HandleId, Open};
pub use locks::{LockKind, LockOwner, LockRange};
pub use names::RenameFlags;
use nodes::{Identity, Key, Limits, Nodes};
pub use nodes::{NodeId, ROOT};
use ownership::{Ids, Ownership, kind};

/// An operation's failure, as the guest is told it.
pub type Errno = rustix::io::Errno;
/// An operation's outcome.
pub type Result<T> = std::result::Result<T, Errno>;

/// The longest name of a file, in bytes.
pub const MAX_NAME: usize = 255;
/// The most file systems below the folder whose files get numbers of their own.
const MAX_DEVICES: usize = 1 << 12;
/// Files that the guest can know, whatever its memory.
const MIN_NODES: usize = 1 << 16;
/// Bytes of memory that a file that it knows costs a guest, at least.
const BYTES_PER_NODE: u64 = 512;

/// What is shared, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Whether the guest can only read.
    pub read_only: bool,
    /// The guest's RAM in bytes: a guest that keeps what it knows of files in it knows no more than fit there.
    pub memory: u64,
    /// Descriptors of this process that the share may have open.
    pub descriptors: usize,
    /// Whether links, pipes and sockets can belong to anybody in the guest, as a root file system wants it, also where
    /// Ringside is an ordinary user's: those that are not root's are files on the host.
    pub keep_all: bool,
}

/// A point in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds.
    pub nanoseconds: u32,
}

/// A file, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Its number, the same for all its names.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes that it takes.
    pub blocks: u64,
    /// Bytes that are best read at a time.
    pub block_size: u32,
    /// Names.
    pub links: u32,
    /// Owner, mode, device.
    pub owner: Ownership,
    /// When it was last read, its contents and itself last changed, and when it was made.
    pub accessed: Time,
    /// See `accessed`.
    pub modified: Time,
    /// See `accessed`.
    pub changed: Time,
    /// See `accessed`; zero where the host does not know.
    pub created: Time,
}

/// A file that was found: the guest holds it once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number.
    pub node: NodeId,
    /// What it is.
    pub attributes: Attributes,
}

/// A shared folder.
#[derive(Debug)]
pub struct Folder {
    nodes: Mutex<Nodes>,
    handles: Mutex<handles::Handles>,
    locks: locks::Locks,
    settings: Settings,
    ids: Ids,
    /// The file systems below it; the folder's own is the first.
    devices: Mutex<Vec<u64>>,
    /// Whether the folder's file system has no attributes of users.
    plain: AtomicBool,
    /// Whether files can have access control lists.
    lists: bool,
}

impl Folder {
    /// Opens a folder of the host.
    ///
    /// # Errors
    /// The host's, for what is no folder or cannot be read; `ENOENT` also where the host has no `/proc`.
    pub fn open(path: &Path, settings: Settings) -> Result<Self> {
        Self::open_as(path, settings, Ids::of_process())
    }

    fn open_as(path: &Path, settings: Settings, ids: Ids) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty())?;
        // It has to be readable, and descriptors have to be usable by name.
        drop(reopen(root.as_fd(), OFlags::DIRECTORY)?);
        let stat = stat(root.as_fd(), b"")?;
        let identity = Identity { key: key_of(&stat), kind: kind::FOLDER, closed: false };
        let fits = usize::try_from(settings.memory / BYTES_PER_NODE).unwrap_or(usize::MAX);
        let lists = lists::are_there(ids, root.as_fd());
        let limits = Limits { nodes: fits.max(MIN_NODES), descriptors: (settings.descriptors / 3).max(16) };
        Ok(Self {
            nodes: Mutex::new(Nodes::new(root, identity, limits)),
            handles: Mutex::new(handles::Handles::new((settings.descriptors / 3).max(16))),
            locks: locks::Locks::new((settings.descriptors / 6).max(16)),
            settings,
            ids,
            devices: Mutex::new(vec![identity.key.device]),
            plain: AtomicBool::new(false),
            lists,
        })
    }

    /// Whether the guest can only read.
    pub fn is_read_only(&self) -> bool {
        self.settings.read_only
    }

    /// Finds a file in a folder.
    ///
    /// # Errors
    /// The host's.
    pub fn lookup(&self, parent: NodeId, name: &[u8]) -> Result<Entry> {
        check_name(name)?;
        let folder = self.folder(parent)?;
        self.find(parent, &folder, name)
    }

    /// Finds a file in an open folder.
    fn find(&self, parent: NodeId, folder: &OwnedFd, name: &[u8]) -> Result<Entry> {
        let stat = stat(folder.as_fd(), name)?;
        let owner = self.ownership(folder.as_fd(), name, &stat);
        let identity = self.identify(parent, folder, name, &stat)?;
        let mut nodes = self.nodes();
        let node = nodes.take(identity, parent, name)?;
        self.note(&mut nodes, node, owner);
        drop(nodes);
        Ok(Entry { node, attributes: self.attributes_of(&stat, owner) })
    }

    /// The folder that a node is in; the shared folder is its own.
    ///
    /// # Errors
    /// `ESTALE` for a node that nobody holds.
    pub fn parent(&self, node: NodeId) -> Result<NodeId> {
        self.nodes().parent(node)
    }

    /// A node's folder and its name there.
    ///
    /// # Errors
    /// `ESTALE` for a node that nobody holds.
    pub fn place(&self, node: NodeId) -> Result<(NodeId, Box<[u8]>)> {
        let nodes = self.nodes();
        Ok((nodes.parent(node)?, nodes.name(node)?))
    }

    /// The file that a node is now; the guest holds it once more.
    ///
    /// # Errors
    /// `ESTALE` for a node that nobody holds.
    pub fn retain(&self, node: NodeId) -> Result<()> {
        self.nodes().retain(node)
    }

    /// Takes back so many references.
    pub fn forget(&self, node: NodeId, count: u64) {
        let gone = self.nodes().forget(node, count);
        self.locks.forget(&gone);
    }

    /// Forgets all that the guest knows and has open: it begins anew.
    pub fn clear(&self) {
        self.handles().clear();
        self.locks.clear();
        self.nodes().clear();
    }

    /// What a file is now.
    ///
    /// # Errors
    /// The host's; `ESTALE` for what is not there any more.
    pub fn attributes(&self, node: NodeId) -> Result<Attributes> {
        let descriptor = self.descriptor(node)?;
        self.attributes_at(node, descriptor.as_fd())
    }

    /// The attributes of an open file.
    fn attributes_at(&self, node: NodeId, descriptor: BorrowedFd<'_>) -> Result<Attributes> {
        let stat = stat(descriptor, b"")?;
        let owner = self.ownership(descriptor, b"", &stat);
        self.note(&mut self.nodes(), node, owner);
        Ok(self.attributes_of(&stat, owner))
    }

    /// Where a symbolic link points, as text.
    ///
    /// # Errors
    /// `EINVAL` for what is none.
    pub fn read_link(&self, node: NodeId) -> Result<Vec<u8>> {
        let kind = self.nodes().identity(node)?.kind;
        let descriptor = self.descriptor(node)?;
        match kind {
            kind::LINK => {}
            kind::FILE => return self.read_kept_link(descriptor.as_fd()),
            _ => return Err(Errno::INVAL),
        }
        rustix::fs::readlinkat(descriptor.as_fd(), "", Vec::new()).map(std::ffi::CString::into_bytes)
    }

    /// How full the file system is.
    ///
    /// # Errors
    /// The host's.
    pub fn statistics(&self, node: NodeId) -> Result<rustix::fs::StatVfs> {
        rustix::fs::fstatvfs(self.descriptor(node)?.as_fd())
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handles(&self) -> MutexGuard<'_, handles::Handles> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses what would change something, where the guest can only read.
    fn writable(&self) -> Result<()> {
        if self.settings.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }

    /// A descriptor that names a node.
    fn descriptor(&self, node: NodeId) -> Result<Arc<OwnedFd>> {
        let (mut descriptor, steps) = self.nodes().descriptor(node)?;
        for step in steps {
            let found = Arc::new(open_path(descriptor.as_fd(), &step.name).map_err(stale)?);
            if key_of(&stat(found.as_fd(), b"")?) != step.key {
                return Err(Errno::STALE);
            }
            self.nodes().keep(step.id, &found);
            descriptor = found;
        }
        Ok(descriptor)
    }

    /// A descriptor of a folder whose files the guest may see.
    fn folder(&self, node: NodeId) -> Result<Arc<OwnedFd>> {
        let identity = self.nodes().identity(node)?;
        match identity {
            Identity { closed: true, .. } => Err(Errno::ACCESS),
            Identity { kind: kind::FOLDER, .. } => self.descriptor(node),
            _ => Err(Errno::NOTDIR),
        }
    }

    /// What a file is that was found in a folder.
    fn identify(&self, parent: NodeId, folder: &OwnedFd, name: &[u8], stat: &Statx) -> Result<Identity> {
        let (key, kind) = (key_of(stat), u32::from(stat.stx_mode) & kind::MASK);
        let above = self.nodes().identity(parent)?;
        let mut closed = false;
        if above.key.device != key.device && matches!(kind, kind::FOLDER | kind::FILE) {
            let found = open_path(folder.as_fd(), name)?;
            closed = is_of_kernel(rustix::fs::fstatfs(&found)?.f_type as u64);
        }
        Ok(Identity { key, kind, closed })
    }

    /// What the guest sees of whom a file belongs to; `name` is in the folder, or empty for the descriptor's own.
    fn ownership(&self, at: BorrowedFd<'_>, name: &[u8], stat: &Statx) -> Ownership {
        let own = self.devices()[0] == key_of(stat).device;
        let kind = u32::from(stat.stx_mode) & kind::MASK;
        // Only files and folders can have attributes of users.
        if !matches!(kind, kind::FILE | kind::FOLDER) || (own && self.plain.load(Ordering::Relaxed)) {
            return self.ids.natural(stat);
        }
        let kept = ownership::read_kept(&path_of(at, name), !name.is_empty());
        if kept.is_err() {
            self.plain.fetch_or(own, Ordering::Relaxed);
        }
        self.ids.shown(stat, kept.ok().flatten())
    }

    /// What is kept beside a name in a folder of the shared one's own file system.
    fn kept_at(&self, folder: BorrowedFd<'_>, name: &[u8]) -> Option<Ownership> {
        if self.plain.load(Ordering::Relaxed) {
            return None;
        }
        ownership::read_kept(&path_of(folder, name), true).ok().flatten()
    }

    fn devices(&self) -> MutexGuard<'_, Vec<u64>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers of a folder what matters when files are made in it.
    fn note(&self, nodes: &mut Nodes, node: NodeId, owner: Ownership) {
        if owner.mode & kind::MASK == kind::FOLDER {
            nodes.set_inherits_group(node, owner.mode & ownership::SET_GROUP != 0);
        }
    }

    fn attributes_of(&self, stat: &Statx, owner: Ownership) -> Attributes {
        let time =
            |time: rustix::fs::StatxTimestamp| Time { seconds: time.tv_sec, nanoseconds: time.tv_nsec };
        Attributes {
            inode: self.inode_number(key_of(stat)),
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            block_size: stat.stx_blksize,
            links: stat.stx_nlink,
            owner,
            accessed: time(stat.stx_atime),
            modified: time(stat.stx_mtime),
            changed: time(stat.stx_ctime),
            created: time(stat.stx_btime),
        }
    }

    /// A number for a file that no other one has: of several file systems, the guest sees one.
    fn inode_number(&self, key: Key) -> u64 {
        let mut devices = self.devices();
        let index = devices.iter().position(|&device| device == key.device).unwrap_or_else(|| {
            if devices.len() < MAX_DEVICES {
                devices.push(key.device);
            }
            devices.len() - 1
        });
        key.inode ^ (index as u64) << 48
    }
}

/// Refuses what is no name of one file in a folder.
fn check_name(name: &[u8]) -> Result<()> {
    match name {
        _ if name.len() > MAX_NAME => Err(Errno::NAMETOOLONG),
        b"" => Err(Errno::NOENT),
        b"." | b".." => Err(Errno::INVAL),
        _ if name.iter().any(|&byte| byte == b'/' || byte == 0) => Err(Errno::INVAL),
        _ => Ok(()),
    }
}

/// A way that leads nowhere any more.
fn stale(error: Errno) -> Errno {
    if matches!(error, Errno::NOENT | Errno::NOTDIR) { Errno::STALE } else { error }
}

fn key_of(stat: &Statx) -> Key {
    let device = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
    Key { device, inode: stat.stx_ino }
}

/// What a name in a folder is, or with no name the descriptor itself; never what a symbolic link points to.
fn stat(at: BorrowedFd<'_>, name: &[u8]) -> Result<Statx> {
    let itself = if name.is_empty() { AtFlags::EMPTY_PATH } else { AtFlags::empty() };
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | itself;
    rustix::fs::statx(at, name, flags, StatxFlags::BASIC_STATS | StatxFlags::BTIME)
}

/// A descriptor that only names a file in a folder.
fn open_path(at: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
}

/// Opens the file that a descriptor names: its kind was looked at.
fn reopen(descriptor: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    rustix::fs::open(link_to(descriptor), flags, Mode::empty())
}

/// The path of the file that a descriptor is of, whatever kind it has.
fn link_to(descriptor: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd())
}

/// The path of a name in a folder, or with no name of the descriptor itself.
fn path_of(at: BorrowedFd<'_>, name: &[u8]) -> Vec<u8> {
    let mut path = link_to(at).into_bytes();
    if !name.is_empty() {
        path.push(b'/');
        path.extend_from_slice(name);
    }
    path
}

/// Whether a file system is the kernel's own, whose files are handles to this very process and machine.
fn is_of_kernel(kind: u64) -> bool {
    const PROC: u64 = 0x9fa0;
    const SYSFS: u64 = 0x6265_6572;
    const CGROUP: [u64; 2] = [0x27_e0eb, 0x6367_7270];
    const DEBUGFS: u64 = 0x6462_6720;
    const TRACEFS: u64 = 0x7472_6163;
    const SECURITYFS: u64 = 0x7363_6673;
    const CONFIGFS: u64 = 0x6265_6570;
    const BPF: u64 = 0xcafe_4a11;
    const EFIVARS: u64 = 0xde5e_81e4;
    const BINFMT: u64 = 0x4249_4e4d;
    const NSFS: u64 = 0x6e73_6673;
    const SELINUX: u64 = 0xf97c_ff8c;
    const DEVPTS: u64 = 0x1cd1;
    const AUTOFS: u64 = 0x187;
    let others =
        [PROC, SYSFS, DEBUGFS, TRACEFS, SECURITYFS, CONFIGFS, BPF, EFIVARS, BINFMT, NSFS, SELINUX, DEVPTS];
    others.contains(&kind) || CGROUP.contains(&kind) || kind == AUTOFS
}
