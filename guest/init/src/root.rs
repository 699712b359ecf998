//! Changing over to a block device as the root.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use krun_wire::BlockRoot;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};

use crate::failure::{Failure, show};
use crate::log::uptime;
use crate::mounts::split_options;

/// How long a disk may take to appear.
const PATIENCE: Duration = Duration::from_secs(5);

/// Mounts the device over the root and moves there. The base file systems are to be mounted again
/// afterwards. The old root stays mounted below, where nothing reaches it.
///
/// # Errors
/// 125: the device does not appear, or no file system of the kernel's recognises it.
pub fn switch(root: &BlockRoot) -> Result<(), Failure> {
    let device = show(&root.device);
    let fail = |what: &str, e: Errno| Failure::setup(format!("The root device {device}: {what}: {e}."));
    // The old root may lack /dev and /proc, so both are used without being mounted anywhere.
    let dev = detached("devtmpfs").map_err(|e| fail("its directory cannot be opened", e))?;
    let name = root.device.strip_prefix(b"/dev/").unwrap_or(&root.device);
    wait_for(&dev, name).map_err(|e| fail("it does not exist", e))?;
    rustix::process::fchdir(&dev).map_err(|e| fail("its directory cannot be entered", e))?;
    let types = match &root.fstype[..] {
        b"" | b"auto" => known_types().map_err(|e| fail("the kernel does not list its file systems", e))?,
        one => vec![one.to_vec()],
    };
    let source = if rustix::fs::stat(&root.device[..]).is_ok() { &root.device } else { name };
    let mut last = Errno::NODEV;
    let mounted = types.iter().find_map(|fstype| {
        attempt(fstype, source, &root.options).inspect_err(|e| last = better(last, *e)).ok()
    });
    let mounted = mounted.ok_or_else(|| {
        let tried = types.iter().map(|t| show(t).to_string()).collect::<Vec<_>>().join(", ");
        fail(&format!("it cannot be mounted (tried {tried})"), last)
    })?;
    enter(&mounted).map_err(|e| fail("the root cannot be changed to it", e))
}

/// Moves to an empty root in memory: for the last words of a guest whose root is of no use.
///
/// # Errors
/// The kernel's.
pub fn leave() -> Result<(), Errno> {
    enter(&detached("tmpfs")?)
}

/// The more telling of two errors: "not this file system" says least.
fn better(old: Errno, new: Errno) -> Errno {
    if matches!(new, Errno::INVAL | Errno::NODEV) && old != Errno::NODEV { old } else { new }
}

/// A new instance, or the only one, of a file system, mounted nowhere.
fn detached(fstype: &str) -> Result<OwnedFd, Errno> {
    let context = fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
}

fn wait_for(dev: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
    let deadline = uptime() + PATIENCE;
    loop {
        match rustix::fs::openat(dev, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            Ok(_) => return Ok(()),
            Err(Errno::NOENT) if uptime() < deadline => std::thread::sleep(Duration::from_millis(1)),
            Err(e) => return Err(e),
        }
    }
}

/// The kernel's file systems that need a device.
fn known_types() -> Result<Vec<Vec<u8>>, Errno> {
    let proc = detached("proc")?;
    let fd = rustix::fs::openat(&proc, "filesystems", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let (mut text, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        match rustix::io::read(&fd, &mut chunk)? {
            0 => return Ok(device_types(&text)),
            n => text.extend_from_slice(&chunk[..n]),
        }
    }
}

/// Reads `/proc/filesystems`: lines of `nodev<TAB>type` or `<TAB>type`.
fn device_types(text: &[u8]) -> Vec<Vec<u8>> {
    text.split(|b| *b == b'\n').filter_map(|line| line.strip_prefix(b"\t")).map(<[u8]>::to_vec).collect()
}

fn attempt(fstype: &[u8], source: &[u8], options: &[u8]) -> Result<OwnedFd, Errno> {
    let context = fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "source", source)?;
    let (flags, data) = split_options(options);
    for (flag, key) in [
        (MountFlags::RDONLY, "ro"),
        (MountFlags::SYNCHRONOUS, "sync"),
        (MountFlags::DIRSYNC, "dirsync"),
        (MountFlags::LAZYTIME, "lazytime"),
    ] {
        if flags.contains(flag) {
            fsconfig_set_flag(context.as_fd(), key)?;
        }
    }
    for option in data.split(|b| *b == b',').filter(|o| !o.is_empty()) {
        match option.iter().position(|b| *b == b'=') {
            Some(at) => fsconfig_set_string(context.as_fd(), &option[..at], &option[at + 1..])?,
            None => fsconfig_set_flag(context.as_fd(), option)?,
        }
    }
    fsconfig_create(context.as_fd())?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes(flags))
}

fn attributes(flags: MountFlags) -> MountAttrFlags {
    let table = [
        (MountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (MountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (MountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
        (MountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (MountFlags::NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
        (MountFlags::STRICTATIME, MountAttrFlags::MOUNT_ATTR_STRICTATIME),
        (MountFlags::NODIRATIME, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
    ];
    let set = table.into_iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, attribute)| attribute);
    set.fold(MountAttrFlags::empty(), MountAttrFlags::union)
}

/// Puts a mount on top of the root and makes it this process's root. No directory is needed for that.
fn enter(mounted: &OwnedFd) -> Result<(), Errno> {
    move_mount(mounted, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    rustix::process::fchdir(mounted)?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_file_systems_on_devices_count() {
        let text = b"nodev\tsysfs\nnodev\ttmpfs\n\text3\n\text4\n\terofs\nnodev\tvirtiofs\n";
        assert_eq!(device_types(text), [&b"ext3"[..], b"ext4", b"erofs"]);
    }

    #[test]
    fn the_telling_error_is_kept() {
        assert_eq!(better(Errno::NODEV, Errno::INVAL), Errno::INVAL);
        assert_eq!(better(Errno::ACCESS, Errno::INVAL), Errno::ACCESS);
        assert_eq!(better(Errno::INVAL, Errno::IO), Errno::IO);
    }

    #[test]
    fn flags_become_attributes() {
        let want = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
        assert_eq!(attributes(MountFlags::RDONLY | MountFlags::NODEV | MountFlags::SYNCHRONOUS), want);
    }
}
