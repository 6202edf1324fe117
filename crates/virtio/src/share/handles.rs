//! What the guest has open: files, and folders that it lists.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FileType, OFlags, RawDir, SeekFrom};

use super::nodes::{Identity, Key, NodeId, ROOT};
use super::ownership::{self, kind};
use super::{Errno, Folder, Result, reopen};

/// An open file's or folder's number for the guest.
pub type HandleId = u64;

/// Bytes of a folder's listing that are read at a time.
const LISTING: usize = 32 << 10;
/// Open handles from which on what was read of a folder and not given is not kept.
const MANY: usize = 512;
/// The position of a listing that is nowhere.
const NOWHERE: u64 = u64::MAX;

/// What the guest can have open at a time.
#[derive(Debug)]
pub(super) struct Handles {
    open: HashMap<HandleId, Open>,
    next: HandleId,
    limit: usize,
}

/// What is open.
#[derive(Clone, Debug)]
pub enum Open {
    /// A file, of this node.
    File(NodeId, Arc<File>),
    /// A folder.
    Folder(NodeId, Arc<Listing>),
}

/// A folder that is being listed.
#[derive(Debug)]
pub struct Listing {
    file: OwnedFd,
    key: Key,
    state: Mutex<State>,
}

/// Where a listing is.
#[derive(Debug, Default)]
struct State {
    /// Entries that were read and not yet given, and the position of the first of them.
    read: VecDeque<DirEntry>,
    position: u64,
}

/// One name in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: Vec<u8>,
    /// The file's number.
    pub inode: u64,
    /// The format bits of its mode; 0 where they are not known.
    pub kind: u32,
    /// The position behind it.
    pub next: u64,
}

impl DirEntry {
    /// Whether it stands for the folder itself or the one above.
    pub fn is_dots(&self) -> bool {
        matches!(&*self.name, b"." | b"..")
    }
}

impl Handles {
    pub(super) fn new(limit: usize) -> Self {
        Self { open: HashMap::new(), next: 1, limit }
    }

    fn insert(&mut self, open: Open) -> Result<HandleId> {
        if self.open.len() >= self.limit {
            return Err(Errno::NFILE);
        }
        let id = self.next;
        self.next += 1;
        self.open.insert(id, open);
        Ok(id)
    }

    pub(super) fn clear(&mut self) {
        self.open.clear();
    }
}

impl Listing {
    /// Reads what comes after what was read last.
    fn fill(&self, state: &mut State) -> Result<()> {
        let mut buffer = [MaybeUninit::uninit(); LISTING];
        let mut entries = RawDir::new(self.file.as_fd(), &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            state.read.push_back(DirEntry {
                name: entry.file_name().to_bytes().to_vec(),
                inode: entry.ino(),
                kind: match entry.file_type() {
                    FileType::Unknown => 0,
                    other => other.as_raw_mode() & kind::MASK,
                },
                next: entry.next_entry_cookie(),
            });
            if entries.is_buffer_empty() {
                break;
            }
        }
        Ok(())
    }
}

impl Folder {
    /// Opens a file that is known, with the host's flags of which reading, writing, truncating and syncing count.
    ///
    /// # Errors
    /// The host's; `EACCES` for what is not opened on the host: devices, pipes, sockets.
    pub fn open_file(&self, node: NodeId, flags: OFlags) -> Result<HandleId> {
        let Identity { kind, closed, .. } = self.nodes().identity(node)?;
        match kind {
            kind::FILE if !closed => {}
            kind::FOLDER => return Err(Errno::ISDIR),
            kind::LINK => return Err(Errno::LOOP),
            _ => return Err(Errno::ACCESS),
        }
        let flags = self.allowed(flags)?;
        self.check_room()?;
        let file = reopen(self.descriptor(node)?.as_fd(), flags)?;
        self.add(Open::File(node, Arc::new(file.into())))
    }

    /// Opens a folder to list it.
    ///
    /// # Errors
    /// The host's.
    pub fn open_folder(&self, node: NodeId) -> Result<HandleId> {
        let folder = self.folder(node)?;
        self.check_room()?;
        let file = reopen(folder.as_fd(), OFlags::RDONLY | OFlags::DIRECTORY)?;
        let key = self.nodes().identity(node)?.key;
        self.add(Open::Folder(node, Arc::new(Listing { file, key, state: Mutex::default() })))
    }

    /// The flags that reach the host; appending is left to who asked, writing to those who may.
    pub(super) fn allowed(&self, flags: OFlags) -> Result<OFlags> {
        let writes = flags.intersects(OFlags::WRONLY | OFlags::RDWR);
        if writes || flags.contains(OFlags::TRUNC) {
            self.writable()?;
        }
        let keep = OFlags::WRONLY | OFlags::RDWR | OFlags::APPEND | OFlags::SYNC | OFlags::DSYNC;
        // Who may write a file may truncate it while it is opened to be read.
        Ok(flags & (keep | OFlags::TRUNC))
    }

    /// Refuses before anything is opened or made where too much is open.
    pub(super) fn check_room(&self) -> Result<()> {
        let handles = self.handles();
        if handles.open.len() >= handles.limit { Err(Errno::NFILE) } else { Ok(()) }
    }

    /// Gives the guest a handle.
    pub(super) fn add(&self, open: Open) -> Result<HandleId> {
        self.handles().insert(open)
    }

    /// What a handle is of.
    ///
    /// # Errors
    /// `EBADF` for one that is not open.
    pub fn handle(&self, id: HandleId) -> Result<Open> {
        self.handles().open.get(&id).cloned().ok_or(Errno::BADF)
    }

    /// The file of a handle.
    ///
    /// # Errors
    /// `EBADF` for one that is not open, `EISDIR` for a folder's.
    pub fn file(&self, id: HandleId) -> Result<Arc<File>> {
        match self.handle(id)? {
            Open::File(_, file) => Ok(file),
            Open::Folder(..) => Err(Errno::ISDIR),
        }
    }

    /// Closes a handle.
    ///
    /// # Errors
    /// `EBADF` for one that is not open.
    pub fn close(&self, id: HandleId) -> Result<()> {
        let closed = self.handles().open.remove(&id);
        closed.map(drop).ok_or(Errno::BADF)
    }

    /// How many handles are open.
    #[cfg(test)]
    pub fn open_handles(&self) -> usize {
        self.handles().open.len()
    }

    /// Whether the guest has a file open.
    pub(super) fn is_open(&self, node: NodeId) -> bool {
        self.handles().open.values().any(|open| matches!(open, Open::File(of, _) if *of == node))
    }

    /// Lists a folder from a position on, until `take` refuses an entry, which then comes first the next time. With
    /// `kinds`, what is a file on the host alone has the kind that the guest sees.
    ///
    /// # Errors
    /// The host's, and `take`'s.
    pub fn list(
        &self,
        id: HandleId,
        position: u64,
        kinds: bool,
        take: &mut dyn FnMut(NodeId, &DirEntry) -> Result<bool>,
    ) -> Result<()> {
        let Open::Folder(node, listing) = self.handle(id)? else { return Err(Errno::NOTDIR) };
        let mut state = listing.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.position != position || position == 0 {
            let offset = i64::try_from(position).map_err(|_| Errno::INVAL)?;
            rustix::fs::seek(&listing.file, SeekFrom::Start(offset as u64))?;
            state.read.clear();
            state.position = position;
        }
        loop {
            if state.read.is_empty() {
                listing.fill(&mut state)?;
            }
            let Some(entry) = state.read.front() else { break };
            let next = entry.next;
            // What lies above the shared folder has no number.
            let outside = node == ROOT && entry.name == b"..";
            let key = Key { inode: entry.inode, ..listing.key };
            let shown = DirEntry {
                kind: if kinds { self.kind_shown(&listing.file, entry) } else { entry.kind },
                inode: self.inode_number(if outside { listing.key } else { key }),
                ..entry.clone()
            };
            if !take(node, &shown)? {
                break;
            }
            state.read.pop_front();
            state.position = next;
        }
        if self.handles().open.len() > MANY {
            // What was read of many folders takes memory: it is read again.
            *state = State { read: VecDeque::new(), position: NOWHERE };
        }
        Ok(())
    }

    /// An entry's kind for the guest.
    fn kind_shown(&self, folder: &OwnedFd, entry: &DirEntry) -> u32 {
        if entry.kind != kind::FILE {
            return entry.kind;
        }
        let kept = self.kept_at(folder.as_fd(), &entry.name);
        kept.map_or(entry.kind, |kept| ownership::kind_shown(entry.kind, kept.mode))
    }

    /// Makes a file's or folder's contents durable.
    ///
    /// # Errors
    /// The host's.
    pub fn sync(&self, id: HandleId, only_data: bool) -> Result<()> {
        let open = self.handle(id)?;
        let descriptor: BorrowedFd<'_> = match &open {
            Open::File(_, file) => file.as_fd(),
            Open::Folder(_, listing) => listing.file.as_fd(),
        };
        if only_data { rustix::fs::fdatasync(descriptor) } else { rustix::fs::fsync(descriptor) }
    }
}
