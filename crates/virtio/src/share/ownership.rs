//! Whom files belong to, and what the host must not have of them.
//!
//! The guest's kernel checks permissions; what it asks for is kept in two places. As root, Ringside sets owners on the
//! host. As an ordinary user it cannot: that user's files are root's in the guest, those of others nobody's. Whatever the
//! host cannot or must not have is in an extended attribute beside the file: other owners, set-user-id and set-group-id
//! bits (a program that the guest made must not be one on the host), devices (empty files on the host), permissions
//! that would keep Ringside itself out.

use std::ffi::CStr;

use rustix::fs::{Statx, XattrFlags};

use super::{Errno, Result};

/// The attribute with what the host does not have.
pub(super) const OVERRIDE: &CStr = c"user.ringside.owner";
/// The longest that is read.
const MAX_OVERRIDE: usize = 128;
/// Who owns what belongs to others on the host, as user namespaces have it.
const NOBODY: u32 = 65534;

/// The format bits of a mode, and its kinds.
pub mod kind {
    /// The bits.
    pub const MASK: u32 = 0o170_000;
    /// A pipe with a name.
    pub const FIFO: u32 = 0o010_000;
    /// A character device.
    pub const CHAR: u32 = 0o020_000;
    /// A folder.
    pub const FOLDER: u32 = 0o040_000;
    /// A block device.
    pub const BLOCK: u32 = 0o060_000;
    /// A file.
    pub const FILE: u32 = 0o100_000;
    /// A symbolic link.
    pub const LINK: u32 = 0o120_000;
    /// A socket with a name.
    pub const SOCKET: u32 = 0o140_000;
}

const SET_USER: u32 = 0o4000;
pub(super) const SET_GROUP: u32 = 0o2000;
const STICKY: u32 = 0o1000;
const GROUP_EXECUTES: u32 = 0o10;

/// Who asks, as the guest has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permissions that what it makes is not to have, unless the folder's access control list decides; 0 where the
    /// guest has seen to that.
    pub umask: u32,
}

/// Owner, mode and device of a file, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Kind and permissions.
    pub mode: u32,
    /// The device that it is, in the host's 32-bit form; 0 for what is none.
    pub rdev: u32,
}

impl Ownership {
    /// Without the bits that a change of owner or contents takes away.
    pub(super) fn without_privileges(mut self) -> Self {
        if self.mode & kind::MASK == kind::FILE {
            self.mode &= !SET_USER;
            if self.mode & GROUP_EXECUTES != 0 {
                self.mode &= !SET_GROUP;
            }
        }
        self
    }

    /// As the attribute's text.
    fn to_text(self) -> String {
        format!("uid={},gid={},mode={:o},rdev={}", self.uid, self.gid, self.mode, self.rdev)
    }

    /// From the attribute's text.
    fn from_text(text: &[u8]) -> Option<Self> {
        let mut fields = std::str::from_utf8(text).ok()?.split(',');
        let mut field = |name: &str| fields.next()?.strip_prefix(name)?.strip_prefix('=');
        let (uid, gid) = (field("uid")?.parse().ok()?, field("gid")?.parse().ok()?);
        let mode = u32::from_str_radix(field("mode")?, 8).ok()?;
        Some(Self { uid, gid, mode, rdev: field("rdev")?.parse().ok()? })
    }
}

/// Whose process this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Whether owners can be set on the host.
    pub root: bool,
}

impl Ids {
    /// This process.
    pub fn of_process() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            root: rustix::process::geteuid().is_root(),
        }
    }

    /// Whether owners can be set on the host.
    pub fn is_root(self) -> bool {
        self.root
    }

    /// What the guest sees where nothing is kept beside the file.
    pub(super) fn natural(self, stat: &Statx) -> Ownership {
        let map = |id, own| match (self.is_root(), id == own) {
            (true, _) => id,
            (false, true) => 0,
            (false, false) => NOBODY,
        };
        Ownership {
            uid: map(stat.stx_uid, self.uid),
            gid: map(stat.stx_gid, self.gid),
            mode: stat.stx_mode.into(),
            rdev: device_number(stat.stx_rdev_major, stat.stx_rdev_minor),
        }
    }

    /// What the guest sees of a file with this attribute.
    pub(super) fn shown(self, stat: &Statx, kept: Option<Ownership>) -> Ownership {
        let natural = self.natural(stat);
        let Some(kept) = kept else { return natural };
        let host = natural.mode & kind::MASK;
        let shown = kind_shown(host, kept.mode);
        if shown != kept.mode & kind::MASK {
            return natural;
        }
        let is_device = matches!(shown, kind::CHAR | kind::BLOCK) && host == kind::FILE;
        Ownership { rdev: if is_device { kept.rdev } else { natural.rdev }, ..kept }
    }

    /// Whether something on the host can belong to someone in the guest.
    pub(super) fn can_give_to(self, uid: u32, gid: u32) -> bool {
        self.is_root() || (uid, gid) == (0, 0)
    }

    /// The permissions on the host of what the guest wants to have these: no privileges, and Ringside is not kept out. A
    /// file that is something else in the guest is nobody else's on the host.
    pub(super) fn host_mode(self, mode: u32, kind_on_host: u32) -> u32 {
        if kind_on_host == kind::FILE && mode & kind::MASK != kind::FILE {
            return 0o600;
        }
        let own = |own| if self.is_root() { 0 } else { own };
        match mode & kind::MASK {
            kind::FOLDER => mode & (0o777 | STICKY) | own(0o700),
            kind::FILE => mode & 0o777 | own(0o600),
            // What is not opened by Ringside, nor run.
            _ => mode & 0o7777,
        }
    }
}

/// The kind that the guest sees of what has one on the host and another beside it: a file may be shown as what has no
/// contents to be read; nothing else is of another kind than it is.
pub(super) fn kind_shown(host: u32, kept: u32) -> u32 {
    let kept = kept & kind::MASK;
    let others = [kind::LINK, kind::FIFO, kind::SOCKET, kind::CHAR, kind::BLOCK];
    if host == kind::FILE && others.contains(&kept) { kept } else { host }
}

/// A device's number in the host's 32-bit form.
pub fn device_number(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// Reads the attribute of a name in a folder, which is not followed, or of a descriptor's path; `None` where there is none.
///
/// # Errors
/// `EOPNOTSUPP` where the file system has none.
pub(super) fn read_kept(path: &[u8], named: bool) -> Result<Option<Ownership>> {
    let mut buffer = [0; MAX_OVERRIDE];
    let read = if named { rustix::fs::lgetxattr::<_, _, &mut [u8]> } else { rustix::fs::getxattr };
    match read(path, OVERRIDE, &mut buffer[..]) {
        Ok(len) => Ok(buffer.get(..len).and_then(Ownership::from_text)),
        Err(Errno::OPNOTSUPP) => Err(Errno::OPNOTSUPP),
        Err(_) => Ok(None),
    }
}

/// Writes the attribute, by the path of a descriptor.
pub(super) fn write_kept(path: &str, kept: Ownership) -> Result<()> {
    let written = rustix::fs::setxattr(path, OVERRIDE, kept.to_text().as_bytes(), XattrFlags::empty());
    written.map_err(|error| match error {
        Errno::OPNOTSUPP | Errno::ACCESS => Errno::PERM,
        other => other,
    })
}

/// Removes the attribute, where there is one.
pub(super) fn remove_kept(path: &str) -> Result<()> {
    match rustix::fs::removexattr(path, OVERRIDE) {
        Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_beside_a_file_reads_back() {
        let kept = Ownership { uid: 1000, gid: 5, mode: 0o104_755, rdev: 0 };
        assert_eq!(Ownership::from_text(kept.to_text().as_bytes()), Some(kept));
        for text in [
            "",
            "uid=1",
            "uid=1,gid=2,mode=9,rdev=0",
            "uid=-1,gid=2,mode=7,rdev=0",
            "gid=1,uid=2,mode=7,rdev=0",
        ] {
            assert_eq!(Ownership::from_text(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn the_host_gets_no_privileged_bits_and_ringside_can_still_read_what_it_made() {
        let (user, root) = (Ids { uid: 1, gid: 1, root: false }, Ids { uid: 0, gid: 0, root: true });
        let same = |ids: Ids, mode: u32| ids.host_mode(mode, mode & kind::MASK);
        assert_eq!(same(user, kind::FILE | 0o6755), 0o755);
        assert_eq!(same(user, kind::FILE), 0o600);
        assert_eq!(same(user, kind::FOLDER | 0o3050), 0o1750);
        assert_eq!(same(root, kind::FILE | 0o4000), 0);
        for mode in [kind::LINK | 0o777, kind::CHAR | 0o666, kind::FIFO | 0o4666] {
            assert_eq!(root.host_mode(mode, kind::FILE), 0o600, "{mode:o}");
        }
    }

    #[test]
    fn a_change_of_contents_takes_privileges_of_programs_only() {
        let mode = |mode| Ownership { uid: 0, gid: 0, mode, rdev: 0 }.without_privileges().mode;
        assert_eq!(mode(kind::FILE | 0o6755), kind::FILE | 0o755);
        assert_eq!(mode(kind::FILE | 0o2644), kind::FILE | 0o2644);
        assert_eq!(mode(kind::FOLDER | 0o2755), kind::FOLDER | 0o2755);
    }
}
