//! Attributes: read, changed, checked.

use std::time::Duration;

use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid};
use rustix::io::Errno;

use super::{OVERLAY_VALID, Result, Share, Who};
use crate::fs::abi::{Attr, Fattr, Time};
use crate::fs::inodes::What;
use crate::fs::request::SetAttr;
use crate::fs::sys::FdName;

impl Share {
    /// Attributes of `node`, or of what `fh` has open, and how long to believe them.
    ///
    /// # Errors
    /// ESTALE, or the host's reason.
    pub fn getattr(&mut self, node: u64, fh: Option<u64>) -> Result<(Attr, Duration)> {
        if let What::Virtual(index) = self.inodes.get(node)?.what {
            // A one-shot file that is gone may still be open.
            return self.overlays.attr(index).map(|a| (a, OVERLAY_VALID)).ok_or(Errno::STALE);
        }
        let open = fh.and_then(|fh| self.handles.host(fh).ok().flatten());
        let st = match open {
            Some(fd) => self.stat_fd(&fd)?,
            None => self.stat(node)?,
        };
        let attr = self.attr_of(&st);
        Ok((attr, self.attr_valid(&attr)))
    }

    /// Changes attributes and returns the new ones.
    ///
    /// # Errors
    /// The host's reason; what came before it in the order mode, owner, size, times is done.
    pub fn setattr(&mut self, node: u64, set: &SetAttr) -> Result<(Attr, Duration)> {
        let path = self.fd_to_change(node)?;
        let open = set.fh.and_then(|fh| self.handles.host(fh).ok().flatten());
        let name = FdName::new(&path);
        let v = set.valid;
        if v.intersects(Fattr::UID | Fattr::GID) {
            // Before the mode, for a change of owner clears set-id bits.
            let uid = v.contains(Fattr::UID).then_some(set.uid).filter(|u| *u != u32::MAX);
            let gid = v.contains(Fattr::GID).then_some(set.gid).filter(|g| *g != u32::MAX);
            let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
            rustix::fs::chownat(&path, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if v.contains(Fattr::MODE) {
            let mode = Mode::from_raw_mode(set.mode & 0o7777);
            rustix::fs::chmodat(&self.fds, name.as_c_str(), mode, AtFlags::empty())?;
        }
        if v.contains(Fattr::SIZE) {
            self.truncate(node, open.as_deref(), set.size)?;
        }
        if v.intersects(Fattr::ATIME | Fattr::MTIME) {
            let pick = |given: Fattr, now: Fattr, t: Time| match (v.contains(given), v.contains(now)) {
                (false, _) => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
                (true, true) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
                (true, false) => Timespec { tv_sec: t.sec, tv_nsec: t.nsec.min(999_999_999).into() },
            };
            let times = Timestamps {
                last_access: pick(Fattr::ATIME, Fattr::ATIME_NOW, set.atime),
                last_modification: pick(Fattr::MTIME, Fattr::MTIME_NOW, set.mtime),
            };
            rustix::fs::utimensat(&self.fds, name.as_c_str(), &times, AtFlags::empty())?;
        }
        let st = self.stat_fd(&path)?;
        let attr = self.attr_of(&st);
        Ok((attr, self.attr_valid(&attr)))
    }

    fn truncate(&mut self, node: u64, open: Option<&std::os::fd::OwnedFd>, size: u64) -> Result<()> {
        if let Some(fd) = open {
            return rustix::fs::ftruncate(fd, size);
        }
        if self.inodes.host(node)?.id.kind != libc::S_IFREG {
            return Err(Errno::INVAL);
        }
        let fd = self.reopen(node, rustix::fs::OFlags::WRONLY)?;
        rustix::fs::ftruncate(&fd, size)
    }

    /// Target of a symbolic link.
    ///
    /// # Errors
    /// EINVAL: it is none; or the host's reason.
    pub fn readlink(&mut self, node: u64, out: &mut Vec<u8>) -> Result<()> {
        if let What::Virtual(_) = self.inodes.get(node)?.what {
            return Err(Errno::INVAL);
        }
        if self.inodes.host(node)?.id.kind != libc::S_IFLNK {
            return Err(Errno::INVAL);
        }
        let path = self.fd(node)?;
        let start = out.len();
        out.resize(start + crate::fs::abi::PATH_MAX + 1, 0);
        let n = rustix::fs::readlinkat_raw(&path, c"", &mut out[start..])?;
        out.truncate(start + n);
        Ok(())
    }

    /// Whether `who` may do `mask` (R_OK, W_OK, X_OK) to `node`. The guest's kernel checks by itself and
    /// does not ask; this serves those that do.
    ///
    /// # Errors
    /// EACCES.
    pub fn access(&mut self, node: u64, mask: u32, who: Who) -> Result<()> {
        let (attr, _) = self.getattr(node, None)?;
        let wanted = mask & 7;
        if who.uid == 0 {
            // Root may execute what anybody may.
            let exec = attr.mode & 0o111 != 0 || attr.kind() == libc::S_IFDIR;
            return if wanted & 1 == 0 || exec { Ok(()) } else { Err(Errno::ACCESS) };
        }
        let granted = match attr {
            a if a.uid == who.uid => a.mode >> 6,
            a if a.gid == who.gid => a.mode >> 3,
            a => a.mode,
        };
        if wanted & !granted == 0 { Ok(()) } else { Err(Errno::ACCESS) }
    }

    /// `struct fuse_kstatfs` of the file system that `node` is on.
    ///
    /// # Errors
    /// The host's reason.
    pub fn statfs(&mut self, node: u64, out: &mut Vec<u8>) -> Result<()> {
        use crate::fs::abi::Put;
        let fd = match (&self.inodes.get(node)?.what, &self.root) {
            (What::Host(_), _) => self.fd(node)?,
            (What::Virtual(_), Some(root)) => root.path.clone(),
            (What::Virtual(_), None) => {
                for v in [0; 5] {
                    out.u64(v);
                }
                for v in [4096, crate::fs::abi::NAME_MAX as u32, 4096, 0, 0, 0, 0, 0, 0, 0] {
                    out.u32(v);
                }
                return Ok(());
            }
        };
        let s = rustix::fs::fstatfs(&fd)?;
        for v in [s.f_blocks as u64, s.f_bfree as u64, s.f_bavail as u64, s.f_files as u64, s.f_ffree as u64]
        {
            out.u64(v);
        }
        for v in [s.f_bsize as u32, s.f_namelen as u32, s.f_frsize as u32, 0, 0, 0, 0, 0, 0, 0] {
            out.u32(v);
        }
        Ok(())
    }
}
