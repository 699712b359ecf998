//! Images: what a disk's bytes are read from and written to.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use super::sys::{self, Buffers};
use super::{BlockError, BlockSpec, DiskFormat, format, raw};

/// Bytes of a sector, the unit of virtio-blk's addresses.
pub const SECTOR: u64 = 512;

/// A disk's contents. Calls block, and may come from several threads at once.
///
/// Ranges lie within [`Image::size`] and their ends are multiples of [`SECTOR`]. A flush brings to stable
/// storage what calls that returned before it have written.
pub trait Image: Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;
    /// Looks up the size again; `None` for an image whose size does not change.
    fn refresh(&self) -> io::Result<Option<u64>>;
    /// Least unit of a transfer in bytes, a power of two.
    fn block_size(&self) -> u32;
    /// Fills `buffers` from `offset`.
    fn read(&self, buffers: &mut Buffers, offset: u64) -> io::Result<()>;
    /// Writes `buffers` at `offset`.
    fn write(&self, buffers: &mut Buffers, offset: u64) -> io::Result<()>;
    /// Brings what was written to stable storage.
    fn flush(&self) -> io::Result<()>;
    /// Hands what this process holds back to the host, which may keep it for a while.
    fn settle(&self) -> io::Result<()>;
    /// Gives the space of a range back; what it reads as afterwards is open.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes a range read as zeroes, giving its space back if `unmap`.
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
    /// The file whose bytes are the disk's and that takes transfers on `buffers` as they are; `None` when
    /// they must go through [`Image::read`] and [`Image::write`].
    fn direct(&self, buffers: Option<&Buffers>) -> Option<&Arc<File>> {
        let _ = buffers;
        None
    }
}

/// Opens the image of `spec`.
pub fn open(spec: &BlockSpec) -> Result<Arc<dyn Image>, BlockError> {
    if spec.format == DiskFormat::Vmdk && !spec.read_only {
        return Err(BlockError::VmdkWrite { path: spec.path.clone() });
    }
    let file = open_file(&spec.path, !spec.read_only, spec.direct_io)?;
    match spec.format {
        DiskFormat::Raw => {
            let raw = raw::Raw::new(file, spec.direct_io)
                .map_err(|source| BlockError::Open { path: spec.path.clone(), source })?;
            Ok(Arc::new(raw))
        }
        DiskFormat::Qcow2 | DiskFormat::Vmdk => Ok(Arc::new(format::Formatted::open(spec, file)?)),
    }
}

/// Opens and locks one file.
pub fn open_file(path: &Path, writable: bool, direct: bool) -> Result<File, BlockError> {
    // Without O_NONBLOCK the opening of a fifo would wait for a peer.
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | if direct { direct_flag() } else { 0 };
    let file = OpenOptions::new().read(true).write(writable).custom_flags(flags).open(path);
    let fail = |source| BlockError::Open { path: path.to_owned(), source };
    let file = match file {
        Err(e) if direct && e.raw_os_error() == Some(libc::EINVAL) => {
            return Err(BlockError::Direct { path: path.to_owned() });
        }
        other => other.map_err(fail)?,
    };
    let kind = file.metadata().map_err(fail)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(BlockError::Kind { path: path.to_owned() });
    }
    match sys::lock(&file, writable) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(BlockError::Locked { path: path.to_owned() }),
        Err(e) => {
            tracing::warn!("disk {}: it cannot be locked against other VMs: {e}", path.display());
            Ok(file)
        }
        Ok(()) => Ok(file),
    }
}

#[cfg(target_os = "linux")]
fn direct_flag() -> i32 {
    libc::O_DIRECT
}

#[cfg(not(target_os = "linux"))]
fn direct_flag() -> i32 {
    0
}
