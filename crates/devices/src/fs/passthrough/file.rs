//! Regular files: opened, created, read, written.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use krun_memory::VolatileSlice;
use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom, openat2};
use rustix::io::Errno;

use super::unopened::Bytes;
use super::{Entry, Result, Share, Stat, Who, beneath, with_descriptors};
use crate::fs::abi::{FOPEN_KEEP_CACHE, FOPEN_NOFLUSH};
use crate::fs::handles::Handle;
use crate::fs::inodes::What;
use crate::fs::io::Sink;
use crate::fs::overlay::Content;
use crate::fs::request::opens_for_writing;
use crate::fs::sys;

/// Most bytes that one COPY_FILE_RANGE moves; the guest asks again for the rest.
const COPY_MAX: u64 = 128 << 20;

/// Open flags that are passed on to the host.
fn host_flags(flags: u32) -> Result<OFlags> {
    let flags = OFlags::from_bits_retain(flags);
    let keep = OFlags::ACCMODE | OFlags::TRUNC | OFlags::APPEND | OFlags::SYNC | OFlags::DSYNC;
    if flags & OFlags::ACCMODE == OFlags::ACCMODE {
        return Err(Errno::INVAL);
    }
    Ok(flags & keep)
}

/// The same for a guest that writes back: its kernel fills up a page that was written in part, so it reads through
/// what was opened for writing; and it knows where the end of a file is, so that nothing is appended here.
fn write_back_flags(flags: OFlags) -> OFlags {
    let flags = flags - OFlags::APPEND;
    if flags & OFlags::ACCMODE == OFlags::WRONLY { (flags - OFlags::WRONLY) | OFlags::RDWR } else { flags }
}

impl Share {
    /// Opens `node` and returns handle and reply flags.
    ///
    /// # Errors
    /// The host's reason; ENXIO for what is neither a file nor a directory.
    pub fn open(&mut self, node: u64, flags: u32) -> Result<(u64, u32)> {
        let host = match &self.inodes.get(node)?.what {
            What::Virtual(index) => return self.open_overlay(*index, flags),
            What::Host(host) => host,
        };
        match host.id.kind {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(Errno::ISDIR),
            _ => return Err(Errno::NXIO),
        }
        let fd = match self.reopen(node, self.flags_on_host(flags)?) {
            // Not for this process to read; whole pages can be written all the same.
            Err(Errno::ACCESS) if self.write_back => {
                self.reopen(node, host_flags(flags)? - OFlags::APPEND)?
            }
            r => r?,
        };
        let st = self.stat_fd(&fd)?;
        let fh = self.add_handle(node, Handle::File { node, fd: Arc::new(fd) })?;
        Ok((fh, self.open_flags(node, &st, opens_for_writing(flags))))
    }

    /// The host's flags for those of the guest.
    fn flags_on_host(&self, flags: u32) -> Result<OFlags> {
        let flags = host_flags(flags)?;
        Ok(if self.write_back { write_back_flags(flags) } else { flags })
    }

    fn open_overlay(&mut self, index: usize, flags: u32) -> Result<(u64, u32)> {
        if opens_for_writing(flags) {
            return Err(Errno::ROFS);
        }
        let data = match self.overlays.content(index) {
            Some(Content::File { data, .. }) => data.clone(),
            Some(Content::Dir { .. }) => return Err(Errno::ISDIR),
            None => return Err(Errno::NOENT),
        };
        let fh = self.handles.add(Handle::Bytes { index, data })?;
        Ok((fh, FOPEN_KEEP_CACHE | FOPEN_NOFLUSH))
    }

    /// Creates and opens `name` in `parent`; an existing regular file is opened unless `O_EXCL` says no.
    ///
    /// # Errors
    /// The host's reason; ESTALE when the name has become something that must be looked up again.
    pub fn create(
        &mut self,
        parent: u64,
        name: &CStr,
        flags: u32,
        mode: u32,
        who: Who,
    ) -> Result<(Entry, u64, u32)> {
        self.not_overlaid(parent, name, Errno::EXIST)?;
        let dir = self.fd_to_change(parent)?;
        self.expect_room()?;
        let open = self.flags_on_host(flags)?;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let made = {
            let Self { inodes, caller, .. } = self;
            let caller = caller.as_ref().map(|(c, _)| c).ok_or(Errno::IO)?;
            let how = (open - OFlags::TRUNC) | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            // Always exclusive: what exists is opened below, once its type is known.
            with_descriptors(inodes, |_| {
                let _worn = caller.wear(who.uid, who.gid);
                openat2(&dir, name, how | OFlags::NOFOLLOW, mode, beneath())
            })
        };
        match made {
            Ok(fd) => {
                let st = self.stat_fd(&fd)?;
                let entry = self.enter(parent, name, &st, true)?;
                self.finish_create(entry, fd, &st)
            }
            Err(Errno::EXIST) if flags & libc::O_EXCL as u32 == 0 => {
                let entry = self.lookup(parent, name)?;
                let opened = match entry.attr.kind() {
                    libc::S_IFREG => self.open(entry.node, flags),
                    libc::S_IFDIR => Err(Errno::ISDIR),
                    _ => Err(Errno::STALE),
                };
                match opened {
                    Ok((fh, reply)) => Ok((entry, fh, reply)),
                    Err(e) => {
                        self.forget(entry.node, 1);
                        Err(e)
                    }
                }
            }
            Err(e) => Err(e),
        }
    }

    fn finish_create(&mut self, entry: Entry, fd: OwnedFd, st: &Stat) -> Result<(Entry, u64, u32)> {
        let node = entry.node;
        match self.add_handle(node, Handle::File { node, fd: Arc::new(fd) }) {
            Ok(fh) => Ok((entry, fh, self.open_flags(node, st, true))),
            Err(e) => {
                self.forget(node, 1);
                Err(e)
            }
        }
    }

    /// Creates and opens a file without a name.
    ///
    /// # Errors
    /// The host's reason, EOPNOTSUPP for one.
    pub fn tmpfile(&mut self, parent: u64, flags: u32, mode: u32, who: Who) -> Result<(Entry, u64, u32)> {
        let dir = self.fd_to_change(parent)?;
        self.expect_room()?;
        let exclusive = OFlags::from_bits_retain(flags) & OFlags::EXCL;
        let open =
            (self.flags_on_host(flags)? - OFlags::TRUNC) | exclusive | OFlags::TMPFILE | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let fd = {
            let Self { inodes, caller, .. } = self;
            let caller = caller.as_ref().map(|(c, _)| c).ok_or(Errno::IO)?;
            with_descriptors(inodes, |_| {
                let _worn = caller.wear(who.uid, who.gid);
                openat2(&dir, c".", open, mode, beneath())
            })?
        };
        let st = self.stat_fd(&fd)?;
        let entry = self.enter(0, c"", &st, true)?;
        self.finish_create(entry, fd, &st)
    }

    /// Reads up to `size` bytes of what `fh` has open into `sink` and returns how many.
    ///
    /// # Errors
    /// EBADF, or the host's reason.
    pub fn read<'m>(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        size: usize,
        sink: &mut impl Sink<'m>,
    ) -> Result<usize> {
        let from = match fh {
            0 if self.reads_unopened() => self.contents_of(node)?,
            _ => match self.handles.get(fh)? {
                Handle::File { fd, .. } => Bytes::Host(Arc::clone(fd)),
                Handle::Dir(_) => return Err(Errno::ISDIR),
                Handle::Bytes { data, .. } => Bytes::Virtual(data.clone()),
            },
        };
        match from {
            Bytes::Host(fd) => sys::read_into(fd.as_fd(), sink.room(), offset, size),
            Bytes::Virtual(data) => {
                let bytes = data.bytes();
                let rest = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
                let part = &rest[..rest.len().min(size).min(sink.remaining())];
                if sink.put(part) { Ok(part.len()) } else { Err(Errno::IO) }
            }
        }
    }

    /// Writes `size` bytes at `offset` and returns how many were written; with `whole`, all of them.
    ///
    /// # Errors
    /// EBADF, or the host's reason.
    pub fn write(
        &self,
        fh: u64,
        offset: u64,
        data: &[VolatileSlice<'_>],
        size: usize,
        whole: bool,
    ) -> Result<usize> {
        sys::write_from(self.handles.file(fh)?.as_fd(), data, offset, size, whole)
    }

    /// Writes an open file or directory out to its disk.
    ///
    /// # Errors
    /// EBADF, or the host's reason.
    pub fn fsync(&self, fh: u64, data_only: bool) -> Result<()> {
        match self.handles.host(fh)? {
            Some(fd) if data_only => rustix::fs::fdatasync(&fd),
            Some(fd) => rustix::fs::fsync(&fd),
            None => Ok(()),
        }
    }

    /// One of the guest's descriptors is closed: errors of the host's file system that show only then
    /// (over a network, for one) are reported.
    ///
    /// # Errors
    /// EBADF, or the host's reason.
    pub fn flush(&self, fh: u64) -> Result<()> {
        let Some(fd) = self.handles.host(fh)? else { return Ok(()) };
        match rustix::io::fcntl_dupfd_cloexec(&fd, 0) {
            Ok(copy) => sys::close(copy),
            // No descriptor to spare; RELEASE closes the file all the same.
            Err(_) => Ok(()),
        }
    }

    /// Reserves, frees or zeroes a part of a file.
    ///
    /// # Errors
    /// EBADF, or the host's reason.
    pub fn fallocate(&self, fh: u64, offset: u64, length: u64, mode: u32) -> Result<()> {
        let fd = self.handles.file(fh)?;
        rustix::fs::fallocate(&fd, FallocateFlags::from_bits_retain(mode), offset, length)
    }

    /// Finds data or holes.
    ///
    /// # Errors
    /// EBADF, ENXIO beyond the end, or the host's reason.
    pub fn lseek(&mut self, node: u64, fh: u64, offset: u64, whence: u32) -> Result<u64> {
        let whence = whence as i32;
        let from = match fh {
            0 if self.reads_unopened() => self.contents_of(node)?,
            _ => match self.handles.get(fh)? {
                Handle::Bytes { data, .. } => Bytes::Virtual(data.clone()),
                _ => Bytes::Host(self.handles.file(fh)?),
            },
        };
        let fd = match from {
            Bytes::Host(fd) => fd,
            Bytes::Virtual(data) => {
                let len = data.bytes().len() as u64;
                return match whence {
                    libc::SEEK_DATA if offset < len => Ok(offset),
                    libc::SEEK_HOLE if offset < len => Ok(len),
                    libc::SEEK_DATA | libc::SEEK_HOLE => Err(Errno::NXIO),
                    _ => Err(Errno::INVAL),
                };
            }
        };
        if i64::try_from(offset).is_err() {
            return Err(Errno::NXIO);
        }
        match whence {
            libc::SEEK_DATA => rustix::fs::seek(&fd, SeekFrom::Data(offset)),
            libc::SEEK_HOLE => rustix::fs::seek(&fd, SeekFrom::Hole(offset)),
            _ => Err(Errno::INVAL),
        }
    }

    /// Copies between two open files on the host and returns how many bytes.
    ///
    /// # Errors
    /// EBADF, or the host's reason; the guest then copies by itself for some of them.
    pub fn copy_range(&self, from: (u64, u64), to: (u64, u64), len: u64) -> Result<usize> {
        let (input, output) = (self.handles.file(from.0)?, self.handles.file(to.0)?);
        let len = usize::try_from(len.min(COPY_MAX)).unwrap_or(usize::MAX);
        let (mut a, mut b) = (from.1, to.1);
        if i64::try_from(a).is_err() || i64::try_from(b).is_err() {
            return Err(Errno::INVAL);
        }
        rustix::fs::copy_file_range(&input, Some(&mut a), &output, Some(&mut b), len)
    }
}
