//! Directories: listed, with or without lookups.
//!
//! Positions are the host's own. A directory that lists overlays shows them first, at positions 0, 1, ..., and
//! shifts the host's up by their number; a position too large to be shifted is one at the very end.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;

use super::{Result, Share, is_dir, parent_key};
use crate::fs::abi::{Attr, ENTRY_SIZE, FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE, Put, ROOT, Valid, dirent_size};
use crate::fs::handles::{Dir, Handle};
use crate::fs::inodes::What;
use crate::fs::overlay::Content;
use crate::fs::{DataCache, sys};

/// Bytes of entries taken from the host at once.
const CHUNK: usize = 8192;

/// An entry as the host stores it (`struct linux_dirent64`).
#[derive(Debug, PartialEq, Eq)]
struct HostEntry<'a> {
    ino: u64,
    /// Position after it.
    next: u64,
    kind: u8,
    name: &'a CStr,
    len: usize,
}

/// The first entry of `bytes`.
fn first_entry(bytes: &[u8]) -> Option<HostEntry<'_>> {
    let ino = u64::from_ne_bytes(*bytes.first_chunk()?);
    let next = u64::from_ne_bytes(*bytes.get(8..)?.first_chunk()?);
    let len = usize::from(u16::from_ne_bytes(*bytes.get(16..)?.first_chunk()?));
    let kind = *bytes.get(18)?;
    let name = CStr::from_bytes_until_nul(bytes.get(19..len)?).ok()?;
    Some(HostEntry { ino, next, kind, name, len })
}

impl Share {
    /// Opens a directory and returns handle and reply flags.
    ///
    /// # Errors
    /// ENOTDIR, or the host's reason.
    pub fn opendir(&mut self, node: u64) -> Result<(u64, u32)> {
        let listed = self.overlays.listed(parent_key(self.inodes.get(node)?));
        let fd = self.directory(node)?;
        let dir = Dir { node, fd, listed, entries: Vec::new(), at: 0, offset: 0 };
        let fh = self.add_handle(node, Handle::Dir(Box::new(dir)))?;
        let flags = match self.cache.data {
            DataCache::Always | DataCache::WriteBack => FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE,
            _ => 0,
        };
        Ok((fh, flags))
    }

    /// Opens directory `node` of the host; `None`: it is an overlay.
    pub(super) fn directory(&mut self, node: u64) -> Result<Option<Arc<OwnedFd>>> {
        match &self.inodes.get(node)?.what {
            What::Virtual(index) => match self.overlays.content(*index) {
                Some(Content::Dir { .. }) => Ok(None),
                Some(Content::File { .. }) => Err(Errno::NOTDIR),
                None => Err(Errno::NOENT),
            },
            What::Host(host) if is_dir(&host.id) => {
                Ok(Some(Arc::new(self.reopen(node, OFlags::RDONLY | OFlags::DIRECTORY)?)))
            }
            What::Host(_) => Err(Errno::NOTDIR),
        }
    }

    /// Appends entries from `offset` to `out`, at most `size` bytes of them; with `plus`, each with a
    /// lookup counted.
    ///
    /// # Errors
    /// EBADF, EINVAL when not one entry fits, or the host's reason.
    pub fn readdir(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        size: usize,
        plus: bool,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let unopened = fh == 0 && self.reads_unopened();
        let mut dir = if unopened { self.listing_of(node)? } else { self.handles.take_dir(fh)? };
        let start = out.len();
        let r = self.list(&mut dir, offset, start.saturating_add(size), plus, out);
        match unopened {
            true => self.keep_listing(dir),
            false => self.handles.put_dir(fh, dir),
        }
        match r {
            // What was listed before an error is passed on; the guest meets the error again.
            Err(_) if out.len() > start => Ok(()),
            r => r,
        }
    }

    fn list(
        &mut self,
        dir: &mut Dir,
        offset: u64,
        limit: usize,
        plus: bool,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let shift = dir.listed.len() as u64;
        let before = out.len();
        let mut index = offset;
        while let Some((name, ino, kind)) =
            usize::try_from(index).ok().and_then(|i| dir.listed.get(i)).cloned()
        {
            index += 1;
            if !self.emit(dir.node, &name, ino, (kind >> 12) as u8, index, limit, plus, out)? {
                return full(out.len() > before);
            }
        }
        let Some(fd) = dir.fd.clone() else { return self.list_dots(dir, index, limit, plus, out) };
        let end = i64::MAX as u64;
        let position = if index >= end { end } else { index - shift };
        if position != dir.offset || (dir.at == dir.entries.len() && position == 0) {
            rustix::fs::seek(&fd, SeekFrom::Start(position))?;
            dir.entries.clear();
            dir.at = 0;
            dir.offset = position;
        }
        loop {
            if dir.at >= dir.entries.len() {
                dir.at = 0;
                dir.entries.resize(CHUNK, 0);
                let n = sys::getdents(fd.as_fd(), &mut dir.entries);
                dir.entries.truncate(*n.as_ref().unwrap_or(&0));
                if n? == 0 {
                    dir.entries = Vec::new();
                    return Ok(());
                }
            }
            let Some(entry) = first_entry(&dir.entries[dir.at..]) else { return Err(Errno::IO) };
            let next = entry.next.saturating_add(shift).min(i64::MAX as u64);
            let shown = !dir.listed.iter().any(|(name, ..)| **name == *entry.name);
            let ino = self.shown_ino(dir.node, &entry)?;
            if shown && !self.emit(dir.node, entry.name, ino, entry.kind, next, limit, plus, out)? {
                return full(out.len() > before);
            }
            dir.offset = entry.next;
            dir.at += entry.len;
        }
    }

    /// The parent of the share's root is no business of the guest's.
    fn shown_ino(&self, node: u64, entry: &HostEntry<'_>) -> Result<u64> {
        if node == ROOT && entry.name == c".." {
            return Ok(self.inodes.host(node)?.id.key.ino);
        }
        Ok(entry.ino)
    }

    /// The two entries that a directory without a host has.
    fn list_dots(
        &mut self,
        dir: &Dir,
        index: u64,
        limit: usize,
        plus: bool,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let What::Virtual(which) = self.inodes.get(dir.node)?.what else { return Err(Errno::IO) };
        let ino = self.overlays.attr(which).ok_or(Errno::NOENT)?.ino;
        let shift = dir.listed.len() as u64;
        let before = out.len();
        for (i, name) in [c".", c".."].into_iter().enumerate().skip((index - shift.min(index)) as usize) {
            let next = shift + i as u64 + 1;
            if !self.emit(dir.node, name, ino, libc::DT_DIR, next, limit, plus, out)? {
                return full(out.len() > before);
            }
        }
        Ok(())
    }

    /// Appends one entry; false when it does not fit.
    #[allow(clippy::too_many_arguments)]
    fn emit(
        &mut self,
        parent: u64,
        name: &CStr,
        ino: u64,
        kind: u8,
        next: u64,
        limit: usize,
        plus: bool,
        out: &mut Vec<u8>,
    ) -> Result<bool> {
        let bytes = name.to_bytes();
        let size = dirent_size(bytes.len()) + if plus { ENTRY_SIZE } else { 0 };
        if out.len() + size > limit {
            return Ok(false);
        }
        let end = out.len() + size;
        let mut ino = ino;
        if plus {
            let dots = matches!(bytes, b"." | b"..");
            match if dots { Err(Errno::NOENT) } else { self.lookup(parent, name) } {
                Ok(e) => {
                    ino = e.attr.ino;
                    out.entry(e.node, &e.attr, e.valid);
                }
                // Gone meanwhile, or not to be looked at: the name alone, for the guest to find out.
                Err(_) => out.entry(0, &Attr::default(), Valid::default()),
            }
        }
        out.u64(ino);
        out.u64(next);
        out.u32(bytes.len() as u32);
        out.u32(kind.into());
        out.raw(bytes);
        out.resize(end, 0);
        Ok(true)
    }
}

/// A reply that is full is fine unless nothing at all fits.
fn full(any: bool) -> Result<()> {
    if any { Ok(()) } else { Err(Errno::INVAL) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_entry_is_taken_apart() {
        let mut b = Vec::new();
        b.extend(5u64.to_ne_bytes());
        b.extend(9u64.to_ne_bytes());
        b.extend(24u16.to_ne_bytes());
        b.push(4);
        b.extend(b"ab\0\0\0");
        let e = first_entry(&b).unwrap();
        assert_eq!((e.ino, e.next, e.kind, e.name, e.len), (5, 9, 4, c"ab", 24));
        assert_eq!(first_entry(&b[..20]), None);
    }

    proptest! {
        #[test]
        fn no_entry_is_longer_than_its_buffer(b in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(e) = first_entry(&b) {
                prop_assert!(e.len <= b.len() && e.len > 0);
            }
        }
    }
}
