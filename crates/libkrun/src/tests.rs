//! Bad arguments, in every call.

use std::ffi::{CString, c_char};
use std::ptr::null;

use crate::console::*;
use crate::context::*;
use crate::disks::*;
use crate::files::*;
use crate::later::*;
use crate::log::*;
use crate::machine::*;
use crate::net::*;
use crate::start::*;
use crate::vhost_user::*;
use crate::vsock::*;
use crate::workload::*;

mod header;

const NOWHERE: u32 = 0x7fff_0000;

fn context() -> u32 {
    u32::try_from(krun_create_ctx()).unwrap()
}

fn c(text: &str) -> CString {
    CString::new(text).unwrap()
}

#[test]
fn values_out_of_range_are_refused() {
    let ctx = context();
    assert_eq!(krun_set_vm_config(ctx, 0, 128), -libc::EINVAL);
    assert_eq!(krun_set_vm_config(ctx, 1, 0), -libc::EINVAL);
    assert_eq!(krun_set_log_level(6), -libc::EINVAL);
    assert_eq!(krun_init_log(9999, 1, 0, 0), -libc::EINVAL);
    assert_eq!(krun_add_virtio_console_default(ctx, 9999, -1, -1), -libc::EINVAL);
    let (long, path) = (c(&"x".repeat(37)), c("/tmp"));
    // SAFETY: the strings live to the end of the test.
    unsafe {
        assert_eq!(krun_add_virtiofs(ctx, long.as_ptr(), path.as_ptr()), -libc::EINVAL);
        assert_eq!(krun_set_kernel(ctx, path.as_ptr(), 6, null(), null()), -libc::EINVAL);
        assert_eq!(krun_set_kernel_console(ctx, c("a b").as_ptr()), -libc::EINVAL);
    }
    assert_eq!(krun_free_ctx(ctx), 0);
}

#[test]
fn there_is_one_root_and_overlays_need_their_parents() {
    let ctx = context();
    let dir = std::env::temp_dir().join(format!("libkrun-test-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("file"), "x").unwrap();
    let (path, tag) = (c(dir.to_str().unwrap()), c(krun_api::ROOT_TAG));
    // SAFETY: the strings live to the end of the block.
    unsafe {
        assert_eq!(krun_set_root(ctx, path.as_ptr()), 0);
        assert_eq!(krun_set_root(ctx, path.as_ptr()), -libc::EEXIST);
        assert_eq!(krun_add_virtiofs(ctx, tag.as_ptr(), path.as_ptr()), -libc::EEXIST);
        let overlay = |name: &str| {
            krun_fs_add_overlay_file(ctx, tag.as_ptr(), c(name).as_ptr(), null(), 0, 0o644, false)
        };
        assert_eq!(overlay("missing/x"), -libc::ENOENT);
        assert_eq!(overlay("file/x"), -libc::ENOTDIR);
        assert_eq!(overlay("../x"), -libc::EINVAL);
        assert_eq!(krun_fs_add_overlay_dir(ctx, tag.as_ptr(), c("virtual").as_ptr(), 0o755), 0);
        assert_eq!(overlay("virtual/x"), 0);
        assert_eq!(overlay("virtual/x"), -libc::EEXIST);
        let unknown = c("no-such-tag");
        assert_eq!(krun_fs_add_overlay_dir(ctx, unknown.as_ptr(), c("d").as_ptr(), 0), -libc::ENOENT);
    }
    std::fs::remove_dir_all(&dir).unwrap();
    assert_eq!(krun_free_ctx(ctx), 0);
}

#[test]
fn the_root_may_be_set_after_what_is_put_into_it() {
    let (tag, path, device) = (c(krun_api::ROOT_TAG), c("/tmp"), c("/dev/vda"));
    let (directory, file) = (c("virtual"), c("virtual/file"));
    let (tag, path) = (tag.as_ptr(), path.as_ptr());
    let set_root = |ctx, way| {
        // SAFETY: the strings live to the end of the test.
        unsafe {
            match way {
                0 => krun_set_root(ctx, path),
                1 => krun_add_virtiofs3(ctx, tag, path, 0, true),
                2 => krun_set_root_disk_remount(ctx, device.as_ptr(), null(), null()),
                _ => krun_set_root_disk(ctx, path),
            }
        }
    };
    for way in 0..4 {
        let ctx = context();
        // SAFETY: as above.
        unsafe {
            assert_eq!(krun_fs_add_overlay_dir(ctx, tag, directory.as_ptr(), 0o755), 0);
            assert_eq!(krun_fs_add_overlay_file(ctx, tag, file.as_ptr(), null(), 0, 0o644, false), 0);
        }
        assert_eq!(set_root(ctx, way), 0, "{way}");
        let (again, disk) = (set_root(ctx, 0), set_root(ctx, 2));
        // The older root disk gives way to a root directory.
        assert_eq!(again, if way == 3 { 0 } else { -libc::EEXIST }, "{way}");
        assert_eq!(disk, -libc::EEXIST, "{way}");
        let mut context = remove(ctx).unwrap();
        let (_, root_disk) = context.disks.take(context.has_root());
        assert_eq!(root_disk.is_some(), way == 2, "{way}");
        let [share] = &context.shares[..] else { panic!("{way}: {:?}", context.shares) };
        let seen = (share.overlays.len(), share.source.is_some(), share.read_only);
        assert_eq!(seen, (2, way != 2, way == 1), "{way}");
    }
    // Without a root directory the older disk is the root, whatever was put beside it.
    let ctx = context();
    // SAFETY: as above.
    assert_eq!(unsafe { krun_fs_add_overlay_dir(ctx, tag, directory.as_ptr(), 0o755) }, 0);
    assert_eq!(set_root(ctx, 3), 0);
    let mut context = remove(ctx).unwrap();
    assert!(context.disks.take(context.has_root()).1.is_some());
}

#[test]
fn windows_fit_into_a_guest() {
    const G: u64 = 1 << 30;
    let windows = |memory_mib: u32, sizes: &[u64]| {
        let ctx = context();
        let path = c("/tmp");
        for (n, size) in sizes.iter().enumerate() {
            // SAFETY: the strings live to the end of the call.
            let done = unsafe { krun_add_virtiofs2(ctx, c(&format!("t{n}")).as_ptr(), path.as_ptr(), *size) };
            assert_eq!(done, 0);
        }
        let mut context = remove(ctx).unwrap();
        fit_windows(&mut context.shares, memory_mib);
        context.shares.iter().map(|s| s.dax.map_or(0, |dax| dax.window)).collect::<Vec<_>>()
    };
    assert_eq!(windows(4096, &[16 * G, 0, 1]), [16 * G, 0, 2 << 20]);
    assert_eq!(windows(8192, &[20 * G, u64::MAX, G]), [16 * G, 16 * G, 0]);
    assert_eq!(windows(256, &[G, 16 * G, G]), [G, G, 0]);
    assert_eq!(windows(0, &[G]), [0]);
    assert_eq!(windows(u32::MAX, &[G]), [G]);
}

#[test]
fn disks_are_told_apart_and_there_is_one_root() {
    let ctx = context();
    let (id, other, path) = (c("a"), c("b"), c("/tmp/disk"));
    let (id, other, path) = (id.as_ptr(), other.as_ptr(), path.as_ptr());
    let (device, auto) = (c("/dev/vda"), c("auto"));
    // Paths as ids: told apart though the serial numbers that the guest sees are the same.
    let [long, longer] = ["/var/lib/some/long/path/a", "/var/lib/some/long/path/b"].map(c);
    // SAFETY: the strings live to the end of the test.
    unsafe {
        assert_eq!(krun_add_disk(ctx, id, path, true), 0);
        assert_eq!(krun_add_disk(ctx, id, path, true), -libc::EEXIST);
        assert_eq!(krun_add_disk2(ctx, other, path, 3, false), -libc::EINVAL);
        assert_eq!(krun_add_disk3(ctx, other, path, 0, false, false, 3), -libc::EINVAL);
        assert_eq!(krun_add_disk(ctx, long.as_ptr(), path, true), 0);
        assert_eq!(krun_add_disk(ctx, longer.as_ptr(), path, true), 0);
        assert_eq!(krun_add_disk(ctx, long.as_ptr(), path, true), -libc::EEXIST);
        assert_eq!(krun_add_disk3(ctx, other, path, 0x101, false, true, 2), 0);
        assert_eq!(krun_set_root_disk(ctx, path), -libc::EINVAL);
        assert_eq!(krun_set_root_disk_remount(ctx, device.as_ptr(), auto.as_ptr(), null()), 0);
        assert_eq!(krun_set_root_disk_remount(ctx, device.as_ptr(), null(), null()), -libc::EEXIST);
        assert_eq!(krun_set_root(ctx, path), -libc::EEXIST);
        assert_eq!(krun_free_ctx(ctx), 0);
        let ctx = context();
        assert_eq!(krun_set_data_disk(ctx, path), 0);
        assert_eq!(krun_set_root_disk(ctx, path), 0);
        assert_eq!(krun_add_disk(ctx, id, path, true), -libc::EINVAL);
        let mut context = remove(ctx).unwrap();
        let (disks, root) = context.disks.take(false);
        let ids: Vec<_> = disks.iter().map(|d| d.id.as_str()).collect();
        assert_eq!((ids, root.unwrap().device.as_str()), (vec!["root", "data"], "/dev/vda"));
    }
}

#[test]
fn networks_are_checked_and_flags_can_be_probed() {
    let ctx = context();
    let (mac, group) = ([2u8, 0, 0, 0, 0, 1], [1u8, 0, 0, 0, 0, 1]);
    let (mac, path) = (mac.as_ptr(), c("/run/peer"));
    let path = path.as_ptr();
    let stream = |path, fd, mac, features, flags| {
        // SAFETY: the pointers are NULL or values that live to the end of the test.
        unsafe { krun_add_net_unixstream(ctx, path, fd, mac, features, flags) }
    };
    let datagram = |path, fd, features, flags| {
        // SAFETY: as above.
        unsafe { krun_add_net_unixgram(ctx, path, fd, mac, features, flags) }
    };
    // SAFETY: as above.
    let tap = |name, features, flags| unsafe { krun_add_net_tap(ctx, name, mac, features, flags) };
    let refused = [
        stream(null(), 3, mac, 0, 1 << 31),
        stream(null(), 3, mac, 0, 1),
        stream(null(), 3, mac, 1 << 2, 0),
        stream(null(), 3, null(), 0, 0),
        stream(null(), 3, group.as_ptr(), 0, 0),
        stream(path, 3, mac, 0, 0),
        stream(null(), -1, mac, 0, 0),
        datagram(path, -1, 0, 4),
        tap(null(), 0, 0),
        tap(path, 0, 1),
    ];
    assert!(refused.iter().all(|a| *a == -libc::EINVAL), "{refused:?}");
    assert_eq!(stream(path, -1, mac, 0x4c83, 2), 0);
    assert_eq!(datagram(path, -1, 0, 3), 0);
    assert_eq!(tap(path, 0x5d83, 0), 0);
    // One way or the other.
    assert_eq!(krun_set_passt_fd(ctx, 3), -libc::EINVAL);
    let nets = remove(ctx).unwrap().nets.take().unwrap();
    assert_eq!(nets.iter().map(|n| n.dhcp).collect::<Vec<_>>(), [true, true, false]);
    let ctx = context();
    assert_eq!(krun_set_passt_fd(ctx, -1), -libc::EINVAL);
    // SAFETY: the string and the address live to the end of the test.
    unsafe {
        assert_eq!(krun_set_gvproxy_path(ctx, path), 0);
        assert_eq!(krun_set_net_mac(ctx, mac), 0);
        assert_eq!(krun_add_net_tap(ctx, path, mac, 0, 0), -libc::EINVAL);
    }
    let nets = remove(ctx).unwrap().nets.take().unwrap();
    assert!(matches!(&nets[0].peer, krun_api::NetPeer::Datagram { vfkit: true, .. }));
    assert_eq!((nets.len(), nets[0].mac), (1, [2, 0, 0, 0, 0, 1]));
}

#[test]
fn there_is_one_socket_device_and_its_paths_are_free() {
    let ctx = context();
    let dir = std::env::temp_dir().join(format!("libkrun-vsock-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = |name: &str| c(dir.join(name).to_str().unwrap());
    std::fs::write(dir.join("file"), "x").unwrap();
    let _alive = std::os::unix::net::UnixListener::bind(dir.join("alive")).unwrap();
    drop(std::os::unix::net::UnixListener::bind(dir.join("stale")).unwrap());
    // SAFETY: the strings live to the end of each call.
    let add =
        |port, name: &str, listen| unsafe { krun_add_vsock_port2(ctx, port, path(name).as_ptr(), listen) };
    for (name, answer) in [("file", -libc::EEXIST), ("alive", -libc::EEXIST), ("stale", 0)] {
        assert_eq!(add(1, name, true), answer, "{name}");
    }
    assert_eq!(add(1, "other", true), -libc::EEXIST);
    assert_eq!((add(1, "file", false), add(1, "file", false)), (0, -libc::EEXIST));
    assert_eq!((add(u32::MAX, "x", false), add(2, &"x".repeat(108), true)), (-libc::EINVAL, -libc::EINVAL));
    assert_eq!(krun_add_vsock(ctx, 0), -libc::EEXIST);
    assert_eq!(krun_disable_implicit_vsock(ctx), 0);
    assert_eq!(add(3, "x", false), -libc::ENODEV);
    assert_eq!((krun_add_vsock(ctx, 1), krun_add_vsock(ctx, 4)), (-libc::ENOTSUP, -libc::EINVAL));
    assert_eq!((krun_add_vsock(ctx, 0), krun_add_vsock(ctx, 0)), (0, -libc::EEXIST));
    assert_eq!(add(3, "x", false), 0);
    assert_eq!(remove(ctx).unwrap().vsock.take().unwrap().ports.len(), 3);
    std::fs::remove_dir_all(&dir).unwrap();
    let device = |prepare: fn(u32)| {
        let ctx = context();
        prepare(ctx);
        remove(ctx).unwrap().vsock.take().is_some()
    };
    let port = |ctx| {
        // SAFETY: the string lives to the end of the call.
        assert_eq!(unsafe { krun_add_vsock_port(ctx, 1, c("/x").as_ptr()) }, 0);
    };
    assert!(!device(|_| {}));
    assert!(device(port));
    assert!(!device(|ctx| assert_eq!(krun_disable_implicit_vsock(ctx), 0)));
}

#[test]
fn a_port_map_of_nothing_is_accepted() {
    let ctx = context();
    // SAFETY: NULL is allowed.
    assert_eq!(unsafe { krun_set_port_map(ctx, null()) }, 0);
    assert_eq!(krun_free_ctx(ctx), 0);
}

#[test]
fn the_shutdown_descriptor_is_made_once() {
    let ctx = context();
    let fd = krun_get_shutdown_eventfd(ctx);
    assert!(fd >= 0);
    assert_eq!(krun_get_shutdown_eventfd(ctx), fd);
    assert_eq!(krun_free_ctx(ctx), 0);
}
