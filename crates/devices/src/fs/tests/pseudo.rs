//! Shares in which the host's kernel can be reached.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use super::client::{Client, ROOT, Set, uncached, words};
use crate::fs::abi::{Fattr, op};

fn share_of(path: &str) -> Client {
    Client::with(|spec| {
        uncached(spec);
        spec.source = Some(path.into());
    })
}

#[test]
fn the_memory_of_this_process_is_out_of_reach() {
    let mut c = share_of("/proc");
    // The guest learns which process serves it.
    let me = c.lookup(ROOT, c"self").unwrap();
    let pid = String::from_utf8(c.readlink(me.node).unwrap()).unwrap();
    assert_eq!(pid, std::process::id().to_string());
    let dir = c.lookup(ROOT, &CString::new(pid).unwrap()).unwrap().node;
    assert!(c.names(dir).iter().any(|name| name == "mem"));
    for name in [c"mem", c"maps", c"environ", c"status"] {
        let e = c.lookup(dir, name).unwrap();
        assert_eq!(e.attr.mode & libc::S_IFMT, libc::S_IFREG);
        assert!(c.getattr(e.node).is_ok());
        let refused = Some(libc::EACCES);
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
            assert_eq!(c.open(e.node, flags).err(), refused, "{name:?}");
            assert_eq!(c.create(dir, name, flags, 0o600).err(), refused);
        }
        assert_eq!(c.setattr(e.node, Fattr::SIZE, Set::default()).err(), refused);
        assert_eq!(c.setattr(e.node, Fattr::MODE, Set { mode: 0o666, ..Set::default() }).err(), refused);
    }
}

#[test]
fn reading_without_open_is_refused_as_well() {
    let mut c = Client::with(|spec| (spec.source, spec.read_only) = (Some("/proc".into()), true));
    let status = c.walk(&format!("{}/status", std::process::id())).unwrap().node;
    assert_eq!(c.read_node(status, 0, 0, 100), Err(libc::EACCES));
    if Path::new("/proc/kmsg").exists() {
        let kmsg = c.walk("kmsg").unwrap().node;
        assert_eq!(
            c.read_node(kmsg, 0, 0, 100),
            Err(libc::EACCES),
            "without waiting for the kernel to speak"
        );
    }
}

#[test]
fn magic_links_lead_nowhere() {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    let (file, open_dir) = (fs::File::open(&secret).unwrap(), fs::File::open(outside.path()).unwrap());
    let mut c = share_of("/proc");
    let me = std::process::id();
    let links =
        ["exe".into(), "root".into(), "cwd".into()].into_iter().chain([&file, &open_dir].map(descriptor));
    for name in links {
        let name: String = name;
        let e = c.walk(&format!("{me}/{name}")).unwrap();
        assert_eq!(e.attr.mode & libc::S_IFMT, libc::S_IFLNK, "{name}");
        let target = fs::read_link(format!("/proc/{me}/{name}")).unwrap();
        assert_eq!(c.readlink(e.node).unwrap(), target.as_os_str().as_encoded_bytes());
        assert_eq!(c.open(e.node, libc::O_RDONLY).err(), Some(libc::ENXIO));
        assert_eq!(c.opendir(e.node).err(), Some(libc::ENOTDIR));
        for below in [c"etc", c"secret", c"fs"] {
            assert_eq!(c.lookup(e.node, below).err(), Some(libc::ENOTDIR));
            assert_eq!(c.create(e.node, below, libc::O_RDWR, 0o600).err(), Some(libc::EACCES));
            assert_eq!(c.unlink(e.node, below), Err(libc::EACCES));
            assert_eq!(c.rename((e.node, below), (ROOT, c"x"), 0), Err(libc::EACCES));
        }
        let set = Set { mode: 0o777, ..Set::default() };
        assert_eq!(c.setattr(e.node, Fattr::MODE, set).err(), Some(libc::EACCES));
        assert!(c.link(e.node, ROOT, c"x").is_err());
    }
    assert_eq!(fs::metadata(&secret).unwrap().permissions().mode() & 0o7777, 0o644);
    assert_eq!(fs::read_to_string(secret).unwrap(), "secret");
}

fn descriptor(file: &fs::File) -> String {
    format!("fd/{}", file.as_raw_fd())
}

#[test]
fn attributes_of_a_link_are_not_those_of_its_target() {
    let outside = tempfile::NamedTempFile::new().unwrap();
    let before = outside.as_file().metadata().unwrap();
    let mut c = Client::new();
    symlink(outside.path(), c.path("l")).unwrap();
    let l = c.lookup(ROOT, c"l").unwrap().node;
    let _ = c.setattr(l, Fattr::MODE, Set { mode: 0o777, ..Set::default() });
    c.setattr(l, Fattr::MTIME, Set { mtime: 77, ..Set::default() }).unwrap();
    assert_eq!(c.getattr(l).unwrap().mtime, 77);
    let after = outside.as_file().metadata().unwrap();
    assert_eq!(after.permissions(), before.permissions());
    assert_eq!(after.modified().unwrap(), before.modified().unwrap());
}

#[test]
fn what_commands_the_kernel_can_be_read() {
    let file = "/sys/kernel/rcu_expedited";
    let Ok(content) = fs::read(file) else {
        println!("skipped: there is no {file} here");
        return;
    };
    let mut c = share_of("/sys/kernel");
    let f = c.walk("rcu_expedited").unwrap().node;
    assert_eq!(c.contents(f).unwrap(), content);
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(c.open(f, flags).err(), Some(libc::EACCES));
    }
    assert_eq!(c.setattr(f, Fattr::MODE, Set { mode: 0o600, ..Set::default() }).err(), Some(libc::EACCES));
}

/// Mounts of procfs, sysfs and both kinds of control groups.
fn kernels_own() -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let (mut kinds, mut found) = (Vec::new(), Vec::new());
    for line in mounts.lines() {
        let [_, at, kind, ..] = line.split(' ').collect::<Vec<_>>()[..] else { continue };
        // Another may be mounted over it, and an escaped path is not worth the trouble.
        let magic = rustix::fs::statfs(at).map_or(0, |s| s.f_type as u32);
        let is_one = matches!(magic, 0x9fa0 | 0x6265_6572 | 0x0027_e0eb | 0x6367_7270);
        if is_one && ["proc", "sysfs", "cgroup", "cgroup2"].contains(&kind) && !kinds.contains(&kind) {
            kinds.push(kind);
            found.push(at.to_owned());
        }
    }
    println!("tried with {kinds:?}");
    found
}

/// None of the names is there, so nothing happens to the host should one be let through, but for what is made.
#[test]
fn names_and_attributes_of_the_kernels_own_stay() {
    let refused = Some(libc::EACCES);
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("f"), "").unwrap();
    let plain = outside.path().canonicalize().unwrap();
    for at in kernels_own() {
        let mut c = share_of(&at);
        let file = c.list(ROOT, false).unwrap().into_iter().find(|e| e.kind == 8 || e.kind == 10);
        let file = file.map_or(ROOT, |e| c.lookup(ROOT, &CString::new(e.name).unwrap()).unwrap().node);
        let new = c"krun-test";
        assert_eq!(c.mkdir(ROOT, new, 0o755).err(), refused, "{at}");
        assert_eq!(c.mknod(ROOT, new, libc::S_IFREG | 0o600, 0).err(), refused, "{at}");
        assert_eq!(c.symlink(ROOT, new, c"target").err(), refused, "{at}");
        assert_eq!(c.link(file, ROOT, new).err(), refused, "{at}");
        assert_eq!(c.create(ROOT, new, libc::O_RDWR, 0o600).err(), refused, "{at}");
        let tmpfile = words(&[libc::O_RDWR as u32, 0o600, 0, 0]);
        assert_eq!(c.call(op::TMPFILE, ROOT, &[&tmpfile, b"#1\0"]).err(), refused, "{at}");
        assert_eq!(c.unlink(ROOT, new).err(), refused, "{at}");
        assert_eq!(c.rmdir(ROOT, new).err(), refused, "{at}");
        for flags in [0, libc::RENAME_EXCHANGE] {
            assert_eq!(c.rename((ROOT, new), (ROOT, c"krun-other"), flags).err(), refused, "{at}");
        }
        for node in [ROOT, file] {
            assert_eq!(c.setxattr(node, c"user.krun", b"1", 0).err(), refused, "{at}");
            assert_eq!(c.call(op::REMOVEXATTR, node, &[b"user.krun\0"]).err(), refused, "{at}");
        }
        assert!(fs::symlink_metadata(Path::new(&at).join("krun-test")).is_err());
        // Between it and a file system of another kind in the same share.
        let mut c = share_of("/");
        let (there, here) =
            (c.walk(&at[1..]).unwrap().node, c.walk(&plain.to_str().unwrap()[1..]).unwrap().node);
        assert_eq!(c.rename((here, c"f"), (there, new), 0).err(), refused, "{at}");
        assert_eq!(c.rename((there, new), (here, c"g"), 0).err(), refused, "{at}");
        c.rename((here, c"f"), (here, c"g"), 0).unwrap();
        c.rename((here, c"g"), (here, c"f"), 0).unwrap();
    }
}
