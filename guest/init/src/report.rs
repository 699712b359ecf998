//! The end: the exit status goes to the host, and the machine stops.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use rustix::system::RebootCommand;

use crate::config::read_file;
use crate::log::Log;
use crate::sys;

/// File systems that keep nothing back: in memory, or writing to the host when a file is closed. Asking
/// the host to write everything to its disk would take long and is not what a guest's end should do.
const NOTHING_TO_WRITE: [&[u8]; 17] = [
    b"autofs",
    b"binfmt_misc",
    b"bpf",
    b"cgroup2",
    b"debugfs",
    b"devpts",
    b"devtmpfs",
    b"hugetlbfs",
    b"mqueue",
    b"proc",
    b"ramfs",
    b"rootfs",
    b"securityfs",
    b"sysfs",
    b"tmpfs",
    b"tracefs",
    b"virtiofs",
];

/// The mount points in `/proc/mounts` whose file systems may hold data that is not yet on their disks, the
/// last one first.
fn unwritten(mounts: &[u8]) -> Vec<Vec<u8>> {
    let point = |line: &[u8]| {
        let mut fields = line.split(|b| *b == b' ').skip(1);
        let (point, fstype) = (fields.next()?, fields.next()?);
        (!NOTHING_TO_WRITE.contains(&fstype)).then(|| unescape(point))
    };
    mounts.split(|b| *b == b'\n').rev().filter_map(point).collect()
}

/// Blanks and backslashes in `/proc/mounts` are octal escapes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let digits =
            after.first_chunk::<3>().filter(|d| first == b'\\' && d.iter().all(|c| (b'0'..b'8').contains(c)));
        match digits {
            Some([a, b, c]) => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = &after[3..];
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    out
}

/// Writes what is not yet on disk, if there are disks, and leaves their file systems as after a proper
/// shut-down where possible.
fn sync() {
    let Ok(mounts) = read_file(b"/proc/self/mounts", 64 << 20) else {
        rustix::fs::sync();
        return;
    };
    let points = unwritten(&mounts);
    if !points.is_empty() {
        rustix::fs::sync();
    }
    for point in points {
        if unmount(&point[..], UnmountFlags::empty()).is_err() {
            // The root, or a process that does not die is still in there.
            let _ = mount_remount(&point[..], MountFlags::RDONLY, c"");
        }
    }
}

/// Keeps the kernel's last words off the user's terminal: it says even with `quiet` that it restarts.
pub fn silence_kernel() {
    if let Ok(fd) =
        rustix::fs::open("/proc/sys/kernel/printk", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
    {
        // A kernel without that setting talks, which is no reason to fail.
        let _ = rustix::io::write(&fd, b"0");
    }
}

/// Reports `status` over `root`, a file of the root share, and stops the machine.
pub fn finish(root: Option<&OwnedFd>, status: i32, log: &mut Log, verbose: bool) -> i32 {
    sync();
    if verbose {
        log.step("the end");
        log.flush();
    }
    let reported = root.map(|file| sys::report_status(file.as_fd(), status));
    if let Some(Err(e)) = reported {
        log.say(&format!("status {status} cannot be reported: {e}"));
    }
    // A restart is what ends a machine without firmware; the host knows it as the end.
    let failed = rustix::system::reboot(RebootCommand::Restart);
    // Only when this is not process 1 of a machine, as in a trial in a container.
    if let Err(e) = failed {
        log.say(&format!("the machine cannot be stopped: {e}"));
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_disks_need_to_be_written() {
        let guest =
            b"/dev/root / virtiofs rw 0 0\ndevtmpfs /dev devtmpfs rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n";
        assert!(unwritten(guest).is_empty());
        let disks =
            b"/dev/vda / ext4 rw 0 0\noverlay /a\\040b\\134 overlay rw 0 0\n/dev/vdb /x\\08 xfs ro 0 0";
        let all = [&guest[..], disks].concat();
        assert_eq!(unwritten(&all), [&b"/x\\08"[..], b"/a b\\", b"/"]);
        assert!(unwritten(b"x\n\n y").is_empty());
    }
}
