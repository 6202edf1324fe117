//! Requests about extended attributes and locks.

use super::{Answer, Args, FuseServer, bytes, empty};
use crate::fs::wire::*;
use crate::share::{Errno, LockKind, LockOwner, LockRange, Open, Result};

impl FuseServer {
    pub(super) fn extended(&self, header: &InHeader, mut args: Args<'_>, room: usize) -> Result<Answer> {
        let node = header.nodeid;
        let value = match header.opcode {
            opcode::SETXATTR => {
                let SetxattrIn { size, flags } = args.take()?;
                let [more, _] = if self.has(Init::SETXATTR_EXT) { args.take()? } else { [0; 2] };
                let name = args.name()?;
                let value = args.0.get(..size as usize).ok_or(Errno::INVAL)?;
                self.folder.set_attribute(node, name, value, flags)?;
                if more & flag::SETXATTR_ACL_KILL_SGID != 0 {
                    self.folder.kill_set_group(node)?;
                }
                return Ok(empty(()));
            }
            opcode::REMOVEXATTR => return self.folder.remove_attribute(node, args.name()?).map(empty),
            opcode::GETXATTR => {
                let asked: GetxattrIn = args.take()?;
                (asked.size, self.folder.attribute(node, args.name()?)?)
            }
            _ => (args.take::<GetxattrIn>()?.size, self.folder.attribute_names(node, header.uid)?),
        };
        match value {
            (0, value) => Ok(bytes(GetxattrIn { size: value.len() as u32, padding: 0 })),
            (size, value) if value.len() > size as usize || value.len() > room => Err(Errno::RANGE),
            (_, value) => Ok(Answer::Bytes(value)),
        }
    }

    pub(super) fn locks(&self, header: &InHeader, mut args: Args<'_>) -> Result<Answer> {
        let asked: LkIn = args.take()?;
        let owner = LockOwner {
            node: header.nodeid,
            owner: asked.owner,
            whole: asked.lk_flags & flag::LK_FLOCK != 0,
        };
        let range = LockRange { start: asked.start, end: asked.end };
        let kind = match asked.kind as i32 {
            libc::F_UNLCK => LockKind::Unlock,
            libc::F_RDLCK => LockKind::Shared,
            libc::F_WRLCK => LockKind::Exclusive,
            _ => return Err(Errno::INVAL),
        };
        if !matches!(self.folder.handle(asked.fh)?, Open::File(node, _) | Open::Folder(node, _) if node == header.nodeid)
        {
            return Err(Errno::BADF);
        }
        if header.opcode == opcode::GETLK {
            let found = self.folder.test_lock(owner, kind, range)?;
            let (kind, range) = found.unwrap_or((LockKind::Unlock, range));
            let kind = match kind {
                LockKind::Unlock => libc::F_UNLCK,
                LockKind::Shared => libc::F_RDLCK,
                LockKind::Exclusive => libc::F_WRLCK,
            };
            return Ok(bytes(LkOut { start: range.start, end: range.end, kind: kind as u32, pid: 0 }));
        }
        match self.folder.lock(owner, kind, range) {
            Err(Errno::AGAIN) if header.opcode == opcode::SETLKW => Ok(Answer::Wait),
            other => other.map(empty),
        }
    }
}
