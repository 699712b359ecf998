//! Open files and directories of the guest.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::inodes::IdMap;
use super::limits::Quota;
use super::overlay::FileData;

/// What a directory takes of the quota: it keeps a piece of its listing.
const DIR_COST: usize = 8;

/// An open directory.
#[derive(Debug)]
pub struct Dir {
    /// Its node.
    pub node: u64,
    /// The directory of the host, if it is one.
    pub fd: Option<Arc<OwnedFd>>,
    /// Overlays to list: name, inode number, type bits.
    pub listed: Vec<(CString, u64, u32)>,
    /// Entries as the host gave them, not all passed on yet.
    pub entries: Vec<u8>,
    /// Where in `entries` the next one is.
    pub at: usize,
    /// The host's position of that one.
    pub offset: u64,
}

/// What a handle stands for.
#[derive(Debug)]
pub enum Handle {
    /// A regular file of the host.
    File {
        /// Its node.
        node: u64,
        /// The open file.
        fd: Arc<OwnedFd>,
    },
    /// A directory.
    Dir(Box<Dir>),
    /// An overlay file.
    Bytes {
        /// Which.
        index: usize,
        /// Its contents, alive while open.
        data: FileData,
    },
}

impl Handle {
    /// What it takes of the quota.
    fn cost(&self) -> usize {
        match self {
            Self::Dir(_) => DIR_COST,
            Self::File { .. } | Self::Bytes { .. } => 1,
        }
    }
}

/// All open handles.
#[derive(Debug)]
pub struct Handles {
    open: IdMap<Handle>,
    last: u64,
    quota: Quota,
}

impl Handles {
    /// None, of so many that there may be.
    pub fn new(quota: Quota) -> Self {
        Self { open: IdMap::default(), last: 0, quota }
    }

    /// Adds a handle and returns its number, which is never used again.
    ///
    /// # Errors
    /// ENFILE: too many.
    pub fn add(&mut self, handle: Handle) -> Result<u64, Errno> {
        self.quota.take(handle.cost())?;
        self.last += 1;
        self.open.insert(self.last, handle);
        Ok(self.last)
    }

    /// What the guest may have open.
    pub fn quota(&self) -> &Quota {
        &self.quota
    }

    /// A handle.
    ///
    /// # Errors
    /// EBADF: there is none.
    pub fn get(&self, fh: u64) -> Result<&Handle, Errno> {
        self.open.get(&fh).ok_or(Errno::BADF)
    }

    /// The open file of the host behind `fh`.
    ///
    /// # Errors
    /// EBADF: there is none; EROFS: it is an overlay; EISDIR.
    pub fn file(&self, fh: u64) -> Result<Arc<OwnedFd>, Errno> {
        match self.get(fh)? {
            Handle::File { fd, .. } => Ok(Arc::clone(fd)),
            Handle::Bytes { .. } => Err(Errno::ROFS),
            Handle::Dir(_) => Err(Errno::ISDIR),
        }
    }

    /// The open file or directory of the host behind `fh`; `None`: an overlay.
    ///
    /// # Errors
    /// EBADF: there is none.
    pub fn host(&self, fh: u64) -> Result<Option<Arc<OwnedFd>>, Errno> {
        Ok(match self.get(fh)? {
            Handle::File { fd, .. } => Some(Arc::clone(fd)),
            Handle::Dir(dir) => dir.fd.clone(),
            Handle::Bytes { .. } => None,
        })
    }

    /// Takes a directory out, to be put back with [`Handles::put_dir`].
    ///
    /// # Errors
    /// EBADF: there is none; ENOTDIR.
    pub fn take_dir(&mut self, fh: u64) -> Result<Box<Dir>, Errno> {
        match self.open.remove(&fh) {
            Some(Handle::Dir(dir)) => Ok(dir),
            Some(other) => {
                self.open.insert(fh, other);
                Err(Errno::NOTDIR)
            }
            None => Err(Errno::BADF),
        }
    }

    /// Puts a directory back.
    pub fn put_dir(&mut self, fh: u64, dir: Box<Dir>) {
        self.open.insert(fh, Handle::Dir(dir));
    }

    /// Closes a handle.
    pub fn remove(&mut self, fh: u64) -> Option<Handle> {
        let handle = self.open.remove(&fh)?;
        self.quota.give(handle.cost());
        Some(handle)
    }

    /// Number of open handles.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Closes all.
    pub fn clear(&mut self) {
        self.quota.give(self.open.values().map(Handle::cost).sum());
        self.open.clear();
    }
}
