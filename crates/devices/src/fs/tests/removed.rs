//! What the guest still holds after it removed the name.

use std::ffi::CString;
use std::fs;

use super::client::{Client, ROOT, is_root};
use crate::fs::FsSpec;

/// A share that caches one descriptor, and a file to use it up with.
fn small() -> (Client, u64) {
    let dir = tempfile::tempdir().unwrap();
    let spec = FsSpec { source: Some(dir.path().to_owned()), ..FsSpec::default() };
    let mut c = Client::build(dir, spec, |_| {}, 1);
    fs::write(c.path("other"), "x").unwrap();
    let other = c.lookup(ROOT, c"other").unwrap().node;
    (c, other)
}

#[test]
fn what_is_open_only_in_the_guest_outlives_its_name() {
    let kinds = [libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFREG, libc::S_IFCHR];
    for kind in kinds.into_iter().filter(|k| *k != libc::S_IFCHR || is_root()) {
        let (mut c, other) = small();
        let node = c.mknod(ROOT, c"n", kind | 0o640, 0x103).unwrap().node;
        c.unlink(ROOT, c"n").unwrap();
        // This takes the only place in the cache.
        assert_eq!(c.contents(other).unwrap(), b"x");
        let attr = c.getattr(node).unwrap();
        assert_eq!((attr.mode, attr.nlink), (kind | 0o640, 0));
        c.forget(node, 1);
        c.forget(other, 1);
        assert_eq!(c.counts(), (1, 0, 0));
    }
}

#[test]
fn a_removed_directory_is_still_somewhere_to_be() {
    let (mut c, other) = small();
    let node = c.mkdir(ROOT, c"d", 0o750).unwrap().node;
    c.rmdir(ROOT, c"d").unwrap();
    assert_eq!(c.contents(other).unwrap(), b"x");
    assert_eq!(c.getattr(node).unwrap().mode, libc::S_IFDIR | 0o750);
    let fh = c.opendir(node).unwrap();
    c.releasedir(fh).unwrap();
    assert_eq!(c.lookup(node, c"x").err(), Some(libc::ENOENT));
}

#[test]
fn what_a_rename_replaced_outlives_its_name() {
    let (mut c, other) = small();
    let old = c.mknod(ROOT, c"old", libc::S_IFIFO | 0o600, 0).unwrap().node;
    let new = c.mknod(ROOT, c"new", libc::S_IFSOCK | 0o600, 0).unwrap().node;
    c.rename((ROOT, c"new"), (ROOT, c"old"), 0).unwrap();
    assert_eq!(c.contents(other).unwrap(), b"x");
    assert_eq!(c.getattr(old).unwrap().nlink, 0);
    assert_eq!(c.getattr(new).unwrap().nlink, 1);
    // Nothing is replaced by an exchange, and it is found by name.
    let exchange = 2;
    c.rename((ROOT, c"other"), (ROOT, c"old"), exchange).unwrap();
    assert_eq!((c.getattr(new).unwrap().nlink, c.getattr(other).unwrap().size), (1, 1));
    for node in [old, new, other] {
        c.forget(node, 1);
    }
    assert_eq!(c.counts(), (1, 0, 0));
}

#[test]
fn nothing_is_kept_for_what_has_a_name() {
    let (mut c, _) = small();
    let d = c.mkdir(ROOT, c"d", 0o755).unwrap().node;
    let f = c.mknod(d, c"f", libc::S_IFREG | 0o600, 0).unwrap().node;
    c.rename((d, c"f"), (d, c"f"), 0).unwrap();
    // The directory's descriptor is the one that is cached.
    assert_eq!(c.counts().2, 1);
    assert_eq!(c.rmdir(ROOT, c"d"), Err(libc::ENOTEMPTY));
    assert_eq!(c.counts().2, 1);
    c.link(f, d, c"g").unwrap();
    c.unlink(d, c"f").unwrap();
    assert!(c.getattr(f).is_ok());
    assert_eq!(c.lookup(d, c"g").unwrap().node, f);
    assert!(c.counts().2 <= 1, "{:?}", c.counts());
    assert_eq!(c.getattr(f).unwrap().nlink, 1);
}

#[test]
fn no_more_are_kept_than_cached() {
    let dir = tempfile::tempdir().unwrap();
    let spec = FsSpec { source: Some(dir.path().to_owned()), ..FsSpec::default() };
    let mut c = Client::build(dir, spec, |_| {}, 4);
    let mut nodes = Vec::new();
    for i in 0..10 {
        let name = CString::new(format!("n{i}")).unwrap();
        nodes.push(c.mknod(ROOT, &name, libc::S_IFIFO | 0o600, 0).unwrap().node);
        c.unlink(ROOT, &name).unwrap();
    }
    let found = nodes.iter().filter(|n| c.getattr(**n).is_ok()).count();
    assert_eq!((found, c.counts().2), (4, 4));
    for node in nodes {
        c.forget(node, 1);
    }
    // The places are free again.
    let node = c.mknod(ROOT, c"n", libc::S_IFIFO | 0o600, 0).unwrap().node;
    c.unlink(ROOT, c"n").unwrap();
    assert_eq!(c.getattr(node).unwrap().nlink, 0);
    c.server.reset();
    c.init().unwrap();
    assert_eq!(c.counts(), (1, 0, 0));
}
