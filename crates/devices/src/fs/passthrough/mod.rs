//! A share: a directory of the host, overlays on top, or overlays alone.
//!
//! **Confinement.** A name from the guest is one component, never `.` or `..`, and is only ever resolved
//! relative to the descriptor of a directory that the guest reached the same way, without following a
//! symbolic link: `openat2` with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS`, or an
//! `*at` call that does not follow. So no sequence of names leaves the share, whatever is moved on the host
//! meanwhile; a directory moved out of the share while the guest holds it stays usable, as it would for any
//! process that has it open, but nothing above it is.
//!
//! **No side effects of opening.** Only an inode known, from a descriptor that cannot do I/O (`O_PATH`), to
//! be a regular file or a directory is opened for I/O, through `/proc/self/fd`; device nodes, FIFOs and
//! sockets belong to the guest's kernel. Nor are files that are a way into the host's kernel, or into this
//! very process (see `pseudo`).

mod attr;
mod dir;
mod file;
mod locks;
mod mapped;
mod names;
mod pseudo;
mod stat;
mod unopened;
mod xattr;

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::ThreadId;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::abi::{
    Attr, FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FOPEN_NOFLUSH, FOPEN_PARALLEL_DIRECT_WRITES, Valid,
};
use super::dax::Dax;
use super::handles::{Handle, Handles};
use super::inodes::{HostNode, Identity, Inodes, Node, What};
use super::limits::Limits;
use super::overlay::{Content, Overlays, Parent};
use super::sys::{Caller, FdName};
use super::watches::Watches;
use super::{CachePolicy, DataCache};
use mapped::Coherence;
pub use names::New;
pub use stat::Stat;
use unopened::Reads;

/// Longest chain of parents walked to find an inode again.
const DEPTH_MAX: usize = 4096;
/// Bytes of a page of the guest's.
const GUEST_PAGE: u32 = 4096;
/// How long the guest may believe in overlays, which do not change.
const OVERLAY_VALID: Duration = Duration::from_secs(3600);

/// Result of an operation; the error goes to the guest.
pub type Result<T> = std::result::Result<T, Errno>;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Who {
    /// File-system user id in the guest.
    pub uid: u32,
    /// File-system group id in the guest.
    pub gid: u32,
}

/// A name found or made.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Node id, with one lookup counted.
    pub node: u64,
    /// Attributes.
    pub attr: Attr,
    /// How long the guest may believe them.
    pub valid: Valid,
}

/// The source directory.
#[derive(Debug)]
pub struct Root {
    /// `O_PATH`.
    pub path: Arc<OwnedFd>,
    /// Open for reading.
    pub dir: Arc<OwnedFd>,
}

/// A share in use. It belongs to one thread at a time.
#[derive(Debug)]
pub struct Share {
    inodes: Inodes,
    handles: Handles,
    overlays: Overlays,
    root: Option<Root>,
    /// `/proc/self/fd`.
    fds: OwnedFd,
    /// Identity of the serving thread, and which thread that is.
    caller: Option<(Caller, ThreadId)>,
    cache: CachePolicy,
    read_only: bool,
    /// Guest and host see each other's locks.
    share_locks: bool,
    owners: locks::Owners,
    /// A lock was given back.
    lock_free: bool,
    /// The guest writes back from its page cache.
    write_back: bool,
    dax: Option<Arc<Dax>>,
    /// Changes to what is mapped.
    watches: Option<Watches>,
    /// The guest is told which files are to be mapped.
    offers_dax: bool,
    reads: Reads,
    devices: HashMap<(u32, u32), Device>,
    /// Mounts whose files are but files.
    plain: HashSet<u64>,
}

/// A file system that was met in the share.
#[derive(Debug, Clone, Copy)]
struct Device {
    /// 0 for the root's, then counting up; keeps inode numbers of different file systems apart.
    number: u64,
    /// An inode's time of birth stays as it is. Not so where layers are stacked: there it changes when a
    /// file is first written to, which must not make another inode of it.
    births: bool,
    /// Closing a file may tell of an error of writing; on a disk of this machine it does not.
    close_tells: bool,
    coherence: Coherence,
}

impl Device {
    /// Asks what kind of file system `fd` is on; with doubts, the careful answers.
    fn new(fd: &OwnedFd) -> Self {
        const FUSE: u32 = 0x6573_5546;
        const OVERLAYFS: u32 = 0x794c_7630;
        // NFS, CIFS, SMB2, SMB, Ceph, AFS, Coda.
        const REMOTE: [u32; 7] =
            [0x6969, 0xff53_4d42, 0xfe53_4d42, 0x517b, 0x00c3_6400, 0x5346_414f, 0x7375_7245];
        match rustix::fs::fstatfs(fd).map(|s| s.f_type as u32) {
            Ok(FUSE) | Err(_) => {
                Self { number: 0, births: false, close_tells: true, coherence: Coherence::Unknown }
            }
            Ok(kind) => Self {
                number: 0,
                births: kind != OVERLAYFS,
                close_tells: REMOTE.contains(&kind),
                coherence: Coherence::of(kind),
            },
        }
    }
}

/// Names with one component, resolved in a directory.
fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

/// Opens `name` in `dir` without the ability to do I/O; a symbolic link is opened itself.
fn open_path(dir: &OwnedFd, name: &CStr) -> Result<OwnedFd> {
    openat2(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), beneath())
}

/// Runs `f`; when descriptors are short, closes cached ones and runs it again.
fn with_descriptors<T>(inodes: &mut Inodes, f: impl Fn(&Inodes) -> Result<T>) -> Result<T> {
    match f(inodes) {
        Err(Errno::MFILE | Errno::NFILE) if inodes.shed() => f(inodes),
        r => r,
    }
}

/// As [`with_descriptors`], for a descriptor that the guest keeps: it leaves some for the rest of the process.
fn to_keep(inodes: &mut Inodes, f: impl Fn(&Inodes) -> Result<OwnedFd>) -> Result<OwnedFd> {
    with_descriptors(inodes, |inodes| {
        f(inodes).and_then(|fd| if inodes.limits().allow(&fd) { Ok(fd) } else { Err(Errno::MFILE) })
    })
}

impl Share {
    /// A share of `root`, or of nothing but overlays (index 0 is then its root).
    pub fn new(
        root: Option<Root>,
        overlays: Overlays,
        fds: OwnedFd,
        cache: CachePolicy,
        read_only: bool,
        limits: Limits,
    ) -> Result<Self> {
        let handles = Handles::new(limits.quota.clone());
        let mut devices = HashMap::new();
        let inodes = match &root {
            Some(root) => {
                let mut st = Stat::of(&root.path)?;
                let device = Device::new(&root.path);
                devices.insert(st.id.key.dev, device);
                if !device.births {
                    st.id.born = None;
                }
                let mut table = Inodes::new(Inodes::root_of(st.id, Arc::clone(&root.path)), limits);
                if super::sys::FileHandle::of(std::os::fd::AsFd::as_fd(&root.path))
                    .and_then(|h| h.open(std::os::fd::AsFd::as_fd(&root.dir)))
                    .is_ok()
                {
                    table.use_handles(st.id.key.mnt, Arc::clone(&root.dir));
                }
                table
            }
            None => Inodes::new(What::Virtual(0), limits),
        };
        Ok(Self {
            inodes,
            handles,
            overlays,
            root,
            fds,
            caller: None,
            cache,
            read_only,
            share_locks: false,
            owners: locks::Owners::new(),
            lock_free: false,
            write_back: false,
            dax: None,
            watches: None,
            offers_dax: false,
            reads: Reads::default(),
            devices,
            plain: HashSet::new(),
        })
    }

    /// Prepares the calling thread to serve the share; does nothing on the thread that did it last.
    ///
    /// # Errors
    /// The host's reason.
    pub fn attach(&mut self) -> std::io::Result<()> {
        let me = std::thread::current().id();
        if self.caller.as_ref().is_none_or(|(_, thread)| *thread != me) {
            let caller = Caller::enter(std::os::fd::AsFd::as_fd(&self.fds))?;
            self.caller = Some((caller, me));
        }
        Ok(())
    }

    /// Forgets all that the guest knows and closes its files.
    pub fn reset(&mut self) {
        self.handles.quota().give(self.owners.len());
        self.owners.clear();
        self.handles.clear();
        self.reads.clear();
        self.inodes.clear();
        self.write_back = false;
        self.offers_dax = false;
        if let Some(Err(e)) = self.dax.as_ref().map(|dax| dax.clear()) {
            tracing::warn!(
                errno = e.raw_os_error(),
                "a DAX window is not emptied: it shows what the last guest had"
            );
        }
        if let Some(watches) = &mut self.watches {
            watches.clear();
        }
    }

    /// The guest's kernel keeps what is written, and writes it back in its own time.
    pub fn set_write_back(&mut self, write_back: bool) {
        self.write_back = write_back;
    }

    /// Whether nothing may be changed.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Guest and host are to see each other's locks.
    pub fn share_locks(&mut self) {
        self.share_locks = true;
    }

    /// Whether files may be read without having been opened: nothing can be changed, nobody counts on seeing
    /// the open or on locks, and the guest may keep pages for longer than one.
    pub fn reads_unopened(&self) -> bool {
        self.read_only
            && !self.share_locks
            && self.cache.data != DataCache::Never
            && !self.overlays.has_one_shot()
    }

    /// How much the guest may cache.
    pub fn cache(&self) -> &CachePolicy {
        &self.cache
    }

    /// Number of nodes, open handles and cached descriptors.
    #[cfg(test)]
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.inodes.len(), self.handles.len() + self.reads.len(), self.inodes.held())
    }

    fn caller(&self) -> Result<&Caller> {
        self.caller.as_ref().map(|(caller, _)| caller).ok_or(Errno::IO)
    }

    /// See [`Caller::keep_set_ids`].
    ///
    /// # Errors
    /// The host refuses.
    pub fn keep_set_ids(&mut self, keep: bool) -> Result<()> {
        self.caller.as_mut().map_or(Err(Errno::IO), |(caller, _)| caller.keep_set_ids(keep))
    }

    /// Gives back `n` lookups of `node`.
    pub fn forget(&mut self, node: u64, n: u64) {
        self.inodes.forget(node, n);
        if self.inodes.get(node).is_err() {
            self.drop_all_locks(node, None);
            self.reads.forget(node);
            if let Some(dax) = &self.dax {
                dax.take_lost(node);
            }
        }
    }

    /// Finds `name` in `parent`.
    ///
    /// # Errors
    /// ENOENT, or the host's reason.
    pub fn lookup(&mut self, parent: u64, name: &CStr) -> Result<Entry> {
        if let Some(index) = self.overlay_at(parent, name)? {
            return self.enter_overlay(index, parent, name);
        }
        let dir = match &self.inodes.get(parent)?.what {
            What::Virtual(_) => return Err(Errno::NOENT),
            What::Host(_) => self.fd(parent)?,
        };
        let st = self.stat_at(&dir, name)?;
        self.enter(parent, name, &st, false)
    }

    /// What the host says about an open descriptor.
    fn stat_fd(&mut self, fd: &OwnedFd) -> Result<Stat> {
        let mut st = Stat::of(fd)?;
        if !self.births(&st, || Some(Device::new(fd))) {
            st.id.born = None;
        }
        Ok(st)
    }

    /// What the host says about `name` in `dir`.
    fn stat_at(&mut self, dir: &OwnedFd, name: &CStr) -> Result<Stat> {
        let mut st = Stat::at(dir, name)?;
        if !self.births(&st, || open_path(dir, name).ok().map(|fd| Device::new(&fd))) {
            st.id.born = None;
        }
        Ok(st)
    }

    /// Whether the time of birth counts on this file system; `probe` looks at one not met before.
    fn births(&mut self, st: &Stat, probe: impl FnOnce() -> Option<Device>) -> bool {
        let number = self.devices.len() as u64;
        if let Some(known) = self.devices.get(&st.id.key.dev) {
            return known.births;
        }
        let Some(device) = probe() else { return false };
        self.devices.insert(st.id.key.dev, Device { number, ..device });
        device.births
    }

    /// Counts a lookup of the inode `st`, found as `name` in `parent`.
    fn enter(&mut self, parent: u64, name: &CStr, st: &Stat, fresh: bool) -> Result<Entry> {
        let node = self.inodes.enter(parent, name, st.id, fresh)?;
        let attr = self.attr_of(st);
        Ok(Entry { node, attr, valid: Valid { entry: self.cache.entry, attr: self.attr_valid(&attr) } })
    }

    fn enter_overlay(&mut self, index: usize, parent: u64, name: &CStr) -> Result<Entry> {
        let attr = self.overlays.attr(index).ok_or(Errno::NOENT)?;
        let mut node = self.overlays.node(index);
        if self.inodes.is_virtual(node, index) {
            self.inodes.add_lookup(node);
        } else {
            node = self.inodes.enter_virtual(index, parent, name)?;
            self.overlays.set_node(index, node);
        }
        let one_shot = matches!(self.overlays.content(index), Some(Content::File { one_shot: true, .. }));
        let entry = if one_shot { Duration::ZERO } else { OVERLAY_VALID };
        Ok(Entry { node, attr, valid: Valid { entry, attr: OVERLAY_VALID } })
    }

    /// The overlay `name` in `parent`, if there is one.
    fn overlay_at(&self, parent: u64, name: &CStr) -> Result<Option<usize>> {
        Ok(self.overlays.child(parent_key(self.inodes.get(parent)?), name))
    }

    /// Refuses to change a name that an overlay has: with EROFS, or with EEXIST when it would be new.
    fn not_overlaid(&self, parent: u64, name: &CStr, why: Errno) -> Result<()> {
        self.overlay_at(parent, name)?.map_or(Ok(()), |_| Err(why))
    }

    /// A descriptor of `node`, perhaps one without the ability to do I/O.
    ///
    /// # Errors
    /// ESTALE: it cannot be found any more; EROFS: it is an overlay.
    fn fd(&mut self, node: u64) -> Result<Arc<OwnedFd>> {
        if let Some(fd) = self.inodes.cached(node) {
            return Ok(fd);
        }
        let mut missing = Vec::new();
        let mut at = node;
        let mut fd = loop {
            if let Some(fd) = self.held(at)? {
                break fd;
            }
            let Some((parent, _)) = self.inodes.get(at)?.place() else { return Err(Errno::STALE) };
            missing.push(at);
            if missing.len() > DEPTH_MAX {
                return Err(Errno::STALE);
            }
            at = parent;
        };
        while let Some(child) = missing.pop() {
            let next = with_descriptors(&mut self.inodes, |inodes| {
                let (_, name) = inodes.get(child)?.place().ok_or(Errno::STALE)?;
                open_path(&fd, name).map_err(|e| if is_gone(e) { Errno::STALE } else { e })
            })?;
            if self.stat_fd(&next)?.id != self.inodes.host(child)?.id {
                return Err(Errno::STALE);
            }
            fd = Arc::new(next);
            self.inodes.cache(child, &fd);
        }
        Ok(fd)
    }

    /// A descriptor of `node` that needs no path: cached, open in the guest, or by file handle.
    fn held(&mut self, node: u64) -> Result<Option<Arc<OwnedFd>>> {
        if let Some(fd) = self.inodes.cached(node) {
            return Ok(Some(fd));
        }
        let id = self.inodes.host(node)?.id;
        if let Some(fd) = open_handle(self.inodes.host(node)?, &self.handles) {
            return Ok(Some(fd));
        }
        let Some(fd) = self.inodes.by_handle(node) else { return Ok(None) };
        if self.stat_fd(&fd)?.id != id {
            return Ok(None);
        }
        let fd = Arc::new(fd);
        self.inodes.cache(node, &fd);
        Ok(Some(fd))
    }

    /// What the host says about `node` now.
    fn stat(&mut self, node: u64) -> Result<Stat> {
        let host = self.inodes.host(node)?;
        let id = host.id;
        if let Some(fd) = open_handle(host, &self.handles) {
            return self.stat_fd(&fd);
        }
        if let Some(fd) = self.inodes.cached(node) {
            return self.stat_fd(&fd);
        }
        if let Some((parent, _)) = self.inodes.get(node)?.place() {
            // Without opening it: one call instead of three.
            let dir = self.fd(parent)?;
            let (_, name) = self.inodes.get(node)?.place().ok_or(Errno::STALE)?;
            let name = name.to_owned();
            if let Ok(st) = self.stat_at(&dir, &name)
                && st.id == id
            {
                return Ok(st);
            }
        }
        let fd = self.held(node)?.ok_or(Errno::STALE)?;
        self.stat_fd(&fd)
    }

    /// Opens `node`, known to be a regular file or directory, for I/O.
    fn reopen(&mut self, node: u64, flags: OFlags) -> Result<OwnedFd> {
        let path = self.fd(node)?;
        let mut flags = flags | OFlags::CLOEXEC;
        if !flags.contains(OFlags::DIRECTORY) {
            let key = self.inodes.host(node)?.id.key;
            flags |= self.may_open(&key, &path, flags)?;
        }
        let Self { inodes, fds, reads, .. } = self;
        let name = FdName::new(&path);
        let mut open =
            || to_keep(inodes, |_| rustix::fs::openat(&*fds, name.as_c_str(), flags, Mode::empty()));
        match open() {
            Err(Errno::MFILE | Errno::NFILE) if reads.clear() => open(),
            r => r,
        }
    }

    /// Makes sure, before something is created, that it can be kept open.
    ///
    /// # Errors
    /// EMFILE.
    fn expect_room(&mut self) -> Result<()> {
        let Self { inodes, fds, .. } = self;
        to_keep(inodes, |_| rustix::io::fcntl_dupfd_cloexec(&*fds, 0)).map(drop)
    }

    /// Adds a handle on a host node and notes it there.
    fn add_handle(&mut self, node: u64, handle: Handle) -> Result<u64> {
        let fh = self.handles.add(handle)?;
        if let Some(host) = self.inodes.host_mut(node) {
            host.open.push(fh);
        }
        Ok(fh)
    }

    /// Closes a handle.
    ///
    /// # Errors
    /// EBADF.
    pub fn release(&mut self, fh: u64) -> Result<()> {
        // With the file goes a BSD lock on it.
        self.lock_free |= self.share_locks;
        let node = match self.handles.remove(fh).ok_or(Errno::BADF)? {
            Handle::File { node, .. } => node,
            Handle::Dir(dir) => dir.node,
            Handle::Bytes { index, .. } => {
                self.overlays.consume(index);
                return Ok(());
            }
        };
        self.drop_all_locks(node, Some(fh));
        if let Some(host) = self.inodes.host_mut(node) {
            host.open.retain(|h| *h != fh);
        }
        Ok(())
    }

    /// Attributes as the guest sees them: inode numbers of other file systems carry the device in their
    /// upper bits, for the guest sees one device.
    fn attr_of(&self, st: &Stat) -> Attr {
        let known = self.devices.get(&st.id.key.dev);
        let device = known.map_or(0, |d| d.number);
        let coherence = known.map_or(Coherence::Unknown, |d| d.coherence);
        let ino = st.id.key.ino;
        let ino =
            if device == 0 { ino } else { (device & 0x3fff) << 48 | (ino ^ ino >> 48) & ((1 << 48) - 1) };
        let dax = self.is_to_be_mapped(&st.attr, coherence);
        // Linux syncs a mapped file only where its blocks are as large as pages, and says EIO else.
        let blksize = match &self.dax {
            Some(_) if st.attr.kind() == libc::S_IFREG => GUEST_PAGE,
            _ => st.attr.blksize,
        };
        Attr { ino, dax, blksize, ..st.attr }
    }

    /// How long the guest may believe attributes. Those of a set-id file not at all: a write of somebody
    /// else clears the bits here, and the guest would go on to run the file with them.
    fn attr_valid(&self, attr: &Attr) -> Duration {
        let set_id = attr.kind() == libc::S_IFREG && attr.mode & (libc::S_ISUID | libc::S_ISGID) != 0;
        if set_id { Duration::ZERO } else { self.cache.attr }
    }

    /// The flags with which a file of `node` is opened in the guest: what its page cache may keep, and
    /// whether it reports each close.
    fn open_flags(&mut self, node: u64, st: &Stat, writable: bool) -> u32 {
        let now = (st.attr.size, st.attr.mtime, st.attr.ctime);
        let before = self.inodes.host_mut(node).and_then(|h| h.seen.replace(now));
        let pages = match self.cache.data {
            DataCache::Never => FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES,
            DataCache::Always | DataCache::WriteBack => FOPEN_KEEP_CACHE,
            DataCache::CloseToOpen if before == Some(now) => FOPEN_KEEP_CACHE,
            DataCache::CloseToOpen => 0,
        };
        let close_tells = self.devices.get(&st.id.key.dev).is_none_or(|d| d.close_tells);
        if writable && close_tells || self.share_locks { pages } else { pages | FOPEN_NOFLUSH }
    }

    /// Writes out the file system of the share.
    ///
    /// # Errors
    /// The host's reason.
    pub fn sync(&self) -> Result<()> {
        self.root.as_ref().map_or(Ok(()), |root| rustix::fs::syncfs(&root.dir))
    }
}

/// How overlays name the directory `node`.
fn parent_key(node: &Node) -> Parent {
    match &node.what {
        What::Host(h) => Parent::Host(h.id.key),
        What::Virtual(i) => Parent::Virtual(*i),
    }
}

/// An open file of the guest on this inode.
fn open_handle(host: &HostNode, handles: &Handles) -> Option<Arc<OwnedFd>> {
    handles.host(*host.open.first()?).ok()?
}

/// Errors of a lookup that mean: what was there is not there any more.
fn is_gone(e: Errno) -> bool {
    matches!(e, Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV)
}

/// Whether `id` is a directory.
fn is_dir(id: &Identity) -> bool {
    id.kind == libc::S_IFDIR
}
