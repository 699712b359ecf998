//! Disks.

use std::ffi::c_char;
use std::path::PathBuf;

use krun_api::{Disk, DiskFormat, RootDisk, SyncMode};

use crate::context::{Context, with};
use crate::{Answer, EEXIST, EINVAL, args};

/// Flag of a format: the image may name other files as what it is based on.
const BACKING: u32 = 0x100;
/// Ids of the disks of the two older functions.
const OLDER: [&str; 2] = ["root", "data"];

/// What was said of disks so far.
#[derive(Debug, Default)]
pub struct Disks {
    /// From `krun_add_disk` and its successors.
    added: Vec<Disk>,
    /// From `krun_set_root_disk` and `krun_set_data_disk`; not together with the others.
    older: [Option<PathBuf>; 2],
    root: Option<RootDisk>,
}

impl Disks {
    /// Whether the guest's root will be a disk.
    pub fn has_root(&self) -> bool {
        self.root.is_some()
    }

    /// All of them, and what the root is when no share is.
    pub fn take(&mut self, has_share: bool) -> (Vec<Disk>, Option<RootDisk>) {
        let boots = self.older[0].is_some() && !has_share;
        let older = OLDER.iter().zip(self.older.iter_mut().map(Option::take));
        let older = older.filter_map(|(id, path)| Some(Disk::new(*id, path?)));
        let disks = older.chain(std::mem::take(&mut self.added)).collect();
        (disks, self.root.take().or_else(|| boots.then(RootDisk::default)))
    }
}

fn set_older(context: &mut Context, which: usize, path: PathBuf) -> Answer<()> {
    if !context.disks.added.is_empty() {
        return Err(EINVAL);
    }
    context.disks.older[which] = Some(path);
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_root_disk(ctx_id: u32, disk_path: *const c_char) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a string.
        let path = unsafe { args::path(disk_path) }?;
        set_older(context, 0, path)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_data_disk(ctx_id: u32, disk_path: *const c_char) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a string.
        let path = unsafe { args::path(disk_path) }?;
        set_older(context, 1, path)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_disk(
    ctx_id: u32,
    block_id: *const c_char,
    disk_path: *const c_char,
    read_only: bool,
) -> i32 {
    // SAFETY: the arguments are passed on as they came.
    unsafe { krun_add_disk2(ctx_id, block_id, disk_path, 0, read_only) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_disk2(
    ctx_id: u32,
    block_id: *const c_char,
    disk_path: *const c_char,
    disk_format: u32,
    read_only: bool,
) -> i32 {
    // SAFETY: the arguments are passed on as they came.
    unsafe { krun_add_disk3(ctx_id, block_id, disk_path, disk_format, read_only, false, 1) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_disk3(
    ctx_id: u32,
    block_id: *const c_char,
    disk_path: *const c_char,
    disk_format: u32,
    read_only: bool,
    direct_io: bool,
    sync_mode: u32,
) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for strings.
        let (id, path) = unsafe { (args::text(block_id)?, args::path(disk_path)?) };
        let backing = disk_format & BACKING != 0;
        let format = match disk_format & !BACKING {
            0 => DiskFormat::Raw,
            1 => DiskFormat::Qcow2,
            2 => DiskFormat::Vmdk,
            _ => return Err(EINVAL),
        };
        let sync = match sync_mode {
            0 => SyncMode::None,
            1 => SyncMode::Relaxed,
            2 => SyncMode::Full,
            _ => return Err(EINVAL),
        };
        let disks = &mut context.disks;
        if disks.older.iter().any(Option::is_some) {
            return Err(EINVAL);
        }
        if disks.added.iter().any(|d| d.id == id) {
            return Err(EEXIST);
        }
        disks.added.push(Disk { format, read_only, direct_io, sync, backing, ..Disk::new(id, path) });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_root_disk_remount(
    ctx_id: u32,
    device: *const c_char,
    fstype: *const c_char,
    options: *const c_char,
) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a string and two that may be NULL.
        let (device, fstype, options) =
            unsafe { (args::text(device)?, args::optional(fstype)?, args::optional(options)?) };
        let text = |s: std::ffi::OsString| s.into_string().map_err(|_| EINVAL);
        let fstype = fstype.map(text).transpose()?.filter(|t| !t.is_empty() && t != "auto");
        let options = options.map(text).transpose()?.unwrap_or_default();
        if device.is_empty() || context.no_init {
            return Err(EINVAL);
        }
        if context.has_root() || context.disks.has_root() {
            return Err(EEXIST);
        }
        context.disks.root = Some(RootDisk { device, fstype, options });
        Ok(())
    })
}
