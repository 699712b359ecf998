//! Shares in which the host's kernel can be reached.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use super::client::{Client, ROOT, Set, uncached};
use crate::fs::abi::Fattr;

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
            assert_eq!(c.create(e.node, below, libc::O_RDWR, 0o600).err(), Some(libc::ENOTDIR));
            assert_eq!(c.unlink(e.node, below), Err(libc::ENOTDIR));
            assert_eq!(c.rename((e.node, below), (ROOT, c"x"), 0), Err(libc::ENOTDIR));
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
