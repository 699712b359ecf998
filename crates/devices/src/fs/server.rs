//! The conversation: a request in, a reply out.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use krun_virtio::DeviceError;
use rustix::io::Errno;

use super::abi::{self, Attr, InHeader, InitFlags, OUT_HEADER, Put, Valid, op, out_header};
use super::counts::Counts;
use super::dax::Dax;
use super::io::{Sink, Source};
use super::passthrough::{Entry, New, Result, Share, Who};
use super::request::{BODY_MAX, Request, WRITE_IN};
use super::{DataCache, ExitSink, dax};

/// Largest WRITE and READ in pages of 4 KiB.
const MAX_PAGES: u16 = 256;
/// The same in bytes. A guest may have room for more, but whoever waits for the device waits for one request.
const DATA_MAX: usize = MAX_PAGES as usize * 4096;
/// Largest READDIR reply.
const READDIR_MAX: usize = 1 << 20;
/// IOCTL that reports the guest's exit status.
const IOCTL_EXIT: u32 = 0x7602;

/// What INIT agreed on.
#[derive(Debug, Clone, Copy, Default)]
struct Session {
    ready: bool,
    setxattr_ext: bool,
    /// OPEN is not served: the guest reads by node.
    no_open: bool,
    /// Nor is OPENDIR.
    no_opendir: bool,
}

/// Serves the requests of one guest to one share.
#[derive(Debug)]
pub struct Server {
    share: Share,
    exit: Option<ExitSink>,
    session: Session,
    counts: Counts,
    /// Requests may wait for a lock, and the last one does.
    may_wait: bool,
    waits: bool,
    /// Bodies of requests, and replies with their head; kept for the next.
    body: Vec<u8>,
    reply: Vec<u8>,
}

impl Server {
    /// A server of `share`; IOCTL 0x7602 reports to `exit`.
    pub fn new(share: Share, exit: Option<ExitSink>) -> Self {
        Self {
            share,
            exit,
            session: Session::default(),
            counts: Counts::default(),
            may_wait: false,
            waits: false,
            body: Vec::new(),
            reply: Vec::new(),
        }
    }

    /// The share.
    #[cfg(test)]
    pub fn share(&self) -> &Share {
        &self.share
    }

    /// The share's window.
    pub fn window(&self) -> Option<&Arc<Dax>> {
        self.share.window()
    }

    /// What is readable when a file in the window has changed; [`Server::follow_changes`] is due then.
    pub fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.share.changes()
    }

    /// Files in the window have changed.
    pub fn follow_changes(&mut self) {
        self.share.follow_changes();
    }

    /// Prepares the calling thread.
    ///
    /// # Errors
    /// The host's reason.
    pub fn attach(&mut self) -> std::io::Result<()> {
        self.share.attach()
    }

    /// Requests since this was asked last.
    pub fn take_counts(&mut self) -> Counts {
        std::mem::take(&mut self.counts)
    }

    /// Whether the caller can serve a request again that has to wait; without, it is refused.
    pub fn let_wait(&mut self, may_wait: bool) {
        self.may_wait = may_wait;
    }

    /// Whether the last request has to wait for a lock: it was not answered, and is to be served again later.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// Whether a lock was given back since this was asked last.
    pub fn gave_lock_back(&mut self) -> bool {
        self.share.gave_lock_back()
    }

    /// Forgets the guest.
    pub fn reset(&mut self) {
        self.share.reset();
        self.session = Session::default();
    }

    /// Serves one request and returns the number of bytes stored in `sink`.
    ///
    /// # Errors
    /// A request too short for its head, or no room for even the head of a reply: there is nothing sensible
    /// to answer.
    pub fn serve<'m>(
        &mut self,
        source: &mut impl Source<'m>,
        mut sink: impl Sink<'m>,
    ) -> std::result::Result<u32, DeviceError> {
        // First, for a request without a reply would leave it as the last one set it, and be served again.
        self.waits = false;
        let mut head = [0; InHeader::SIZE];
        if !source.fill(&mut head) {
            return Err(DeviceError::Driver("a file-system request is shorter than its head".into()));
        }
        let head = InHeader::parse(&head);
        self.counts.add(head.opcode);
        tracing::trace!(op = head.opcode, node = head.nodeid, len = head.len, "request");
        if !Request::wants_reply(head.opcode) {
            self.one_way(&head, source);
            return Ok(0);
        }
        if sink.remaining() < OUT_HEADER {
            return Err(DeviceError::Driver(format!(
                "no room for a reply to file-system operation {}",
                head.opcode
            )));
        }
        let result = match head.opcode {
            op::READ => self.read(&head, source, &mut sink),
            _ => self.buffered(&head, source, sink.remaining()),
        };
        let len = match result {
            Ok(Done::Stored(len)) => return Ok(len),
            Err(_) if self.waits => return Ok(0),
            Ok(Done::Reply) => {
                let len = self.reply.len() as u32;
                self.reply[..OUT_HEADER].copy_from_slice(&out_header(len, 0, head.unique));
                sink.put(&self.reply).then_some(len)
            }
            Err(e) => {
                tracing::trace!(op = head.opcode, node = head.nodeid, errno = e.raw_os_error(), "refused");
                let len = OUT_HEADER as u32;
                sink.put(&out_header(len, e.raw_os_error(), head.unique)).then_some(len)
            }
        };
        len.ok_or_else(|| DeviceError::Driver("the room for a reply went away".into()))
    }

    /// Takes the body of a request in, WRITE's data aside, and parses it.
    fn with_body<'m, S: Source<'m>, T>(
        &mut self,
        head: &InHeader,
        source: &mut S,
        then: impl FnOnce(&mut Self, Request<'_>, &mut S) -> Result<T>,
    ) -> Result<T> {
        let claimed = (head.len as usize).checked_sub(InHeader::SIZE).ok_or(Errno::INVAL)?;
        if claimed > source.remaining() {
            return Err(Errno::INVAL);
        }
        let len = if head.opcode == op::WRITE { WRITE_IN } else { claimed };
        if len > claimed {
            return Err(Errno::INVAL);
        }
        if len > BODY_MAX {
            return Err(Errno::TOOBIG);
        }
        let mut body = std::mem::take(&mut self.body);
        body.resize(len, 0);
        let r = if source.fill(&mut body) {
            Request::parse(head, &body, self.session.setxattr_ext).and_then(|r| then(self, r, source))
        } else {
            Err(Errno::INVAL)
        };
        self.body = body;
        r
    }

    /// FORGET and its like, which have no reply, so nowhere to put an error.
    fn one_way<'m>(&mut self, head: &InHeader, source: &mut impl Source<'m>) {
        let _ = self.with_body(head, source, |me, request, _| {
            match request {
                Request::Forget { nlookup } => me.share.forget(head.nodeid, nlookup),
                Request::BatchForget(list) => {
                    for (node, n) in list.iter() {
                        me.share.forget(node, n);
                    }
                }
                _ => {}
            }
            Ok(())
        });
    }

    /// READ: the data go straight to where the guest wants them.
    fn read<'m, K: Sink<'m>>(
        &mut self,
        head: &InHeader,
        source: &mut impl Source<'m>,
        sink: &mut K,
    ) -> Result<Done> {
        self.with_body(head, source, |me, request, _| {
            let Request::Read { fh, offset, size } = request else { return Err(Errno::INVAL) };
            me.check_ready()?;
            let mut data = sink.split_at(OUT_HEADER);
            let size = (size as usize).min(data.remaining()).min(DATA_MAX);
            let n = me.share.read(head.nodeid, fh, offset, size, &mut data)?;
            let len = (OUT_HEADER + n) as u32;
            if !sink.put(&out_header(len, 0, head.unique)) {
                return Err(Errno::IO);
            }
            Ok(Done::Stored(len))
        })
    }

    /// All others: the reply is built here first.
    fn buffered<'m>(&mut self, head: &InHeader, source: &mut impl Source<'m>, room: usize) -> Result<Done> {
        self.with_body(head, source, |me, request, source| {
            let mut out = std::mem::take(&mut me.reply);
            out.clear();
            out.resize(OUT_HEADER, 0);
            let r = me.dispatch(head, request, source, room, &mut out);
            me.share.complete_mappings();
            // What an INIT of an older guest has no room for is cut off, as the protocol has it.
            if head.opcode == op::INIT {
                out.truncate(room);
            }
            let fits = out.len() <= room;
            me.reply = out;
            match r {
                Ok(()) if !fits => Err(Errno::IO),
                Ok(()) => Ok(Done::Reply),
                Err(e) => Err(e),
            }
        })
    }

    fn check_ready(&self) -> Result<()> {
        if self.session.ready { Ok(()) } else { Err(Errno::IO) }
    }

    fn dispatch<'m>(
        &mut self,
        head: &InHeader,
        request: Request<'_>,
        source: &mut impl Source<'m>,
        room: usize,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let node = head.nodeid;
        match request {
            Request::Init { major, minor, max_readahead, flags } => {
                return self.init(major, minor, max_readahead, InitFlags::from_bits_retain(flags), out);
            }
            Request::Destroy => {
                self.reset();
                return Ok(());
            }
            Request::Unserved => return Err(Errno::NOSYS),
            _ => self.check_ready()?,
        }
        if request.changes() {
            if self.share.is_read_only() {
                return Err(Errno::ROFS);
            }
            self.share.keep_set_ids(!request.kills_priv())?;
        }
        let who = Who { uid: head.uid, gid: head.gid };
        let share = &mut self.share;
        match request {
            Request::Lookup { name } => put_found(out, share.lookup(node, name), share.cache().entry)?,
            Request::GetAttr { fh } => put_attr(out, share.getattr(node, fh)?),
            Request::Statx { fh } => put_statx(out, share.getattr(node, fh)?),
            Request::SetAttr(set) => put_attr(out, share.setattr(node, &set)?),
            Request::ReadLink => share.readlink(node, out)?,
            Request::Symlink { name, target } => {
                put_entry(out, &share.make(node, name, New::Symlink { target }, who)?);
            }
            Request::MkNod { name, mode, rdev } => {
                put_entry(out, &share.make(node, name, New::Node { mode, rdev }, who)?);
            }
            Request::MkDir { name, mode } => {
                put_entry(out, &share.make(node, name, New::Dir { mode }, who)?);
            }
            Request::Unlink { name } => share.remove(node, name, false)?,
            Request::RmDir { name } => share.remove(node, name, true)?,
            Request::Rename { new_dir, flags, from, to } => {
                share.rename((node, from), (new_dir, to), flags, who)?;
            }
            Request::Link { old, name } => put_entry(out, &share.link(old, node, name)?),
            Request::StatFs => share.statfs(node, out)?,
            Request::Access { mask } => share.access(node, mask, who)?,
            Request::SetXattr { name, value, flags, .. } => share.setxattr(node, name, value, flags)?,
            Request::GetXattr { name, size } => {
                let n = share.getxattr(node, name, size.min(room as u32), out)?;
                put_size(out, size, n);
            }
            Request::ListXattr { size } => {
                let n = share.listxattr(node, size.min(room as u32), out)?;
                put_size(out, size, n);
            }
            Request::RemoveXattr { name } => share.removexattr(node, name)?,
            Request::SyncFs => share.sync()?,
            Request::SetupMapping(part) => share.map(node, part)?,
            Request::RemoveMapping(places) => share.unmap(places.iter())?,
            Request::Ioctl { cmd, arg } => self.ioctl(cmd, arg, who, out)?,
            _ => self.on_files(node, request, source, room, who, out)?,
        }
        Ok(())
    }

    /// Requests about open files and directories.
    fn on_files<'m>(
        &mut self,
        node: u64,
        request: Request<'_>,
        source: &mut impl Source<'m>,
        room: usize,
        who: Who,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let share = &mut self.share;
        match request {
            Request::Open { .. } if self.session.no_open => return Err(Errno::NOSYS),
            Request::OpenDir if self.session.no_opendir => return Err(Errno::NOSYS),
            // Nothing is written, so nothing is left to be said when a file is closed.
            Request::Flush { .. } if self.session.no_open => return Err(Errno::NOSYS),
            Request::Open { flags, .. } => {
                let (fh, flags) = share.open(node, flags)?;
                out.open(fh, flags);
            }
            Request::OpenDir => {
                let (fh, flags) = share.opendir(node)?;
                out.open(fh, flags);
            }
            Request::Create { name, flags, mode, .. } => {
                put_created(out, share.create(node, name, flags, mode, who)?);
            }
            Request::TmpFile { flags, mode } => put_created(out, share.tmpfile(node, flags, mode, who)?),
            Request::Write { fh, offset, size, whole, .. } => {
                let size = (size as usize).min(DATA_MAX);
                let data = source.take(size);
                let n = share.write(fh, offset, &data, size, whole)?;
                out.u32(n as u32);
                out.u32(0);
            }
            Request::ReadDir { fh, offset, size, plus } => {
                let size = (size as usize).min(room.saturating_sub(OUT_HEADER)).min(READDIR_MAX);
                share.readdir(node, fh, offset, size, plus, out)?;
            }
            Request::Release { fh } | Request::ReleaseDir { fh } => share.release(fh)?,
            Request::Fsync { fh, data_only } | Request::FsyncDir { fh, data_only } => {
                share.fsync(fh, data_only)?;
                share.check_mapped(node)?;
            }
            Request::Flush { fh, owner } => {
                share.drop_locks(node, owner);
                share.flush(fh)?;
            }
            Request::GetLock(_) | Request::SetLock(_) if !share.shares_locks() => return Err(Errno::NOSYS),
            Request::GetLock(lock) => out.lock(share.get_lock(node, &lock)?),
            Request::SetLock(lock) => match share.set_lock(node, &lock) {
                Err(Errno::AGAIN) if lock.waits && !self.may_wait => return Err(Errno::NOLCK),
                Err(Errno::AGAIN) if lock.waits => {
                    self.waits = true;
                    return Err(Errno::AGAIN);
                }
                r => r?,
            },
            Request::Fallocate { fh, offset, length, mode } => share.fallocate(fh, offset, length, mode)?,
            Request::Lseek { fh, offset, whence } => out.u64(share.lseek(node, fh, offset, whence)?),
            Request::CopyFileRange { fh_in, off_in, fh_out, off_out, len } => {
                let n = share.copy_range((fh_in, off_in), (fh_out, off_out), len)?;
                out.u32(n as u32);
                out.u32(0);
            }
            _ => return Err(Errno::NOSYS),
        }
        Ok(())
    }

    fn init(
        &mut self,
        major: u32,
        minor: u32,
        max_readahead: u32,
        offered: InitFlags,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        if major < abi::MAJOR || (major == abi::MAJOR && minor < abi::MINOR_MIN) {
            return Err(Errno::PROTO);
        }
        // The exit status is taken from root alone, so the users of requests must be known.
        let offered = if self.exit.is_some() { offered - InitFlags::ALLOW_IDMAP } else { offered };
        // A newer major begins again with ours; the rest of the reply does not count then.
        self.share.reset();
        let mut wanted = InitFlags::ASYNC_READ
            | InitFlags::BIG_WRITES
            | InitFlags::DO_READDIRPLUS
            | InitFlags::READDIRPLUS_AUTO
            | InitFlags::ASYNC_DIO
            | InitFlags::PARALLEL_DIROPS
            | InitFlags::MAX_PAGES
            | InitFlags::CACHE_SYMLINKS
            | InitFlags::HANDLE_KILLPRIV_V2
            | InitFlags::SETXATTR_EXT
            | InitFlags::DIRECT_IO_ALLOW_MMAP
            | InitFlags::ALLOW_IDMAP
            | InitFlags::INIT_EXT;
        if self.share.reads_unopened() {
            wanted |= InitFlags::NO_OPEN_SUPPORT;
            // Without OPENDIR the guest keeps listings for as long as a directory's times are the same; the
            // host's clock may be too coarse for two changes at nearly the same time.
            if matches!(self.share.cache().data, DataCache::Always | DataCache::WriteBack) {
                wanted |= InitFlags::NO_OPENDIR_SUPPORT;
            }
        }
        // Not ATOMIC_O_TRUNC: the guest's kernel asks whether a program runs from the file only after OPEN, and one
        // that was opened for reading would be truncated by then.
        match self.share.cache().data {
            DataCache::WriteBack if !self.share.is_read_only() => wanted |= InitFlags::WRITEBACK_CACHE,
            DataCache::WriteBack | DataCache::Always => {}
            _ => wanted |= InitFlags::AUTO_INVAL_DATA,
        }
        if self.share.window().is_some() {
            wanted |= InitFlags::MAP_ALIGNMENT | InitFlags::HAS_INODE_DAX;
        }
        if self.share.shares_locks() {
            wanted |= InitFlags::POSIX_LOCKS | InitFlags::FLOCK_LOCKS;
        }
        let agreed = wanted & offered;
        self.share.set_write_back(agreed.contains(InitFlags::WRITEBACK_CACHE));
        self.share.offer_mapping(agreed.contains(InitFlags::HAS_INODE_DAX));
        self.session = Session {
            ready: major == abi::MAJOR,
            setxattr_ext: agreed.contains(InitFlags::SETXATTR_EXT),
            no_open: agreed.contains(InitFlags::NO_OPEN_SUPPORT),
            no_opendir: agreed.contains(InitFlags::NO_OPENDIR_SUPPORT),
        };
        out.u32(abi::MAJOR);
        out.u32(minor.min(abi::MINOR));
        out.u32(max_readahead);
        out.u32(agreed.bits() as u32);
        // Requests in the background, and where the guest begins to slow its writers down.
        out.u16(64);
        out.u16(48);
        out.u32(DATA_MAX as u32);
        // Time stamps to the nanosecond.
        out.u32(1);
        out.u16(MAX_PAGES);
        out.u16(if agreed.contains(InitFlags::MAP_ALIGNMENT) { dax::ALIGNMENT } else { 0 });
        out.u32((agreed.bits() >> 32) as u32);
        out.raw(&[0; 28]);
        Ok(())
    }

    fn ioctl(&mut self, cmd: u32, arg: u64, who: Who, out: &mut Vec<u8>) -> Result<()> {
        match &self.exit {
            // Any user may open a file of the root; the machine's status is for init to say.
            Some(_) if cmd == IOCTL_EXIT && who.uid != 0 => return Err(Errno::PERM),
            Some(exit) if cmd == IOCTL_EXIT => exit.set(arg as i32),
            _ => return Err(Errno::NOTTY),
        }
        out.raw(&[0; 16]);
        Ok(())
    }
}

/// What became of a request.
#[derive(Debug)]
enum Done {
    /// Its reply is in the buffer.
    Reply,
    /// Its reply of so many bytes is with the guest.
    Stored(u32),
}

/// A name, or for how long there is none: as long as one that is there is believed in.
fn put_found(out: &mut Vec<u8>, found: Result<Entry>, absent: Duration) -> Result<()> {
    match found {
        Ok(entry) => put_entry(out, &entry),
        Err(Errno::NOENT) if !absent.is_zero() => {
            out.entry(0, &Attr::default(), Valid { entry: absent, attr: Duration::ZERO });
        }
        Err(e) => return Err(e),
    }
    Ok(())
}

fn put_entry(out: &mut Vec<u8>, e: &Entry) {
    out.entry(e.node, &e.attr, e.valid);
}

fn put_created(out: &mut Vec<u8>, (entry, fh, flags): (Entry, u64, u32)) {
    put_entry(out, &entry);
    out.open(fh, flags);
}

fn put_attr(out: &mut Vec<u8>, (attr, valid): (Attr, Duration)) {
    out.attr_out(&attr, valid);
}

/// The reply to a question for a length.
fn put_size(out: &mut Vec<u8>, asked: u32, len: usize) {
    if asked == 0 {
        out.u32(len as u32);
        out.u32(0);
    }
}

fn put_statx(out: &mut Vec<u8>, (a, valid): (Attr, Duration)) {
    out.u64(valid.as_secs());
    out.u32(valid.subsec_nanos());
    for _ in 0..5 {
        out.u32(0);
    }
    let birth = if a.btime.is_some() { 0x800 } else { 0 };
    out.u32(0x7ff | birth);
    out.u32(a.blksize);
    out.u64(0);
    for v in [a.nlink, a.uid, a.gid, a.mode & 0xffff] {
        out.u32(v);
    }
    for v in [a.ino, a.size, a.blocks, 0] {
        out.u64(v);
    }
    for t in [a.atime, a.btime.unwrap_or_default(), a.ctime, a.mtime] {
        out.u64(t.sec as u64);
        out.u64(t.nsec.into());
    }
    for v in [a.rdev_major, a.rdev_minor, 0, 0] {
        out.u32(v);
    }
    out.raw(&[0; 14 * 8]);
}
