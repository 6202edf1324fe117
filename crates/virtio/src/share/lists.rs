//! Access control lists, as POSIX 1003.1e draft 17 has them and Linux keeps them in attributes of the system.
//!
//! They name users and groups, so they can only be the host's where owners are: as root, the guest's lists are those of the
//! host's files, and the host's kernel passes a folder's default list on to what is made in it. For an ordinary user's
//! share there are none: on the host they would let others in who happen to have the numbers of the guest's users.
//!
//! The guest's kernel checks permissions, and asks for the list; of what it makes and how its mode and list go together,
//! the host's kernel decides. What is kept beside a file (`ownership`) follows.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::XattrFlags;

use super::ownership::{Caller, Ids, Ownership, SET_GROUP, kind};
use super::{Errno, Folder, NodeId, Result, link_to, stat, xattrs};

/// The attributes with a file's list, and with what is made in a folder begins with.
const ACCESS: &[u8] = b"system.posix_acl_access";
const DEFAULT: &[u8] = b"system.posix_acl_default";
/// The bits of a mode that a list has as well.
const PERMISSIONS: u32 = 0o777;

/// Whether an attribute is a list.
pub(super) fn is_list(name: &[u8]) -> bool {
    matches!(name, ACCESS | DEFAULT)
}

/// Whether files below a folder can have the guest's lists.
pub(super) fn are_there(ids: Ids, root: BorrowedFd<'_>) -> bool {
    let mut none: [u8; 0] = [];
    let found = rustix::fs::getxattr(link_to(root), ACCESS, &mut none[..]);
    ids.is_root() && matches!(found, Ok(_) | Err(Errno::NODATA))
}

impl Folder {
    /// Whether files can have access control lists.
    pub fn has_lists(&self) -> bool {
        self.lists
    }

    /// A file that can have a list, and what the guest sees of whom it belongs to.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where it can have none.
    pub(super) fn listed(&self, node: NodeId) -> Result<(Arc<OwnedFd>, Ownership)> {
        let identity = self.nodes().identity(node)?;
        if !self.lists || identity.closed || identity.kind == kind::LINK {
            return Err(Errno::OPNOTSUPP);
        }
        let file = self.descriptor(node)?;
        let owner = self.ownership(file.as_fd(), b"", &stat(file.as_fd(), b"")?);
        // What is a file on the host alone has a mode there that says nothing.
        if owner.mode & kind::MASK != identity.kind {
            return Err(Errno::OPNOTSUPP);
        }
        Ok((file, owner))
    }

    /// A file's list.
    ///
    /// # Errors
    /// `ENODATA` where there is none, also where there can be none: the guest's kernel asks for each file's list, and
    /// takes no other answer for that. `EOPNOTSUPP` where the share has none at all; the host's.
    pub(super) fn access_list(&self, node: NodeId, name: &[u8]) -> Result<Vec<u8>> {
        let found = self.listed(node).and_then(|(file, _)| xattrs::read(file.as_fd(), name));
        found.map_err(|error| if self.lists && error == Errno::OPNOTSUPP { Errno::NODATA } else { error })
    }

    /// Sets a list, or removes it where it is empty, and the mode with it.
    ///
    /// # Errors
    /// The host's; `EOPNOTSUPP` where there can be none.
    pub(super) fn set_list(&self, node: NodeId, name: &[u8], value: &[u8], flags: XattrFlags) -> Result<()> {
        let (file, owner) = self.listed(node)?;
        let path = link_to(file.as_fd());
        if value.is_empty() {
            match rustix::fs::removexattr(&*path, name) {
                Err(Errno::NODATA) => {}
                other => other?,
            }
        } else {
            rustix::fs::setxattr(&*path, name, value, flags)?;
        }
        if name == DEFAULT {
            return Ok(());
        }
        let now = stat(file.as_fd(), b"")?;
        let mode = owner.mode & !PERMISSIONS | u32::from(now.stx_mode) & PERMISSIONS;
        if mode == owner.mode {
            return Ok(());
        }
        self.own(&file, &now, owner, Ownership { mode, ..owner })
    }

    /// Takes the bit by which a program runs as its group: who set the list is not in the group.
    ///
    /// # Errors
    /// The host's.
    pub fn kill_set_group(&self, node: NodeId) -> Result<()> {
        let (file, owner) = self.listed(node)?;
        let wanted = Ownership { mode: owner.mode & !SET_GROUP, ..owner };
        if wanted == owner { Ok(()) } else { self.own(&file, &stat(file.as_fd(), b"")?, owner, wanted) }
    }

    /// The mode of what is made in a folder: its default list says what remains of it, or where there is none, the
    /// caller's mask. *acl(5)*, *Object creation and default ACLs*.
    pub(super) fn new_mode(&self, folder: &OwnedFd, mode: u32, caller: Caller) -> u32 {
        let default = if self.lists { xattrs::read(folder.as_fd(), DEFAULT) } else { Err(Errno::NODATA) };
        let mask = default.ok().and_then(|list| mask_of(&list));
        mode & mask.map_or(!(caller.umask & PERMISSIONS), |mask| !PERMISSIONS | mask)
    }
}

/// The permissions in a list: of the owner, of the mask or else the group, and of others. `None` for what is no list.
fn mask_of(list: &[u8]) -> Option<u32> {
    const VERSION: [u8; 4] = 2u32.to_le_bytes();
    const USER_OBJ: u16 = 1;
    const GROUP_OBJ: u16 = 4;
    const MASK: u16 = 0x10;
    const OTHER: u16 = 0x20;
    let entries = list.strip_prefix(&VERSION)?.chunks_exact(8);
    let entry = |tag: u16| {
        let mut entries = entries.clone();
        let found = entries.find(|entry| entry[..2] == tag.to_le_bytes())?;
        Some(u32::from(u16::from_le_bytes([found[2], found[3]])) & 7)
    };
    Some(entry(USER_OBJ)? << 6 | entry(MASK).or_else(|| entry(GROUP_OBJ))? << 3 | entry(OTHER)?)
}

#[cfg(test)]
mod tests {
    use rustix::fs::OFlags;

    use super::*;
    use crate::share::testing::{Place, SETTINGS};
    use crate::share::{ROOT, RenameFlags};

    const NONE: u32 = u32::MAX;
    const CALLER: Caller = Caller { uid: 0, gid: 0, umask: 0o027 };

    fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let entry = |&(tag, permissions, id): &(u16, u16, u32)| {
            [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        [vec![2, 0, 0, 0], entries.iter().flat_map(entry).collect()].concat()
    }

    #[test]
    fn a_list_leaves_of_a_mode_what_its_mask_or_its_group_allows() {
        let plain = [(1, 7, NONE), (4, 5, NONE), (0x20, 1, NONE)];
        assert_eq!(mask_of(&list(&plain)), Some(0o751));
        let named = [(1, 6, NONE), (2, 7, 1000), (4, 7, NONE), (8, 7, 50), (0x10, 2, NONE), (0x20, 0, NONE)];
        assert_eq!(mask_of(&list(&named)), Some(0o620));
        for wrong in [&b""[..], &[1, 0, 0, 0], &list(&[]), &list(&plain[1..]), &list(&plain)[..20]] {
            assert_eq!(mask_of(wrong), None, "{wrong:?}");
        }
    }

    /// The folder as root's; `None`, with a message, where it can have no lists.
    fn share(place: &Place) -> Option<Folder> {
        let folder = Folder::open(&place.path(""), SETTINGS).unwrap();
        if !folder.has_lists() {
            eprintln!("skipped: lists take root and a file system that has them");
        }
        Some(folder).filter(Folder::has_lists)
    }

    #[test]
    fn a_list_changes_the_mode_also_where_that_is_kept_beside_the_file() {
        let place = Place::new();
        let Some(folder) = share(&place) else { return };
        let (file, _) = folder.create(ROOT, b"f", OFlags::RDWR, 0o6755, CALLER).unwrap();
        assert_eq!(file.attributes.owner.mode & 0o7777, 0o6750, "the mask counts where there is no list");
        let wanted = list(&[(1, 6, NONE), (2, 7, 1000), (4, 0, NONE), (0x10, 5, NONE), (0x20, 4, NONE)]);
        folder.set_attribute(file.node, ACCESS, &wanted, 0).unwrap();
        assert_eq!(folder.attribute(file.node, ACCESS).unwrap(), wanted);
        assert_eq!(folder.attribute_names(file.node, 0).unwrap(), [ACCESS, b"\0"].concat());
        let mode = || folder.attributes(file.node).unwrap().owner.mode & 0o7777;
        assert_eq!(mode(), 0o6654);
        folder.kill_set_group(file.node).unwrap();
        assert_eq!(mode(), 0o4654);
        folder.remove_attribute(file.node, ACCESS).unwrap();
        folder.remove_attribute(file.node, ACCESS).unwrap();
        assert_eq!((mode(), folder.attribute(file.node, ACCESS)), (0o4654, Err(Errno::NODATA)));
        assert_eq!(folder.set_attribute(file.node, ACCESS, &wanted[..20], 0), Err(Errno::INVAL));
    }

    #[test]
    fn what_is_made_in_a_folder_with_a_default_list_has_it_and_not_the_mask() {
        let place = Place::new();
        let Some(folder) = share(&place) else { return };
        let default = list(&[(1, 7, NONE), (2, 6, 1000), (4, 5, NONE), (0x10, 7, NONE), (0x20, 1, NONE)]);
        folder.set_attribute(ROOT, DEFAULT, &default, 0).unwrap();
        let below = folder.make_folder(ROOT, b"d", 0o777, CALLER).unwrap();
        assert_eq!(folder.attribute(below.node, DEFAULT).unwrap(), default);
        assert_eq!(below.attributes.owner.mode & 0o7777, 0o771);
        let (file, _) = folder.create(ROOT, b"f", OFlags::RDWR, 0o666, CALLER).unwrap();
        assert_eq!(file.attributes.owner.mode & 0o7777, 0o660);
        assert!(folder.attribute(file.node, ACCESS).unwrap().len() > 4);
        let (unnamed, _) = folder.create_unnamed(ROOT, OFlags::RDWR, 0o606, CALLER).unwrap();
        assert_eq!(unnamed.attributes.owner.mode & 0o7777, 0o600);
        // A device is a file on the host, whose list there is not the device's.
        let device = folder.make_node(ROOT, b"c", kind::CHAR | 0o666, 0x103, CALLER).unwrap();
        assert_eq!(device.attributes.owner.mode & 0o7777, 0o660);
        assert_eq!(folder.attribute(device.node, ACCESS), Err(Errno::NODATA));
        assert_eq!(folder.set_attribute(device.node, ACCESS, &default, 0), Err(Errno::OPNOTSUPP));
        assert_eq!(folder.attribute_names(device.node, 0), Ok(Vec::new()));
        folder.rename((ROOT, b"f"), (below.node, b"f"), RenameFlags::empty()).unwrap();
        assert!(folder.attribute(file.node, ACCESS).is_ok());
    }

    #[test]
    fn an_ordinary_users_share_has_none_and_nothing_gets_onto_the_host() {
        let place = Place::new();
        let folder = place.share();
        let (file, _) = folder.create(ROOT, b"f", OFlags::RDWR, 0o644, CALLER).unwrap();
        let wanted = list(&[(1, 6, NONE), (2, 7, 1000), (4, 0, NONE), (0x10, 5, NONE), (0x20, 4, NONE)]);
        for name in [ACCESS, DEFAULT] {
            assert_eq!(folder.set_attribute(file.node, name, &wanted, 0), Err(Errno::OPNOTSUPP));
            assert_eq!(folder.attribute(file.node, name), Err(Errno::OPNOTSUPP));
            assert_eq!(folder.remove_attribute(file.node, name), Err(Errno::OPNOTSUPP));
        }
        let mut none: [u8; 0] = [];
        assert!(rustix::fs::getxattr(place.path("f"), ACCESS, &mut none[..]).is_err());
    }
}
