//! The guest's side of the protocol.

use std::ffi::CStr;
use std::path::Path;
use std::sync::Arc;

use krun_memory::VolatileSlice;
use tempfile::TempDir;

use crate::fs::abi::{Fattr, op};
use crate::fs::flat::{FlatSink, FlatSource};
use crate::fs::limits::Limits;
use crate::fs::server::Server;
use crate::fs::{CachePolicy, ExitCode, ExitSink, FsSpec, Overlay, setup};

pub const ROOT: u64 = 1;

/// A guest with one share.
pub struct Client {
    pub server: Server,
    pub dir: TempDir,
    pub uid: u32,
    pub gid: u32,
    pub exit: Arc<ExitCode>,
    unique: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub mtime: i64,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
}

#[derive(Debug, Clone, Copy)]
pub struct Entry {
    pub node: u64,
    pub entry_valid: u64,
    pub attr_valid: u64,
    pub attr: Attr,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    pub name: Vec<u8>,
    pub ino: u64,
    pub kind: u32,
    pub next: u64,
    pub node: u64,
}

pub type Reply<T> = Result<T, i32>;

pub fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(b[at..at + 4].try_into().unwrap())
}

pub fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().unwrap())
}

fn attr(b: &[u8]) -> Attr {
    Attr {
        ino: u64_at(b, 0),
        size: u64_at(b, 8),
        mtime: u64_at(b, 32) as i64,
        mode: u32_at(b, 60),
        nlink: u32_at(b, 64),
        uid: u32_at(b, 68),
        gid: u32_at(b, 72),
        rdev: u32_at(b, 76),
    }
}

fn entry(b: &[u8]) -> Entry {
    Entry { node: u64_at(b, 0), entry_valid: u64_at(b, 16), attr_valid: u64_at(b, 24), attr: attr(&b[40..]) }
}

/// Words of a request.
pub fn words(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|w| w.to_le_bytes()).collect()
}

pub fn longs(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|w| w.to_le_bytes()).collect()
}

impl Client {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut FsSpec)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let spec = FsSpec { source: Some(dir.path().to_owned()), ..FsSpec::default() };
        Self::build(dir, spec, change, 64)
    }

    pub fn without_source(overlays: Vec<Overlay>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::build(dir, FsSpec { overlays, ..FsSpec::default() }, |_| {}, 64)
    }

    pub fn build(dir: TempDir, spec: FsSpec, change: impl FnOnce(&mut FsSpec), descriptors: usize) -> Self {
        let exit = Arc::new(ExitCode::new());
        let mut spec = FsSpec { tag: "test".into(), exit_code: Some(Arc::clone(&exit)), ..spec };
        change(&mut spec);
        let limits = Limits { cached: descriptors, ..Limits::new(spec.quota.clone()) };
        let share = setup::share_with(&spec, limits).unwrap();
        let mut server = Server::new(share, Some(ExitSink(Arc::clone(&exit))));
        server.attach().unwrap();
        let mut me = Self { server, dir, uid: 0, gid: 0, exit, unique: 0 };
        me.init().unwrap();
        me
    }

    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// Sends raw bytes, and returns errno and what follows the head of the reply.
    pub fn raw(&mut self, op: u32, node: u64, body: &[u8], room: usize) -> Reply<Vec<u8>> {
        self.unique += 1;
        let mut bytes = words(&[40 + body.len() as u32, op]);
        bytes.extend(longs(&[self.unique, node]));
        bytes.extend(words(&[self.uid, self.gid, 77, 0]));
        bytes.extend(body);
        let mut space = vec![0xa5u8; 16 + room];
        let written = {
            // In pieces, as a driver may send it.
            let (head, rest) = bytes.split_at_mut(40);
            let mut source = FlatSource::new(vec![VolatileSlice::from(head), VolatileSlice::from(rest)]);
            let (a, b) = space.split_at_mut(16);
            let half = b.len() / 2;
            let (b, c) = b.split_at_mut(half);
            let sink = FlatSink::new([a, b, c].into_iter().map(VolatileSlice::from).collect());
            self.server.serve(&mut source, sink).unwrap() as usize
        };
        if self.server.waits() {
            assert_eq!(written, 0);
            return Err(libc::EINPROGRESS);
        }
        if !crate::fs::request::Request::wants_reply(op) {
            assert_eq!(written, 0);
            return Ok(Vec::new());
        }
        assert_eq!(u32_at(&space, 0) as usize, written);
        assert_eq!(u64_at(&space, 8), self.unique);
        match u32_at(&space, 4) as i32 {
            0 => Ok(space[16..written].to_vec()),
            e => {
                assert!(e < 0 && written == 16, "errors are negative and come alone");
                Err(-e)
            }
        }
    }

    pub fn call(&mut self, op: u32, node: u64, parts: &[&[u8]]) -> Reply<Vec<u8>> {
        self.raw(op, node, &parts.concat(), 1 << 16)
    }

    pub fn init(&mut self) -> Reply<Vec<u8>> {
        self.init_without(0)
    }

    /// INIT of a guest that lacks the features `missing`.
    pub fn init_without(&mut self, missing: u32) -> Reply<Vec<u8>> {
        self.call(op::INIT, 0, &[&words(&[7, 41, 1 << 17, (u32::MAX >> 1) & !missing, 0]), &[0; 44]])
    }

    pub fn lookup(&mut self, parent: u64, name: &CStr) -> Reply<Entry> {
        let found = self.call(op::LOOKUP, parent, &[name.to_bytes_with_nul()]).map(|b| entry(&b))?;
        // No node: there is nothing of that name, for so long.
        if found.node == 0 { Err(libc::ENOENT) } else { Ok(found) }
    }

    /// Looks up a path of several components.
    pub fn walk(&mut self, path: &str) -> Reply<Entry> {
        let mut at = None;
        for part in path.split('/') {
            let name = std::ffi::CString::new(part).unwrap();
            at = Some(self.lookup(at.map_or(ROOT, |e: Entry| e.node), &name)?);
        }
        Ok(at.unwrap())
    }

    pub fn forget(&mut self, node: u64, n: u64) {
        self.call(op::FORGET, node, &[&longs(&[n])]).unwrap();
    }

    pub fn getattr(&mut self, node: u64) -> Reply<Attr> {
        self.call(op::GETATTR, node, &[&[0; 16]]).map(|b| attr(&b[16..]))
    }

    pub fn getattr_fh(&mut self, node: u64, fh: u64) -> Reply<Attr> {
        self.call(op::GETATTR, node, &[&words(&[1, 0]), &longs(&[fh])]).map(|b| attr(&b[16..]))
    }

    pub fn setattr(&mut self, node: u64, valid: Fattr, set: Set) -> Reply<Attr> {
        let body = [
            words(&[valid.bits(), 0]),
            longs(&[set.fh, set.size, 0, set.atime as u64, set.mtime as u64, 0]),
            words(&[0, 5, 0, set.mode, 0, set.uid, set.gid, 0]),
        ];
        self.call(op::SETATTR, node, &[&body[0], &body[1], &body[2]]).map(|b| attr(&b[16..]))
    }

    pub fn mkdir(&mut self, parent: u64, name: &CStr, mode: u32) -> Reply<Entry> {
        self.call(op::MKDIR, parent, &[&words(&[mode, 0]), name.to_bytes_with_nul()]).map(|b| entry(&b))
    }

    pub fn mknod(&mut self, parent: u64, name: &CStr, mode: u32, rdev: u32) -> Reply<Entry> {
        let body = words(&[mode, rdev, 0, 0]);
        self.call(op::MKNOD, parent, &[&body, name.to_bytes_with_nul()]).map(|b| entry(&b))
    }

    pub fn symlink(&mut self, parent: u64, name: &CStr, target: &CStr) -> Reply<Entry> {
        self.call(op::SYMLINK, parent, &[name.to_bytes_with_nul(), target.to_bytes_with_nul()])
            .map(|b| entry(&b))
    }

    pub fn readlink(&mut self, node: u64) -> Reply<Vec<u8>> {
        self.call(op::READLINK, node, &[])
    }

    pub fn link(&mut self, old: u64, parent: u64, name: &CStr) -> Reply<Entry> {
        self.call(op::LINK, parent, &[&longs(&[old]), name.to_bytes_with_nul()]).map(|b| entry(&b))
    }

    pub fn unlink(&mut self, parent: u64, name: &CStr) -> Reply<()> {
        self.call(op::UNLINK, parent, &[name.to_bytes_with_nul()]).map(drop)
    }

    pub fn rmdir(&mut self, parent: u64, name: &CStr) -> Reply<()> {
        self.call(op::RMDIR, parent, &[name.to_bytes_with_nul()]).map(drop)
    }

    pub fn rename(&mut self, from: (u64, &CStr), to: (u64, &CStr), flags: u32) -> Reply<()> {
        let (a, b) = (from.1.to_bytes_with_nul(), to.1.to_bytes_with_nul());
        if flags == 0 {
            return self.call(op::RENAME, from.0, &[&longs(&[to.0]), a, b]).map(drop);
        }
        self.call(op::RENAME2, from.0, &[&longs(&[to.0]), &words(&[flags, 0]), a, b]).map(drop)
    }

    /// Handle and reply flags.
    pub fn open(&mut self, node: u64, flags: i32) -> Reply<(u64, u32)> {
        self.call(op::OPEN, node, &[&words(&[flags as u32, 0])]).map(|b| (u64_at(&b, 0), u32_at(&b, 8)))
    }

    pub fn create(&mut self, parent: u64, name: &CStr, flags: i32, mode: u32) -> Reply<(Entry, u64)> {
        let body = words(&[flags as u32, mode, 0, 0]);
        self.call(op::CREATE, parent, &[&body, name.to_bytes_with_nul()])
            .map(|b| (entry(&b), u64_at(&b, 128)))
    }

    pub fn read(&mut self, fh: u64, offset: u64, size: u32) -> Reply<Vec<u8>> {
        self.read_node(0, fh, offset, size)
    }

    pub fn read_node(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Reply<Vec<u8>> {
        let body = [longs(&[fh, offset]), words(&[size, 0, 0, 0, 0, 0])].concat();
        self.raw(op::READ, node, &body, size as usize)
    }

    pub fn write(&mut self, fh: u64, offset: u64, data: &[u8], flags: u32) -> Reply<u32> {
        let head = [longs(&[fh, offset]), words(&[data.len() as u32, flags, 0, 0, 0, 0])].concat();
        self.call(op::WRITE, 0, &[&head, data]).map(|b| u32_at(&b, 0))
    }

    pub fn release(&mut self, fh: u64) -> Reply<()> {
        self.call(op::RELEASE, 0, &[&longs(&[fh, 0, 0])]).map(drop)
    }

    pub fn opendir(&mut self, node: u64) -> Reply<u64> {
        self.call(op::OPENDIR, node, &[&[0; 8]]).map(|b| u64_at(&b, 0))
    }

    pub fn releasedir(&mut self, fh: u64) -> Reply<()> {
        self.call(op::RELEASEDIR, 0, &[&longs(&[fh, 0, 0])]).map(drop)
    }

    /// One reply's worth of entries.
    pub fn readdir(&mut self, fh: u64, offset: u64, size: u32, plus: bool) -> Reply<Vec<DirEntry>> {
        self.readdir_node(0, fh, offset, size, plus)
    }

    pub fn readdir_node(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        size: u32,
        plus: bool,
    ) -> Reply<Vec<DirEntry>> {
        let body = [longs(&[fh, offset]), words(&[size, 0, 0, 0, 0, 0])].concat();
        let op = if plus { op::READDIRPLUS } else { op::READDIR };
        let b = self.raw(op, node, &body, size as usize)?;
        let (mut at, mut list) = (0, Vec::new());
        while at < b.len() {
            let node = if plus { u64_at(&b, at) } else { 0 };
            at += if plus { 128 } else { 0 };
            let len = u32_at(&b, at + 16) as usize;
            list.push(DirEntry {
                name: b[at + 24..at + 24 + len].to_vec(),
                ino: u64_at(&b, at),
                kind: u32_at(&b, at + 20),
                next: u64_at(&b, at + 8),
                node,
            });
            at += (24 + len).next_multiple_of(8);
        }
        assert_eq!(at, b.len(), "entries fill the reply exactly");
        Ok(list)
    }

    /// A whole directory in replies of one page.
    pub fn list(&mut self, node: u64, plus: bool) -> Reply<Vec<DirEntry>> {
        let fh = self.opendir(node)?;
        let (mut all, mut offset) = (Vec::new(), 0);
        loop {
            let part = self.readdir(fh, offset, 4096, plus)?;
            let Some(last) = part.last() else { break };
            offset = last.next;
            all.extend(part);
        }
        self.releasedir(fh)?;
        Ok(all)
    }

    /// Sorted names of a directory without the dots.
    pub fn names(&mut self, node: u64) -> Vec<String> {
        let list = self.list(node, false).unwrap();
        let mut names: Vec<_> = list.iter().map(|e| String::from_utf8_lossy(&e.name).into_owned()).collect();
        names.retain(|n| n != "." && n != "..");
        names.sort();
        names
    }

    pub fn getxattr(&mut self, node: u64, name: &CStr, size: u32) -> Reply<Vec<u8>> {
        let body = [&words(&[size, 0])[..], name.to_bytes_with_nul()].concat();
        self.raw(op::GETXATTR, node, &body, size.max(8) as usize)
    }

    pub fn setxattr(&mut self, node: u64, name: &CStr, value: &[u8], flags: u32) -> Reply<()> {
        let head = words(&[value.len() as u32, flags, 0, 0]);
        self.call(op::SETXATTR, node, &[&head, name.to_bytes_with_nul(), value]).map(drop)
    }

    /// The contents of a file, by node.
    pub fn contents(&mut self, node: u64) -> Reply<Vec<u8>> {
        let (fh, _) = self.open(node, libc::O_RDONLY)?;
        let mut all = Vec::new();
        loop {
            let part = self.read(fh, all.len() as u64, 10_000)?;
            if part.is_empty() {
                break;
            }
            all.extend(part);
        }
        self.release(fh)?;
        Ok(all)
    }

    pub fn counts(&self) -> (usize, usize, usize) {
        self.server.share().counts()
    }
}

/// Fields of SETATTR.
#[derive(Debug, Clone, Copy, Default)]
pub struct Set {
    pub fh: u64,
    pub size: u64,
    pub atime: i64,
    pub mtime: i64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// A policy under which nothing is believed for long.
pub fn uncached(spec: &mut FsSpec) {
    spec.cache = CachePolicy::NEVER;
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Names a file that is not there.
pub fn absent(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_err()
}
