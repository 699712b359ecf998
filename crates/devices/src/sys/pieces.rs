//! Scatter-gather I/O between descriptors and guest memory.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use krun_memory::VolatileSlice;

/// Most pieces of one call; a caller goes on with the rest.
pub(crate) const MAX_PIECES: usize = 64;

pub(super) const NOTHING: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// Reads once into `room`, in order. A socket is not waited for.
///
/// # Errors
/// The host's reason, `WouldBlock` and `Interrupted` among them.
pub fn read_into(fd: BorrowedFd<'_>, room: &[VolatileSlice<'_>], socket: bool) -> io::Result<usize> {
    let guards: Vec<_> = room.iter().take(MAX_PIECES).map(VolatileSlice::ptr_guard_mut).collect();
    let mut pieces = [NOTHING; MAX_PIECES];
    for (piece, guard) in pieces.iter_mut().zip(&guards) {
        *piece = libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() };
    }
    let count = if socket {
        let mut header = message(&mut pieces[..guards.len()]);
        // SAFETY: `header` refers to `pieces`, each of which lies in guest memory that `guards` keep
        // mapped; no Rust reference to it exists, and the kernel may store there as the guest may.
        unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) }
    } else {
        // SAFETY: as above; the first `guards.len()` entries of `pieces` are set (at most 64).
        unsafe { libc::readv(fd.as_raw_fd(), pieces.as_ptr(), guards.len() as libc::c_int) }
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Writes once from `data`, in order and at most `limit` bytes. A socket is not waited for, and raises no
/// `SIGPIPE`.
///
/// # Errors
/// The host's reason, `WouldBlock` and `Interrupted` among them.
pub fn write_from(
    fd: BorrowedFd<'_>,
    data: &[VolatileSlice<'_>],
    limit: usize,
    socket: bool,
) -> io::Result<usize> {
    let guards: Vec<_> = data.iter().take(MAX_PIECES).map(VolatileSlice::ptr_guard).collect();
    let mut pieces = [NOTHING; MAX_PIECES];
    let mut left = limit;
    for (piece, guard) in pieces.iter_mut().zip(&guards) {
        let len = guard.len().min(left);
        left -= len;
        *piece = libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: len };
    }
    let count = if socket {
        let header = message(&mut pieces[..guards.len()]);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: `header` refers to `pieces`, each of which lies in guest memory that `guards` keep
        // mapped; the kernel only reads it.
        unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, flags) }
    } else {
        // SAFETY: as above; the first `guards.len()` entries of `pieces` are set (at most 64).
        unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr(), guards.len() as libc::c_int) }
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

pub(super) fn message(pieces: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all-zero is a valid `msghdr` (null pointers with zero lengths); it has padding and fields
    // that differ between systems, so there is no literal for it.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = pieces.as_mut_ptr();
    header.msg_iovlen = pieces.len() as _;
    header
}
