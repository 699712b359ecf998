//! Each operation once, and its errors.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use super::client::{Client, ROOT, Set, absent, longs, u32_at, u64_at, uncached, words};
use crate::fs::abi::{FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, Fattr, op};
use crate::fs::{CachePolicy, DataCache};

#[test]
fn init_agrees_on_what_is_served() {
    let mut c = Client::new();
    let reply = c.init().unwrap();
    assert_eq!(reply.len(), 64);
    assert_eq!((u32_at(&reply, 0), u32_at(&reply, 4)), (7, 41));
    let flags = u32_at(&reply, 12);
    for (bit, on) in [
        (0, true),
        (1, false),
        (3, false),
        (6, false),
        (10, false),
        (13, true),
        (16, false),
        (20, false),
        (22, true),
        (28, true),
    ] {
        assert_eq!(flags >> bit & 1 == 1, on, "flag {bit}");
    }
    assert_eq!((u32_at(&reply, 20), u32_at(&reply, 28) & 0xffff), (1 << 20, 256));
    // Nothing that was not offered.
    let reply = c.call(op::INIT, 0, &[&words(&[7, 38, 0, 1])]).unwrap();
    assert_eq!((u32_at(&reply, 4), u32_at(&reply, 12)), (38, 1));
    assert_eq!(c.call(op::INIT, 0, &[&words(&[7, 12, 0, 0])]), Err(libc::EPROTO));
    assert_eq!(c.call(op::INIT, 0, &[&words(&[7])]), Err(libc::EINVAL));
}

#[test]
fn nothing_is_served_before_init_or_after_destroy() {
    let mut c = Client::new();
    fs::write(c.path("f"), "x").unwrap();
    let f = c.lookup(ROOT, c"f").unwrap();
    c.open(f.node, libc::O_RDONLY).unwrap();
    c.call(op::DESTROY, 0, &[]).unwrap();
    assert_eq!(c.counts(), (1, 0, 0));
    assert_eq!(c.lookup(ROOT, c"f").err(), Some(libc::EIO));
    c.init().unwrap();
    assert_eq!(c.getattr(f.node), Err(libc::ESTALE));
    assert_eq!(c.contents(f.node), Err(libc::ESTALE));
    assert!(c.lookup(ROOT, c"f").is_ok());
}

#[test]
fn lookup_tells_what_the_host_has() {
    let mut c = Client::new();
    fs::create_dir(c.path("d")).unwrap();
    fs::write(c.path("d/f"), "hello").unwrap();
    let e = c.walk("d/f").unwrap();
    let meta = fs::metadata(c.path("d/f")).unwrap();
    assert_eq!((e.attr.size, e.attr.ino, e.attr.mode), (5, meta.ino(), meta.mode()));
    assert_eq!(e.entry_valid, 1);
    assert_eq!(c.walk("d/g").err(), Some(libc::ENOENT));
    assert_eq!(c.lookup(e.node, c"x").err(), Some(libc::ENOTDIR));
    assert_eq!(c.lookup(12345, c"x").err(), Some(libc::ESTALE));
    assert_eq!(c.getattr(e.node).unwrap(), e.attr);
}

#[test]
fn files_are_created_written_and_read() {
    let mut c = Client::new();
    let (e, fh) = c.create(ROOT, c"f", libc::O_RDWR | libc::O_EXCL, 0o640).unwrap();
    assert_eq!(e.attr.mode, libc::S_IFREG | 0o640);
    let data: Vec<u8> = (0..100_000u32).map(|i| (i * 7) as u8).collect();
    for (i, part) in data.chunks(30_000).enumerate() {
        assert_eq!(c.write(fh, i as u64 * 30_000, part, 0), Ok(part.len() as u32));
    }
    assert_eq!(fs::read(c.path("f")).unwrap(), data);
    assert_eq!(c.read(fh, 50_000, 100).unwrap(), data[50_000..50_100]);
    assert_eq!(c.read(fh, 99_999, 100).unwrap(), data[99_999..]);
    assert_eq!(c.read(fh, 100_000, 100).unwrap(), []);
    assert_eq!(c.read(fh, u64::MAX, 100), Err(libc::EINVAL));
    assert_eq!(c.contents(e.node).unwrap(), data);
    c.call(op::FLUSH, e.node, &[&longs(&[fh, 0, 0])]).unwrap();
    for only_data in [0, 1] {
        c.call(op::FSYNC, e.node, &[&longs(&[fh]), &words(&[only_data, 0])]).unwrap();
    }
    c.release(fh).unwrap();
    assert_eq!(c.release(fh), Err(libc::EBADF));
    assert_eq!(c.read(fh, 0, 1), Err(libc::EBADF));
    assert_eq!(c.write(fh, 0, b"x", 0), Err(libc::EBADF));
    assert_eq!(c.create(ROOT, c"f", libc::O_RDWR | libc::O_EXCL, 0o600).err(), Some(libc::EEXIST));
    let (again, fh) = c.create(ROOT, c"f", libc::O_RDWR | libc::O_TRUNC, 0o600).unwrap();
    assert_eq!((again.node, fs::metadata(c.path("f")).unwrap().len()), (e.node, 0));
    assert_eq!(c.write(fh, 5, b"abc", 0), Ok(3));
    c.release(fh).unwrap();
    let (fh, _) = c.open(e.node, libc::O_WRONLY | libc::O_APPEND).unwrap();
    c.write(fh, 0, b"def", 0).unwrap();
    assert_eq!(fs::read(c.path("f")).unwrap(), b"\0\0\0\0\0abcdef");
    assert_eq!(c.read(fh, 0, 1), Err(libc::EBADF), "not open for reading");
}

#[test]
fn a_write_must_have_its_data() {
    let mut c = Client::new();
    let (_, fh) = c.create(ROOT, c"f", libc::O_RDWR, 0o600).unwrap();
    // The request says 100 bytes and has 3.
    let head = [longs(&[fh, 0]), words(&[100, 0, 0, 0, 0, 0])].concat();
    assert_eq!(c.call(op::WRITE, 0, &[&head, b"abc"]).map(|b| u32_at(&b, 0)), Ok(3));
    assert_eq!(c.call(op::WRITE, 0, &[&head[..30]]), Err(libc::EINVAL));
}

#[test]
fn attributes_change() {
    let mut c = Client::new();
    fs::write(c.path("f"), "0123456789").unwrap();
    let f = c.lookup(ROOT, c"f").unwrap().node;
    let a = c.setattr(f, Fattr::MODE, Set { mode: 0o4711, ..Set::default() }).unwrap();
    assert_eq!(a.mode, libc::S_IFREG | 0o4711);
    let a = c.setattr(f, Fattr::SIZE, Set { size: 4, ..Set::default() }).unwrap();
    assert_eq!((a.size, fs::read(c.path("f")).unwrap()), (4, b"0123".to_vec()));
    let (fh, _) = c.open(f, libc::O_RDWR).unwrap();
    let a = c.setattr(f, Fattr::SIZE | Fattr::FH, Set { size: 6, fh, ..Set::default() }).unwrap();
    assert_eq!((a.size, c.getattr_fh(f, fh).unwrap().size), (6, 6));
    let times = Set { atime: -5, mtime: 77, ..Set::default() };
    assert_eq!(c.setattr(f, Fattr::ATIME | Fattr::MTIME, times).unwrap().mtime, 77);
    let meta = fs::metadata(c.path("f")).unwrap();
    assert_eq!((meta.atime(), meta.mtime(), meta.mtime_nsec()), (-5, 77, 5));
    c.setattr(f, Fattr::MTIME | Fattr::MTIME_NOW, times).unwrap();
    let meta = fs::metadata(c.path("f")).unwrap();
    assert!(meta.atime() == -5 && meta.mtime() > 1_000_000);
    let d = c.mkdir(ROOT, c"d", 0o755).unwrap().node;
    assert_eq!(c.setattr(d, Fattr::SIZE, Set::default()), Err(libc::EINVAL));
    // A link has times of its own.
    let l = c.symlink(ROOT, c"l", c"f").unwrap().node;
    c.setattr(l, Fattr::MTIME, Set { mtime: 42, ..Set::default() }).unwrap();
    assert_eq!(fs::symlink_metadata(c.path("l")).unwrap().mtime(), 42);
    assert!(fs::metadata(c.path("f")).unwrap().mtime() > 1_000_000);
}

#[test]
fn names_are_made_and_removed() {
    let mut c = Client::new();
    let d = c.mkdir(ROOT, c"d", 0o1777).unwrap();
    assert_eq!(d.attr.mode, libc::S_IFDIR | 0o1777, "no umask of this process gets in between");
    let l = c.symlink(d.node, c"l", c"/etc/passwd").unwrap();
    assert_eq!(c.readlink(l.node).unwrap(), b"/etc/passwd");
    assert_eq!(c.readlink(d.node), Err(libc::EINVAL));
    let p = c.mknod(d.node, c"p", libc::S_IFIFO | 0o666, 0).unwrap();
    assert_eq!(p.attr.mode, libc::S_IFIFO | 0o666);
    let s = c.mknod(d.node, c"s", libc::S_IFSOCK | 0o600, 0).unwrap();
    assert_eq!(s.attr.mode & libc::S_IFMT, libc::S_IFSOCK);
    let f = c.mknod(d.node, c"f", libc::S_IFREG | 0o600, 0).unwrap();
    let g = c.link(f.node, ROOT, c"g").unwrap();
    assert_eq!((g.node, g.attr.nlink), (f.node, 2));
    let l2 = c.link(l.node, ROOT, c"l2").unwrap();
    assert_eq!(fs::read_link(c.path("l2")).unwrap().as_os_str().as_bytes(), b"/etc/passwd");
    assert_eq!(l2.node, l.node);
    assert_eq!(c.rmdir(ROOT, c"d"), Err(libc::ENOTEMPTY));
    assert_eq!(c.unlink(ROOT, c"d"), Err(libc::EISDIR));
    assert_eq!(c.rmdir(ROOT, c"g"), Err(libc::ENOTDIR));
    for name in [c"l", c"p", c"s", c"f"] {
        c.unlink(d.node, name).unwrap();
    }
    c.rmdir(ROOT, c"d").unwrap();
    assert!(absent(&c.path("d")));
    assert_eq!(c.mkdir(ROOT, c"g", 0o755).err(), Some(libc::EEXIST));
    assert_eq!(c.mknod(ROOT, c"bad", libc::S_IFDIR | 0o755, 0).err(), Some(libc::EINVAL));
    assert_eq!(c.symlink(ROOT, c"e", c"").err(), Some(libc::ENOENT));
}

#[test]
fn device_nodes_keep_their_numbers() {
    if !super::client::is_root() {
        println!("skipped: making device nodes takes root");
        return;
    }
    let mut c = Client::new();
    let dev = 259 << 8 | 7 | (300 & 0xff00) << 12;
    let e = c.mknod(ROOT, c"b", libc::S_IFBLK | 0o600, dev).unwrap();
    assert_eq!(e.attr.rdev, dev);
    let meta = fs::symlink_metadata(c.path("b")).unwrap();
    assert!(meta.file_type().is_block_device());
    assert_eq!(rustix::fs::major(meta.rdev()), 259);
}

#[test]
fn names_move() {
    let mut c = Client::new();
    let (a, b) = (c.mkdir(ROOT, c"a", 0o755).unwrap().node, c.mkdir(ROOT, c"b", 0o755).unwrap().node);
    fs::write(c.path("a/f"), "f").unwrap();
    fs::write(c.path("b/g"), "g").unwrap();
    let (f, g) = (c.walk("a/f").unwrap().node, c.walk("b/g").unwrap().node);
    c.rename((a, c"f"), (b, c"h"), 0).unwrap();
    assert_eq!(c.contents(f).unwrap(), b"f");
    assert_eq!(c.rename((b, c"h"), (b, c"g"), libc::RENAME_NOREPLACE), Err(libc::EEXIST));
    c.rename((b, c"h"), (b, c"g"), libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(fs::read(c.path("b/g")).unwrap(), b"f");
    assert_eq!((c.contents(f).unwrap(), c.contents(g).unwrap()), (b"f".to_vec(), b"g".to_vec()));
    // A directory, with what is in it.
    c.rename((ROOT, c"b"), (a, c"b"), 0).unwrap();
    assert_eq!(c.contents(g).unwrap(), b"g");
    assert_eq!(c.rename((ROOT, c"a"), (b, c"x"), 0), Err(libc::EINVAL));
    assert_eq!(c.rename((b, c"g"), (b, c"h"), 64), Err(libc::EINVAL));
    if super::client::is_root() {
        c.rename((b, c"g"), (b, c"moved"), libc::RENAME_WHITEOUT).unwrap();
        let left = fs::symlink_metadata(c.path("a/b/g")).unwrap();
        assert!(left.file_type().is_char_device() && left.rdev() == 0);
    }
}

#[test]
fn directories_are_listed_once_and_whole() {
    let mut c = Client::new();
    let names: Vec<String> = (0..500).map(|i| format!("file-with-a-name-{i:04}")).collect();
    for n in &names {
        fs::write(c.path(n), n).unwrap();
    }
    for plus in [false, true] {
        let list = c.list(ROOT, plus).unwrap();
        let mut got: Vec<_> = list.iter().map(|e| String::from_utf8(e.name.clone()).unwrap()).collect();
        got.retain(|n| !n.starts_with('.'));
        got.sort();
        assert_eq!(got, names);
        let root = fs::metadata(c.dir.path()).unwrap().ino();
        let parent = list.iter().find(|e| e.name == b"..").unwrap();
        assert_eq!((parent.ino, parent.node), (root, 0), "what is above the root is not told");
        for e in list.iter().filter(|e| e.name[0] != b'.') {
            assert_eq!(e.kind, u32::from(libc::DT_REG));
            assert_eq!(e.node != 0, plus);
        }
        for e in list {
            c.forget(e.node, 1);
        }
        assert_eq!(c.counts().0, 1);
    }
    // From the middle, and back to the start.
    let fh = c.opendir(ROOT).unwrap();
    let first = c.readdir(fh, 0, 4096, false).unwrap();
    let middle = c.readdir(fh, first[3].next, 4096, false).unwrap();
    assert_eq!(middle[0], first[4]);
    assert_eq!(c.readdir(fh, 0, 4096, false).unwrap(), first);
    assert_eq!(c.readdir(fh, 0, 10, false), Err(libc::EINVAL), "not even one fits");
    let _ = c.readdir(fh, u64::MAX, 4096, false);
    assert_eq!(c.readdir(fh + 1, 0, 4096, false), Err(libc::EBADF));
    c.call(op::FSYNCDIR, ROOT, &[&longs(&[fh]), &words(&[0, 0])]).unwrap();
    let f = c.lookup(ROOT, c"file-with-a-name-0000").unwrap().node;
    assert_eq!(c.opendir(f), Err(libc::ENOTDIR));
    assert_eq!(c.open(ROOT, libc::O_RDONLY).err(), Some(libc::EISDIR));
}

#[test]
fn a_listing_sees_what_is_added_after_rewinding() {
    let mut c = Client::new();
    let fh = c.opendir(ROOT).unwrap();
    let empty = c.readdir(fh, 0, 4096, false).unwrap();
    assert_eq!(empty.len(), 2);
    assert!(c.readdir(fh, empty[1].next, 4096, false).unwrap().is_empty());
    fs::write(c.path("new"), "").unwrap();
    assert_eq!(c.readdir(fh, 0, 4096, false).unwrap().len(), 3);
}

#[test]
fn space_is_reserved_found_and_copied() {
    let mut c = Client::new();
    let (e, fh) = c.create(ROOT, c"f", libc::O_RDWR, 0o600).unwrap();
    let falloc = |mode: u32, at: u64, len: u64| [longs(&[fh, at, len]), words(&[mode, 0])].concat();
    c.call(op::FALLOCATE, e.node, &[&falloc(0, 0, 1 << 20)]).unwrap();
    assert_eq!(fs::metadata(c.path("f")).unwrap().len(), 1 << 20);
    assert_eq!(c.call(op::FALLOCATE, e.node, &[&falloc(0x4000, 0, 10)]), Err(libc::EOPNOTSUPP));
    c.write(fh, 2 << 20, b"tail", 0).unwrap();
    let seek = |at: u64, how: i32| [longs(&[fh, at]), words(&[how as u32, 0])].concat();
    let at = |b: Vec<u8>| u64_at(&b, 0);
    assert_eq!(c.call(op::LSEEK, e.node, &[&seek(1 << 20, libc::SEEK_DATA)]).map(at), Ok(2 << 20));
    assert_eq!(c.call(op::LSEEK, e.node, &[&seek(2 << 20, libc::SEEK_HOLE)]).map(at), Ok((2 << 20) + 4));
    assert_eq!(c.call(op::LSEEK, e.node, &[&seek(9 << 20, libc::SEEK_DATA)]), Err(libc::ENXIO));
    assert_eq!(c.call(op::LSEEK, e.node, &[&seek(0, 17)]), Err(libc::EINVAL));
    let (g, to) = c.create(ROOT, c"g", libc::O_RDWR, 0o600).unwrap();
    let body = longs(&[fh, 2 << 20, g.node, to, 3, 100, 0]);
    assert_eq!(c.call(op::COPY_FILE_RANGE, e.node, &[&body]).map(|b| u32_at(&b, 0)), Ok(4));
    assert_eq!(fs::read(c.path("g")).unwrap(), b"\0\0\0tail");
    let wild = longs(&[fh, u64::MAX, g.node, to, u64::MAX, u64::MAX, 0]);
    assert_eq!(c.call(op::COPY_FILE_RANGE, e.node, &[&wild]), Err(libc::EINVAL));
}

#[test]
fn a_file_without_a_name_gets_one() {
    let mut c = Client::new();
    let body = words(&[libc::O_RDWR as u32, libc::S_IFREG | 0o600, 0, 0]);
    let reply = match c.call(op::TMPFILE, ROOT, &[&body, b"#1\0"]) {
        Err(libc::EOPNOTSUPP) => {
            println!("skipped: the temporary directory's file system has no unnamed files");
            return;
        }
        r => r.unwrap(),
    };
    let (node, fh) = (u64_at(&reply, 0), u64_at(&reply, 128));
    c.write(fh, 0, b"data", 0).unwrap();
    assert_eq!(c.getattr(node).unwrap().size, 4);
    assert!(c.names(ROOT).is_empty());
    assert_eq!(c.link(node, ROOT, c"named").unwrap().node, node);
    c.release(fh).unwrap();
    assert_eq!(c.contents(node).unwrap(), b"data");
}

#[test]
fn an_open_file_outlives_its_name() {
    let mut c = Client::new();
    let (e, fh) = c.create(ROOT, c"f", libc::O_RDWR, 0o600).unwrap();
    c.write(fh, 0, b"still here", 0).unwrap();
    c.unlink(ROOT, c"f").unwrap();
    assert_eq!(c.getattr(e.node).unwrap().nlink, 0);
    assert_eq!(
        c.setattr(e.node, Fattr::MODE, Set { mode: 0o644, ..Set::default() }).unwrap().mode & 0o777,
        0o644
    );
    assert_eq!(c.contents(e.node).unwrap(), b"still here");
    // Its number may be used again at once; that is another node.
    let (g, _) = c.create(ROOT, c"g", libc::O_RDWR, 0o600).unwrap();
    assert_ne!(g.node, e.node);
    c.release(fh).unwrap();
    c.forget(e.node, 1);
    assert_eq!(c.getattr(e.node), Err(libc::ESTALE));
}

#[test]
fn extended_attributes_pass() {
    let mut c = Client::new();
    fs::write(c.path("f"), "").unwrap();
    let f = c.lookup(ROOT, c"f").unwrap().node;
    if c.setxattr(f, c"user.a", b"value", 0) == Err(libc::EOPNOTSUPP) {
        println!("skipped: the temporary directory's file system has no extended attributes");
        return;
    }
    assert_eq!(c.getxattr(f, c"user.a", 0).map(|b| u32_at(&b, 0)), Ok(5));
    assert_eq!(c.getxattr(f, c"user.a", 64).unwrap(), b"value");
    assert_eq!(c.getxattr(f, c"user.a", 3), Err(libc::ERANGE));
    assert_eq!(c.getxattr(f, c"user.b", 64), Err(libc::ENODATA));
    assert_eq!(c.setxattr(f, c"user.a", b"x", libc::XATTR_CREATE as u32), Err(libc::EEXIST));
    assert_eq!(c.setxattr(f, c"user.b", b"x", libc::XATTR_REPLACE as u32), Err(libc::ENODATA));
    let list = c.raw(op::LISTXATTR, f, &words(&[100, 0]), 100).unwrap();
    assert!(list.windows(7).any(|w| w == b"user.a\0"));
    let size = c.raw(op::LISTXATTR, f, &words(&[0, 0]), 8).unwrap();
    assert_eq!(u32_at(&size, 0) as usize, list.len());
    c.call(op::REMOVEXATTR, f, &[b"user.a\0"]).unwrap();
    assert_eq!(c.getxattr(f, c"user.a", 64), Err(libc::ENODATA));
    // On a directory, and on a link (which has no user attributes) not on its target.
    c.setxattr(ROOT, c"user.d", b"dir", 0).unwrap();
    assert_eq!(c.getxattr(ROOT, c"user.d", 64).unwrap(), b"dir");
    let l = c.symlink(ROOT, c"l", c"f").unwrap().node;
    assert!(c.setxattr(l, c"user.a", b"x", 0).is_err());
    assert_eq!(c.getxattr(f, c"user.a", 64), Err(libc::ENODATA));
    assert_eq!(c.setxattr(f, c"user.big", &[1; 65536 - 100], 0).err().unwrap_or(libc::ENOSPC), libc::ENOSPC);
    let head = words(&[70_000, 0, 0, 0]);
    assert_eq!(c.call(op::SETXATTR, f, &[&head, b"user.x\0", &[0; 70_000]]), Err(libc::E2BIG));
}

#[test]
fn the_rest_of_the_operations() {
    let mut c = Client::new();
    let statfs = c.call(op::STATFS, ROOT, &[]).unwrap();
    assert_eq!(statfs.len(), 80);
    assert!(u64_at(&statfs, 0) > 0 && u32_at(&statfs, 40) > 0);
    c.call(op::SYNCFS, ROOT, &[&[0; 8]]).unwrap();
    let statx = c.call(op::STATX, ROOT, &[&[0; 24]]).unwrap();
    assert_eq!(statx.len(), 288);
    assert_eq!(u64_at(&statx, 64), fs::metadata(c.dir.path()).unwrap().ino());
    c.call(op::ACCESS, ROOT, &[&words(&[7, 0])]).unwrap();
    (c.uid, c.gid) = (12345, 12345);
    fs::set_permissions(c.dir.path(), fs::Permissions::from_mode(0o701)).unwrap();
    c.call(op::ACCESS, ROOT, &[&words(&[1, 0])]).unwrap();
    assert_eq!(c.call(op::ACCESS, ROOT, &[&words(&[4, 0])]), Err(libc::EACCES));
    for unserved in [31, 32, 33, 37, 40, 48, 49, 63, 4096, u32::MAX] {
        assert_eq!(c.call(unserved, ROOT, &[&[0; 64]]), Err(libc::ENOSYS), "operation {unserved}");
    }
    c.call(op::INTERRUPT, 0, &[&longs(&[1])]).unwrap();
}

#[test]
fn the_exit_status_is_reported_once() {
    let mut c = Client::new();
    let ioctl = |cmd: u32, arg: u64| [longs(&[0]), words(&[0, cmd]), longs(&[arg]), words(&[0, 0])].concat();
    assert_eq!(c.call(op::IOCTL, ROOT, &[&ioctl(0x5401, 0)]), Err(libc::ENOTTY));
    // Offered everything, it does not agree to id-mapped mounts, with which users are not told.
    let all = [7, 41, 1 << 17, u32::MAX, u32::MAX];
    let agreed = c.call(op::INIT, 0, &[&words(&all), &[0; 44]]).unwrap();
    assert_eq!(u32_at(&agreed, 32) & 1 << 8, 0);
    c.uid = 1000;
    assert_eq!(c.call(op::IOCTL, ROOT, &[&ioctl(0x7602, 1)]), Err(libc::EPERM));
    assert_eq!(c.call(op::IOCTL, ROOT, &[&ioctl(0x5401, 0)]), Err(libc::ENOTTY));
    assert_eq!(c.exit.get(), None);
    c.uid = 0;
    assert_eq!(c.call(op::IOCTL, ROOT, &[&ioctl(0x7602, 37)]).unwrap(), [0; 16]);
    c.call(op::IOCTL, ROOT, &[&ioctl(0x7602, 5)]).unwrap();
    assert_eq!(c.exit.get(), Some(37));
}

#[test]
fn names_need_not_be_text() {
    let mut c = Client::new();
    let name = c"\xff\xfe na\xefve\n";
    let (e, fh) = c.create(ROOT, name, libc::O_RDWR, 0o600).unwrap();
    c.write(fh, 0, b"x", 0).unwrap();
    assert_eq!(c.lookup(ROOT, name).unwrap().node, e.node);
    assert!(c.list(ROOT, true).unwrap().iter().any(|d| d.name == name.to_bytes()));
    let on_host = std::ffi::OsStr::from_bytes(name.to_bytes());
    assert_eq!(fs::read(c.dir.path().join(on_host)).unwrap(), b"x");
}

#[test]
fn the_page_cache_is_kept_while_nothing_changed() {
    let mut c = Client::new();
    fs::write(c.path("f"), "one").unwrap();
    let f = c.lookup(ROOT, c"f").unwrap().node;
    let flags = |c: &mut Client| c.open(f, libc::O_RDONLY).unwrap().1 & (FOPEN_KEEP_CACHE | FOPEN_DIRECT_IO);
    assert_eq!(flags(&mut c), 0);
    assert_eq!(flags(&mut c), FOPEN_KEEP_CACHE);
    fs::write(c.path("f"), "three").unwrap();
    assert_eq!(flags(&mut c), 0);
    let mut c = Client::with(uncached);
    fs::write(c.path("f"), "one").unwrap();
    let f = c.lookup(ROOT, c"f").unwrap();
    assert_eq!((c.open(f.node, libc::O_RDONLY).unwrap().1 & 3, f.entry_valid), (FOPEN_DIRECT_IO, 0));
    let mut c = Client::with(|s| s.cache = CachePolicy { data: DataCache::Always, ..CachePolicy::AUTO });
    fs::write(c.path("f"), "one").unwrap();
    let f = c.lookup(ROOT, c"f").unwrap().node;
    assert_eq!(c.open(f, libc::O_RDONLY).unwrap().1 & 3, FOPEN_KEEP_CACHE);
}

#[test]
fn a_reply_that_does_not_fit_is_an_error() {
    let mut c = Client::new();
    assert_eq!(c.raw(op::GETATTR, ROOT, &[0; 16], 50), Err(libc::EIO));
    assert_eq!(c.raw(op::STATFS, ROOT, &[], 0), Err(libc::EIO));
}

#[test]
fn write_back_is_for_those_who_ask_for_it_and_can_write() {
    let agreed = |cache, read_only| {
        let mut c = Client::with(|s| (s.cache, s.read_only) = (cache, read_only));
        u32_at(&c.init().unwrap(), 12) & 1 << 16 != 0
    };
    assert!(agreed(CachePolicy::WRITE_BACK, false));
    assert!(!agreed(CachePolicy::WRITE_BACK, true));
    assert!(!agreed(CachePolicy::ALWAYS, false) && !agreed(CachePolicy::AUTO, false));

    let mut c = Client::with(|s| s.cache = CachePolicy::WRITE_BACK);
    fs::write(c.path("f"), "0123456789").unwrap();
    let f = c.lookup(ROOT, c"f").unwrap().node;
    // The guest's kernel reads the rest of a page through it, and places what is appended.
    let (fh, _) = c.open(f, libc::O_WRONLY | libc::O_APPEND).unwrap();
    assert_eq!(c.read(fh, 2, 3).unwrap(), b"234");
    assert_eq!(c.write(fh, 4, b"xy", 0), Ok(2));
    assert_eq!(fs::read(c.path("f")).unwrap(), b"0123xy6789");
    let (_, fh) = c.create(ROOT, c"new", libc::O_WRONLY, 0o200).unwrap();
    assert_eq!((c.write(fh, 0, b"ab", 0), c.read(fh, 0, 9)), (Ok(2), Ok(b"ab".to_vec())));
    // A guest that cannot write back appends as ever.
    c.init_without(1 << 16).unwrap();
    let f = c.lookup(ROOT, c"f").unwrap().node;
    let (fh, _) = c.open(f, libc::O_WRONLY | libc::O_APPEND).unwrap();
    assert_eq!((c.read(fh, 0, 1).err(), c.write(fh, 0, b"z", 0)), (Some(libc::EBADF), Ok(1)));
    assert_eq!(fs::read(c.path("f")).unwrap(), b"0123xy6789z");
}
