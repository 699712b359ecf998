//! Sockets that keep messages apart (`SOCK_SEQPACKET`). None of these calls waits.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use krun_memory::VolatileSlice;

use super::pieces::{MAX_PIECES, NOTHING, message};

/// A message as it lies in the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peeked {
    /// Bytes from where the look began to the message's end, which may be more than were stored.
    pub len: usize,
    /// The message ends a record of its sender's.
    pub end_of_record: bool,
}

fn set(fd: BorrowedFd<'_>, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the value is an int, which outlives the call, and its size is given.
    let status = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Prepares a unix socket for [`peek`], and makes room for messages of `room` bytes, if the host lets it.
///
/// # Errors
/// The host's reason.
pub fn keep_messages(fd: BorrowedFd<'_>, room: usize) -> io::Result<()> {
    // Each look goes on where the one before it ended.
    set(fd, libc::SO_PEEK_OFF, 0)?;
    // A message brings something that the end does not: a time, for which no call here has room. The kernel says that it
    // was cut off, and so an empty message can be told from the end.
    set(fd, libc::SO_TIMESTAMP, 1)?;
    set(fd, libc::SO_SNDBUF, libc::c_int::try_from(room).unwrap_or(libc::c_int::MAX))
}

/// Copies the next bytes of the first message into `room` and leaves the message where it is; `None` when there is none
/// and never will be.
///
/// # Errors
/// The host's reason, `WouldBlock` and `Interrupted` among them.
pub fn peek(fd: BorrowedFd<'_>, room: &[VolatileSlice<'_>]) -> io::Result<Option<Peeked>> {
    let guards: Vec<_> = room.iter().take(MAX_PIECES).map(VolatileSlice::ptr_guard_mut).collect();
    let mut pieces = [NOTHING; MAX_PIECES];
    for (piece, guard) in pieces.iter_mut().zip(&guards) {
        *piece = libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() };
    }
    let mut header = message(&mut pieces[..guards.len()]);
    let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK | libc::MSG_TRUNC;
    // SAFETY: `header` refers to `pieces`, each of which lies in guest memory that `guards` keep mapped; no Rust reference
    // to it exists, and the kernel may store there as the guest may.
    let len = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    if len == 0 && header.msg_flags & libc::MSG_CTRUNC == 0 {
        return Ok(None);
    }
    Ok(Some(Peeked { len, end_of_record: header.msg_flags & libc::MSG_EOR != 0 }))
}

/// Takes the first message out of the socket.
///
/// # Errors
/// The host's reason.
pub fn discard(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut header = message(&mut []);
    // SAFETY: `header` has no room for anything; descriptors that came with the message are closed by the kernel.
    let len = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
    if len < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What a message to be sent is made of, at most [`MAX_PIECES`] pieces.
#[derive(Debug, Clone, Copy)]
pub enum Contents<'a> {
    /// Pieces of guest memory.
    Guest(&'a [VolatileSlice<'a>]),
    /// Two pieces of this process' memory.
    Own(&'a [u8], &'a [u8]),
}

/// Sends one message, as a whole or not at all. Raises no `SIGPIPE`.
///
/// # Errors
/// The host's reason: `WouldBlock` and `Interrupted` among them, and `EMSGSIZE` for one that is too long for it.
pub fn send(fd: BorrowedFd<'_>, contents: Contents<'_>, end_of_record: bool) -> io::Result<()> {
    let mut pieces = [NOTHING; MAX_PIECES];
    let (mut guards, mut count) = (Vec::new(), 2);
    match contents {
        Contents::Guest(data) => {
            if data.len() > MAX_PIECES {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            guards.extend(data.iter().map(VolatileSlice::ptr_guard));
            count = guards.len();
            for (piece, guard) in pieces.iter_mut().zip(&guards) {
                *piece = libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() };
            }
        }
        Contents::Own(a, b) => {
            for (piece, part) in pieces.iter_mut().zip([a, b]) {
                *piece = libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
            }
        }
    }
    let header = message(&mut pieces[..count]);
    let end = if end_of_record { libc::MSG_EOR } else { 0 };
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | end;
    // SAFETY: `header` refers to `pieces`; each lies in guest memory that `guards` keep mapped, or in a slice that outlives
    // the call; the kernel only reads them.
    let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, flags) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
