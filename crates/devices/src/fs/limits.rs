//! What a guest may take of this process: descriptors and memory are the process's, not the guest's.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;

use crate::sys::descriptors_for_guests;

/// How many inodes and open files a guest may have known, in all of its shares together. Clones count together.
///
/// A guest that plays fair cannot get there: an inode and its name take a kernel more than 1 KiB of the guest's
/// memory, and less here.
#[derive(Debug, Clone)]
pub struct Quota(Arc<AtomicUsize>);

/// Memory of a guest's kernel that an inode with its name takes at least.
const GUEST_BYTES: usize = 1024;
/// Enough for the smallest of guests to boot.
const LEAST: usize = 1 << 14;

impl Quota {
    /// For a guest with this much memory.
    pub fn for_memory(bytes: u64) -> Self {
        let most = usize::try_from(bytes / GUEST_BYTES as u64).unwrap_or(usize::MAX);
        Self::new(most.max(LEAST))
    }

    pub(super) fn new(most: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(most)))
    }

    /// Takes `n`.
    ///
    /// # Errors
    /// ENFILE: they are not left.
    pub(super) fn take(&self, n: usize) -> Result<(), Errno> {
        let less = |left: usize| left.checked_sub(n);
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        taken.map(drop).map_err(|_| Errno::NFILE)
    }

    /// Gives back what was taken.
    pub(super) fn give(&self, n: usize) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(super) fn left(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Default for Quota {
    /// For a guest of 4 GiB.
    fn default() -> Self {
        Self::for_memory(4 << 30)
    }
}

/// Limits of one share.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Inodes that keep a descriptor.
    pub cached: usize,
    /// Descriptors of the guest's open files have numbers below this.
    pub top: RawFd,
    /// Descriptors that are kept only to save work have numbers below this.
    pub spare: RawFd,
    /// Inodes and open files.
    pub quota: Quota,
}

impl Limits {
    /// Those that go with the process's limit of open files. An eighth is for inodes of this share, for there are
    /// others.
    pub fn new(quota: Quota) -> Self {
        let (top, spare) = descriptors_for_guests();
        let cached = usize::try_from(spare / 4).unwrap_or(0).clamp(16, 1 << 16);
        Self { cached, top, spare, quota }
    }

    /// Whether `fd` may be an open file of the guest's.
    pub fn allow(&self, fd: &impl AsFd) -> bool {
        fd.as_fd().as_raw_fd() < self.top
    }

    /// Whether `fd` may be kept to save work.
    pub fn allow_spare(&self, fd: &impl AsFd) -> bool {
        fd.as_fd().as_raw_fd() < self.spare
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_shared_and_never_below_zero() {
        let quota = Quota::new(3);
        let same = quota.clone();
        quota.take(2).unwrap();
        assert_eq!(same.take(2), Err(Errno::NFILE));
        same.take(1).unwrap();
        quota.give(3);
        assert_eq!(same.left(), 3);
        assert_eq!(Quota::for_memory(512 << 20).left(), 512 << 10);
        assert_eq!(Quota::for_memory(0).left(), LEAST);
    }
}
