//! Shares that cannot be changed, and specs that cannot be served.

use std::fs;
use std::path::Path;

use super::client::{Client, ROOT, Set, absent, longs, u32_at, words};
use crate::fs::abi::{Fattr, op};
use crate::fs::{CachePolicy, Content, FsError, FsSpec, Overlay, setup};

/// NO_OPEN_SUPPORT and NO_OPENDIR_SUPPORT.
const NO_OPEN: u32 = 1 << 17 | 1 << 24;

#[test]
fn every_change_is_refused() {
    let mut c = Client::with(|s| {
        let root = s.source.clone().unwrap();
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("f"), "data").unwrap();
        s.read_only = true;
    });
    // A guest that insists on opening.
    c.init_without(NO_OPEN).unwrap();
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

#[test]
fn files_are_read_without_being_opened() {
    let mut c = Client::with(|s| {
        let root = s.source.clone().unwrap();
        for n in 0..300 {
            fs::write(root.join(format!("f{n}")), format!("file {n}")).unwrap();
        }
        fs::create_dir(root.join("d")).unwrap();
        s.read_only = true;
        s.cache = CachePolicy::ALWAYS;
        s.overlays = vec![Overlay {
            path: "o".into(),
            content: Content::File { data: b"overlay".to_vec().into(), mode: 0o644, one_shot: false },
            listed: true,
        }];
    });
    let nosys = Some(libc::ENOSYS);
    let (d, o) = (c.lookup(ROOT, c"d").unwrap().node, c.lookup(ROOT, c"o").unwrap().node);
    assert_eq!(c.read_node(o, 0, 4, 10).unwrap(), b"lay");
    assert_eq!(c.read_node(d, 0, 0, 10).err(), Some(libc::EISDIR));
    assert_eq!((c.open(o, libc::O_RDONLY).err(), c.opendir(ROOT).err()), (nosys, nosys));
    assert_eq!(c.call(op::FLUSH, o, &[&longs(&[0, 0, 0])]).err(), nosys);
    // More files than are kept open, and again.
    for _ in 0..2 {
        for n in 0..300 {
            let name = std::ffi::CString::new(format!("f{n}")).unwrap();
            let node = c.lookup(ROOT, &name).unwrap().node;
            assert_eq!(c.read_node(node, 0, 0, 100).unwrap(), format!("file {n}").as_bytes());
        }
    }
    let first = c.lookup(ROOT, c"f299").unwrap().node;
    fs::remove_file(c.path("f299")).unwrap();
    assert_eq!(c.read_node(first, 0, 5, 100).unwrap(), b"299", "what is in use stays readable");
    c.forget(first, 3);
    assert_eq!(c.read_node(first, 0, 0, 1).err(), Some(libc::ESTALE));
    let open = c.counts().1;
    assert!(open < 130, "{open} are open");
    let (mut names, mut at) = (Vec::new(), 0);
    loop {
        let part = c.readdir_node(ROOT, 0, at, 4096, false).unwrap();
        let Some(last) = part.last() else { break };
        at = last.next;
        names.extend(part.into_iter().map(|e| e.name));
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 299 + 4, "files, the directory, the overlay and the dots");
    assert_eq!(c.lookup(ROOT, c"absent").err(), Some(libc::ENOENT));
}

#[test]
fn an_open_that_counts_is_asked_for() {
    let once = |s: &mut FsSpec| {
        s.read_only = true;
        s.overlays = vec![Overlay {
            path: "once".into(),
            content: Content::File { data: b"x".to_vec().into(), mode: 0o644, one_shot: true },
            listed: true,
        }];
    };
    let never = |s: &mut FsSpec| (s.read_only, s.cache) = (true, CachePolicy::NEVER);
    for mut c in [Client::with(once), Client::with(never), Client::new()] {
        assert!(c.opendir(ROOT).is_ok());
        let flags = u32_at(&c.init().unwrap(), 12);
        assert_eq!(flags & NO_OPEN, 0);
        assert_eq!(c.read_node(ROOT, 0, 0, 1).err(), Some(libc::EBADF));
    }
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
