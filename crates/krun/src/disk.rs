//! Disks.

use std::path::PathBuf;

use krun_devices::block::{Block, BlockHandle, BlockSpec};
use krun_virtio::VirtioDevice;
use krun_wire as wire;

pub use krun_devices::block::{BlockError, DiskFormat, SyncMode};

use crate::{Error, Vm, VmConfig};

/// A disk of the guest: an image in a file of this host, or a block device. The first one is `/dev/vda`.
///
/// The image is locked while the VM lives: one VM writes to it, or several read it.
#[derive(Debug, Clone)]
pub struct Disk {
    /// What the disk is called, for [`Vm::refresh_disk`]. Its first 20 bytes are the serial number that the guest
    /// sees (`/dev/disk/by-id/virtio-…` with udev).
    pub id: String,
    /// The image.
    pub path: PathBuf,
    /// What it holds. It is never guessed.
    pub format: DiskFormat,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// Go around the host's page cache.
    pub direct_io: bool,
    /// What becomes of the guest's flushes.
    pub sync: SyncMode,
    /// A qcow2 image may name other files of this host as its backing chain. Only for images that you trust:
    /// the guest can read what such a file holds.
    pub backing: bool,
    /// Request queues, 1 to 16; `None`: one for each processor, at most four.
    pub queues: Option<u16>,
}

impl Disk {
    /// A writable raw disk.
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            id: id.into(),
            path: path.into(),
            format: DiskFormat::Raw,
            read_only: false,
            direct_io: false,
            sync: SyncMode::default(),
            backing: false,
            queues: None,
        }
    }
}

/// A block device of the guest that becomes its root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootDisk {
    /// The device in the guest, such as `/dev/vda1`.
    pub device: String,
    /// Its file system; `None`: every one that the guest's kernel has is tried.
    pub fstype: Option<String>,
    /// Mount options, separated by commas.
    pub options: String,
}

impl Default for RootDisk {
    fn default() -> Self {
        Self { device: "/dev/vda".into(), fstype: None, options: String::new() }
    }
}

impl RootDisk {
    pub(crate) fn wire(&self) -> wire::BlockRoot {
        wire::BlockRoot {
            device: self.device.clone().into_bytes(),
            fstype: self.fstype.clone().unwrap_or_default().into_bytes(),
            options: self.options.clone().into_bytes(),
        }
    }
}

type Disks = (Vec<Box<dyn VirtioDevice>>, Vec<BlockHandle>);

/// The devices of all disks, in order.
pub(crate) fn devices(config: &mut VmConfig) -> Result<Disks, Error> {
    let default = u16::from(config.vcpus).clamp(1, 4);
    let (mut devices, mut handles) = (Vec::<Box<dyn VirtioDevice>>::new(), Vec::new());
    for disk in config.disks.drain(..) {
        let device = Block::new(BlockSpec {
            id: disk.id,
            path: disk.path,
            format: disk.format,
            read_only: disk.read_only,
            direct_io: disk.direct_io,
            sync: disk.sync,
            backing: disk.backing,
            queues: disk.queues.unwrap_or(default),
            ..BlockSpec::default()
        })?;
        handles.push(device.handle());
        devices.push(Box::new(device));
    }
    Ok((devices, handles))
}

impl Vm {
    /// Tells the guest that the image of the raw disk `id` has another size now. Returns the size in bytes.
    ///
    /// # Errors
    /// [`Error::NoDisk`], or a disk that cannot change its size.
    pub fn refresh_disk(&self, id: &str) -> Result<u64, Error> {
        let disk = self.disks.iter().find(|d| d.id() == id);
        Ok(disk.ok_or_else(|| Error::NoDisk { id: id.to_owned() })?.refresh()?)
    }
}
