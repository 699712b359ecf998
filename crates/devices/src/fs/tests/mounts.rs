//! Shares with more than one file system in them, and stacked ones. Takes root.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use super::client::{Client, ROOT, is_root, uncached};
use crate::fs::abi::{FOPEN_NOFLUSH, WRITE_CACHE};

/// Mounts that end with the test; false (said why) where that cannot be.
fn can_mount() -> bool {
    if !is_root() || crate::fs::sys::private_mounts().is_err() {
        println!("skipped: mounting takes root and a mount namespace");
        return false;
    }
    rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE).unwrap();
    true
}

fn mount(kind: &str, at: &Path, options: &str) {
    let options = std::ffi::CString::new(options).unwrap();
    rustix::mount::mount(kind, at, kind, MountFlags::empty(), Some(&*options)).unwrap();
}

struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        rustix::mount::unmount(self.0, UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn file_systems_below_the_share_are_part_of_it() {
    if !can_mount() {
        return;
    }
    let mut c = Client::with(uncached);
    for name in ["one", "two"] {
        fs::create_dir(c.path(name)).unwrap();
        mount("tmpfs", &c.path(name), "size=1m");
        fs::write(c.path(name).join("f"), name).unwrap();
    }
    let (a, b) = (c.walk("one/f").unwrap(), c.walk("two/f").unwrap());
    // The host's numbers are the same, for both are new; the guest's are not.
    let ino = |name: &str| fs::metadata(c.path(name)).unwrap().ino();
    assert_eq!(ino("one/f"), ino("two/f"));
    assert_ne!(a.attr.ino, b.attr.ino);
    assert_eq!(c.contents(a.node).unwrap(), b"one");
    assert_eq!(c.contents(b.node).unwrap(), b"two");
    let (one, two) = (c.walk("one").unwrap().node, c.walk("two").unwrap().node);
    assert_eq!(c.rename((one, c"f"), (two, c"g"), 0), Err(libc::EXDEV));
    assert_eq!(c.link(a.node, two, c"g").err(), Some(libc::EXDEV));
    assert_eq!(c.rmdir(ROOT, c"one"), Err(libc::EBUSY));
    for name in ["one", "two"] {
        rustix::mount::unmount(c.path(name), UnmountFlags::DETACH).unwrap();
    }
    assert_eq!(c.walk("one/f").err(), Some(libc::ENOENT));
}

/// The numbers of a device and a mount are given out again: what was learnt of one is not believed of the next.
#[test]
fn procfs_in_place_of_another_file_system_is_noticed() {
    if !can_mount() {
        return;
    }
    let mut c = Client::with(uncached);
    fs::create_dir(c.path("p")).unwrap();
    for (kind, file, outcome) in [("tmpfs", "uptime", Ok(())), ("proc", "uptime", Err(libc::EACCES))] {
        mount(kind, &c.path("p"), "");
        let mounted = c.path("p");
        let _mounted = Unmount(&mounted);
        if kind == "tmpfs" {
            fs::write(mounted.join(file), "").unwrap();
        }
        let (p, f) = (c.walk("p").unwrap().node, c.walk("p/uptime").unwrap().node);
        let opened = c.open(f, libc::O_RDONLY).map(|(fh, _)| c.release(fh).unwrap());
        assert_eq!(opened, outcome, "{kind}");
        c.forget(f, 1);
        c.forget(p, 2);
    }
}

#[test]
fn a_file_copied_up_stays_the_same_node() {
    if !can_mount() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    // An overlay on another overlay is not always possible.
    mount("tmpfs", base.path(), "");
    let _base = Unmount(base.path());
    for d in ["lower/d/e", "upper", "work", "merged"] {
        fs::create_dir_all(base.path().join(d)).unwrap();
    }
    fs::write(base.path().join("lower/d/f"), "lower").unwrap();
    let p = base.path().display();
    let options = format!("lowerdir={p}/lower,upperdir={p}/upper,workdir={p}/work");
    let at = base.path().join("merged");
    mount("overlay", &at, &options);
    let _at = Unmount(&at);
    let mut c = Client::with(|s| s.source = Some(at.clone()));
    let (d, f) = (c.walk("d").unwrap().node, c.walk("d/f").unwrap().node);
    let (fh, flags) = c.open(f, libc::O_RDWR).unwrap();
    assert_ne!(flags & FOPEN_NOFLUSH, 0, "a disk of this machine");
    c.write(fh, 0, b"upper", 0).unwrap();
    c.release(fh).unwrap();
    assert!(base.path().join("upper/d/f").exists());
    assert_eq!((c.walk("d").unwrap().node, c.walk("d/f").unwrap().node), (d, f));
    assert_eq!(c.contents(f).unwrap(), b"upper");
    c.unlink(d, c"f").unwrap();
    assert_eq!(c.names(d), ["e"]);
}

#[test]
fn a_page_that_is_written_in_part_is_an_error() {
    if !can_mount() {
        return;
    }
    let mut c = Client::with(uncached);
    fs::create_dir(c.path("small")).unwrap();
    mount("tmpfs", &c.path("small"), "size=64k");
    let small = c.lookup(ROOT, c"small").unwrap().node;
    let (_, fh) = c.create(small, c"f", libc::O_RDWR, 0o600).unwrap();
    // A program gets the count; the page cache, which would not look at it, the reason.
    assert_eq!(c.write(fh, 0, &[7; 100 << 10], 0), Ok(64 << 10));
    assert_eq!(c.write(fh, 0, &[7; 100 << 10], WRITE_CACHE), Err(libc::ENOSPC));
    assert_eq!(c.write(fh, 0, &[7; 64 << 10], WRITE_CACHE), Ok(64 << 10));
    let path = c.path("small");
    let _unmount = Unmount(&path);
}
