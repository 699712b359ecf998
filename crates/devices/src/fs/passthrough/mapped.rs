//! Files in the DAX window: which are offered, and how they get there.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fcntl_getfl};
use rustix::io::Errno;

use super::{Result, Share};
use crate::fs::abi::Attr;
use crate::fs::dax::{Dax, Lacking, Part, pages};
use crate::fs::handles::Handle;
use crate::fs::inodes::What;
use crate::fs::watches::Watches;
use crate::fs::{CachePolicy, DataCache};

/// So many files are watched without a look at whether they are still in the window.
const WATCHES_MIN: usize = 64;

/// Whether what is mapped of a file system's files is what others read and write of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coherence {
    /// It is.
    Always,
    /// As long as nobody writes to them: a stack of layers copies a file that is written to, and what was mapped before
    /// stays with the copy below; and some network file systems map for reading only.
    Unchanged,
    /// Not known.
    Unknown,
}

impl Coherence {
    /// That of a file system by its number in statfs(2).
    pub fn of(kind: u32) -> Self {
        // ext4, XFS, btrfs, F2FS, bcachefs, tmpfs, EROFS, squashfs, ISO 9660, FAT, exFAT.
        const LOCAL: [u32; 11] = [
            0xef53,
            0x5846_5342,
            0x9123_683e,
            0xf2f5_2010,
            0xca45_1a4e,
            0x0102_1994,
            0xe0f5_e1e2,
            0x7371_7368,
            0x9660,
            0x4d44,
            0x2011_bab0,
        ];
        // Overlayfs, 9p.
        const LAYERS: [u32; 2] = [0x794c_7630, 0x0102_1997];
        match kind {
            kind if LOCAL.contains(&kind) => Self::Always,
            kind if LAYERS.contains(&kind) => Self::Unchanged,
            _ => Self::Unknown,
        }
    }

    fn suffices(self, read_only: bool, cache: &CachePolicy) -> bool {
        match self {
            Self::Always => true,
            Self::Unchanged => read_only && cache.data == DataCache::Always,
            Self::Unknown => false,
        }
    }
}

impl Share {
    /// Gives the share a window.
    pub fn set_window(&mut self, dax: Arc<Dax>) {
        self.dax = Some(dax);
        match Watches::new() {
            Ok(watches) => self.watches = Some(watches),
            Err(e) => tracing::warn!(
                errno = e.raw_os_error(),
                "files in a DAX window are not watched: where one loses its end, a program in the guest may hang"
            ),
        }
    }

    /// The window, if there is one.
    pub fn window(&self) -> Option<&Arc<Dax>> {
        self.dax.as_ref()
    }

    /// The guest's kernel wants to know of each file whether it is to be mapped.
    pub fn offer_mapping(&mut self, offer: bool) {
        self.offers_dax = offer;
    }

    /// Whether a file with these attributes, on such a file system, is to be mapped and not read by requests. Small ones
    /// are not, as one of them takes a whole piece of the window; nor set-id files, for a write through the window takes
    /// no bits away.
    pub fn is_to_be_mapped(&self, attr: &Attr, coherence: Coherence) -> bool {
        let Some(dax) = self.dax.as_ref().filter(|_| self.offers_dax) else { return false };
        let set_id = attr.mode & (libc::S_ISUID | libc::S_ISGID) != 0;
        attr.kind() == libc::S_IFREG
            && !set_id
            && attr.size >= dax.from()
            && coherence.suffices(self.read_only, &self.cache)
    }

    /// Shows a part of file `node` in the window.
    ///
    /// # Errors
    /// ENOSYS: there is no window; EROFS; EINVAL: no file, or not one to be mapped, or no such place; ENOSPC: the part has
    /// holes, and the disk has no room for them; or the host's reason.
    pub fn map(&mut self, node: u64, part: Part) -> Result<()> {
        let dax = Arc::clone(self.dax.as_ref().ok_or(Errno::NOSYS)?);
        if part.writable && self.read_only {
            return Err(Errno::ROFS);
        }
        dax.check(part)?;
        let file = self.file_to_map(node, part.writable)?;
        if part.writable {
            fill_holes(&file, part)?;
        }
        dax.show(node, file.as_fd(), part)?;
        if let Some(watches) = &mut self.watches {
            watches.add(node, &file);
            if watches.len() > WATCHES_MIN && watches.len() > dax.count() {
                watches.keep(&dax.nodes());
            }
        }
        // It may have lost its end since, or before.
        let size = rustix::fs::fstat(&file)?.st_size.cast_unsigned();
        if size < part.offset.saturating_add(part.len) {
            dax.cut(node, size);
        }
        Ok(())
    }

    /// What is readable when a file in the window has changed.
    pub fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.watches.as_ref().map(Watches::fd)
    }

    /// Files in the window have changed: what they have lost is replaced, what they have gained is shown.
    pub fn follow_changes(&mut self) {
        let Some(dax) = self.dax.clone() else { return };
        for node in self.watches.as_mut().map(Watches::take).unwrap_or_default() {
            let Ok(size) = self.stat(node).map(|st| st.attr.size) else { continue };
            dax.cut(node, size);
            for lacking in dax.lacking().iter().filter(|l| l.node == node) {
                self.complete(&dax, lacking, size);
            }
        }
    }

    /// Takes parts of the window away.
    ///
    /// # Errors
    /// ENOSYS: there is no window; EINVAL: no such place. What came before that in the list is done.
    pub fn unmap(&mut self, mut places: impl Iterator<Item = (u64, u64)>) -> Result<()> {
        let dax = self.dax.as_ref().ok_or(Errno::NOSYS)?;
        let done = places.try_for_each(|(at, len)| dax.hide(at, len));
        match &mut self.watches {
            Some(watches) if dax.count() == 0 => watches.clear(),
            Some(watches) if watches.len() > dax.count() => watches.keep(&dax.nodes()),
            _ => {}
        }
        done
    }

    /// Shows the ends of files in the window that are there again. To be called before the guest learns of anything that
    /// may have become longer.
    pub fn complete_mappings(&mut self) {
        let Some(dax) = self.dax.clone().filter(|dax| dax.is_lacking()) else { return };
        if self.watches.as_ref().is_some_and(Watches::is_complete) {
            return self.follow_changes();
        }
        for lacking in dax.lacking() {
            if let Ok(st) = self.stat(lacking.node) {
                self.complete(&dax, &lacking, st.attr.size);
            }
        }
    }

    /// Shows a piece anew of whose file, which has `size` bytes, more is there than it shows.
    fn complete(&mut self, dax: &Dax, lacking: &Lacking, size: u64) {
        let (node, part) = (lacking.node, lacking.part);
        if pages(size.saturating_sub(part.offset)) <= lacking.there {
            return;
        }
        let shown = self.file_to_map(node, part.writable).and_then(|file| {
            if part.writable {
                fill_holes(&file, part)?;
            }
            dax.show(node, file.as_fd(), part)
        });
        match shown {
            Ok(()) => dax.cut(node, size),
            Err(e) => {
                tracing::debug!(node, errno = e.raw_os_error(), "a file is not mapped again");
                // What the guest writes there from now on does not reach the file, though that is long enough.
                if part.writable {
                    dax.lose(node);
                }
            }
        }
    }

    /// Tells once that something the guest wrote through the window did not reach file `node`.
    ///
    /// # Errors
    /// EIO.
    pub fn check_mapped(&self, node: u64) -> Result<()> {
        if self.dax.as_ref().is_some_and(|dax| dax.take_lost(node)) { Err(Errno::IO) } else { Ok(()) }
    }

    /// File `node`, open for what a mapping needs: as the guest has it open, or opened now.
    fn file_to_map(&mut self, node: u64, writable: bool) -> Result<Arc<OwnedFd>> {
        let host = match &self.inodes.get(node)?.what {
            What::Virtual(_) => return Err(Errno::NODEV),
            What::Host(host) => host,
        };
        // Others would wait for a file system's server as long as that likes: the guest's processors, and the threads of
        // all devices that are given buffers there.
        let coherence = self.devices.get(&host.id.key.dev).map_or(Coherence::Unknown, |d| d.coherence);
        if host.id.kind != libc::S_IFREG || coherence == Coherence::Unknown {
            return Err(Errno::INVAL);
        }
        let fits = |fd: &OwnedFd| match fcntl_getfl(fd).map(|flags| flags & OFlags::ACCMODE) {
            Ok(OFlags::RDWR) => true,
            Ok(OFlags::RDONLY) => !writable,
            _ => false,
        };
        let open = host.open.iter().find_map(|fh| match self.handles.get(*fh) {
            Ok(Handle::File { fd, .. }) if fits(fd) => Some(Arc::clone(fd)),
            _ => None,
        });
        match open {
            Some(fd) => Ok(fd),
            None => self.reopen(node, if writable { OFlags::RDWR } else { OFlags::RDONLY }).map(Arc::new),
        }
    }
}

/// Has the disk give the holes in a part of a file their room now. A processor of the guest that writes to one later
/// could not be told that there is none.
fn fill_holes(file: &OwnedFd, part: Part) -> Result<()> {
    let size = rustix::fs::fstat(file)?.st_size.cast_unsigned();
    let end = part.offset.saturating_add(part.len).min(size);
    if part.offset >= end {
        return Ok(());
    }
    let hole = rustix::fs::seek(file, SeekFrom::Hole(part.offset)).unwrap_or(part.offset);
    if hole >= end {
        return Ok(());
    }
    match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, hole, end - hole) {
        Err(e @ (Errno::NOSPC | Errno::DQUOT)) => Err(e),
        // A file system that cannot.
        _ => Ok(()),
    }
}
