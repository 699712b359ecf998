//! The inodes that the guest knows, by node id.
//!
//! A node of the host is identified by device, inode number and mount. It is found again, when needed,
//! through the first of: a cached descriptor, an open handle (see the share), a file handle noted when its
//! descriptor was evicted, or its parent and name, checked against the identity. So the table may hold
//! far more nodes than there are descriptors. When the guest removes a name, what was there can be found by
//! none but the first; so such nodes keep their descriptors, as many as are cached at most.

use std::collections::{HashMap, VecDeque};
use std::ffi::CStr;
use std::hash::{BuildHasherDefault, Hasher};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;

use super::abi::{ROOT, Time};
use super::limits::Limits;
use super::sys::FileHandle;

/// Hashes the ids given out here, which count up and need no protection.
#[derive(Debug, Default, Clone, Copy)]
pub struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64(u64::from(*b));
        }
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = (self.0 ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(26);
    }
}

/// A map by node id or handle.
pub type IdMap<T> = HashMap<u64, T, BuildHasherDefault<IdHasher>>;

/// Which inode of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Major and minor number of the device.
    pub dev: (u32, u32),
    /// Inode number.
    pub ino: u64,
    /// Mount; 0 where the host does not say.
    pub mnt: u64,
}

/// What tells an inode from a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Which inode.
    pub key: Key,
    /// `S_IFMT` bits of the mode.
    pub kind: u32,
    /// Time of birth, where the file system keeps it.
    pub born: Option<Time>,
}

/// An inode of the host.
#[derive(Debug)]
pub struct HostNode {
    /// Which one.
    pub id: Identity,
    fd: Option<Arc<OwnedFd>>,
    /// A descriptor that is not evicted, for the name is gone.
    kept: Option<Arc<OwnedFd>>,
    /// Asked for since the clock hand last passed.
    used: bool,
    handle: Option<Box<FileHandle>>,
    /// Open handles on it.
    pub open: Vec<u64>,
    /// Size, modification and change time when last opened.
    pub seen: Option<(u64, Time, Time)>,
}

/// What a node is.
#[derive(Debug)]
pub enum What {
    /// An inode of the host.
    Host(HostNode),
    /// An overlay, by index.
    Virtual(usize),
}

/// An inode that the guest knows.
#[derive(Debug)]
pub struct Node {
    /// What it is.
    pub what: What,
    nlookup: u64,
    /// Nodes whose parent it is.
    children: u64,
    /// Where it was last seen; 0: nowhere.
    parent: u64,
    name: Box<CStr>,
}

impl Node {
    fn new(what: What, parent: u64, name: &CStr) -> Self {
        Self { what, nlookup: 1, children: 0, parent, name: name.into() }
    }

    /// The host inode.
    ///
    /// # Errors
    /// EROFS: it is an overlay.
    pub fn host(&self) -> Result<&HostNode, Errno> {
        match &self.what {
            What::Host(h) => Ok(h),
            What::Virtual(_) => Err(Errno::ROFS),
        }
    }

    /// Parent and name, if it was found by name.
    pub fn place(&self) -> Option<(u64, &CStr)> {
        (self.parent != 0).then_some((self.parent, &*self.name))
    }
}

/// The table.
#[derive(Debug)]
pub struct Inodes {
    nodes: IdMap<Node>,
    by_key: HashMap<Key, u64>,
    next: u64,
    /// Nodes that hold a descriptor, and some that no longer do, in the order the clock hand passes.
    ring: VecDeque<u64>,
    held: usize,
    /// Nodes whose descriptor is kept because their name is gone.
    kept: usize,
    limits: Limits,
    /// A real descriptor on the root's mount, where file handles can be used.
    by_handle: Option<(u64, Arc<OwnedFd>)>,
}

impl Inodes {
    /// A table with only the root, which the limits do not count.
    pub fn new(root: What, limits: Limits) -> Self {
        let mut table = Self {
            nodes: IdMap::default(),
            by_key: HashMap::new(),
            next: ROOT + 1,
            ring: VecDeque::new(),
            held: 0,
            kept: 0,
            limits: Limits { cached: limits.cached.max(1), ..limits },
            by_handle: None,
        };
        if let What::Host(h) = &root {
            table.by_key.insert(h.id.key, ROOT);
        }
        table.nodes.insert(ROOT, Node::new(root, 0, c""));
        table
    }

    /// The root's node content: its descriptor stays for good.
    pub fn root_of(id: Identity, fd: Arc<OwnedFd>) -> What {
        let mut host = host_node(id);
        host.fd = Some(fd);
        What::Host(host)
    }

    /// Allows file handles on mount `mnt`; `fd` is a real descriptor on it.
    pub fn use_handles(&mut self, mnt: u64, fd: Arc<OwnedFd>) {
        self.by_handle = Some((mnt, fd));
    }

    /// What the share may take.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Number of nodes, the root included.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Number of descriptors held, the root's not counted.
    #[cfg(test)]
    pub fn held(&self) -> usize {
        self.held + self.kept
    }

    /// A node.
    ///
    /// # Errors
    /// ESTALE: there is none.
    pub fn get(&self, id: u64) -> Result<&Node, Errno> {
        self.nodes.get(&id).ok_or(Errno::STALE)
    }

    /// A host node.
    ///
    /// # Errors
    /// ESTALE: there is none; EROFS: it is an overlay.
    pub fn host(&self, id: u64) -> Result<&HostNode, Errno> {
        self.get(id)?.host()
    }

    /// A host node, if there is one of that id.
    pub fn host_mut(&mut self, id: u64) -> Option<&mut HostNode> {
        match &mut self.nodes.get_mut(&id)?.what {
            What::Host(h) => Some(h),
            What::Virtual(_) => None,
        }
    }

    /// The node of an inode, if the guest knows it.
    pub fn find(&self, id: &Identity) -> Option<u64> {
        let node = *self.by_key.get(&id.key)?;
        (self.host(node).ok()?.id == *id).then_some(node)
    }

    /// Counts one lookup of the inode `id`, found as `name` in `parent`, and returns its node id.
    /// `fresh`: it was created just now, so a node with the same number is one that is gone.
    ///
    /// # Errors
    /// ENFILE: too many nodes.
    pub fn enter(&mut self, parent: u64, name: &CStr, id: Identity, fresh: bool) -> Result<u64, Errno> {
        if let Some(known) = self.find(&id)
            && !fresh
        {
            self.add_lookup(known);
            self.place(known, parent, name);
            return Ok(known);
        }
        let new = self.insert(What::Host(host_node(id)), parent, name)?;
        self.by_key.insert(id.key, new);
        Ok(new)
    }

    /// Adds a node for overlay `index`, with one lookup.
    ///
    /// # Errors
    /// ENFILE: too many nodes.
    pub fn enter_virtual(&mut self, index: usize, parent: u64, name: &CStr) -> Result<u64, Errno> {
        self.insert(What::Virtual(index), parent, name)
    }

    /// Counts one more lookup.
    pub fn add_lookup(&mut self, id: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.nlookup = node.nlookup.saturating_add(1);
        }
    }

    fn insert(&mut self, what: What, parent: u64, name: &CStr) -> Result<u64, Errno> {
        self.limits.quota.take(1)?;
        let id = self.next;
        self.next += 1;
        self.nodes.insert(id, Node::new(what, parent, name));
        if let Some(p) = self.nodes.get_mut(&parent) {
            p.children += 1;
        }
        Ok(id)
    }

    /// Notes that node `id` is now `name` in `parent`.
    pub fn place(&mut self, id: u64, parent: u64, name: &CStr) {
        if self.host_mut(id).is_some_and(|host| host.kept.take().is_some()) {
            self.kept -= 1;
        }
        let Some(node) = self.nodes.get(&id) else { return };
        if id == ROOT || (node.parent == parent && *node.name == *name) {
            return;
        }
        if node.children > 0 && !self.unloop(id, parent) {
            return;
        }
        let old = match self.nodes.get_mut(&id) {
            Some(node) => {
                if *node.name != *name {
                    node.name = name.into();
                }
                std::mem::replace(&mut node.parent, parent)
            }
            None => return,
        };
        if old != parent {
            if let Some(p) = self.nodes.get_mut(&parent) {
                p.children += 1;
            }
            self.lose_child(old);
        }
    }

    /// Directories may have been moved on the host since they were seen. If `id` is noted as an ancestor
    /// of `parent`, that note is out of date: cuts the chain below `id`, so that it stays a tree.
    /// False when `id` is `parent` itself.
    fn unloop(&mut self, id: u64, parent: u64) -> bool {
        let mut at = parent;
        while let Some(node) = self.nodes.get_mut(&at) {
            if at == id {
                return false;
            }
            if node.parent == id {
                node.parent = 0;
                if let Some(n) = self.nodes.get_mut(&id) {
                    n.children = n.children.saturating_sub(1);
                }
                return true;
            }
            at = node.parent;
        }
        true
    }

    /// Gives back `n` lookups of `id`; with the last, and no children, the node goes.
    pub fn forget(&mut self, id: u64, n: u64) {
        if id == ROOT {
            return;
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.nlookup = node.nlookup.saturating_sub(n);
            self.drop_unused(id);
        }
    }

    fn lose_child(&mut self, parent: u64) {
        if let Some(p) = self.nodes.get_mut(&parent) {
            p.children = p.children.saturating_sub(1);
            self.drop_unused(parent);
        }
    }

    /// Removes `id` and then its ancestors as far as nothing needs them.
    fn drop_unused(&mut self, id: u64) {
        let mut at = id;
        while at != ROOT
            && let Some(node) = self.nodes.get(&at)
            && node.nlookup == 0
            && node.children == 0
        {
            let parent = node.parent;
            if let Some(Node { what: What::Host(host), .. }) = self.nodes.remove(&at) {
                if self.by_key.get(&host.id.key) == Some(&at) {
                    self.by_key.remove(&host.id.key);
                }
                self.held -= usize::from(host.fd.is_some());
                self.kept -= usize::from(host.kept.is_some());
            }
            self.limits.quota.give(1);
            at = parent;
            match self.nodes.get_mut(&at) {
                Some(p) => p.children = p.children.saturating_sub(1),
                None => break,
            }
        }
        self.tidy();
    }

    /// Whether `id` is still the node of overlay `index`.
    pub fn is_virtual(&self, id: u64, index: usize) -> bool {
        matches!(self.nodes.get(&id), Some(Node { what: What::Virtual(i), .. }) if *i == index)
    }

    /// The cached descriptor of `id`.
    pub fn cached(&mut self, id: u64) -> Option<Arc<OwnedFd>> {
        let host = self.host_mut(id)?;
        host.used = true;
        host.kept.clone().or_else(|| host.fd.clone())
    }

    /// Keeps `fd` as the descriptor of `id`, whose name is gone, until it is found under another. Where there
    /// are too many already, the node may be lost.
    pub fn keep(&mut self, id: u64, fd: Arc<OwnedFd>) {
        if self.kept >= self.limits.cached || !self.limits.allow_spare(&fd) {
            return;
        }
        if let Some(host) = self.host_mut(id)
            && host.kept.replace(fd).is_none()
        {
            self.kept += 1;
        }
    }

    /// Opens `id` by the file handle noted earlier.
    pub fn by_handle(&self, id: u64) -> Option<OwnedFd> {
        let (_, mount) = self.by_handle.as_ref()?;
        self.host(id).ok()?.handle.as_ref()?.open(mount.as_fd()).ok()
    }

    /// Keeps `fd` as the descriptor of `id`, and makes room for it.
    pub fn cache(&mut self, id: u64, fd: &Arc<OwnedFd>) {
        // One that must not be kept serves once.
        if !self.limits.allow_spare(fd) {
            return;
        }
        while self.held >= self.limits.cached {
            if !self.evict() {
                return;
            }
        }
        let Some(host) = self.host_mut(id) else { return };
        if host.fd.replace(Arc::clone(fd)).is_none() {
            host.used = false;
            self.held += 1;
            self.ring.push_back(id);
        }
    }

    /// Closes half of the cached descriptors; false when there was none.
    pub fn shed(&mut self) -> bool {
        let keep = self.held / 2;
        let any = self.held > 0;
        while self.held > keep {
            if !self.evict() {
                break;
            }
        }
        any
    }

    /// Closes the next descriptor under the clock hand that was not used since it last passed.
    fn evict(&mut self) -> bool {
        let handles = self.by_handle.as_ref().map(|(mnt, _)| *mnt);
        // Twice around: the first pass may only clear marks.
        for _ in 0..=2 * self.ring.len() {
            let Some(id) = self.ring.pop_front() else { return false };
            let Some(host) = self.host_mut(id) else { continue };
            let Some(fd) = host.fd.take() else { continue };
            if std::mem::take(&mut host.used) {
                host.fd = Some(fd);
                self.ring.push_back(id);
                continue;
            }
            if host.handle.is_none() && handles == Some(host.id.key.mnt) {
                host.handle = FileHandle::of(fd.as_fd()).ok().map(Box::new);
            }
            self.held -= 1;
            return true;
        }
        false
    }

    /// Drops entries of the ring whose nodes are gone, once they outnumber the others.
    fn tidy(&mut self) {
        if self.ring.len() > 2 * self.held + 64 {
            let nodes = &self.nodes;
            self.ring.retain(
                |id| matches!(nodes.get(id), Some(Node { what: What::Host(h), .. }) if h.fd.is_some()),
            );
        }
    }

    /// Forgets all but the root.
    pub fn clear(&mut self) {
        let root = self.nodes.remove(&ROOT);
        self.limits.quota.give(self.nodes.len());
        self.nodes.clear();
        self.by_key.clear();
        self.ring.clear();
        (self.held, self.kept) = (0, 0);
        if let Some(mut root) = root {
            root.children = 0;
            if let What::Host(h) = &mut root.what {
                h.open.clear();
                h.seen = None;
                self.by_key.insert(h.id.key, ROOT);
            }
            self.nodes.insert(ROOT, root);
        }
    }
}

fn host_node(id: Identity) -> HostNode {
    HostNode { id, fd: None, kept: None, used: false, handle: None, open: Vec::new(), seen: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::limits::Quota;

    fn ident(ino: u64, born: i64) -> Identity {
        Identity {
            key: Key { dev: (0, 1), ino, mnt: 9 },
            kind: libc::S_IFREG,
            born: Some(Time { sec: born, nsec: 0 }),
        }
    }

    fn fd() -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open("/").unwrap().into())
    }

    fn table(cap: usize) -> Inodes {
        let limits = Limits { cached: cap, ..Limits::new(Quota::new(10)) };
        Inodes::new(Inodes::root_of(ident(2, 0), fd()), limits)
    }

    #[test]
    fn lookups_are_counted() {
        let mut t = table(4);
        let a = t.enter(ROOT, c"a", ident(3, 0), false).unwrap();
        assert_eq!(t.enter(ROOT, c"b", ident(3, 0), false).unwrap(), a);
        assert_eq!(t.get(a).unwrap().place().unwrap().1, c"b");
        t.forget(a, 1);
        assert_eq!(t.len(), 2);
        t.forget(a, 1);
        assert_eq!(t.len(), 1);
        t.forget(ROOT, u64::MAX);
        assert_eq!(t.len(), 1);
    }

    #[test]
    fn a_parent_stays_while_it_has_children() {
        let mut t = table(4);
        let d = t.enter(ROOT, c"d", ident(3, 0), false).unwrap();
        let f = t.enter(d, c"f", ident(4, 0), false).unwrap();
        t.forget(d, 1);
        assert!(t.get(d).is_ok());
        t.forget(f, 1);
        assert_eq!(t.len(), 1);
    }

    #[test]
    fn there_are_no_more_nodes_than_the_quota_allows() {
        let mut t = table(4);
        let ids: Vec<_> = (10..20).map(|i| t.enter(ROOT, c"x", ident(i, 0), false).unwrap()).collect();
        assert_eq!(t.enter(ROOT, c"y", ident(20, 0), false), Err(Errno::NFILE));
        assert_eq!(t.enter_virtual(0, ROOT, c"y"), Err(Errno::NFILE));
        // One that is known costs nothing more.
        assert_eq!(t.enter(ROOT, c"x", ident(19, 0), false), Ok(ids[9]));
        t.forget(ids[0], 1);
        assert_eq!(t.limits().quota.left(), 1);
        t.enter(ROOT, c"y", ident(20, 0), false).unwrap();
        t.clear();
        assert_eq!((t.len(), t.limits().quota.left()), (1, 10));
    }

    #[test]
    fn a_number_used_again_is_another_node() {
        let mut t = table(4);
        let a = t.enter(ROOT, c"a", ident(3, 0), false).unwrap();
        let b = t.enter(ROOT, c"a", ident(3, 1), false).unwrap();
        let c = t.enter(ROOT, c"a", ident(3, 1), true).unwrap();
        assert!(a != b && b != c);
        t.forget(a, 1);
        t.forget(b, 1);
        assert_eq!(t.find(&ident(3, 1)), Some(c));
    }

    #[test]
    fn directories_moved_on_the_host_leave_no_loop() {
        let mut t = table(4);
        let a = t.enter(ROOT, c"a", ident(3, 0), false).unwrap();
        let b = t.enter(a, c"b", ident(4, 0), false).unwrap();
        let c = t.enter(b, c"c", ident(5, 0), false).unwrap();
        // On the host, c has become the parent of a.
        assert_eq!(t.enter(c, c"a", ident(3, 0), false).unwrap(), a);
        let mut at = a;
        for _ in 0..4 {
            at = t.get(at).map_or(0, |n| n.parent);
        }
        assert_eq!(at, 0);
        for (id, n) in [(a, 2), (b, 1), (c, 1)] {
            t.forget(id, n);
        }
        assert_eq!(t.len(), 1);
    }

    #[test]
    fn descriptors_stay_below_the_cap() {
        let mut t = table(3);
        let ids: Vec<_> = (10..20).map(|i| t.enter(ROOT, c"x", ident(i, 0), false).unwrap()).collect();
        for id in &ids {
            t.cache(*id, &fd());
            assert!(t.held() <= 3);
        }
        let last = ids[9];
        assert!(t.cached(last).is_some());
        t.cache(ids[0], &fd());
        assert!(t.cached(last).is_some(), "one in use outlives one that is not");
        assert!(t.shed());
        assert!(t.held() <= 1);
        for id in ids {
            t.forget(id, 1);
        }
        assert_eq!((t.held(), t.len()), (0, 1));
    }
}
