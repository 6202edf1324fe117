//! Extended attributes. The guest's `user.` ones are the host's; those with privileges (`security.`, `trusted.`) are kept
//! on the host under names that have none there, so that a file's capabilities in the guest are not capabilities on the
//! host. What Ringside keeps beside files is not to be seen. Access control lists are in `lists`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::XattrFlags;

use super::ownership::kind;
use super::{Errno, Folder, NodeId, Result, link_to, lists};

/// What is Ringside's.
const OWN: &[u8] = b"user.ringside.";
/// Where privileged attributes are kept.
const KEPT: &[u8] = b"user.ringside.xattr.";
/// The longest name, and the longest value, in bytes.
const MAX_NAME: usize = 255;
const MAX_VALUE: usize = 64 << 10;
/// The longest list of names.
const MAX_LIST: usize = 64 << 10;
/// The attribute with a program's capabilities.
const CAPABILITY: &[u8] = b"security.capability";

impl Folder {
    /// An attribute's value.
    ///
    /// # Errors
    /// The host's; `ENODATA` where there is none.
    pub fn attribute(&self, node: NodeId, name: &[u8]) -> Result<Vec<u8>> {
        if lists::is_list(name) {
            return self.access_list(node, name);
        }
        let (name, file) = (host_name(name)?, self.attributed(node, Errno::NODATA)?);
        read(file.as_fd(), &name)
    }

    /// Sets an attribute.
    ///
    /// # Errors
    /// The host's.
    pub fn set_attribute(&self, node: NodeId, name: &[u8], value: &[u8], flags: u32) -> Result<()> {
        self.writable()?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        if value.len() > MAX_VALUE {
            return Err(Errno::TOOBIG);
        }
        if lists::is_list(name) {
            return self.set_list(node, name, value, flags);
        }
        let (name, file) = (host_name(name)?, self.attributed(node, Errno::PERM)?);
        rustix::fs::setxattr(link_to(file.as_fd()), &*name, value, flags)
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// The host's; `ENODATA` where there is none.
    pub fn remove_attribute(&self, node: NodeId, name: &[u8]) -> Result<()> {
        self.writable()?;
        if lists::is_list(name) {
            return self.set_list(node, name, &[], XattrFlags::empty());
        }
        let (name, file) = (host_name(name)?, self.attributed(node, Errno::NODATA)?);
        rustix::fs::removexattr(link_to(file.as_fd()), &*name)
    }

    /// The names of a file's attributes that a user of the guest may know of, each with a NUL behind it.
    ///
    /// # Errors
    /// The host's.
    pub fn attribute_names(&self, node: NodeId, uid: u32) -> Result<Vec<u8>> {
        let file = match self.attributed(node, Errno::NODATA) {
            Err(Errno::NODATA) => return Ok(Vec::new()),
            other => other?,
        };
        let mut list = Vec::with_capacity(MAX_LIST);
        rustix::fs::listxattr(link_to(file.as_fd()), rustix::buffer::spare_capacity(&mut list))?;
        let mut shown = Vec::new();
        let may_know = |name: &&[u8]| uid == 0 || !name.starts_with(b"trusted.");
        let has_lists = self.listed(node).is_ok();
        let shown_as = |name| if has_lists && lists::is_list(name) { Some(name) } else { guest_name(name) };
        for name in list.split(|&byte| byte == 0).filter_map(shown_as).filter(may_know) {
            shown.extend_from_slice(name);
            shown.push(0);
        }
        Ok(shown)
    }

    /// Takes a program's capabilities, for what is written to.
    pub(super) fn kill_capability(&self, node: NodeId) {
        let _ = self.remove_attribute(node, CAPABILITY);
    }

    /// A descriptor of a file that can have attributes of users; its path is good while it is held.
    fn attributed(&self, node: NodeId, otherwise: Errno) -> Result<Arc<OwnedFd>> {
        let identity = self.nodes().identity(node)?;
        if identity.closed || !matches!(identity.kind, kind::FILE | kind::FOLDER) {
            return Err(otherwise);
        }
        self.descriptor(node)
    }
}

/// An attribute of the host's.
pub(super) fn read(file: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<u8>> {
    let path = link_to(file);
    let mut value = Vec::with_capacity(256);
    loop {
        match rustix::fs::getxattr(&*path, name, rustix::buffer::spare_capacity(&mut value)) {
            Err(Errno::RANGE) if value.capacity() < MAX_VALUE => value = Vec::with_capacity(MAX_VALUE),
            other => return other.map(|_| value),
        }
    }
}

/// The name on the host of an attribute of the guest.
fn host_name(name: &[u8]) -> Result<Vec<u8>> {
    if name.is_empty() || name.len() > MAX_NAME || name.contains(&0) {
        return Err(if name.len() > MAX_NAME { Errno::RANGE } else { Errno::INVAL });
    }
    if name.starts_with(OWN) {
        return Err(Errno::PERM);
    }
    if name.starts_with(b"user.") {
        return Ok(name.to_vec());
    }
    if name.starts_with(b"security.") || name.starts_with(b"trusted.") {
        return Ok([KEPT, name].concat());
    }
    Err(Errno::OPNOTSUPP)
}

/// The guest's name of an attribute on the host, where it sees it.
fn guest_name(name: &[u8]) -> Option<&[u8]> {
    match name.strip_prefix(KEPT) {
        Some(kept) => (!kept.is_empty()).then_some(kept),
        None => (name.starts_with(b"user.") && !name.starts_with(OWN)).then_some(name),
    }
}
