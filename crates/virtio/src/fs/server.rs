//! The FUSE server: a request's bytes in, an answer's bytes out.

mod extended;

use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::OFlags;
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{self, *};
use crate::share::ownership::Caller;
use crate::share::serve::{Payload, Reply, Server};
use crate::share::{
    Attributes, Changes, DirEntry, Entry, Errno, Folder, LockOwner, NodeId, RenameFlags, Result, SetTime,
    Time,
};

/// The most bytes that one request reads or writes, and the pages that they are in.
const MAX_TRANSFER: u32 = 1 << 20;
const MAX_PAGES: u16 = (MAX_TRANSFER / 4096) as u16;
/// The most bytes of a request's arguments, apart from what is written to files: a name and an attribute's value.
const MAX_ARGUMENTS: usize = 128 << 10;
/// The longest listing, or value of an attribute, that is answered at once.
const MAX_ANSWER: u32 = 128 << 10;
/// How many requests the guest may have under way that nobody waits for.
const BACKGROUND: u16 = 64;

/// How long the guest may believe what it was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Not at all: it asks again each time.
    None,
    /// A second; contents until a file is opened anew. Changes on the host are seen.
    #[default]
    Auto,
    /// Until it forgets: nobody else changes anything. What is written stays in the guest for a while.
    Always,
}

impl Cache {
    fn seconds(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Auto => 1,
            Self::Always => 86400,
        }
    }
}

/// A server of one folder.
#[derive(Debug)]
pub struct FuseServer {
    folder: Folder,
    cache: Cache,
    ready: AtomicBool,
    negotiated: Mutex<Init>,
}

/// A request's arguments.
struct Args<'a>(&'a [u8]);

impl<'a> Args<'a> {
    fn take<T: FromBytes>(&mut self) -> Result<T> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = rest;
        Ok(value)
    }

    /// Bytes up to a NUL.
    fn name(&mut self) -> Result<&'a [u8]> {
        let end = self.0.iter().position(|&byte| byte == 0).ok_or(Errno::INVAL)?;
        let (name, rest) = self.0.split_at(end);
        self.0 = &rest[1..];
        Ok(name)
    }
}

/// What an answer is, without its header.
enum Answer {
    Bytes(Vec<u8>),
    /// So many bytes were written to the answer already.
    Loaded(usize),
    /// None is given.
    None,
    /// It comes when a lock can be had.
    Wait,
    /// Another request is not to be waited for any more.
    Cancel(u64),
}

fn bytes<T: IntoBytes + zerocopy::Immutable>(value: T) -> Answer {
    Answer::Bytes(value.as_bytes().to_vec())
}

fn empty((): ()) -> Answer {
    Answer::Bytes(Vec::new())
}

impl Server for FuseServer {
    fn head_len(&self, start: &[u8]) -> usize {
        match InHeader::read_from_prefix(start) {
            Ok((header, _)) if header.opcode == opcode::WRITE => IN_HEADER + size_of::<TransferIn>(),
            _ => MAX_ARGUMENTS,
        }
    }

    fn is_slow(&self, head: &[u8]) -> bool {
        const QUICK: [u32; 14] = [
            opcode::LOOKUP,
            opcode::FORGET,
            opcode::GETATTR,
            opcode::READLINK,
            opcode::MKNOD,
            opcode::MKDIR,
            opcode::OPEN,
            opcode::CREATE,
            opcode::RELEASE,
            opcode::FLUSH,
            opcode::OPENDIR,
            opcode::RELEASEDIR,
            opcode::GETXATTR,
            opcode::BATCH_FORGET,
        ];
        InHeader::read_from_prefix(head).is_ok_and(|(header, _)| !QUICK.contains(&header.opcode))
    }

    fn handle(&self, head: &[u8], room: usize, payload: &mut dyn Payload) -> Reply {
        let Ok((header, rest)) = InHeader::read_from_prefix(head) else { return Reply::None };
        let answer = match self.dispatch(&header, Args(rest), room.saturating_sub(OUT_HEADER), payload) {
            Ok(Answer::Wait) => return Reply::Wait(header.unique),
            Ok(Answer::None) => return Reply::None,
            Ok(Answer::Cancel(unique)) => return Reply::Cancel(unique),
            other => other,
        };
        let (error, body, loaded) = match answer {
            Ok(Answer::Bytes(body)) => (0, body, 0),
            Ok(Answer::Loaded(len)) => (0, Vec::new(), len),
            Ok(_) => (0, Vec::new(), 0),
            Err(error) => (-error.raw_os_error(), Vec::new(), 0),
        };
        let len = OUT_HEADER + body.len() + loaded;
        let out = OutHeader { len: len as u32, error, unique: header.unique };
        Reply::Bytes { bytes: [out.as_bytes(), &body].concat(), loaded }
    }

    fn refuse(&self, head: &[u8], error: Errno) -> Vec<u8> {
        let unique = InHeader::read_from_prefix(head).map_or(0, |(header, _)| header.unique);
        OutHeader { len: OUT_HEADER as u32, error: -error.raw_os_error(), unique }.as_bytes().to_vec()
    }

    fn reset(&self) {
        self.ready.store(false, Ordering::SeqCst);
        self.folder.clear();
    }
}

impl FuseServer {
    /// A server of this folder.
    pub fn new(folder: Folder, cache: Cache) -> Self {
        Self { folder, cache, ready: AtomicBool::new(false), negotiated: Mutex::new(Init::empty()) }
    }

    fn dispatch(
        &self,
        header: &InHeader,
        args: Args<'_>,
        room: usize,
        payload: &mut dyn Payload,
    ) -> Result<Answer> {
        if !self.ready.load(Ordering::SeqCst) && header.opcode != opcode::INIT {
            return Err(Errno::IO);
        }
        let node = header.nodeid;
        match header.opcode {
            opcode::INIT => self.init(args),
            opcode::READ | opcode::WRITE => self.transfer(header.opcode, node, args, room, payload),
            opcode::READDIR => self.read_folder(args, room, false),
            opcode::READDIRPLUS => self.read_folder(args, room, true),
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT | opcode::DESTROY => {
                self.housekeeping(header, args)
            }
            opcode::LOOKUP
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::LINK
            | opcode::CREATE
            | opcode::TMPFILE => self.name(header, args),
            opcode::GETXATTR | opcode::LISTXATTR | opcode::SETXATTR | opcode::REMOVEXATTR => {
                self.extended(header, args, room)
            }
            opcode::GETLK | opcode::SETLK | opcode::SETLKW => self.locks(header, args),
            _ => self.file(header, args),
        }
    }

    fn init(&self, mut args: Args<'_>) -> Result<Answer> {
        let asked: InitIn = args.take()?;
        if asked.major > wire::MAJOR {
            // The guest begins again with what is understood.
            return Ok(bytes(InitOut { major: wire::MAJOR, minor: wire::MINOR, ..InitOut::default() }));
        }
        if asked.major < wire::MAJOR || asked.minor < wire::OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        let more: u32 = if asked.flags & Init::INIT_EXT.bits() as u32 != 0 { args.take()? } else { 0 };
        let offered = Init::from_bits_truncate(u64::from(asked.flags) | u64::from(more) << 32);
        let mut wanted = Init::all();
        if self.cache == Cache::Always && !self.folder.is_read_only() {
            wanted -= Init::AUTO_INVAL_DATA;
        } else {
            wanted -= Init::WRITEBACK_CACHE;
        }
        if !self.folder.has_lists() {
            wanted -= Init::POSIX_ACL | Init::DONT_MASK;
        }
        let agreed = offered & wanted;
        *self.negotiated.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = agreed;
        self.folder.clear();
        self.ready.store(true, Ordering::SeqCst);
        Ok(bytes(InitOut {
            major: wire::MAJOR,
            minor: wire::MINOR.min(asked.minor),
            max_readahead: asked.max_readahead.min(MAX_TRANSFER),
            flags: agreed.bits() as u32,
            flags2: (agreed.bits() >> 32) as u32,
            max_background: BACKGROUND,
            congestion_threshold: BACKGROUND / 4 * 3,
            max_write: MAX_TRANSFER,
            time_gran: 1,
            max_pages: MAX_PAGES,
            ..InitOut::default()
        }))
    }

    fn has(&self, flag: Init) -> bool {
        self.negotiated.lock().unwrap_or_else(std::sync::PoisonError::into_inner).contains(flag)
    }

    fn housekeeping(&self, header: &InHeader, mut args: Args<'_>) -> Result<Answer> {
        match header.opcode {
            opcode::FORGET => {
                if let Ok(ForgetIn { nlookup }) = args.take() {
                    self.folder.forget(header.nodeid, nlookup);
                }
                Ok(Answer::None)
            }
            opcode::BATCH_FORGET => {
                let count = args.take::<BatchForgetIn>().map_or(0, |batch| batch.count);
                for _ in 0..count {
                    let Ok(one) = args.take::<ForgetOne>() else { break };
                    self.folder.forget(one.nodeid, one.nlookup);
                }
                Ok(Answer::None)
            }
            opcode::INTERRUPT => args.take().map(|InterruptIn { unique }| Answer::Cancel(unique)),
            _ => {
                self.reset();
                Ok(empty(()))
            }
        }
    }

    /// What has to do with a name in a folder.
    fn name(&self, header: &InHeader, mut args: Args<'_>) -> Result<Answer> {
        let node = header.nodeid;
        let caller = |umask| Caller { uid: header.uid, gid: header.gid, umask };
        let entry = match header.opcode {
            opcode::LOOKUP => return self.lookup(node, args.name()?),
            opcode::SYMLINK => {
                let (name, text) = (args.name()?, args.name()?);
                self.folder.make_link(node, name, text, caller(0))?
            }
            opcode::MKNOD => {
                let MknodIn { mode, rdev, umask, .. } = args.take()?;
                self.folder.make_node(node, args.name()?, mode, rdev, caller(umask))?
            }
            opcode::MKDIR => {
                let MkdirIn { mode, umask } = args.take()?;
                self.folder.make_folder(node, args.name()?, mode, caller(umask))?
            }
            opcode::LINK => {
                let LinkIn { oldnodeid } = args.take()?;
                self.folder.link(oldnodeid, node, args.name()?)?
            }
            opcode::CREATE | opcode::TMPFILE => {
                let CreateIn { flags, mode, umask, .. } = args.take()?;
                let (flags, caller) = (self.flags(flags), caller(umask));
                let (entry, fh) = match header.opcode {
                    opcode::CREATE => self.folder.create(node, args.name()?, flags, mode, caller)?,
                    _ => self.folder.create_unnamed(node, flags, mode, caller)?,
                };
                let open = OpenOut { fh, open_flags: self.keeps(), padding: 0 };
                let entry = self.entry(&entry);
                return Ok(Answer::Bytes([entry.as_bytes(), open.as_bytes()].concat()));
            }
            opcode::UNLINK => return self.folder.remove(node, args.name()?, false).map(empty),
            opcode::RMDIR => return self.folder.remove(node, args.name()?, true).map(empty),
            other => {
                let (newdir, flags) = match other {
                    opcode::RENAME => (args.take::<RenameIn>()?.newdir, 0),
                    _ => args.take().map(|Rename2In { newdir, flags, .. }| (newdir, flags))?,
                };
                let (from, to) = (args.name()?, args.name()?);
                let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
                return self.folder.rename((node, from), (newdir, to), flags).map(empty);
            }
        };
        Ok(bytes(self.entry(&entry)))
    }

    fn lookup(&self, node: NodeId, name: &[u8]) -> Result<Answer> {
        match self.folder.lookup(node, name) {
            Ok(entry) => Ok(bytes(self.entry(&entry))),
            // That there is nothing may be believed as well.
            Err(Errno::NOENT) if self.cache == Cache::Always => {
                Ok(bytes(EntryOut { entry_valid: self.cache.seconds(), ..EntryOut::default() }))
            }
            Err(error) => Err(error),
        }
    }

    /// What has to do with a file or an open one.
    fn file(&self, header: &InHeader, mut args: Args<'_>) -> Result<Answer> {
        let (node, folder) = (header.nodeid, &self.folder);
        match header.opcode {
            opcode::GETATTR => folder.attributes(node).map(|attributes| bytes(self.attr(&attributes))),
            opcode::SETATTR => self.set_attributes(node, &args.take()?),
            opcode::READLINK => folder.read_link(node).map(Answer::Bytes),
            opcode::OPEN => self.open(node, args.take()?),
            opcode::OPENDIR => {
                let fh = folder.open_folder(node)?;
                let cache = flag::FOPEN_CACHE_DIR | flag::FOPEN_KEEP_CACHE;
                let open_flags = if self.cache == Cache::Always { cache } else { 0 };
                Ok(bytes(OpenOut { fh, open_flags, padding: 0 }))
            }
            opcode::RELEASE => {
                let ReleaseIn { fh, release_flags, lock_owner, .. } = args.take()?;
                if release_flags & flag::RELEASE_FLOCK_UNLOCK != 0 {
                    folder.unlock_all(LockOwner { node, owner: lock_owner, whole: true });
                }
                folder.close(fh).map(empty)
            }
            opcode::RELEASEDIR => folder.close(args.take::<ReleaseIn>()?.fh).map(empty),
            opcode::FLUSH => {
                let FlushIn { lock_owner, fh, .. } = args.take()?;
                folder.handle(fh)?;
                folder.unlock_all(LockOwner { node, owner: lock_owner, whole: false });
                Ok(empty(()))
            }
            opcode::FSYNC | opcode::FSYNCDIR => {
                let FsyncIn { fh, flags, .. } = args.take()?;
                folder.sync(fh, flags & flag::FSYNC_FDATASYNC != 0).map(empty)
            }
            opcode::SYNCFS => folder.sync_all().map(empty),
            opcode::STATFS => folder.statistics(node).map(|full| bytes(statfs(&full))),
            opcode::ACCESS => {
                const WRITE: u32 = 2;
                let AccessIn { mask, .. } = args.take()?;
                folder.attributes(node)?;
                // Permissions are the guest's to check.
                if mask & WRITE != 0 && folder.is_read_only() { Err(Errno::ROFS) } else { Ok(empty(())) }
            }
            opcode::FALLOCATE => {
                let FallocateIn { fh, offset, length, mode, .. } = args.take()?;
                folder.allocate(fh, mode, offset, length).map(empty)
            }
            opcode::LSEEK => {
                let LseekIn { fh, offset, whence, .. } = args.take()?;
                folder.seek(fh, offset, whence).map(|offset| bytes(LseekOut { offset }))
            }
            opcode::COPY_FILE_RANGE => {
                let copy: CopyFileRangeIn = args.take()?;
                if copy.flags != 0 {
                    return Err(Errno::INVAL);
                }
                let done = folder.copy((copy.fh_in, copy.off_in), (copy.fh_out, copy.off_out), copy.len)?;
                Ok(bytes(WriteOut { size: done as u32, padding: 0 }))
            }
            _ => Err(Errno::NOSYS),
        }
    }

    fn open(&self, node: NodeId, asked: OpenIn) -> Result<Answer> {
        let flags = self.flags(asked.flags);
        let fh = self.folder.open_file(node, flags)?;
        if asked.open_flags & flag::OPEN_KILL_SUIDGID != 0 && flags.contains(OFlags::TRUNC) {
            self.folder.kill_privileges(node)?;
        }
        Ok(bytes(OpenOut { fh, open_flags: self.keeps(), padding: 0 }))
    }

    /// What a file that is opened may keep of its contents in the guest.
    fn keeps(&self) -> u32 {
        if self.cache == Cache::Always { flag::FOPEN_KEEP_CACHE } else { 0 }
    }

    /// A file's flags for the host. The guest says where it appends; where it holds back what is written it reads, too.
    fn flags(&self, asked: u32) -> OFlags {
        let mut flags = OFlags::from_bits_retain(asked) - OFlags::APPEND;
        if self.has(Init::WRITEBACK_CACHE) && flags.contains(OFlags::WRONLY) {
            flags = flags - OFlags::WRONLY | OFlags::RDWR;
        }
        flags
    }

    fn set_attributes(&self, node: NodeId, asked: &SetattrIn) -> Result<Answer> {
        let has = |bit: u32| asked.valid & bit != 0;
        let time = |set, now, seconds: u64, nanoseconds| match (has(now), has(set)) {
            (true, _) => Some(SetTime::Now),
            (false, true) => Some(SetTime::To(Time { seconds: seconds as i64, nanoseconds })),
            (false, false) => None,
        };
        let changes = Changes {
            mode: has(valid::MODE).then_some(asked.mode),
            uid: has(valid::UID).then_some(asked.uid),
            gid: has(valid::GID).then_some(asked.gid),
            size: has(valid::SIZE).then_some(asked.size),
            accessed: time(valid::ATIME, valid::ATIME_NOW, asked.atime, asked.atimensec),
            modified: time(valid::MTIME, valid::MTIME_NOW, asked.mtime, asked.mtimensec),
            kill_privileges: has(valid::KILL_SUIDGID),
        };
        let handle = has(valid::FH).then_some(asked.fh);
        let attributes = self.folder.change(node, handle, &changes)?;
        Ok(bytes(self.attr(&attributes)))
    }

    /// READ and WRITE: the bytes go between the file and the guest's memory without a copy.
    fn transfer(
        &self,
        opcode: u32,
        node: NodeId,
        mut args: Args<'_>,
        room: usize,
        payload: &mut dyn Payload,
    ) -> Result<Answer> {
        let asked: TransferIn = args.take()?;
        let file = self.folder.file(asked.fh)?;
        let len = asked.size.min(MAX_TRANSFER) as usize;
        if opcode == opcode::READ {
            let done = payload.load(OUT_HEADER, len.min(room), file.as_fd(), asked.offset)?;
            return Ok(Answer::Loaded(done));
        }
        if asked.size > MAX_TRANSFER {
            return Err(Errno::INVAL);
        }
        if asked.flags & flag::WRITE_KILL_SUIDGID != 0 {
            self.folder.kill_privileges(node)?;
        }
        let done = payload.store(IN_HEADER + size_of::<TransferIn>(), len, file.as_fd(), asked.offset)?;
        Ok(bytes(WriteOut { size: done as u32, padding: 0 }))
    }

    fn read_folder(&self, mut args: Args<'_>, room: usize, plus: bool) -> Result<Answer> {
        let asked: TransferIn = args.take()?;
        let room = room.min(asked.size.min(MAX_ANSWER) as usize);
        let mut out = Vec::with_capacity(room.min(16 << 10));
        let size = |entry: &DirEntry| {
            let plus = if plus { size_of::<EntryOut>() } else { 0 };
            (plus + size_of::<Dirent>() + entry.name.len()).next_multiple_of(8)
        };
        self.folder.list(asked.fh, asked.offset, !plus, &mut |folder, entry| {
            let end = out.len() + size(entry);
            if end > room {
                return Ok(false);
            }
            let mut dirent = Dirent {
                ino: entry.inode,
                off: entry.next,
                namelen: entry.name.len() as u32,
                kind: entry.kind >> 12,
            };
            if plus {
                let found = if entry.is_dots() { None } else { self.folder.lookup(folder, &entry.name).ok() };
                let found = found.map(|entry| self.entry(&entry)).unwrap_or_default();
                if found.nodeid != 0 {
                    (dirent.ino, dirent.kind) = (found.attr.ino, found.attr.mode >> 12);
                }
                out.extend_from_slice(found.as_bytes());
            }
            out.extend_from_slice(dirent.as_bytes());
            out.extend_from_slice(&entry.name);
            out.resize(end, 0);
            Ok(true)
        })?;
        Ok(Answer::Bytes(out))
    }

    fn entry(&self, entry: &Entry) -> EntryOut {
        let seconds = self.cache.seconds();
        EntryOut {
            nodeid: entry.node,
            entry_valid: seconds,
            attr_valid: seconds,
            attr: attr(&entry.attributes),
            ..EntryOut::default()
        }
    }

    fn attr(&self, attributes: &Attributes) -> AttrOut {
        AttrOut { attr_valid: self.cache.seconds(), attr: attr(attributes), ..AttrOut::default() }
    }
}

fn attr(from: &Attributes) -> Attr {
    Attr {
        ino: from.inode,
        size: from.size,
        blocks: from.blocks,
        atime: from.accessed.seconds as u64,
        mtime: from.modified.seconds as u64,
        ctime: from.changed.seconds as u64,
        atimensec: from.accessed.nanoseconds,
        mtimensec: from.modified.nanoseconds,
        ctimensec: from.changed.nanoseconds,
        mode: from.owner.mode,
        nlink: from.links,
        uid: from.owner.uid,
        gid: from.owner.gid,
        rdev: from.owner.rdev,
        blksize: from.block_size,
        flags: 0,
    }
}

fn statfs(from: &rustix::fs::StatVfs) -> StatfsOut {
    StatfsOut {
        blocks: from.f_blocks,
        bfree: from.f_bfree,
        bavail: from.f_bavail,
        files: from.f_files,
        ffree: from.f_ffree,
        bsize: from.f_bsize as u32,
        namelen: from.f_namemax as u32,
        frsize: from.f_frsize as u32,
        ..StatfsOut::default()
    }
}
