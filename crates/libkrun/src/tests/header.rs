//! Every function of the header: what it says to an unknown context, and to NULL in place of each pointer.

use std::collections::{BTreeMap, BTreeSet};
use std::ptr::null_mut;

use super::*;
use crate::input::*;

const HEADER: &str = include_str!("../../../../include/libkrun.h");

/// The functions that the header declares, with their parameters as they are written there.
fn declared() -> BTreeMap<&'static str, Vec<&'static str>> {
    let declaration = |text: &'static str| {
        let text = text.strip_prefix("int32_t ").or_else(|| text.strip_prefix("int "))?;
        let (name, parameters) = text.split_once(");")?.0.split_once('(')?;
        Some((name, parameters.split(',').map(str::trim).collect()))
    };
    HEADER.match_indices('\n').filter_map(|(at, _)| declaration(&HEADER[at + 1..])).collect()
}

/// The functions that take a context.
fn with_a_context() -> BTreeSet<&'static str> {
    declared().into_iter().filter(|(_, p)| p[0] == "uint32_t ctx_id").map(|(name, _)| name).collect()
}

/// Each pointer of each function, as `function parameter`.
fn pointers() -> BTreeSet<String> {
    let is_pointer = |p: &&&str| p.contains(['*', '[']);
    let name = |p: &&str| p.trim_end_matches("[]").rsplit(['*', ' ']).next().unwrap_or_default().to_owned();
    declared()
        .into_iter()
        .flat_map(|(f, list)| {
            list.iter().filter(is_pointer).map(|p| format!("{f} {}", name(p))).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn the_header_is_read_whole() {
    let all = declared();
    let starts = |line: &&str| line.starts_with("int32_t krun_") || line.starts_with("int krun_");
    assert_eq!(all.len(), HEADER.lines().filter(starts).count());
    assert_eq!(all["krun_set_root"], ["uint32_t ctx_id", "const char *root_path"]);
    assert!(pointers().contains("krun_set_exec argv") && pointers().contains("krun_add_net_tap mac"));
}

/// Calls with their names.
macro_rules! called {
    ($($name:ident($($argument:expr),*);)*) => { [$((stringify!($name), $name($($argument),*))),*] };
}

#[test]
fn an_unknown_context_is_told() {
    let s = c("/tmp");
    let (p, mac) = (s.as_ptr(), [2u8, 0, 0, 0, 0, 1]);
    let mac = mac.as_ptr();
    let (list, x) = (null(), NOWHERE);
    // SAFETY: every pointer is NULL or a value that lives to the end of the test.
    let answers = unsafe {
        called! {
            krun_free_ctx(x);
            krun_set_vm_config(x, 1, 128);
            krun_set_kernel(x, p, 0, null(), null());
            krun_set_kernel_console(x, p);
            krun_split_irqchip(x, true);
            krun_set_smbios_oem_strings(x, list);
            krun_set_nested_virt(x, true);
            krun_set_root(x, p);
            krun_add_virtiofs(x, p, p);
            krun_add_virtiofs2(x, p, p, 0);
            krun_add_virtiofs3(x, p, p, 0, true);
            krun_add_virtiofs4(x, p, p, 0, true, 0);
            krun_fs_add_overlay_file(x, p, p, null(), 0, 0, false);
            krun_fs_add_overlay_dir(x, p, p, 0);
            krun_set_exec(x, p, list, list);
            krun_set_env(x, list);
            krun_set_workdir(x, p);
            krun_set_rlimits(x, list);
            krun_disable_implicit_init(x);
            krun_setuid(x, 0);
            krun_setgid(x, 0);
            krun_set_console_output(x, p);
            krun_disable_implicit_console(x);
            krun_add_virtio_console_default(x, -1, -1, -1);
            krun_add_serial_console_default(x, -1, -1);
            krun_add_virtio_console_multiport(x);
            krun_add_console_port_tty(x, 0, p, 0);
            krun_add_console_port_inout(x, 0, p, -1, -1);
            krun_add_input_device(x, null(), 0, null(), 0);
            krun_add_input_device_fd(x, 0);
            krun_add_disk(x, p, p, true);
            krun_add_disk2(x, p, p, 0, true);
            krun_add_disk3(x, p, p, 0, true, false, 0);
            krun_set_root_disk_remount(x, p, null(), null());
            krun_set_root_disk(x, p);
            krun_set_data_disk(x, p);
            krun_add_net_unixstream(x, p, -1, mac, 0, 0);
            krun_add_net_unixgram(x, p, -1, mac, 0, 0);
            krun_add_net_tap(x, p, mac, 0, 0);
            krun_set_passt_fd(x, 0);
            krun_set_gvproxy_path(x, p);
            krun_set_net_mac(x, mac);
            krun_add_vsock_port(x, 1, p);
            krun_add_vsock_port2(x, 1, p, true);
            krun_add_vsock(x, 0);
            krun_disable_implicit_vsock(x);
            krun_get_shutdown_eventfd(x);
            krun_start_enter(x);
            krun_set_port_map(x, list);
            krun_set_gpu_options(x, 0);
            krun_set_gpu_options2(x, 0, 0);
            krun_set_gpu_render_server_fd(x, 0);
            krun_add_display(x, 640, 480);
            krun_display_set_edid(x, 0, mac, 6);
            krun_display_set_dpi(x, 0, 96);
            krun_display_set_physical_size(x, 0, 100, 100);
            krun_display_set_refresh_rate(x, 0, 60);
            krun_set_display_backend(x, mac.cast(), 6);
            krun_set_snd_device(x, true);
            krun_add_vhost_user_device(x, 1, p, p, 0, null());
            krun_set_firmware(x, p);
            krun_set_tee_config_file(x, p);
        }
    };
    for (name, answer) in answers {
        assert_eq!(answer, -libc::ENOENT, "{name}");
    }
    // It has one answer to everything.
    assert_eq!(krun_set_mapped_volumes(x, list), -libc::EINVAL);
    let called = answers.iter().map(|(name, _)| *name).chain(["krun_set_mapped_volumes"]);
    assert_eq!(called.collect::<BTreeSet<_>>(), with_a_context());
}

/// Calls with NULL for one of the pointers, each named by `function parameter`.
macro_rules! with_null {
    ($($name:ident[$parameter:ident]($($argument:expr),*);)*) => {
        [$((concat!(stringify!($name), " ", stringify!($parameter)), $name($($argument),*))),*]
    };
}

/// Fails unless each pointer of the header was given as NULL once.
fn all_pointers<'a>(seen: impl Iterator<Item = &'a str>) {
    let (mut names, mut count) = (BTreeSet::new(), 0);
    seen.for_each(|name| {
        count += 1;
        names.insert(name.to_owned());
    });
    assert_eq!(names, pointers());
    assert_eq!(names.len(), count);
}

#[test]
fn null_is_refused_where_something_must_be() {
    let x = context();
    let port = krun_add_virtio_console_multiport(x) as u32;
    let (s, root) = (c("/tmp"), c(krun_api::ROOT_TAG));
    let (p, r, mac) = (s.as_ptr(), root.as_ptr(), [2u8, 0, 0, 0, 0, 1]);
    let (mac, size) = (mac.as_ptr(), 1000);
    let list = null::<*const c_char>();
    let (mut data, mut len) = (null::<u8>(), 0);
    // SAFETY: every pointer is NULL or a value that lives to the end of the test; where two structures have to be,
    // neither is read for the want of the other.
    let refused = unsafe {
        with_null! {
            krun_set_kernel[kernel_path](x, null(), 0, p, p);
            krun_set_kernel_console[console_id](x, null());
            krun_set_smbios_oem_strings[oem_strings](x, list);
            krun_set_root[root_path](x, null());
            krun_add_virtiofs[tag](x, null(), p);
            krun_add_virtiofs[path](x, p, null());
            krun_add_virtiofs2[tag](x, null(), p, 0);
            krun_add_virtiofs2[path](x, p, null(), 0);
            krun_add_virtiofs3[tag](x, null(), p, 0, false);
            krun_add_virtiofs3[path](x, p, null(), 0, false);
            krun_add_virtiofs4[tag](x, null(), p, 0, false, 0);
            krun_add_virtiofs4[path](x, p, null(), 0, false, 0);
            krun_fs_add_overlay_file[fs_tag](x, null(), p, mac, 6, 0, false);
            krun_fs_add_overlay_file[path](x, r, null(), mac, 6, 0, false);
            krun_fs_add_overlay_file[data](x, r, p, null(), 5, 0, false);
            krun_fs_add_overlay_dir[fs_tag](x, null(), p, 0);
            krun_fs_add_overlay_dir[path](x, r, null(), 0);
            krun_set_exec[exec_path](x, null(), list, list);
            krun_set_workdir[workdir_path](x, null());
            krun_set_rlimits[rlimits](x, list);
            krun_get_default_init[data_out](null_mut(), &raw mut len);
            krun_get_default_init[len_out](&raw mut data, null_mut());
            krun_set_console_output[filepath](x, null());
            krun_add_console_port_inout[name](x, port, null(), -1, -1);
            krun_add_input_device[config_backend](x, null(), size, mac.cast(), size);
            krun_add_input_device[events_backend](x, mac.cast(), size, null(), size);
            krun_add_disk[block_id](x, null(), p, true);
            krun_add_disk[disk_path](x, p, null(), true);
            krun_add_disk2[block_id](x, null(), p, 0, true);
            krun_add_disk2[disk_path](x, p, null(), 0, true);
            krun_add_disk3[block_id](x, null(), p, 0, true, false, 0);
            krun_add_disk3[disk_path](x, p, null(), 0, true, false, 0);
            krun_set_root_disk_remount[device](x, null(), p, p);
            krun_set_root_disk[disk_path](x, null());
            krun_set_data_disk[disk_path](x, null());
            krun_add_net_unixstream[path](x, null(), -1, mac, 0, 0);
            krun_add_net_unixstream[mac](x, p, -1, null(), 0, 0);
            krun_add_net_unixgram[path](x, null(), -1, mac, 0, 0);
            krun_add_net_unixgram[mac](x, p, -1, null(), 0, 0);
            krun_add_net_tap[tap_name](x, null(), mac, 0, 0);
            krun_add_net_tap[mac](x, p, null(), 0, 0);
            krun_set_gvproxy_path[path](x, null());
            krun_set_net_mac[mac](x, null());
            krun_add_vsock_port[filepath](x, 1, null());
            krun_add_vsock_port2[filepath](x, 1, null(), false);
            krun_set_mapped_volumes[mapped_volumes](x, list);
            krun_display_set_edid[edid_blob](x, 0, null(), 6);
            krun_set_display_backend[display_backend](x, null(), 6);
            krun_add_vhost_user_device[socket_path](x, 1, null(), p, 0, null());
            krun_set_firmware[firmware_path](x, null());
            krun_set_tee_config_file[filepath](x, null());
        }
    };
    for (what, answer) in refused {
        assert_eq!(answer, -libc::EINVAL, "{what}");
    }
    assert_eq!((data, len), (null(), 0));
    // A terminal of nobody.
    let tty = std::fs::File::options().read(true).write(true).open("/dev/ptmx").unwrap();
    let tty = std::os::fd::IntoRawFd::into_raw_fd(tty);
    // SAFETY: as above.
    let accepted = unsafe {
        with_null! {
            krun_set_kernel[initramfs](x, p, 0, null(), p);
            krun_set_kernel[cmdline](x, p, 0, p, null());
            krun_set_exec[argv](x, p, list, list);
            krun_set_exec[envp](x, p, list, list);
            krun_set_env[envp](x, list);
            krun_add_console_port_tty[name](x, port, null(), tty);
            krun_set_root_disk_remount[fstype](x, p, null(), p);
            krun_set_root_disk_remount[options](context(), p, p, null());
            krun_set_port_map[port_map](x, list);
            krun_add_vhost_user_device[name](x, 4, p, null(), 0, null());
            krun_add_vhost_user_device[queue_sizes](x, 4, p, p, 0, null());
        }
    };
    for (what, answer) in accepted {
        assert_eq!(answer, 0, "{what}");
    }
    all_pointers([&refused[..], &accepted[..]].concat().iter().map(|(what, _)| *what));
    assert_eq!(krun_free_ctx(x), 0);
}

#[test]
fn features_have_the_numbers_of_the_header() {
    let served = ["NET", "BLK", "INPUT", "INIT_BLOB"];
    let features = HEADER.lines().filter_map(|l| l.strip_prefix("#define KRUN_FEATURE_")?.split_once(' '));
    let features: Vec<(_, u64)> = features.map(|(name, number)| (name, number.parse().unwrap())).collect();
    for (name, number) in &features {
        assert_eq!(krun_has_feature(*number), i32::from(served.contains(name)), "{name}");
    }
    assert_eq!(features.len(), 12);
    assert_eq!(krun_has_feature(12), -libc::EINVAL);
}
