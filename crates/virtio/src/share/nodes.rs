//! What the guest knows of the folder: files by number, each with the way to it.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{Errno, Result};

/// A file's number for the guest.
pub type NodeId = u64;

/// The shared folder itself.
pub const ROOT: NodeId = 1;

/// The deepest way that is walked anew; whoever moves folders about on the host can make rings of stale ways.
const MAX_DEPTH: usize = 4096;

/// What tells files of the host apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The file system.
    pub device: u64,
    /// The file in it.
    pub inode: u64,
}

/// What a file is, as far as it never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Which it is.
    pub key: Key,
    /// Its kind on the host: the format bits of its mode.
    pub kind: u32,
    /// Whether it is shown but never entered or opened: a mount of the host's kernel, such as `/proc`.
    pub closed: bool,
}

#[derive(Debug)]
struct Node {
    identity: Identity,
    /// The way to it: its name in a folder. It was right when the guest last took it.
    parent: NodeId,
    name: Box<[u8]>,
    /// How often the guest holds it.
    references: u64,
    /// How many nodes have it as their parent.
    children: u64,
    /// A descriptor that only names it (`O_PATH`), kept while there is room.
    descriptor: Option<Arc<OwnedFd>>,
    /// Whether the descriptor was used since room was last looked for.
    recent: bool,
    /// Whether the way does not lead to it any more, so that the descriptor must stay.
    pinned: bool,
    /// Whether the guest sees its set-group-id bit: what is created in it gets its group.
    inherits_group: bool,
}

/// One step of a way: a node, and its name in the one before.
#[derive(Debug)]
pub struct Step {
    /// The node.
    pub id: NodeId,
    /// Its name.
    pub name: Box<[u8]>,
    /// What must be found there.
    pub key: Key,
}

/// The files that the guest knows.
#[derive(Debug)]
pub struct Nodes {
    nodes: HashMap<NodeId, Node>,
    by_key: HashMap<Key, NodeId>,
    next: NodeId,
    /// Nodes whose descriptors can be closed, the longest unused ones first.
    closable: VecDeque<NodeId>,
    pinned: usize,
    limits: Limits,
}

/// How much there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Files that the guest knows at a time.
    pub nodes: usize,
    /// Descriptors that are kept for them; half as many again may be pinned.
    pub descriptors: usize,
}

impl Nodes {
    /// The folder alone.
    pub fn new(root: OwnedFd, identity: Identity, limits: Limits) -> Self {
        let node = Node {
            identity,
            parent: ROOT,
            name: Box::default(),
            references: 1,
            children: 0,
            descriptor: Some(Arc::new(root)),
            recent: true,
            pinned: true,
            inherits_group: false,
        };
        Self {
            nodes: HashMap::from([(ROOT, node)]),
            by_key: HashMap::from([(identity.key, ROOT)]),
            next: ROOT + 1,
            closable: VecDeque::new(),
            pinned: 1,
            limits,
        }
    }

    /// How many the guest knows.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// How many descriptors are open for them.
    #[cfg(test)]
    pub fn descriptors(&self) -> usize {
        self.nodes.values().filter(|node| node.descriptor.is_some()).count()
    }

    fn node(&self, id: NodeId) -> Result<&Node> {
        self.nodes.get(&id).ok_or(Errno::STALE)
    }

    /// What a node is.
    pub fn identity(&self, id: NodeId) -> Result<Identity> {
        self.node(id).map(|node| node.identity)
    }

    /// The folder that a node is in; the root's is itself.
    pub fn parent(&self, id: NodeId) -> Result<NodeId> {
        self.node(id).map(|node| node.parent)
    }

    /// A node's name in its folder; the root has none.
    pub fn name(&self, id: NodeId) -> Result<Box<[u8]>> {
        self.node(id).map(|node| node.name.clone())
    }

    /// The node of a file that the guest knows.
    pub fn find(&self, key: Key) -> Option<NodeId> {
        self.by_key.get(&key).copied()
    }

    /// Whether what is created in a folder gets the folder's group.
    pub fn inherits_group(&self, id: NodeId) -> bool {
        self.nodes.get(&id).is_some_and(|node| node.inherits_group)
    }

    /// Notes what the guest sees of a folder.
    pub fn set_inherits_group(&mut self, id: NodeId, inherits: bool) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.inherits_group = inherits;
        }
    }

    /// Notes that a file was found under a name, and that the guest holds it once more.
    ///
    /// # Errors
    /// `ENFILE` where the guest knows too many files already.
    pub fn take(&mut self, identity: Identity, parent: NodeId, name: &[u8]) -> Result<NodeId> {
        self.node(parent)?;
        if let Some(&id) = self.by_key.get(&identity.key) {
            if self.node(id)?.identity.kind == identity.kind {
                self.place(id, parent, name);
                let node = self.nodes.get_mut(&id).ok_or(Errno::STALE)?;
                node.references = node.references.saturating_add(1);
                return Ok(id);
            }
            // The host gave the number of a file that is gone to another one.
            self.by_key.remove(&identity.key);
        }
        if self.nodes.len() >= self.limits.nodes {
            return Err(Errno::NFILE);
        }
        let id = self.next;
        self.next += 1;
        self.by_key.insert(identity.key, id);
        let node = Node {
            identity,
            parent,
            name: name.into(),
            references: 1,
            children: 0,
            descriptor: None,
            recent: false,
            pinned: false,
            inherits_group: false,
        };
        self.nodes.insert(id, node);
        self.count_child(parent);
        Ok(id)
    }

    /// Notes that the guest holds a file that has no name; its descriptor is kept.
    ///
    /// # Errors
    /// `ENFILE` where too many files or descriptors are held already.
    pub fn take_unnamed(
        &mut self,
        identity: Identity,
        parent: NodeId,
        descriptor: &Arc<OwnedFd>,
    ) -> Result<NodeId> {
        let id = self.take(identity, parent, b"")?;
        self.keep(id, descriptor);
        self.pin(id);
        if self.node(id)?.pinned {
            return Ok(id);
        }
        self.forget(id, 1);
        Err(Errno::NFILE)
    }

    /// Takes one more reference of a node that is known.
    pub fn retain(&mut self, id: NodeId) -> Result<()> {
        let node = self.nodes.get_mut(&id).ok_or(Errno::STALE)?;
        node.references = node.references.saturating_add(1);
        Ok(())
    }

    /// Gives references back; a node that nobody holds is gone, and its number with it.
    pub fn forget(&mut self, id: NodeId, count: u64) -> Vec<NodeId> {
        if id != ROOT
            && let Some(node) = self.nodes.get_mut(&id)
        {
            node.references = node.references.saturating_sub(count);
        }
        self.drop_unused(id)
    }

    /// Forgets everything but the root.
    pub fn clear(&mut self) {
        self.nodes.retain(|&id, _| id == ROOT);
        self.by_key.retain(|_, id| *id == ROOT);
        self.closable.clear();
        self.pinned = 1;
        if let Some(root) = self.nodes.get_mut(&ROOT) {
            root.children = 0;
        }
    }

    /// Removes a node, and the folders above it that were only there for it.
    fn drop_unused(&mut self, mut id: NodeId) -> Vec<NodeId> {
        let mut gone = Vec::new();
        while id != ROOT
            && self.nodes.get(&id).is_some_and(|node| node.references == 0 && node.children == 0)
            && let Some(node) = self.nodes.remove(&id)
        {
            if self.by_key.get(&node.identity.key) == Some(&id) {
                self.by_key.remove(&node.identity.key);
            }
            self.pinned -= usize::from(node.pinned);
            gone.push(id);
            id = node.parent;
            if let Some(parent) = self.nodes.get_mut(&id) {
                parent.children -= 1;
            }
        }
        gone
    }

    fn count_child(&mut self, parent: NodeId) {
        if let Some(node) = self.nodes.get_mut(&parent) {
            node.children += 1;
        }
    }

    /// Notes where a file is now.
    pub fn place(&mut self, id: NodeId, parent: NodeId, name: &[u8]) {
        if id == ROOT || id == parent || !self.nodes.contains_key(&parent) {
            return;
        }
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if std::mem::take(&mut node.pinned) {
            self.pinned -= 1;
            self.closable.push_back(id);
        }
        if node.parent == parent && *node.name == *name {
            return;
        }
        let before = std::mem::replace(&mut node.parent, parent);
        node.name = name.into();
        self.count_child(parent);
        if let Some(node) = self.nodes.get_mut(&before) {
            node.children -= 1;
        }
        self.drop_unused(before);
    }

    /// Notes that another file of the host is now what a node was.
    pub fn replaced(&mut self, id: NodeId, identity: Identity) {
        let Some(node) = self.nodes.get_mut(&id).filter(|_| id != ROOT) else { return };
        let before = std::mem::replace(&mut node.identity, identity);
        node.descriptor = None;
        self.pinned -= usize::from(std::mem::take(&mut node.pinned));
        if self.by_key.get(&before.key) == Some(&id) {
            self.by_key.remove(&before.key);
        }
        self.by_key.insert(identity.key, id);
    }

    /// Keeps a node's descriptor, because its way leads to it no more. Where too many are kept already, the node becomes
    /// stale when its descriptor is closed.
    pub fn pin(&mut self, id: NodeId) {
        if self.pinned > self.limits.descriptors / 2 {
            return;
        }
        if let Some(node) = self.nodes.get_mut(&id)
            && node.descriptor.is_some()
            && !node.pinned
        {
            node.pinned = true;
            self.pinned += 1;
        }
    }

    /// A node's descriptor, or the way from the nearest folder that has one.
    pub fn descriptor(&mut self, id: NodeId) -> Result<(Arc<OwnedFd>, Vec<Step>)> {
        let (mut at, mut steps) = (id, Vec::new());
        while steps.len() < MAX_DEPTH {
            let node = self.nodes.get_mut(&at).ok_or(Errno::STALE)?;
            if let Some(descriptor) = &node.descriptor {
                node.recent = true;
                steps.reverse();
                return Ok((descriptor.clone(), steps));
            }
            steps.push(Step { id: at, name: node.name.clone(), key: node.identity.key });
            at = node.parent;
        }
        Err(Errno::STALE)
    }

    /// Keeps a descriptor for a node, and closes others where there are too many.
    pub fn keep(&mut self, id: NodeId, descriptor: &Arc<OwnedFd>) {
        if let Some(node) = self.nodes.get_mut(&id)
            && node.descriptor.is_none()
        {
            node.descriptor = Some(descriptor.clone());
            node.recent = true;
            self.closable.push_back(id);
        }
        let mut chances = 2 * self.closable.len();
        while self.closable.len() > self.limits.descriptors && chances > 0 {
            chances -= 1;
            let Some(oldest) = self.closable.pop_front() else { return };
            let Some(node) = self.nodes.get_mut(&oldest).filter(|node| !node.pinned) else { continue };
            if std::mem::take(&mut node.recent) {
                self.closable.push_back(oldest);
            } else {
                node.descriptor = None;
            }
        }
    }
}
