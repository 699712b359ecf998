//! The emulated host's file systems.

use std::ffi::CString;
use std::os::fd::OwnedFd;

use krun_wire::host::{Export, ROOT_TAG};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::termios::OptionalActions;

use crate::failure::{Failure, show};
use crate::log::Log;
use crate::mounts;

/// Where this machine's root is mounted before it becomes the root.
const NEW_ROOT: &str = "/root";
/// The machine's serial port.
const CONSOLE: &str = "/dev/ttyS0";
/// Memory for what is written to `/tmp`.
const SCRATCH: &str = "/scratch";

/// Options of every 9p mount: the protocol's Linux form, in messages as large as the device's queue holds.
const PROTOCOL: &str = "trans=virtio,version=9p2000.L,msize=524288";
/// What is only read changes rarely while a command runs, and caching everything makes it six times as
/// fast. A file that is replaced on this machine meanwhile may be seen as it was.
const READ_ONLY: &str = "cache=loose";
/// What can be written has its data cached, so that files can be mapped, and nothing else: names, sizes and
/// times always come from this machine.
const WRITABLE: &str = "cache=mmap";

fn setup(what: &str, path: &[u8], e: Errno) -> Failure {
    Failure::setup(format!("{what} {} failed: {e}.", show(path)))
}

fn mount(source: &str, at: &[u8], fstype: &str, flags: MountFlags, options: &str) -> Result<(), Failure> {
    let options = CString::new(options).map_err(|_| setup("Mounting", at, Errno::INVAL))?;
    rustix::mount::mount(source, at, fstype, flags, options.as_c_str())
        .map_err(|e| setup(&format!("Mounting {fstype} {source} on"), at, e))
}

fn directory(path: &[u8]) -> Result<(), Failure> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(setup("Creating", path, e)),
    }
}

/// What finding the ports needs, in the initial RAM disk.
///
/// # Errors
/// The kernel's.
pub fn first() -> Result<(), Failure> {
    for (fstype, at) in [("devtmpfs", "/dev"), ("sysfs", "/sys")] {
        directory(at.as_bytes())?;
        mount(fstype, at.as_bytes(), fstype, MountFlags::empty(), "")?;
    }
    Ok(())
}

/// The serial console, which passes every byte as it is.
///
/// # Errors
/// The kernel's.
pub fn console() -> Result<OwnedFd, Failure> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let failed = |e| setup("Opening", CONSOLE.as_bytes(), e);
    let console = rustix::fs::open(CONSOLE, flags, Mode::empty()).map_err(failed)?;
    let mut modes = rustix::termios::tcgetattr(&console).map_err(failed)?;
    modes.make_raw();
    rustix::termios::tcsetattr(&console, OptionalActions::Now, &modes).map_err(failed)?;
    Ok(console)
}

/// The initial RAM disk stays the root.
pub fn initial_root(log: &mut Log) {
    if let Err(failure) = mounts::base(log) {
        log.warn(failure.reason);
    }
    let _ = rustix::fs::mkdir("/tmp", Mode::from_raw_mode(0o1777));
}

/// Makes this machine's root the root, read-only but for `exports`, `/tmp` and `/run`.
///
/// # Errors
/// The root or an export cannot be mounted.
pub fn shared_root(exports: &[Export], log: &mut Log) -> Result<(), Failure> {
    directory(NEW_ROOT.as_bytes())?;
    if let Some(root) = exports.iter().find(|e| e.path == b"/") {
        mount(&root.tag, NEW_ROOT.as_bytes(), "9p", MountFlags::empty(), &format!("{PROTOCOL},{WRITABLE}"))?;
    } else {
        mount(ROOT_TAG, NEW_ROOT.as_bytes(), "9p", MountFlags::RDONLY, &format!("{PROTOCOL},{READ_ONLY}"))?;
        if !exports.iter().any(|e| e.path == b"/tmp") {
            temporary(log);
        }
    }
    let failed = |what: &'static str| move |e| setup(what, NEW_ROOT.as_bytes(), e);
    rustix::process::chdir(NEW_ROOT).map_err(failed("Entering"))?;
    rustix::mount::mount_move(".", "/").map_err(failed("Moving"))?;
    rustix::process::chroot(".").map_err(failed("Entering"))?;
    rustix::process::chdir("/").map_err(failed("Entering"))?;
    mounts::base(log)?;
    mount("tmpfs", b"/run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=755")?;
    let mut exports: Vec<_> = exports.iter().filter(|e| e.path != b"/").collect();
    // Outer directories come before those in them.
    exports.sort_by_key(|e| e.path.len());
    for export in exports {
        mount_export(export)?;
    }
    Ok(())
}

/// `/tmp` shows what this machine has there; what is written stays in memory.
fn temporary(log: &mut Log) {
    let overlay = || {
        directory(SCRATCH.as_bytes())?;
        mount("tmpfs", SCRATCH.as_bytes(), "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=755")?;
        let (upper, work) = (format!("{SCRATCH}/upper"), format!("{SCRATCH}/work"));
        directory(upper.as_bytes())?;
        directory(work.as_bytes())?;
        rustix::fs::chmod(&upper, Mode::from_raw_mode(0o1777))
            .map_err(|e| setup("chmod", upper.as_bytes(), e))?;
        let at = format!("{NEW_ROOT}/tmp");
        let options = format!("lowerdir={at},upperdir={upper},workdir={work}");
        mount("overlay", at.as_bytes(), "overlay", MountFlags::NOSUID | MountFlags::NODEV, &options)
    };
    if let Err(e) = overlay() {
        log.warn(e.reason);
        let at = format!("{NEW_ROOT}/tmp");
        let plain = mount("tmpfs", at.as_bytes(), "tmpfs", MountFlags::NOSUID, "mode=1777");
        if let Err(e) = plain {
            log.warn(e.reason);
        }
    }
}

fn mount_export(export: &Export) -> Result<(), Failure> {
    // Below a file system in memory the directory is not there.
    let slashes = export.path.iter().enumerate().filter(|(at, b)| **b == b'/' && *at > 0).map(|(at, _)| at);
    for end in slashes.chain([export.path.len()]) {
        let part = &export.path[..end];
        if rustix::fs::stat(part).is_err() {
            directory(part)?;
        }
    }
    let options = format!("{PROTOCOL},{WRITABLE}");
    mount(&export.tag, &export.path, "9p", MountFlags::empty(), &options)
}
