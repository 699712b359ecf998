//! Names made, moved and removed.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, RenameFlags};
use rustix::io::Errno;

use super::{Entry, Result, Share, Who, open_path, with_descriptors};
use crate::fs::abi::split_dev;
use crate::fs::sys::FdName;

/// What MKNOD, MKDIR and SYMLINK make.
#[derive(Debug, Clone, Copy)]
pub enum New<'a> {
    /// A directory.
    Dir {
        /// Permission bits.
        mode: u32,
    },
    /// A file or special file.
    Node {
        /// Type and permission bits.
        mode: u32,
        /// Device number.
        rdev: u32,
    },
    /// A symbolic link.
    Symlink {
        /// Its target.
        target: &'a CStr,
    },
}

impl Share {
    /// Makes `name` in `parent`, owned by `who` where the host allows it.
    ///
    /// # Errors
    /// The host's reason.
    pub fn make(&mut self, parent: u64, name: &CStr, new: New<'_>, who: Who) -> Result<Entry> {
        self.not_overlaid(parent, name, Errno::EXIST)?;
        let dir = self.fd_to_change(parent)?;
        {
            let _worn = self.caller()?.wear(who.uid, who.gid);
            match new {
                New::Dir { mode } => rustix::fs::mkdirat(&dir, name, Mode::from_raw_mode(mode & 0o7777))?,
                New::Symlink { target } => rustix::fs::symlinkat(target, &dir, name)?,
                New::Node { mode, rdev } => {
                    let kind = match mode & libc::S_IFMT {
                        0 => FileType::RegularFile,
                        libc::S_IFDIR | libc::S_IFLNK => return Err(Errno::INVAL),
                        bits => FileType::from_raw_mode(bits),
                    };
                    let (major, minor) = split_dev(rdev);
                    let dev = rustix::fs::makedev(major, minor);
                    rustix::fs::mknodat(&dir, name, kind, Mode::from_raw_mode(mode & 0o7777), dev)?;
                }
            }
        }
        let st = self.stat_at(&dir, name)?;
        self.enter(parent, name, &st, true)
    }

    /// Gives the inode `old` another name.
    ///
    /// # Errors
    /// The host's reason.
    pub fn link(&mut self, old: u64, parent: u64, name: &CStr) -> Result<Entry> {
        self.not_overlaid(parent, name, Errno::EXIST)?;
        let (from, dir) = (self.fd(old)?, self.fd_to_change(parent)?);
        let number = FdName::new(&from);
        rustix::fs::linkat(&self.fds, number.as_c_str(), &dir, name, AtFlags::SYMLINK_FOLLOW)?;
        let st = self.stat_at(&dir, name)?;
        self.enter(parent, name, &st, false)
    }

    /// Removes a name, of a directory or of anything else.
    ///
    /// # Errors
    /// The host's reason; EROFS for overlays.
    pub fn remove(&mut self, parent: u64, name: &CStr, dir: bool) -> Result<()> {
        self.not_overlaid(parent, name, Errno::ROFS)?;
        let fd = self.fd_to_change(parent)?;
        let held = self.known(&fd, name);
        rustix::fs::unlinkat(&fd, name, if dir { AtFlags::REMOVEDIR } else { AtFlags::empty() })?;
        if let Some((node, fd)) = held {
            self.inodes.keep(node, fd);
        }
        Ok(())
    }

    /// What is `name` in `dir`, if the guest knows it, to be kept once the name is gone: it may be open there
    /// without being open here (a FIFO, a socket), or be a process's working directory.
    fn known(&mut self, dir: &OwnedFd, name: &CStr) -> Option<(u64, Arc<OwnedFd>)> {
        let fd = with_descriptors(&mut self.inodes, |_| open_path(dir, name)).ok()?;
        let id = self.stat_fd(&fd).ok()?.id;
        let node = self.inodes.find(&id)?;
        // Over a network a file that is held is renamed instead of removed, and its directory could not be.
        if self.devices.get(&id.key.dev).is_none_or(|d| d.close_tells) {
            return None;
        }
        Some((node, self.inodes.cached(node).unwrap_or_else(|| Arc::new(fd))))
    }

    /// Moves or exchanges names.
    ///
    /// # Errors
    /// The host's reason; EROFS for overlays.
    pub fn rename(&mut self, from: (u64, &CStr), to: (u64, &CStr), flags: u32, who: Who) -> Result<()> {
        let flags = RenameFlags::from_bits_retain(flags);
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        self.not_overlaid(from.0, from.1, Errno::ROFS)?;
        self.not_overlaid(to.0, to.1, Errno::ROFS)?;
        let (old, new) = (self.fd_to_change(from.0)?, self.fd_to_change(to.0)?);
        let stays = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE;
        let replaced = if flags.intersects(stays) { None } else { self.known(&new, to.1) };
        {
            // The whiteout that stays behind is the caller's.
            let whiteout = flags.contains(RenameFlags::WHITEOUT);
            let caller = self.caller()?;
            let _worn = whiteout.then(|| caller.wear(who.uid, who.gid));
            rustix::fs::renameat_with(&old, from.1, &new, to.1, flags)?;
        }
        if let Some((node, fd)) = replaced {
            self.inodes.keep(node, fd);
        }
        // The guest does not look the names up again, so what is found by name later must be noted now.
        if let Ok(st) = self.stat_at(&new, to.1)
            && let Some(node) = self.inodes.find(&st.id)
        {
            self.inodes.place(node, to.0, to.1);
        }
        if flags.contains(RenameFlags::EXCHANGE)
            && let Ok(st) = self.stat_at(&old, from.1)
            && let Some(node) = self.inodes.find(&st.id)
        {
            self.inodes.place(node, from.0, from.1);
        }
        Ok(())
    }
}
