//! Shares that cannot be changed, and specs that cannot be served.

use std::fs;
use std::path::Path;

use super::client::{Client, ROOT, Set, absent, longs, words};
use crate::fs::abi::{Fattr, op};
use crate::fs::{FsError, FsSpec, setup};

#[test]
fn every_change_is_refused() {
    let mut c = Client::with(|s| {
        let root = s.source.clone().unwrap();
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("f"), "data").unwrap();
        s.read_only = true;
    });
    let (d, f) = (c.lookup(ROOT, c"d").unwrap().node, c.lookup(ROOT, c"f").unwrap().node);
    let e = Some(libc::EROFS);
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(c.open(f, flags).err(), e);
    }
    assert_eq!(c.create(ROOT, c"n", libc::O_RDONLY, 0o600).err(), e);
    assert_eq!(c.mkdir(ROOT, c"n", 0o755).err(), e);
    assert_eq!(c.mknod(ROOT, c"n", libc::S_IFREG, 0).err(), e);
    assert_eq!(c.symlink(ROOT, c"n", c"t").err(), e);
    assert_eq!(c.link(f, ROOT, c"n").err(), e);
    assert_eq!(c.unlink(ROOT, c"f").err(), e);
    assert_eq!(c.rmdir(ROOT, c"d").err(), e);
    assert_eq!(c.rename((ROOT, c"f"), (d, c"g"), 0).err(), e);
    assert_eq!(c.rename((ROOT, c"f"), (d, c"g"), 1).err(), e);
    let all =
        [Fattr::MODE, Fattr::UID, Fattr::GID, Fattr::SIZE, Fattr::ATIME | Fattr::ATIME_NOW, Fattr::MTIME];
    for valid in all {
        assert_eq!(c.setattr(f, valid, Set::default()).err(), e);
    }
    assert_eq!(c.setxattr(f, c"user.a", b"x", 0).err(), e);
    assert_eq!(c.call(op::REMOVEXATTR, f, &[b"user.a\0"]).err(), e);
    assert_eq!(c.call(op::TMPFILE, ROOT, &[&words(&[2, 0o600, 0, 0]), b"#\0"]).err(), e);
    assert_eq!(c.call(op::ACCESS, f, &[&words(&[2, 0])]).err(), e);
    let (fh, _) = c.open(f, libc::O_RDONLY).unwrap();
    assert_eq!(c.write(fh, 0, b"x", 0).err(), e);
    assert_eq!(c.call(op::FALLOCATE, f, &[&longs(&[fh, 0, 10]), &words(&[0, 0])]).err(), e);
    assert_eq!(c.call(op::COPY_FILE_RANGE, f, &[&longs(&[fh, 0, f, fh, 0, 4, 0])]).err(), e);
    assert_eq!(c.contents(f).unwrap(), b"data");
    assert_eq!(c.names(ROOT), ["d", "f"]);
    assert!(absent(&c.path("n")));
}

fn refused(tag: &str, source: &Path) -> FsError {
    setup::share(&FsSpec { tag: tag.into(), source: Some(source.to_owned()), ..FsSpec::default() })
        .unwrap_err()
}

#[test]
fn a_spec_that_cannot_be_served_says_why() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "").unwrap();
    assert!(matches!(refused("t", &dir.path().join("no")), FsError::SourceMissing { .. }));
    assert!(matches!(refused("t", &dir.path().join("f")), FsError::SourceNotDirectory { .. }));
    let e = refused(&"x".repeat(37), dir.path());
    assert!(matches!(e, FsError::TagLength { len: 37, .. }));
    assert!(e.to_string().contains("1 to 36"), "{e}");
    assert!(matches!(refused("", dir.path()), FsError::TagLength { len: 0, .. }));
    assert!(matches!(refused("a\0b", dir.path()), FsError::TagCharacter { .. }));
    assert!(setup::check_tag(&"x".repeat(36)).is_ok());
}
