//! The kernel's random number generator, for which there is no safe interface.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::{Mode, OFlags};

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` of `linux/random.h`.
const ADD: u32 = 0x4008_5203;
const RESEED: u32 = 0x5207;

/// Gives the generator `seed` as entropy and makes it use it at once.
pub fn stir(seed: &[u8]) -> io::Result<()> {
    if seed.is_empty() {
        return Ok(());
    }
    let random = rustix::fs::open("/dev/urandom", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    let len = i32::try_from(seed.len()).map_err(io::Error::other)?;
    // `struct rand_pool_info`: bits of entropy, bytes of data, data.
    let request = [&(len * 8).to_ne_bytes()[..], &len.to_ne_bytes(), seed].concat();
    // SAFETY: the kernel reads the two numbers and `len` bytes after them, all of which are there.
    if unsafe { libc::ioctl(random.as_raw_fd(), ADD as _, request.as_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request has no argument.
    if unsafe { libc::ioctl(random.as_raw_fd(), RESEED as _) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
