//! The file-system device (virtio 1.2, section 5.11): FUSE requests from the guest, served from a
//! directory of the host and from overlays in memory.
//!
//! One worker thread serves a share and owns all of its state; data of READ and WRITE move between files
//! and guest memory without a copy in between.
//!
//! Each request costs the guest a switch to this process and back, so it is spared those that tell it nothing:
//! that a name does not exist is believed for as long as that one exists; and a read-only share, unless
//! nothing is cached, is read without OPEN and RELEASE (`FUSE_NO_OPEN_SUPPORT`). There an open for writing
//! succeeds if the guest has not mounted the share `ro`, and the write fails. A writable share keeps OPEN: a
//! file may have been unlinked, or made without permission to write, while it is open. Write-back caching is
//! for those who ask for it ([`CachePolicy::WRITE_BACK`]): many small writes become one, but it hides from the guest
//! what the host changes, and from the host for a while what the guest wrote.
//!
//! What a guest should know: POSIX and BSD locks are its own affair (they work between its processes, and do
//! not reach the host) unless [`FsSpec::share_locks`] says otherwise; a share that is read-only answers EROFS, but the
//! mount shows `ro` only if the guest mounts it so; new files belong to the guest's user where this process has `CAP_SETUID` and
//! `CAP_SETGID`, else to the user it runs as.

mod abi;
mod counts;
mod dax;
mod device;
mod flat;
mod handles;
mod inodes;
mod io;
mod limits;
mod overlay;
mod passthrough;
mod request;
mod server;
mod setup;
mod sys;
mod watches;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use dax::{CHUNK as DAX_CHUNK, DaxSpec, WINDOW_MAX as DAX_WINDOW_MAX};
pub use device::Fs;
#[doc(hidden)]
pub use device::fuzz_one;
pub use limits::Quota;
pub use overlay::{Content, FileData};
pub use setup::{FsError, raise_nofile};

/// Longest tag in bytes (virtio 1.2, section 5.11.4).
pub const TAG_MAX: usize = 36;

/// How much of file contents the guest keeps between one open and the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DataCache {
    /// Nothing: every read and write reaches the host.
    Never,
    /// While size and times are as they were, checked at every open.
    CloseToOpen,
    /// For good: the host does not change files behind the guest's back.
    Always,
    /// For good, and what the guest writes as well: it reaches the host when a file is closed or synced, when the
    /// guest is short of memory, and some seconds later in any case.
    WriteBack,
}

/// How long the guest believes what it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CachePolicy {
    /// That a name leads to an inode.
    pub entry: Duration,
    /// Attributes of an inode.
    pub attr: Duration,
    /// Contents of files.
    pub data: DataCache,
}

impl CachePolicy {
    /// Changes of the host are seen at once.
    pub const NEVER: Self = Self { entry: Duration::ZERO, attr: Duration::ZERO, data: DataCache::Never };
    /// Changes of the host are seen within a second: new names, changed attributes, and contents at the next
    /// open or read.
    pub const AUTO: Self =
        Self { entry: Duration::from_secs(1), attr: Duration::from_secs(1), data: DataCache::CloseToOpen };
    /// Only the guest changes the share.
    pub const ALWAYS: Self =
        Self { entry: Duration::from_secs(86400), attr: Duration::from_secs(86400), data: DataCache::Always };
    /// Only the guest changes the share, and nobody looks at a file before the guest has closed it.
    pub const WRITE_BACK: Self = Self { data: DataCache::WriteBack, ..Self::ALWAYS };
}

impl Default for CachePolicy {
    fn default() -> Self {
        Self::AUTO
    }
}

/// A virtual file or directory in a share.
#[derive(Debug, Clone)]
pub struct Overlay {
    /// Where, relative to the root of the share. Its parent exists, or is an overlay added before.
    pub path: PathBuf,
    /// What.
    pub content: Content,
    /// Listings show it. It is found by name in any case.
    pub listed: bool,
}

/// A share as it is asked for.
#[derive(Debug, Clone, Default)]
pub struct FsSpec {
    /// The name by which the guest mounts it: 1 to 36 bytes.
    pub tag: String,
    /// Directory of the host; `None`: the root is empty but for overlays.
    pub source: Option<PathBuf>,
    /// Nothing can be changed.
    pub read_only: bool,
    /// Virtual files and directories, which hide what the source has under the same names.
    pub overlays: Vec<Overlay>,
    /// Where the guest's exit status goes (ioctl 0x7602 of the guest's root user on any file of the share).
    pub exit_code: Option<Arc<ExitCode>>,
    /// A window into which the guest maps files.
    pub dax: Option<DaxSpec>,
    /// How much the guest caches.
    pub cache: CachePolicy,
    /// Locks of the guest and of the host's programs exclude each other. A guest that waits for one cannot be
    /// interrupted in that.
    pub share_locks: bool,
    /// How many inodes and open files the guest may have here; one for all of its shares.
    pub quota: Quota,
}

/// An exit status that is set once, by the guest, and read by whoever waits for it.
#[derive(Debug, Default)]
pub struct ExitCode(AtomicU64);

/// Marks a status as set.
const SET: u64 = 1 << 32;

impl ExitCode {
    /// Not set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the status; false when it is set already, which then stays.
    pub fn set(&self, status: i32) -> bool {
        let value = SET | u64::from(status as u32);
        self.0.compare_exchange(0, value, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The status, once set.
    pub fn get(&self) -> Option<i32> {
        let value = self.0.load(Ordering::Acquire);
        (value & SET != 0).then_some(value as u32 as i32)
    }
}

/// The writing end of an [`ExitCode`].
#[derive(Debug, Clone)]
struct ExitSink(Arc<ExitCode>);

impl ExitSink {
    fn set(&self, status: i32) {
        if !self.0.set(status) {
            tracing::debug!(status, "the guest reported another exit status; the first one counts");
        }
    }
}
