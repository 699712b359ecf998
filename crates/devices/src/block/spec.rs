//! What a disk is made of, as plain values.

use std::path::PathBuf;

/// What an image file holds. It is never guessed: a guest could write another format's header into a raw
/// image and have other files of the host opened with the next start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiskFormat {
    /// The disk's bytes, in a file or a block device.
    #[default]
    Raw,
    /// QEMU's format, versions 2 and 3.
    Qcow2,
    /// A VMDK descriptor with flat extents, read-only.
    Vmdk,
}

/// What becomes of a flush that the guest asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SyncMode {
    /// Nothing: what the guest has written survives the end of this process, not that of the host.
    None,
    /// The host writes it to the disk, which may keep it in its own cache for a moment (macOS; elsewhere
    /// the same as `Full`).
    #[default]
    Relaxed,
    /// It is on stable storage before the guest gets the answer.
    Full,
}

/// A disk.
#[derive(Debug, Clone)]
pub struct BlockSpec {
    /// What the disk is called. Its first 20 bytes are the serial number that the guest sees.
    pub id: String,
    /// The image: a file or a block device.
    pub path: PathBuf,
    /// What it holds.
    pub format: DiskFormat,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// Go around the host's page cache.
    pub direct_io: bool,
    /// What a flush does.
    pub sync: SyncMode,
    /// The image may name other files as its backing chain, which are then opened for reading.
    pub backing: bool,
    /// Request queues, 1 to [`BlockSpec::MAX_QUEUES`].
    pub queues: u16,
    /// Do without io_uring.
    pub threads_only: bool,
}

impl BlockSpec {
    /// Most request queues.
    pub const MAX_QUEUES: u16 = 16;
    /// Length of a serial number in bytes (virtio 1.2, section 5.2.6).
    pub const SERIAL: usize = 20;
}

impl Default for BlockSpec {
    fn default() -> Self {
        Self {
            id: String::new(),
            path: PathBuf::new(),
            format: DiskFormat::Raw,
            read_only: false,
            direct_io: false,
            sync: SyncMode::default(),
            backing: false,
            queues: 1,
            threads_only: false,
        }
    }
}

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The file cannot be opened.
    #[error("disk {}: {source}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// Direct I/O was asked for, and the file system of the image has none.
    #[error("disk {}: its file system does not take direct I/O; leave it out", path.display())]
    Direct {
        /// The image.
        path: PathBuf,
    },
    /// Not a file that can be a disk.
    #[error("disk {} is neither a file nor a block device", path.display())]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// Another VM, or QEMU, uses the image.
    #[error(
        "disk {} is in use by another VM or program; end that one first, or let both only read", path.display()
    )]
    Locked {
        /// The image.
        path: PathBuf,
    },
    /// The image is not of the format that it is said to be, or it is damaged.
    #[error("disk {} cannot be used as {format:?}: {source}", path.display())]
    Format {
        /// The image.
        path: PathBuf,
        /// The format that was asked for.
        format: DiskFormat,
        /// What is wrong with it.
        source: std::io::Error,
    },
    /// The image names a backing file, and backing files were not allowed.
    #[error(
        "disk {} is based on {file:?}; allow backing files if you trust the image", path.display()
    )]
    Backing {
        /// The image.
        path: PathBuf,
        /// The name in the image.
        file: String,
    },
    /// The image names a backing file without its format, which is not guessed.
    #[error(
        "disk {} does not say of which format its base {file:?} is; add it: qemu-img rebase -u -b {file} -F FORMAT", path.display()
    )]
    BackingFormat {
        /// The image.
        path: PathBuf,
        /// The name in the image.
        file: String,
    },
    /// The backing chain does not end.
    #[error("disk {}: its backing chain is longer than {limit} files, or a loop", path.display())]
    Chain {
        /// The image.
        path: PathBuf,
        /// The limit.
        limit: usize,
    },
    /// VMDK images can only be read.
    #[error("disk {}: a VMDK image can only be read; add it read-only or convert it to qcow2", path.display())]
    VmdkWrite {
        /// The image.
        path: PathBuf,
    },
    /// See [`BlockSpec::queues`].
    #[error("{asked} queues: a disk has 1 to {}", BlockSpec::MAX_QUEUES)]
    Queues {
        /// What was asked for.
        asked: u16,
    },
    /// A change of size that the format does not have.
    #[error("disk {}: only a raw image can change its size while in use", path.display())]
    Resize {
        /// The image.
        path: PathBuf,
    },
    /// The host refused something small.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
}
