//! Virtual files and directories.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use super::client::{Client, ROOT, Set, words};
use crate::fs::abi::{Fattr, op};
use crate::fs::{Content, FileData, FsError, FsSpec, Overlay, setup};

fn file(path: &str, data: &'static [u8]) -> Overlay {
    let content = Content::File { data: FileData::from(data), mode: 0o755, one_shot: false };
    Overlay { path: PathBuf::from(path), content, listed: false }
}

fn dir(path: &str) -> Overlay {
    Overlay { path: PathBuf::from(path), content: Content::Dir { mode: 0o700 }, listed: false }
}

fn listed(o: Overlay) -> Overlay {
    Overlay { listed: true, ..o }
}

#[test]
fn a_file_is_found_by_name_and_not_listed() {
    let mut c = Client::with(|s| s.overlays = vec![file("init", b"\x7fELF and so on")]);
    fs::write(c.path("real"), "").unwrap();
    let e = c.lookup(ROOT, c"init").unwrap();
    assert_eq!((e.attr.mode, e.attr.size, e.attr.nlink), (libc::S_IFREG | 0o755, 14, 1));
    assert!(e.entry_valid > 60);
    assert_eq!(c.contents(e.node).unwrap(), b"\x7fELF and so on");
    let (fh, _) = c.open(e.node, libc::O_RDONLY).unwrap();
    assert_eq!(c.read(fh, 5, 3).unwrap(), b"and");
    assert_eq!(c.read(fh, 100, 3).unwrap(), b"");
    assert_eq!(c.read(fh, u64::MAX, 3).unwrap(), b"");
    assert_eq!(c.names(ROOT), ["real"]);
    assert_eq!(c.getxattr(e.node, c"user.x", 10), Err(libc::ENODATA));
    assert!(c.raw(op::LISTXATTR, e.node, &words(&[10, 0]), 10).unwrap().is_empty());
    assert_eq!(c.lookup(ROOT, c"init").unwrap().node, e.node);
    c.forget(e.node, 2);
    assert_eq!(c.counts().0, 1);
    assert!(c.lookup(ROOT, c"init").is_ok());
}

#[test]
fn it_cannot_be_changed_on_a_writable_share() {
    let mut c = Client::with(|s| s.overlays = vec![file("v", b"data"), dir("d")]);
    let v = c.lookup(ROOT, c"v").unwrap().node;
    let d = c.lookup(ROOT, c"d").unwrap().node;
    fs::write(c.path("real"), "").unwrap();
    let real = c.lookup(ROOT, c"real").unwrap().node;
    let rofs = Some(libc::EROFS);
    assert_eq!(c.open(v, libc::O_RDWR).err(), rofs);
    assert_eq!(c.open(v, libc::O_RDONLY | libc::O_TRUNC).err(), rofs);
    assert_eq!(c.setattr(v, Fattr::MODE, Set::default()).err(), rofs);
    assert_eq!(c.setattr(d, Fattr::UID, Set::default()).err(), rofs);
    assert_eq!(c.setxattr(v, c"user.a", b"x", 0).err(), rofs);
    assert_eq!(c.unlink(ROOT, c"v").err(), rofs);
    assert_eq!(c.rmdir(ROOT, c"d").err(), rofs);
    assert_eq!(c.rename((ROOT, c"v"), (ROOT, c"w"), 0).err(), rofs);
    assert_eq!(c.rename((ROOT, c"real"), (ROOT, c"v"), 0).err(), rofs);
    assert_eq!(c.rename((ROOT, c"real"), (d, c"x"), 0).err(), rofs);
    assert_eq!(c.link(v, ROOT, c"w").err(), rofs);
    assert_eq!(c.link(real, d, c"w").err(), rofs);
    assert_eq!(c.create(d, c"x", libc::O_RDWR, 0o600).err(), rofs);
    assert_eq!(c.mkdir(d, c"x", 0o755).err(), rofs);
    assert_eq!(c.create(ROOT, c"v", libc::O_RDWR, 0o600).err(), Some(libc::EEXIST));
    assert_eq!(c.mkdir(ROOT, c"d", 0o755).err(), Some(libc::EEXIST));
    let (fh, _) = c.open(v, libc::O_RDONLY).unwrap();
    assert_eq!(c.write(fh, 0, b"x", 0).err(), rofs);
    assert_eq!(c.contents(v).unwrap(), b"data");
}

#[test]
fn it_hides_a_real_one() {
    let mut c = Client::with(|s| {
        fs::create_dir(s.source.as_ref().unwrap().join("etc")).unwrap();
        fs::write(s.source.as_ref().unwrap().join("etc/hosts"), "real").unwrap();
        s.overlays = vec![listed(file("etc/hosts", b"virtual"))];
    });
    let e = c.walk("etc/hosts").unwrap();
    assert_eq!(c.contents(e.node).unwrap(), b"virtual");
    let etc = c.lookup(ROOT, c"etc").unwrap().node;
    assert_eq!(c.names(etc), ["hosts"], "listed once");
    assert_eq!(fs::read(c.path("etc/hosts")).unwrap(), b"real");
}

#[test]
fn listings_join_both() {
    let mut c = Client::with(|s| {
        let root = s.source.clone().unwrap();
        for i in 0..200 {
            fs::write(root.join(format!("real-{i:03}")), "").unwrap();
        }
        s.overlays = (0..100).map(|i| listed(file(&format!("virtual-{i:03}"), b"v"))).collect();
        s.overlays.push(listed(dir("mnt")));
        s.overlays.push(file("hidden", b"h"));
    });
    for plus in [false, true] {
        let list = c.list(ROOT, plus).unwrap();
        assert_eq!(list.len(), 200 + 101 + 2);
        let mut names: Vec<_> = list.iter().map(|e| e.name.clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 303);
        let mnt = list.iter().find(|e| e.name == b"mnt").unwrap();
        assert_eq!((mnt.kind, mnt.node != 0), (u32::from(libc::DT_DIR), plus));
        // Going on from each position gives the next entry.
        let fh = c.opendir(ROOT).unwrap();
        for i in (0..300).step_by(37) {
            assert_eq!(c.readdir(fh, list[i].next, 4096, false).unwrap()[0].name, list[i + 1].name);
        }
        c.releasedir(fh).unwrap();
    }
}

#[test]
fn one_shot_files_go_after_their_first_use() {
    let data: Arc<Vec<u8>> = Arc::new(b"secret config".to_vec());
    let held = Arc::downgrade(&data);
    let mut c = Client::with(|s| {
        let content = Content::File { data: FileData::new(data), mode: 0o600, one_shot: true };
        s.overlays = vec![Overlay { path: "once".into(), content, listed: true }];
    });
    let e = c.lookup(ROOT, c"once").unwrap();
    assert_eq!(e.entry_valid, 0);
    let (a, _) = c.open(e.node, libc::O_RDONLY).unwrap();
    let (b, _) = c.open(e.node, libc::O_RDONLY).unwrap();
    assert_eq!(c.read(a, 0, 100).unwrap(), b"secret config");
    c.release(a).unwrap();
    assert_eq!(c.lookup(ROOT, c"once").err(), Some(libc::ENOENT));
    assert!(c.names(ROOT).is_empty());
    assert_eq!(c.open(e.node, libc::O_RDONLY).err(), Some(libc::ENOENT));
    assert_eq!(c.read(b, 0, 6).unwrap(), b"secret", "what is open stays");
    c.release(b).unwrap();
    assert!(held.upgrade().is_none(), "its memory is free");
    // The name may be used now.
    assert!(c.create(ROOT, c"once", libc::O_RDWR, 0o600).is_ok());
}

#[test]
fn a_share_may_have_overlays_alone() {
    let mut c = Client::without_source(vec![
        file("init", b"i"),
        listed(dir("a")),
        listed(dir("a/b")),
        listed(file("a/b/f", b"deep")),
    ]);
    assert_eq!(c.getattr(ROOT).unwrap().mode, libc::S_IFDIR | 0o755);
    let f = c.walk("a/b/f").unwrap();
    assert_eq!(c.contents(f.node).unwrap(), b"deep");
    assert_eq!(c.names(ROOT), ["a"]);
    let a = c.lookup(ROOT, c"a").unwrap();
    assert_eq!((a.attr.nlink, a.attr.mode), (3, libc::S_IFDIR | 0o700));
    assert_eq!(c.list(a.node, true).unwrap().len(), 3);
    assert_eq!(c.lookup(ROOT, c"nothing").err(), Some(libc::ENOENT));
    assert_eq!(c.create(ROOT, c"x", libc::O_RDWR, 0o600).err(), Some(libc::EROFS));
    assert_eq!(c.call(op::STATFS, ROOT, &[]).unwrap().len(), 80);
    c.call(op::SYNCFS, ROOT, &[&[0; 8]]).unwrap();
    let fh = c.opendir(ROOT).unwrap();
    assert!(c.readdir(fh, 1 << 63, 4096, false).unwrap().is_empty());
}

fn refused(overlays: Vec<Overlay>) -> FsError {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    std::os::unix::fs::symlink("loop", dir.path().join("loop")).unwrap();
    let source = Some(dir.path().to_owned());
    setup::share(&FsSpec { tag: "t".into(), source, overlays, ..FsSpec::default() }).unwrap_err()
}

#[test]
fn wrong_parents_are_told_apart() {
    assert!(matches!(refused(vec![file("no/x", b"")]), FsError::OverlayNotFound { .. }));
    assert!(matches!(refused(vec![file("file/x", b"")]), FsError::OverlayNotADirectory { .. }));
    assert!(matches!(refused(vec![file("loop/x", b"")]), FsError::OverlayNotADirectory { .. }));
    assert!(matches!(refused(vec![file("v", b""), file("v/x", b"")]), FsError::OverlayNotADirectory { .. }));
    assert!(matches!(refused(vec![dir("d"), file("d/e/x", b"")]), FsError::OverlayNotFound { .. }));
    assert!(matches!(refused(vec![dir("d"), file("d", b"")]), FsError::OverlayExists { .. }));
    for bad in ["", "/x", "../x", "a/../x", "."] {
        assert!(matches!(refused(vec![file(bad, b"")]), FsError::OverlayPath { .. }), "{bad:?}");
    }
}

#[test]
fn links_on_the_way_to_an_overlay_stay_inside() {
    let mut c = Client::with(|s| {
        let root = s.source.clone().unwrap();
        fs::create_dir(root.join("run")).unwrap();
        fs::create_dir(root.join("var")).unwrap();
        std::os::unix::fs::symlink("/run", root.join("var/run")).unwrap();
        s.overlays = vec![file("var/run/x", b"x")];
    });
    let e = c.walk("run/x").unwrap();
    assert_eq!(c.contents(e.node).unwrap(), b"x");
    assert!(!std::path::Path::new("/run/x").exists());
}
