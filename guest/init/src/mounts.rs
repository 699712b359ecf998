//! The file systems every Linux program expects, shares of the host, and file systems in memory.

use std::ffi::CString;

use krun_wire::{Mount, Tmpfs};
use rustix::fs::{Access, AtFlags, CWD, Mode, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use crate::failure::{Failure, show};
use crate::log::Log;

/// A file system to mount at the start.
struct Base {
    fstype: &'static str,
    at: &'static str,
    flags: MountFlags,
    options: &'static str,
    /// The mount point lies in a file system that was mounted just before, which does not have it.
    make: bool,
}

const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

const BASE: [Base; 7] = [
    Base { fstype: "devtmpfs", at: "/dev", flags: MountFlags::NOSUID, options: "", make: false },
    Base { fstype: "proc", at: "/proc", flags: PLAIN, options: "", make: false },
    Base { fstype: "sysfs", at: "/sys", flags: PLAIN, options: "", make: false },
    Base { fstype: "cgroup2", at: "/sys/fs/cgroup", flags: PLAIN, options: "", make: false },
    Base {
        fstype: "devpts",
        at: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        // Group 5 is the terminals' in every distribution that has such a group.
        options: "gid=5,mode=620,ptmxmode=666",
        make: true,
    },
    Base {
        fstype: "tmpfs",
        at: "/dev/shm",
        flags: MountFlags::NOSUID.union(MountFlags::NODEV),
        options: "mode=1777",
        make: true,
    },
    Base { fstype: "mqueue", at: "/dev/mqueue", flags: PLAIN, options: "", make: true },
];

/// Names in `/dev` that programs expect and the kernel does not make.
const LINKS: [(&str, &str); 4] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];

/// Mounts all of [`BASE`]. What cannot be mounted becomes a warning: many commands do without it.
///
/// # Errors
/// 125: there is no place for `/dev`, `/proc` or `/sys`, without which init can do little itself.
pub fn base(log: &mut Log) -> Result<(), Failure> {
    let mut missing = Vec::new();
    for base in &BASE {
        let result = if base.make { mount_in_new_directory(base) } else { mount_base(base) };
        match result {
            // A kernel without this file system. One that is there already is fine too: the kernel
            // refuses to mount a file system of which there is only one on itself.
            Ok(()) | Err(Errno::NODEV | Errno::BUSY) => {}
            Err(Errno::ROFS | Errno::ACCESS | Errno::PERM) if !base.make => missing.push(base.at),
            Err(e) => log.warn(format!("{} could not be mounted on {}: {e}.", base.fstype, base.at)),
        }
    }
    if !missing.is_empty() {
        // That the others could not be mounted below them says nothing more.
        log.clear_warnings();
        return Err(Failure::setup(format!(
            "The root has no directories {} and is read-only, so that they cannot be created.",
            missing.join(", ")
        )));
    }
    for (link, target) in LINKS {
        match rustix::fs::symlink(target, link) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => log.warn(format!("{link} could not be made: {e}.")),
        }
    }
    Ok(())
}

fn mount_base(base: &Base) -> Result<(), Errno> {
    let mount = || {
        mount(base.fstype.as_bytes(), base.at.as_bytes(), base.fstype, base.flags, base.options.as_bytes())
    };
    match mount() {
        // Asking first would cost a request to the host for each one.
        Err(Errno::NOENT) => {
            rustix::fs::mkdir(base.at, Mode::from_raw_mode(0o755))?;
            mount()
        }
        other => other,
    }
}

fn mount_in_new_directory(base: &Base) -> Result<(), Errno> {
    match rustix::fs::mkdir(base.at, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) if is_mount_point(base.at.as_bytes()) => return Ok(()),
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(e),
    }
    mount_base(base)
}

fn is_mount_point(path: &[u8]) -> bool {
    rustix::fs::statx(CWD, path, AtFlags::NO_AUTOMOUNT, StatxFlags::empty())
        .is_ok_and(|s| s.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn mount(source: &[u8], at: &[u8], fstype: &str, flags: MountFlags, options: &[u8]) -> Result<(), Errno> {
    let options = CString::new(options).map_err(|_| Errno::INVAL)?;
    rustix::mount::mount(source, at, fstype, flags, options.as_c_str())
}

/// Gives a read-only root the writable directories that programs cannot do without. A writable root
/// keeps its own: images come with prepared directories below `/run`.
pub fn temporary_directories(log: &mut Log) {
    if rustix::fs::access("/", Access::WRITE_OK) != Err(Errno::ROFS) {
        return;
    }
    for (at, options) in [("/run", "mode=755"), ("/tmp", "mode=1777")] {
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        match mount(b"tmpfs", at.as_bytes(), "tmpfs", flags, options.as_bytes()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => log.warn(format!("{at} could not be made writable: {e}.")),
        }
    }
}

/// Makes a directory and those above it.
pub fn make_directories(path: &[u8]) -> Result<(), Errno> {
    let make = |path: &[u8]| match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        // A read-only file system answers so for a directory that exists as well.
        Err(Errno::ROFS) if rustix::fs::stat(path).is_ok() => Ok(()),
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(e),
    };
    if make(path).is_ok() {
        return Ok(());
    }
    let slashes = path.iter().enumerate().filter(|(at, b)| **b == b'/' && *at > 0);
    for (at, _) in slashes {
        make(&path[..at])?;
    }
    make(path)
}

fn mount_point(path: &[u8], what: &str) -> Result<(), Failure> {
    if path.first() != Some(&b'/') {
        return Err(Failure::setup(format!(
            "The mount point {} of {what} is not an absolute path.",
            show(path)
        )));
    }
    make_directories(path).map_err(|e| {
        let hint = match e {
            Errno::ROFS | Errno::ACCESS => " The root is read-only; create the directory there first.",
            _ => "",
        };
        Failure::setup(format!("The mount point {} of {what} cannot be created: {e}.{hint}", show(path)))
    })
}

/// Mounts a share of the host.
///
/// # Errors
/// 125: the mount point cannot be made, or there is no such share.
pub fn share(share: &Mount) -> Result<(), Failure> {
    let what = format!("share {:?}", share.tag);
    mount_point(&share.path, &what)?;
    let flags = if share.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    mount(share.tag.as_bytes(), &share.path, "virtiofs", flags, b"").map_err(|e| {
        let why = match e {
            Errno::INVAL => "the machine has no share of that name".to_owned(),
            Errno::NODEV => "the guest's kernel lacks virtio-fs".to_owned(),
            Errno::NOTDIR => "the mount point is not a directory".to_owned(),
            other => other.to_string(),
        };
        Failure::setup(format!("Cannot mount {what} on {}: {why}.", show(&share.path)))
    })
}

/// Mounts a file system in memory.
///
/// # Errors
/// 125: the mount point cannot be made, or an option is wrong.
pub fn tmpfs(tmpfs: &Tmpfs) -> Result<(), Failure> {
    mount_point(&tmpfs.path, "a tmpfs")?;
    let (flags, data) = split_options(&tmpfs.options);
    mount(b"tmpfs", &tmpfs.path, "tmpfs", flags, &data).map_err(|e| {
        let options = show(&tmpfs.options);
        Failure::setup(format!(
            "Cannot mount a tmpfs on {} with options \"{options}\": {e}.",
            show(&tmpfs.path)
        ))
    })
}

/// Tells the options that are flags of a mount from those that are the file system's.
pub fn split_options(options: &[u8]) -> (MountFlags, Vec<u8>) {
    let mut flags = MountFlags::empty();
    let mut data = Vec::new();
    for option in options.split(|b| *b == b',').filter(|o| !o.is_empty()) {
        match option {
            b"ro" => flags |= MountFlags::RDONLY,
            b"nosuid" => flags |= MountFlags::NOSUID,
            b"nodev" => flags |= MountFlags::NODEV,
            b"noexec" => flags |= MountFlags::NOEXEC,
            b"sync" => flags |= MountFlags::SYNCHRONOUS,
            b"dirsync" => flags |= MountFlags::DIRSYNC,
            b"noatime" => flags |= MountFlags::NOATIME,
            b"nodiratime" => flags |= MountFlags::NODIRATIME,
            b"relatime" => flags |= MountFlags::RELATIME,
            b"strictatime" => flags |= MountFlags::STRICTATIME,
            b"lazytime" => flags |= MountFlags::LAZYTIME,
            // Defaults, and words that are for an engine rather than for the kernel.
            b"rw" | b"suid" | b"dev" | b"exec" | b"async" | b"atime" | b"diratime" | b"defaults"
            | b"private" | b"rprivate" | b"slave" | b"rslave" | b"shared" | b"rshared" | b"tmpcopyup"
            | b"notmpcopyup" => {}
            other => {
                if !data.is_empty() {
                    data.push(b',');
                }
                data.extend_from_slice(other);
            }
        }
    }
    (flags, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_told_apart() {
        let (flags, data) = split_options(b"nosuid,size=64m,,strictatime,mode=755,rw,tmpcopyup");
        assert_eq!(flags, MountFlags::NOSUID | MountFlags::STRICTATIME);
        assert_eq!(data, b"size=64m,mode=755");
    }

    #[test]
    fn directories_are_made_with_their_parents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/\u{fc}");
        let bytes = path.as_os_str().as_encoded_bytes();
        make_directories(bytes).unwrap();
        make_directories(bytes).unwrap();
        assert!(path.is_dir());
        std::fs::write(dir.path().join("file"), "").unwrap();
        let below = dir.path().join("file/x");
        assert_eq!(make_directories(below.as_os_str().as_encoded_bytes()), Err(Errno::NOTDIR));
    }

    #[test]
    fn mount_points_are_absolute() {
        let wrong = Tmpfs { path: b"x/y".to_vec(), options: vec![] };
        assert!(tmpfs(&wrong).unwrap_err().reason.contains("not an absolute path"));
    }

    #[test]
    fn mount_points_are_recognised() {
        assert!(is_mount_point(b"/proc"));
        assert!(!is_mount_point(b"/proc/self"));
    }
}
