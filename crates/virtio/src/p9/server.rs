//! The 9P2000.L server: a message in, a message out.

mod extended;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;

use self::extended::Room;
use super::wire::{self, *};
use crate::share::ownership::{Caller, device_number};
use crate::share::serve::{Payload, Reply, Server};
use crate::share::{
    Attributes, Changes, DirEntry, Entry, Errno, Folder, HandleId, NodeId, ROOT, RenameFlags, Result,
    SetTime, Time,
};

/// The largest message, and the smallest that a client may want.
const MAX_MESSAGE: u32 = 1 << 20;
const MIN_MESSAGE: u32 = 4096;
/// The most bytes of a message whose data does not go to a file.
const MAX_HEAD: usize = 128 << 10;
/// The one version that is spoken.
const VERSION: &[u8] = b"9P2000.L";
/// No tag, and no user.
const NO_TAG: u16 = 0xffff;
const NO_USER: u32 = u32::MAX;
/// Names in one walk, and files that the client can know at a time.
const MAX_NAMES: u16 = 16;
const MAX_FIDS: usize = 1 << 20;
/// XATTRCREATE's flag for an attribute that is there.
const XATTR_REPLACE: u32 = 2;
/// UNLINKAT's flag for folders.
const REMOVE_FOLDER: u32 = 0x200;
/// STATFS's kind of file system: 9P's own.
const FILE_SYSTEM: u32 = 0x0102_1997;

/// A server of one folder.
#[derive(Debug)]
pub struct P9Server {
    folder: Folder,
    state: Mutex<State>,
    /// Bytes of attributes that fids hold.
    held: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct State {
    fids: HashMap<u32, Fid>,
    /// The largest message that was agreed upon.
    message: u32,
}

/// A file that the client knows. It holds one reference of its node.
#[derive(Clone, Debug)]
struct Fid {
    node: NodeId,
    uid: u32,
    open: Opened,
}

/// How a fid is open.
#[derive(Clone, Debug)]
enum Opened {
    Not,
    /// As a file or a folder.
    Handle(HandleId),
    /// To read an attribute's value, or the list of names.
    Value(Arc<(Vec<u8>, Room)>),
    /// To write an attribute, which is set when the fid is given back.
    Attribute {
        name: Vec<u8>,
        size: usize,
        flags: u32,
        value: Vec<u8>,
        _room: Arc<Room>,
    },
}

/// What an answer is.
enum Answer {
    Message(Out),
    /// So many bytes of a file are behind the answer's header.
    Loaded(usize),
    Wait,
    Cancelled(u16),
}

fn done((): ()) -> Answer {
    Answer::Message(Out::default())
}

impl Server for P9Server {
    fn head_len(&self, start: &[u8]) -> usize {
        if start.get(4) == Some(&kind_of::WRITE) { WRITE_HEADER } else { MAX_HEAD }
    }

    fn is_slow(&self, _head: &[u8]) -> bool {
        false
    }

    fn handle(&self, head: &[u8], room: usize, payload: &mut dyn Payload) -> Reply {
        let mut fields = Fields(head);
        let (Ok(_), Ok(kind), Ok(tag)) = (fields.u32(), fields.u8(), fields.u16()) else {
            return Reply::None;
        };
        match self.dispatch(kind, fields, room, payload) {
            Ok(Answer::Message(out)) => Reply::Bytes { bytes: message(kind + 1, tag, &out.0, 0), loaded: 0 },
            Ok(Answer::Loaded(loaded)) => {
                let count = (loaded as u32).to_le_bytes();
                Reply::Bytes { bytes: message(kind + 1, tag, &count, loaded), loaded }
            }
            Ok(Answer::Wait) => Reply::Wait(tag.into()),
            Ok(Answer::Cancelled(old)) => Reply::Cancelled(old.into(), message(kind + 1, tag, &[], 0)),
            Err(error) => Reply::Bytes { bytes: self.refuse(head, error), loaded: 0 },
        }
    }

    fn refuse(&self, head: &[u8], error: Errno) -> Vec<u8> {
        let tag = head.get(5..7).map_or(NO_TAG, |tag| u16::from_le_bytes([tag[0], tag[1]]));
        message(kind_of::LERROR + 1, tag, &error.raw_os_error().to_le_bytes(), 0)
    }

    fn reset(&self) {
        let mut state = self.state();
        state.fids.clear();
        state.message = MAX_MESSAGE;
        self.folder.clear();
    }
}

/// A whole message, with so many more bytes behind it.
fn message(kind: u8, tag: u16, body: &[u8], behind: usize) -> Vec<u8> {
    let mut out = Out::default().u32((HEADER + body.len() + behind) as u32).u8(kind).u16(tag);
    out.0.extend_from_slice(body);
    out.0
}

impl P9Server {
    /// A server of this folder.
    pub fn new(folder: Folder) -> Self {
        let state = Mutex::new(State { fids: HashMap::new(), message: MAX_MESSAGE });
        Self { folder, state, held: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dispatch(
        &self,
        kind: u8,
        fields: Fields<'_>,
        room: usize,
        payload: &mut dyn Payload,
    ) -> Result<Answer> {
        match kind {
            kind_of::VERSION => self.version(fields),
            kind_of::AUTH => Err(Errno::OPNOTSUPP),
            kind_of::ATTACH => self.attach(fields),
            kind_of::FLUSH => self.flush(fields),
            kind_of::WALK => self.walk(fields),
            kind_of::READ => self.read(fields, room, payload),
            kind_of::WRITE => self.write(fields, payload),
            kind_of::READDIR => self.read_folder(fields, room),
            kind_of::CLUNK => self.clunk(fields),
            kind_of::REMOVE => self.remove(fields),
            kind_of::LOPEN | kind_of::LCREATE => self.open(kind, fields),
            kind_of::SYMLINK | kind_of::MKNOD | kind_of::MKDIR => self.make(kind, fields),
            kind_of::RENAME | kind_of::RENAMEAT | kind_of::LINK | kind_of::UNLINKAT => {
                self.names(kind, fields)
            }
            kind_of::XATTRWALK | kind_of::XATTRCREATE => self.extended(kind, fields),
            kind_of::LOCK | kind_of::GETLOCK => self.lock(kind, fields),
            _ => self.file(kind, fields),
        }
    }

    /// A new session: what the client knew and had open is gone.
    fn version(&self, mut fields: Fields<'_>) -> Result<Answer> {
        let (wanted, version) = (fields.u32()?, fields.text()?);
        if wanted < MIN_MESSAGE {
            return Err(Errno::MSGSIZE);
        }
        self.reset();
        let size = wanted.min(MAX_MESSAGE);
        self.state().message = size;
        let spoken = if version == VERSION { VERSION } else { b"unknown" };
        Ok(Answer::Message(Out::default().u32(size).text(spoken)))
    }

    fn attach(&self, mut fields: Fields<'_>) -> Result<Answer> {
        let (fid, _auth, _user, _name, uid) =
            (fields.u32()?, fields.u32()?, fields.text()?, fields.text()?, fields.u32()?);
        let attributes = self.folder.attributes(ROOT)?;
        self.folder.retain(ROOT)?;
        let uid = if uid == NO_USER { 0 } else { uid };
        self.insert(fid, Fid { node: ROOT, uid, open: Opened::Not })?;
        Ok(Answer::Message(Out::default().qid(Qid::of(&attributes))))
    }

    fn flush(&self, mut fields: Fields<'_>) -> Result<Answer> {
        fields.u16().map(Answer::Cancelled)
    }

    /// Gives the client a fid, whose reference is given back where it cannot have it.
    fn insert(&self, number: u32, fid: Fid) -> Result<()> {
        let mut state = self.state();
        let refused = match () {
            () if state.fids.contains_key(&number) => Errno::BADF,
            () if state.fids.len() >= MAX_FIDS => Errno::NFILE,
            () => {
                state.fids.insert(number, fid);
                return Ok(());
            }
        };
        drop(state);
        self.folder.forget(fid.node, 1);
        Err(refused)
    }

    fn fid(&self, fields: &mut Fields<'_>) -> Result<Fid> {
        let number = fields.u32()?;
        self.state().fids.get(&number).cloned().ok_or(Errno::BADF)
    }

    /// The node of the next field, a fid.
    fn node(&self, fields: &mut Fields<'_>) -> Result<NodeId> {
        let number = fields.u32()?;
        self.state().fids.get(&number).map(|fid| fid.node).ok_or(Errno::BADF)
    }

    fn walk(&self, mut fields: Fields<'_>) -> Result<Answer> {
        let (number, new, count) = (fields.u32()?, fields.u32()?, fields.u16()?);
        let from = self.state().fids.get(&number).cloned().ok_or(Errno::BADF)?;
        if count > MAX_NAMES {
            return Err(Errno::INVAL);
        }
        if new != number && self.state().fids.contains_key(&new) {
            return Err(Errno::BADF);
        }
        let names = (0..count).map(|_| fields.text()).collect::<Result<Vec<_>>>()?;
        let mut qids = Vec::new();
        let mut node = from.node;
        self.folder.retain(node)?;
        for name in &names {
            match self.step(node, name) {
                Ok(entry) => {
                    self.folder.forget(node, 1);
                    node = entry.node;
                    qids.push(Qid::of(&entry.attributes));
                }
                Err(error) => {
                    self.folder.forget(node, 1);
                    // As far as it went; the new fid is none then.
                    return if qids.is_empty() { Err(error) } else { Ok(walked(&qids)) };
                }
            }
        }
        if new == number {
            let old = self.state().fids.remove(&number);
            self.release(old)?;
        }
        self.insert(new, Fid { node, uid: from.uid, open: Opened::Not })?;
        Ok(walked(&qids))
    }

    /// One step of a walk; above the shared folder is the folder itself.
    fn step(&self, node: NodeId, name: &[u8]) -> Result<Entry> {
        let to = match name {
            b"." => node,
            b".." => self.folder.parent(node)?,
            _ => return self.folder.lookup(node, name),
        };
        let attributes = self.folder.attributes(to)?;
        self.folder.retain(to)?;
        Ok(Entry { node: to, attributes })
    }

    /// What a fid held is given back; an attribute that it was to write is set.
    fn release(&self, fid: Option<Fid>) -> Result<()> {
        let fid = fid.ok_or(Errno::BADF)?;
        let result = match fid.open {
            Opened::Handle(handle) => self.folder.close(handle),
            Opened::Attribute { name, size, flags, value, .. } => match size {
                // So a client asks for an attribute to be removed.
                0 if flags & XATTR_REPLACE != 0 => self.folder.remove_attribute(fid.node, &name),
                _ if value.len() < size => Err(Errno::INVAL),
                _ => self.folder.set_attribute(fid.node, &name, &value, flags),
            },
            Opened::Not | Opened::Value(_) => Ok(()),
        };
        self.folder.forget(fid.node, 1);
        result
    }

    fn clunk(&self, mut fields: Fields<'_>) -> Result<Answer> {
        let number = fields.u32()?;
        let fid = self.state().fids.remove(&number);
        self.release(fid).map(done)
    }

    fn remove(&self, mut fields: Fields<'_>) -> Result<Answer> {
        let number = fields.u32()?;
        let fid = self.state().fids.remove(&number).ok_or(Errno::BADF)?;
        let removed = self.folder.place(fid.node).and_then(|(parent, name)| {
            let is_folder = self.folder.attributes(fid.node)?.owner.mode & 0o170_000 == 0o040_000;
            self.folder.remove(parent, &name, is_folder)
        });
        self.release(Some(fid))?;
        removed.map(done)
    }

    fn open(&self, kind: u8, mut fields: Fields<'_>) -> Result<Answer> {
        let number = fields.u32()?;
        let fid = self.state().fids.get(&number).cloned().ok_or(Errno::BADF)?;
        if !matches!(fid.open, Opened::Not) {
            return Err(Errno::BADF);
        }
        let (node, handle, attributes) = if kind == kind_of::LCREATE {
            let (name, flags, mode, gid) = (fields.text()?, fields.u32()?, fields.u32()?, fields.u32()?);
            let (flags, caller) = (OFlags::from_bits_retain(flags), Caller { uid: fid.uid, gid, umask: 0 });
            let (entry, handle) = self.folder.create(fid.node, name, flags, mode, caller)?;
            self.folder.forget(fid.node, 1);
            (entry.node, handle, entry.attributes)
        } else {
            let flags = OFlags::from_bits_retain(fields.u32()?);
            let attributes = self.folder.attributes(fid.node)?;
            let is_folder = attributes.owner.mode & 0o170_000 == 0o040_000;
            let handle = match is_folder {
                true if flags.intersects(OFlags::WRONLY | OFlags::RDWR) => return Err(Errno::ISDIR),
                true => self.folder.open_folder(fid.node)?,
                false => self.folder.open_file(fid.node, flags)?,
            };
            (fid.node, handle, attributes)
        };
        self.state().fids.insert(number, Fid { node, uid: fid.uid, open: Opened::Handle(handle) });
        // The client's own choice of how much it transfers at a time.
        Ok(Answer::Message(Out::default().qid(Qid::of(&attributes)).u32(0)))
    }

    fn make(&self, kind: u8, mut fields: Fields<'_>) -> Result<Answer> {
        let fid = self.fid(&mut fields)?;
        let name = fields.text()?;
        let caller = |gid| Caller { uid: fid.uid, gid, umask: 0 };
        let entry = match kind {
            kind_of::SYMLINK => {
                let (text, gid) = (fields.text()?, fields.u32()?);
                self.folder.make_link(fid.node, name, text, caller(gid))?
            }
            kind_of::MKDIR => {
                let (mode, gid) = (fields.u32()?, fields.u32()?);
                self.folder.make_folder(fid.node, name, mode, caller(gid))?
            }
            _ => {
                let (mode, major, minor, gid) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
                self.folder.make_node(fid.node, name, mode, device_number(major, minor), caller(gid))?
            }
        };
        self.folder.forget(entry.node, 1);
        Ok(Answer::Message(Out::default().qid(Qid::of(&entry.attributes))))
    }

    fn names(&self, kind: u8, mut fields: Fields<'_>) -> Result<Answer> {
        let folder = &self.folder;
        let first = self.node(&mut fields)?;
        match kind {
            kind_of::RENAME => {
                let (to, name) = (self.node(&mut fields)?, fields.text()?);
                let (parent, old) = folder.place(first)?;
                folder.rename((parent, &old), (to, name), RenameFlags::empty()).map(done)
            }
            kind_of::RENAMEAT => {
                let old = fields.text()?;
                let (to, name) = (self.node(&mut fields)?, fields.text()?);
                folder.rename((first, old), (to, name), RenameFlags::empty()).map(done)
            }
            kind_of::LINK => {
                let (file, name) = (self.node(&mut fields)?, fields.text()?);
                let entry = folder.link(file, first, name)?;
                folder.forget(entry.node, 1);
                Ok(done(()))
            }
            _ => {
                let (name, flags) = (fields.text()?, fields.u32()?);
                folder.remove(first, name, flags & REMOVE_FOLDER != 0).map(done)
            }
        }
    }

    fn file(&self, kind: u8, mut fields: Fields<'_>) -> Result<Answer> {
        match kind {
            kind_of::GETATTR => {
                let (node, mask) = (self.node(&mut fields)?, fields.u64()?);
                let attributes = self.folder.attributes(node)?;
                Ok(Answer::Message(attributes_out(&attributes, mask)))
            }
            kind_of::SETATTR => {
                let node = self.node(&mut fields)?;
                let changes = changes(fields)?;
                self.folder.change(node, None, &changes)?;
                Ok(done(()))
            }
            kind_of::READLINK => {
                let text = self.folder.read_link(self.node(&mut fields)?)?;
                Ok(Answer::Message(Out::default().text(&text)))
            }
            kind_of::STATFS => {
                let full = self.folder.statistics(self.node(&mut fields)?)?;
                let out = Out::default().u32(FILE_SYSTEM).u32(full.f_bsize as u32);
                let out = out.u64(full.f_blocks).u64(full.f_bfree).u64(full.f_bavail);
                let out = out.u64(full.f_files).u64(full.f_ffree).u64(full.f_fsid);
                Ok(Answer::Message(out.u32(full.f_namemax as u32)))
            }
            kind_of::FSYNC => {
                let handle = self.handle(&mut fields)?;
                // Older clients do not say.
                let only_data = fields.u32().unwrap_or(0) != 0;
                self.folder.sync(handle, only_data).map(done)
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn handle(&self, fields: &mut Fields<'_>) -> Result<HandleId> {
        match self.fid(fields)?.open {
            Opened::Handle(handle) => Ok(handle),
            _ => Err(Errno::BADF),
        }
    }

    fn read(&self, mut fields: Fields<'_>, room: usize, payload: &mut dyn Payload) -> Result<Answer> {
        let fid = self.fid(&mut fields)?;
        let (offset, count) = (fields.u64()?, fields.u32()?);
        let room = room.min(self.state().message as usize).saturating_sub(READ_HEADER);
        let len = (count as usize).min(room);
        match fid.open {
            Opened::Handle(handle) => {
                let file = self.folder.file(handle)?;
                payload.load(READ_HEADER, len, file.as_fd(), offset).map(Answer::Loaded)
            }
            Opened::Value(held) => {
                let value = &held.0;
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(value.len());
                let part = &value[start..value.len().min(start.saturating_add(len))];
                let mut out = Out::default().u32(part.len() as u32);
                out.0.extend_from_slice(part);
                Ok(Answer::Message(out))
            }
            Opened::Not | Opened::Attribute { .. } => Err(Errno::BADF),
        }
    }

    fn write(&self, mut fields: Fields<'_>, payload: &mut dyn Payload) -> Result<Answer> {
        let number = fields.u32()?;
        let (offset, count) = (fields.u64()?, fields.u32()?);
        if count > self.state().message {
            return Err(Errno::MSGSIZE);
        }
        let mut state = self.state();
        let fid = state.fids.get_mut(&number).ok_or(Errno::BADF)?;
        let written = match &mut fid.open {
            Opened::Handle(handle) => {
                let file = self.folder.file(*handle)?;
                drop(state);
                payload.store(WRITE_HEADER, count as usize, file.as_fd(), offset)?
            }
            Opened::Attribute { size, value, .. } => {
                if offset != value.len() as u64 || value.len() + count as usize > *size {
                    return Err(Errno::INVAL);
                }
                let start = value.len();
                value.resize(start + count as usize, 0);
                let got = payload.fetch(WRITE_HEADER, &mut value[start..]);
                value.truncate(start + *got.as_ref().unwrap_or(&0));
                got?
            }
            Opened::Not | Opened::Value(_) => return Err(Errno::BADF),
        };
        Ok(Answer::Message(Out::default().u32(written as u32)))
    }

    fn read_folder(&self, mut fields: Fields<'_>, room: usize) -> Result<Answer> {
        let handle = self.handle(&mut fields)?;
        let (offset, count) = (fields.u64()?, fields.u32()?);
        let room = room.min(self.state().message as usize).min(MAX_HEAD).saturating_sub(READ_HEADER);
        let room = room.min(count as usize);
        let mut list = Out::default();
        self.folder.list(handle, offset, true, &mut |_, entry: &DirEntry| {
            const FIXED: usize = 13 + 8 + 1 + 2;
            if list.0.len() + FIXED + entry.name.len() > room {
                return Ok(false);
            }
            let out = std::mem::take(&mut list).qid(Qid::new(entry.kind, entry.inode)).u64(entry.next);
            list = out.u8((entry.kind >> 12) as u8).text(&entry.name);
            Ok(true)
        })?;
        let mut out = Out::default().u32(list.0.len() as u32);
        out.0.extend_from_slice(&list.0);
        Ok(Answer::Message(out))
    }
}

fn walked(qids: &[Qid]) -> Answer {
    let out = Out::default().u16(qids.len() as u16);
    Answer::Message(qids.iter().fold(out, |out, &qid| out.qid(qid)))
}

fn attributes_out(attributes: &Attributes, mask: u64) -> Out {
    let time = |out: Out, time: Time| out.u64(time.seconds as u64).u64(time.nanoseconds.into());
    let owner = attributes.owner;
    let out = Out::default().u64(mask & wire::BASIC | mask & wire::BTIME).qid(Qid::of(attributes));
    let out = out.u32(owner.mode).u32(owner.uid).u32(owner.gid).u64(attributes.links.into());
    let out = out.u64(owner.rdev.into()).u64(attributes.size);
    let out = out.u64(attributes.block_size.into()).u64(attributes.blocks);
    let out = time(time(time(out, attributes.accessed), attributes.modified), attributes.changed);
    time(out, attributes.created).u64(0).u64(0)
}

fn changes(mut fields: Fields<'_>) -> Result<Changes> {
    let valid = fields.u32()?;
    let has = |bit: u32| valid & bit != 0;
    let (mode, uid, gid, size) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u64()?);
    let mut time = |change, given| {
        let (seconds, nanoseconds) = (fields.u64()? as i64, fields.u64()? as u32);
        Ok(match (has(change), has(given)) {
            (false, _) => None,
            (true, false) => Some(SetTime::Now),
            (true, true) => Some(SetTime::To(Time { seconds, nanoseconds })),
        })
    };
    Ok(Changes {
        accessed: time(set::ATIME, set::ATIME_SET)?,
        modified: time(set::MTIME, set::MTIME_SET)?,
        mode: has(set::MODE).then_some(mode),
        uid: has(set::UID).then_some(uid),
        gid: has(set::GID).then_some(gid),
        size: has(set::SIZE).then_some(size),
        kill_privileges: false,
    })
}
