//! Locks that guest and host see of each other, where the share is to have that.
//!
//! A BSD lock is the host's on the guest's open file. A record lock of the guest has an owner, a process of the guest;
//! each owner gets an open file of its own on the host, on which its locks are. Without FLUSH, which tells that an
//! owner has closed the file, locks would stay; so files of such a share are opened without `FOPEN_NOFLUSH`. Linux does
//! not tell so of an open file that is itself the owner (`F_OFD_SETLK`); its locks go with its RELEASE.

use std::os::fd::OwnedFd;

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use super::{Result, Share};
use crate::fs::handles::Handle;
use crate::fs::inodes::What;
use crate::fs::request::Lock;
use crate::fs::sys::locks::{self, Record};

/// Open files that owners have their locks on, by node and owner, each with the guest's handle that it was made for.
pub type Owners = std::collections::BTreeMap<(u64, u64), (OwnedFd, u64)>;

impl Share {
    /// Whether guest and host see each other's locks.
    pub fn shares_locks(&self) -> bool {
        self.share_locks
    }

    /// Whether a lock was given back since this was asked last.
    pub fn gave_lock_back(&mut self) -> bool {
        std::mem::take(&mut self.lock_free)
    }

    /// Takes or gives back a lock, without waiting.
    ///
    /// # Errors
    /// EAGAIN: somebody else has it; or the host's reason.
    pub fn set_lock(&mut self, node: u64, lock: &Lock) -> Result<()> {
        // A lock for reading may have been one for writing before.
        self.lock_free |= lock.record.kind != libc::F_WRLCK as u32;
        if lock.is_flock {
            let fd = self.handles.host(lock.fh)?.ok_or(Errno::ROFS)?;
            let how = match lock.record.kind as i32 {
                libc::F_RDLCK => FlockOperation::NonBlockingLockShared,
                libc::F_WRLCK => FlockOperation::NonBlockingLockExclusive,
                libc::F_UNLCK => FlockOperation::NonBlockingUnlock,
                _ => return Err(Errno::INVAL),
            };
            return rustix::fs::flock(&fd, how);
        }
        if lock.record.kind == libc::F_UNLCK as u32 {
            return match self.owners.get(&(node, lock.owner)) {
                Some((fd, _)) => locks::set(fd, lock.record),
                None => Ok(()),
            };
        }
        locks::set(self.owner(node, lock)?, lock.record)
    }

    /// What is in the way of a record lock.
    ///
    /// # Errors
    /// The host's reason.
    pub fn get_lock(&mut self, node: u64, lock: &Lock) -> Result<Record> {
        locks::get(self.owner(node, lock)?, lock.record)
    }

    /// The owner's open file.
    fn owner(&mut self, node: u64, lock: &Lock) -> Result<&OwnedFd> {
        if !self.owners.contains_key(&(node, lock.owner)) {
            let fd = self.open_for_owner(node, lock)?;
            self.owners.insert((node, lock.owner), (fd, lock.fh));
        }
        self.owners.get(&(node, lock.owner)).map(|(fd, _)| fd).ok_or(Errno::NOLCK)
    }

    fn open_for_owner(&mut self, node: u64, lock: &Lock) -> Result<OwnedFd> {
        // Only what the guest has open itself, so that nothing is opened for its sake.
        match (self.handles.get(lock.fh)?, &self.inodes.get(node)?.what) {
            (Handle::File { node: opened, .. }, What::Host(_)) if *opened == node => {}
            _ => return Err(Errno::BADF),
        }
        self.handles.quota().take(1)?;
        let opened = match self.reopen(node, OFlags::RDWR) {
            Err(Errno::ACCESS | Errno::ROFS | Errno::TXTBSY) => self.reopen(node, OFlags::RDONLY),
            r => r,
        };
        opened.inspect_err(|_| self.handles.quota().give(1))
    }

    /// The owner has closed the file once: its locks are gone (fcntl(2)).
    pub fn drop_locks(&mut self, node: u64, owner: u64) {
        if self.owners.remove(&(node, owner)).is_some() {
            self.lock_free = true;
            self.handles.quota().give(1);
        }
    }

    /// Drops the locks of all owners on `node`, or of those that have them through the handle `fh`.
    pub fn drop_all_locks(&mut self, node: u64, fh: Option<u64>) {
        let all = self.owners.range((node, 0)..=(node, u64::MAX));
        let owners: Vec<_> =
            all.filter(|(_, (_, by))| fh.is_none_or(|fh| fh == *by)).map(|(key, _)| *key).collect();
        owners.into_iter().for_each(|(node, owner)| self.drop_locks(node, owner));
    }
}
