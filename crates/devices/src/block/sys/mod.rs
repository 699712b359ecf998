//! What needs unsafe code: vectored transfers on guest memory, io_uring, locks of files.
#![allow(unsafe_code)]

mod buffers;
#[cfg(target_os = "linux")]
mod ring;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

pub use buffers::Buffers;
#[cfg(target_os = "linux")]
pub use ring::Ring;

/// Takes a lock on the whole file that goes with the open file, not with the process: exclusive for one
/// that is written to, else shared. QEMU's own locks collide with it as they should.
///
/// # Errors
/// `WouldBlock` when somebody else has it; what else the host says.
pub fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `flock`: the whole file, from its start.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the structure lives across the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        e if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EAGAIN)) => {
            Err(io::ErrorKind::WouldBlock.into())
        }
        e => Err(e),
    }
}
