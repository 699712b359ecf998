//! Files and directories that exist only in the share as the guest sees it.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::abi::{Attr, Time};
use super::inodes::Key;

/// Inode numbers of overlays begin here, beyond those of any file system in use.
const FIRST_INO: u64 = 1 << 62;

/// The bytes of a virtual file: static, owned or shared.
#[derive(Clone)]
pub struct FileData(Arc<dyn AsRef<[u8]> + Send + Sync>);

impl FileData {
    /// Shares `data`, whatever holds it.
    pub fn new(data: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        Self(data)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

impl From<&'static [u8]> for FileData {
    fn from(data: &'static [u8]) -> Self {
        Self(Arc::new(data))
    }
}

impl From<Vec<u8>> for FileData {
    fn from(data: Vec<u8>) -> Self {
        Self(Arc::new(data))
    }
}

impl std::fmt::Debug for FileData {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FileData({} bytes)", self.bytes().len())
    }
}

/// What a virtual name holds.
#[derive(Debug, Clone)]
pub enum Content {
    /// A read-only file.
    File {
        /// Its bytes.
        data: FileData,
        /// Permission bits.
        mode: u32,
        /// It disappears, and its memory is freed, once it has been opened and closed.
        one_shot: bool,
    },
    /// An empty directory, a place to mount on.
    Dir {
        /// Permission bits.
        mode: u32,
    },
}

/// Where an overlay hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Parent {
    /// In a directory of the host.
    Host(Key),
    /// In another overlay, by index.
    Virtual(usize),
}

#[derive(Debug)]
struct Entry {
    name: CString,
    /// `None` once it is gone.
    content: Option<Content>,
    /// What stays to be said of it then.
    attr: Attr,
    listed: bool,
    /// Node id while the guest knows it.
    node: u64,
}

/// All overlays of a share. Index 0 is the root where there is no source.
#[derive(Debug, Default)]
pub struct Overlays {
    entries: Vec<Entry>,
    below: HashMap<Parent, Vec<usize>>,
    /// Descriptors of the directories that overlays are in, so that no other inode takes their numbers.
    pins: HashMap<Key, OwnedFd>,
    born: Time,
}

impl Overlays {
    /// None yet; `born` is the time stamp of all.
    pub fn new(born: Time) -> Self {
        Self { born, ..Self::default() }
    }

    /// Adds the root of a share without source.
    pub fn add_root(&mut self) -> usize {
        self.push(c"".to_owned(), Content::Dir { mode: 0o755 }, false)
    }

    /// Adds a name; `None` when the parent has it already.
    pub fn add(&mut self, parent: Parent, name: CString, content: Content, listed: bool) -> Option<usize> {
        if self.child(parent, &name).is_some() {
            return None;
        }
        let dir = matches!(content, Content::Dir { .. });
        let index = self.push(name, content, listed);
        self.below.entry(parent).or_default().push(index);
        if let (true, Parent::Virtual(p)) = (dir, parent)
            && let Some(p) = self.entries.get_mut(p)
        {
            p.attr.nlink += 1;
        }
        Some(index)
    }

    /// Keeps `dir` open as long as there are overlays in it.
    pub fn pin(&mut self, key: Key, dir: OwnedFd) {
        self.pins.entry(key).or_insert(dir);
    }

    fn push(&mut self, name: CString, content: Content, listed: bool) -> usize {
        let (kind, mode, size, nlink) = match &content {
            Content::File { data, mode, .. } => (libc::S_IFREG, *mode, data.bytes().len() as u64, 1),
            Content::Dir { mode } => (libc::S_IFDIR, *mode, 0, 2),
        };
        let attr = Attr {
            ino: FIRST_INO + self.entries.len() as u64,
            size,
            blocks: size.div_ceil(512),
            atime: self.born,
            mtime: self.born,
            ctime: self.born,
            btime: Some(self.born),
            mode: kind | (mode & 0o7777),
            nlink,
            blksize: 4096,
            ..Attr::default()
        };
        self.entries.push(Entry { name, content: Some(content), attr, listed, node: 0 });
        self.entries.len() - 1
    }

    /// The overlay `name` in `parent`.
    pub fn child(&self, parent: Parent, name: &CStr) -> Option<usize> {
        self.children(parent).find(|i| *self.entries[*i].name == *name)
    }

    fn children(&self, parent: Parent) -> impl Iterator<Item = usize> + '_ {
        let list = if self.below.is_empty() { None } else { self.below.get(&parent) };
        list.into_iter().flatten().copied().filter(|i| self.entries[*i].content.is_some())
    }

    /// Those below `parent` that a listing shows: name, inode number, type bits.
    pub fn listed(&self, parent: Parent) -> Vec<(CString, u64, u32)> {
        self.children(parent)
            .filter(|i| self.entries[*i].listed)
            .map(|i| (self.entries[i].name.clone(), self.entries[i].attr.ino, self.entries[i].attr.kind()))
            .collect()
    }

    /// Attributes, also once it is gone.
    pub fn attr(&self, index: usize) -> Option<Attr> {
        Some(self.entries.get(index)?.attr)
    }

    /// What it holds; `None` once it is gone.
    pub fn content(&self, index: usize) -> Option<&Content> {
        self.entries.get(index)?.content.as_ref()
    }

    /// Whether any file disappears once it was used.
    pub fn has_one_shot(&self) -> bool {
        self.entries.iter().any(|e| matches!(e.content, Some(Content::File { one_shot: true, .. })))
    }

    /// Removes a one-shot file.
    pub fn consume(&mut self, index: usize) {
        if let Some(e) = self.entries.get_mut(index)
            && matches!(e.content, Some(Content::File { one_shot: true, .. }))
        {
            e.content = None;
            e.attr.nlink = 0;
        }
    }

    /// The node id noted last.
    pub fn node(&self, index: usize) -> u64 {
        self.entries.get(index).map_or(0, |e| e.node)
    }

    /// Notes the node id.
    pub fn set_node(&mut self, index: usize, node: u64) {
        if let Some(e) = self.entries.get_mut(index) {
            e.node = node;
        }
    }
}
