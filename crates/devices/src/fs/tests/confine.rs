//! No way out of the share.

use std::ffi::CStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::client::{Client, ROOT, uncached};
use crate::fs::abi::op;

#[test]
fn names_that_are_paths_are_refused() {
    let mut c = Client::new();
    fs::create_dir(c.path("d")).unwrap();
    fs::write(c.path("d/f"), "").unwrap();
    let d = c.lookup(ROOT, c"d").unwrap().node;
    let f = c.lookup(d, c"f").unwrap().node;
    for bad in [c"", c".", c"..", c"/", c"d/f", c"/etc/passwd", c"../x", c"x/"] {
        let e = Some(libc::EINVAL);
        assert_eq!(c.lookup(ROOT, bad).err(), e, "{bad:?}");
        assert_eq!(c.mkdir(ROOT, bad, 0o755).err(), e);
        assert_eq!(c.mknod(ROOT, bad, libc::S_IFREG, 0).err(), e);
        assert_eq!(c.create(ROOT, bad, libc::O_RDWR, 0o600).err(), e);
        assert_eq!(c.symlink(ROOT, bad, c"t").err(), e);
        assert_eq!(c.link(f, ROOT, bad).err(), e);
        assert_eq!(c.unlink(d, bad).err(), e);
        assert_eq!(c.rmdir(ROOT, bad).err(), e);
        assert_eq!(c.rename((d, bad), (ROOT, c"ok"), 0).err(), e);
        assert_eq!(c.rename((d, c"f"), (ROOT, bad), 0).err(), e);
        assert_eq!(c.rename((d, c"f"), (ROOT, bad), 1).err(), e);
    }
    let long = std::ffi::CString::new(vec![b'x'; 256]).unwrap();
    assert_eq!(c.lookup(ROOT, &long).err(), Some(libc::ENAMETOOLONG));
}

#[test]
fn links_are_never_followed() {
    let mut c = Client::new();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    symlink("/etc/passwd", c.path("file")).unwrap();
    symlink(outside.path(), c.path("dir")).unwrap();
    symlink("/proc/self/root", c.path("magic")).unwrap();
    symlink("..", c.path("up")).unwrap();
    for name in [c"file", c"dir", c"magic", c"up"] {
        let e = c.lookup(ROOT, name).unwrap();
        assert_eq!(e.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(c.open(e.node, libc::O_RDONLY).err(), Some(libc::ENXIO));
        assert_eq!(c.opendir(e.node).err(), Some(libc::ENOTDIR));
        assert!(c.lookup(e.node, c"secret").is_err());
        assert!(c.lookup(e.node, c"passwd").is_err());
        assert!(c.create(e.node, c"new", libc::O_RDWR, 0o600).is_err());
        assert!(c.mkdir(e.node, c"new", 0o700).is_err());
        assert!(c.unlink(e.node, c"secret").is_err());
        assert_eq!(c.create(ROOT, name, libc::O_RDWR, 0o600).err(), Some(libc::ESTALE));
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn a_dangling_link_is_not_created_through() {
    let mut c = Client::new();
    let outside = tempfile::tempdir().unwrap();
    symlink(outside.path().join("new"), c.path("l")).unwrap();
    assert_eq!(c.create(ROOT, c"l", libc::O_RDWR, 0o600).err(), Some(libc::ESTALE));
    assert_eq!(c.create(ROOT, c"l", libc::O_RDWR | libc::O_EXCL, 0o600).err(), Some(libc::EEXIST));
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[test]
fn a_file_replaced_by_a_link_is_not_opened() {
    let mut c = Client::with(uncached);
    fs::write(c.path("f"), "inside").unwrap();
    let f = c.lookup(ROOT, c"f").unwrap().node;
    fs::remove_file(c.path("f")).unwrap();
    symlink("/etc/passwd", c.path("f")).unwrap();
    assert_eq!(c.contents(f), Err(libc::ESTALE));
    assert_eq!(c.getattr(f), Err(libc::ESTALE));
}

#[test]
fn special_files_are_not_opened_on_the_host() {
    let mut c = Client::new();
    c.mknod(ROOT, c"fifo", libc::S_IFIFO | 0o666, 0).unwrap();
    c.mknod(ROOT, c"sock", libc::S_IFSOCK | 0o666, 0).unwrap();
    let begun = Instant::now();
    for name in [c"fifo", c"sock"] {
        let n = c.lookup(ROOT, name).unwrap().node;
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
            assert_eq!(c.open(n, flags).err(), Some(libc::ENXIO));
        }
        // Metadata of its own is fine.
        assert!(c.getattr(n).is_ok());
        assert_eq!(c.create(ROOT, name, libc::O_WRONLY, 0o600).err(), Some(libc::ESTALE));
    }
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_file_replaced_by_a_fifo_does_not_block() {
    let mut c = Client::with(uncached);
    fs::write(c.path("f"), "x").unwrap();
    let f = c.lookup(ROOT, c"f").unwrap().node;
    fs::remove_file(c.path("f")).unwrap();
    c.mknod(ROOT, c"f", libc::S_IFIFO | 0o666, 0).unwrap();
    assert_eq!(c.open(f, libc::O_RDONLY).err(), Some(libc::ESTALE));
}

#[test]
fn a_directory_moved_out_shows_nothing_above_it() {
    let mut c = Client::new();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    fs::create_dir_all(c.path("a/b")).unwrap();
    let b = c.walk("a/b").unwrap().node;
    // Hold it, so that it is still reachable afterwards.
    let fh = c.opendir(b).unwrap();
    fs::rename(c.path("a/b"), outside.path().join("b")).unwrap();
    assert_eq!(c.lookup(b, c"..").err(), Some(libc::EINVAL));
    assert!(c.lookup(b, c"secret").is_err());
    assert!(c.readdir(fh, 0, 4096, true).unwrap().iter().all(|e| e.name != b"secret" && e.node == 0));
}

/// Exchanges a directory of the share and a link to one outside, as fast as it can, while the guest looks
/// things up, creates and removes.
#[test]
fn directories_exchanged_with_links_let_nothing_through() {
    let mut c = Client::with(uncached);
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("f"), "outside").unwrap();
    fs::create_dir(c.path("d")).unwrap();
    fs::write(c.path("d/f"), "inside").unwrap();
    symlink(outside.path(), c.path("l")).unwrap();
    let stop = AtomicBool::new(false);
    let (a, b) = (c.path("d"), c.path("l"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(rustix::fs::CWD, &a, rustix::fs::CWD, &b, flags).unwrap();
            }
        });
        let begun = Instant::now();
        let mut reached = 0u32;
        // On a busy host it takes its time until one of the two has the other's moment.
        while begun.elapsed() < Duration::from_millis(700)
            || reached == 0 && begun.elapsed() < Duration::from_secs(60)
        {
            let Ok(d) = c.lookup(ROOT, c"d") else { continue };
            if let Ok(f) = c.lookup(d.node, c"f") {
                if let Ok(data) = c.contents(f.node) {
                    assert_eq!(data, b"inside");
                    reached += 1;
                }
                c.forget(f.node, 1);
            }
            let _ = c.create(d.node, c"new", libc::O_RDWR, 0o600);
            let _ = c.unlink(d.node, c"new");
            c.forget(d.node, 1);
        }
        stop.store(true, Ordering::Relaxed);
        assert!(reached > 0, "the race was never run");
    });
    let left: Vec<_> = fs::read_dir(outside.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["f"]);
}

#[test]
fn made_up_nodes_and_handles_are_refused() {
    let mut c = Client::new();
    for node in [0, 2, 99, u64::MAX] {
        assert_eq!(c.lookup(node, c"x").err(), Some(libc::ESTALE));
        assert_eq!(c.getattr(node).err(), Some(libc::ESTALE));
        assert_eq!(c.open(node, 0).err(), Some(libc::ESTALE));
        assert_eq!(c.opendir(node).err(), Some(libc::ESTALE));
        assert_eq!(c.readlink(node).err(), Some(libc::ESTALE));
        assert_eq!(c.unlink(node, c"x").err(), Some(libc::ESTALE));
        assert_eq!(c.link(node, ROOT, c"x").err(), Some(libc::ESTALE));
        assert_eq!(c.rename((ROOT, c"x"), (node, c"y"), 0).err(), Some(libc::ESTALE));
        assert_eq!(c.getxattr(node, c"user.a", 10).err(), Some(libc::ESTALE));
        assert_eq!(c.call(op::STATFS, node, &[]).err(), Some(libc::ESTALE));
        c.forget(node, 5);
    }
    let dir = c.opendir(ROOT).unwrap();
    for fh in [0, 77, u64::MAX] {
        assert_eq!(c.read(fh, 0, 10).err(), Some(libc::EBADF));
        assert_eq!(c.readdir(fh, 0, 10, true).err(), Some(libc::EBADF));
        assert_eq!(c.release(fh).err(), Some(libc::EBADF));
    }
    // Handles of one kind do not serve as the other.
    assert_eq!(c.read(dir, 0, 10).err(), Some(libc::EISDIR));
    let (_, file) = c.create(ROOT, c"f", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(c.readdir(file, 0, 4096, false).err(), Some(libc::ENOTDIR));
    let wild: &CStr = c"";
    assert_eq!(c.getxattr(ROOT, wild, 10).err(), Some(libc::ERANGE));
}
