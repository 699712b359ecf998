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

/// Attaches to the tap interface `name`, with headers of `header` bytes before each frame.
///
/// # Errors
/// The host's answer.
pub fn open_tap(name: &str, header: usize) -> io::Result<OwnedFd> {
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
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request reads and writes one `ifreq`, which lives across the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    let size = header as libc::c_int;
    // SAFETY: the request reads one `int`, which lives across the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const size) })?;
    Ok(file)
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
