//! Named ports of the console device.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::log::uptime;

const CLASS: &str = "/sys/class/virtio-ports";

/// The ports that have a name by now, with their device names. They appear one by one while the driver
/// and the host introduce them to each other, which may go on while init runs.
fn named() -> Vec<(Vec<u8>, Vec<u8>)> {
    let Ok(entries) = std::fs::read_dir(CLASS) else { return Vec::new() };
    let devices = entries.flatten().map(|entry| entry.file_name());
    devices
        .filter_map(|device| {
            let mut path = std::path::Path::new(CLASS).join(&device);
            path.push("name");
            let mut name = std::fs::read(path).ok()?;
            name.truncate(name.trim_ascii_end().len());
            Some((name, device.as_bytes().to_vec()))
        })
        .collect()
}

/// How long nothing must have changed before the introductions count as finished.
const QUIET: Duration = Duration::from_millis(10);
/// How long the first port may take to appear.
const PATIENCE: Duration = Duration::from_millis(500);

/// Which of `names` exist: bit n for the nth. Nobody said how many ports there will be, so this waits
/// until all of `names` are there or no more seem to come.
pub fn existing(names: &[&str]) -> u8 {
    let start = uptime();
    let (mut last, mut changed) = ((0, 0), start);
    loop {
        let named = named();
        let is_there = |wanted: &str| named.iter().any(|(name, _)| name == wanted.as_bytes());
        let found = names
            .iter()
            .enumerate()
            .filter(|(_, name)| is_there(name))
            .fold(0u8, |bits, (n, _)| bits | 1 << n);
        let state = (std::fs::read_dir(CLASS).map_or(0, Iterator::count), named.len());
        let now = uptime();
        if state != last {
            (last, changed) = (state, now);
        }
        let settled = if last == (0, 0) { now >= start + PATIENCE } else { now >= changed + QUIET };
        if found.count_ones() as usize == names.len() || settled || !has_ports() {
            return found;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether there is a console device with ports (virtio feature 1, `MULTIPORT`).
fn has_ports() -> bool {
    let Ok(devices) = std::fs::read_dir("/sys/bus/virtio/drivers/virtio_console") else { return false };
    devices.flatten().any(|device| {
        std::fs::read(device.path().join("features")).is_ok_and(|bits| bits.get(1) == Some(&b'1'))
    })
}

/// Opens the port of this name for reading and writing, not to block. `None`: there is none, or not yet.
///
/// # Errors
/// It is there and cannot be opened: a port can be open only once.
pub fn open(name: &str) -> io::Result<Option<OwnedFd>> {
    let Some((_, device)) = named().into_iter().find(|(known, _)| known == name.as_bytes()) else {
        return Ok(None);
    };
    let path = [b"/dev/", &device[..]].concat();
    match rustix::fs::open(path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}
