//! Requests to the host's tun driver (Linux: include/uapi/linux/if_tun.h).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::feature;

/// Longest name of an interface.
const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// `TUNSETOFFLOAD`'s bits and the features of which they come.
const OFFLOADS: [(u32, libc::c_uint); 4] = [
    (feature::GUEST_CSUM, 0x01),
    (feature::GUEST_TSO4, 0x02),
    (feature::GUEST_TSO6, 0x04),
    (feature::GUEST_UFO, 0x10),
];
/// The one that not every kernel has.
const UFO: libc::c_uint = 0x10;

/// Attaches to the tap interface `name`, with headers of `header` bytes before each frame, for several queues if that is
/// `wanted` and as the interface was made if there is one; says for which.
///
/// # Errors
/// The host's answer.
pub fn open_tap(name: &str, header: usize, wanted: bool) -> io::Result<(OwnedFd, bool)> {
    match attach(name, header, wanted) {
        // It was made for the other.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            attach(name, header, !wanted).map(|file| (file, !wanted))
        }
        other => other.map(|file| (file, wanted)),
    }
}

/// Attaches to one more queue of an interface that has several.
///
/// # Errors
/// The host's answer, that there are enough for one.
pub fn open_tap_queue(name: &str, header: usize) -> io::Result<OwnedFd> {
    attach(name, header, true)
}

fn attach(name: &str, header: usize, several: bool) -> io::Result<OwnedFd> {
    if name.is_empty()
        || name.len() > MAX_NAME
        || name.contains(['\0', '/', '%'])
        || name.contains(char::is_whitespace)
    {
        let text = format!("a name has 1 to {MAX_NAME} characters, none of them space, '/' or '%'");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    let several = if several { libc::IFF_MULTI_QUEUE } else { 0 };
    let mut request = request(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several);
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the request reads and writes one `ifreq`, which lives across the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    let size = header as libc::c_int;
    // SAFETY: the request reads one `int`, which lives across the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const size) })?;
    Ok(file)
}

/// A request with flags and no name.
fn request(flags: libc::c_int) -> libc::ifreq {
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

/// Lets frames into and out of a queue of an interface that has several, or not. It is attached at first.
///
/// # Errors
/// The host's answer.
pub fn attach_tap_queue(tap: &OwnedFd, active: bool) -> io::Result<()> {
    let request = request(if active { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE });
    // SAFETY: the request reads one `ifreq`, which lives across the call.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE as _, &raw const request) })
}

/// Tells the interface what the guest takes.
///
/// # Errors
/// The host's answer.
pub fn set_offloads(tap: &OwnedFd, features: u64) -> io::Result<()> {
    let wanted =
        OFFLOADS.iter().filter(|(bit, _)| features & 1 << bit != 0).fold(0, |all, (_, bit)| all | bit);
    let set = |bits: libc::c_uint| {
        // SAFETY: the argument is a number.
        check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(bits)) })
    };
    set(wanted).or_else(|_| set(wanted & !UFO))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
