//! A host descriptor that is read or written without ever blocking the device's thread.
//!
//! `O_NONBLOCK` belongs to the open file description, which the caller's descriptors share with its
//! parent shell and other processes; it is never changed here. Instead, whichever is possible:
//!
//! - sockets take `MSG_DONTWAIT` with every call;
//! - pipes and terminals are opened once more through `/proc/self/fd`, which gives a description of our own;
//! - where that is refused, the descriptor is polled before each call, and so little is written that a
//!   pipe that is ready takes it whole;
//! - files and devices like `/dev/null` are always ready.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use krun_memory::VolatileSlice;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};

use crate::{sys, tty};

/// What a ready pipe takes without blocking (`PIPE_BUF` of Linux).
const PIPE_ATOMIC: usize = 4096;
/// What a ready terminal takes, in all likelihood, without blocking.
const TERMINAL_CHUNK: usize = 256;

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Host to guest.
    Input,
    /// Guest to host.
    Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    /// Calls carry their own wish not to block.
    Socket,
    /// The description is non-blocking.
    Nonblocking,
    /// Poll first, then write at most so many bytes.
    Polled(usize),
    /// Does not block for long.
    Direct,
}

/// One direction of a port's host side.
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
    access: Access,
    terminal: bool,
}

/// What came of reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// So many bytes, more than none.
    Data(usize),
    /// Nothing now.
    NotReady,
    /// The end of a file, or a writer that closed; a terminal's end-of-file character.
    End,
    /// The terminal is gone.
    HungUp,
    /// A terminal whose foreground is another process group: nothing until that changes.
    Background,
}

impl Stream {
    /// Finds the best way to use `fd`.
    pub fn new(fd: OwnedFd, direction: Direction) -> Self {
        let terminal = rustix::termios::isatty(&fd);
        let kind = rustix::fs::fstat(&fd).map_or(FileType::Unknown, |s| FileType::from_raw_mode(s.st_mode));
        let nonblocking = rustix::fs::fcntl_getfl(&fd).is_ok_and(|f| f.contains(OFlags::NONBLOCK));
        let limit = if terminal { TERMINAL_CHUNK } else { PIPE_ATOMIC };
        let (fd, access) = match kind {
            FileType::Socket => (fd, Access::Socket),
            FileType::RegularFile | FileType::BlockDevice => (fd, Access::Direct),
            _ if nonblocking => (fd, Access::Nonblocking),
            FileType::Fifo => reopen_or(fd, direction, limit),
            FileType::CharacterDevice if terminal => reopen_or(fd, direction, limit),
            _ => (fd, Access::Polled(limit)),
        };
        Self { fd, access, terminal }
    }

    /// Whether it is a terminal.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Reads once into `room`, which is not empty.
    ///
    /// # Errors
    /// The host's reason; there is no point in trying again.
    pub fn read(&self, room: &[VolatileSlice<'_>]) -> io::Result<Read> {
        if matches!(self.access, Access::Polled(_)) && !self.is_ready(PollFlags::IN) {
            return Ok(Read::NotReady);
        }
        match again(|| sys::read_into(self.fd.as_fd(), room, self.access == Access::Socket)) {
            Ok(0) if self.terminal && self.polls(PollFlags::HUP) => Ok(Read::HungUp),
            Ok(0) => Ok(Read::End),
            Ok(n) => Ok(Read::Data(n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Read::NotReady),
            // To a thread that blocks SIGTTIN the kernel says EIO instead of stopping the process.
            Err(_) if self.terminal && tty::in_background(self.fd.as_fd()) => Ok(Read::Background),
            Err(e) if self.terminal && e.raw_os_error() == Some(libc::EIO) => Ok(Read::HungUp),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(Read::End),
            Err(e) => Err(e),
        }
    }

    /// Writes once from `data`, which is not empty; `None` when nothing can be taken now.
    ///
    /// # Errors
    /// The host's reason; there is no point in trying again.
    pub fn write(&self, data: &[VolatileSlice<'_>]) -> io::Result<Option<usize>> {
        let limit = match self.access {
            Access::Polled(_) if !self.is_ready(PollFlags::OUT) => return Ok(None),
            Access::Polled(limit) => limit,
            // The kernel's own limit for one call.
            _ => i32::MAX as usize,
        };
        match again(|| sys::write_from(self.fd.as_fd(), data, limit, self.access == Access::Socket)) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => Ok(Some(n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Whether `error` means that nobody takes output any more.
    pub fn is_gone(error: &io::Error) -> bool {
        let gone = [libc::EPIPE, libc::ECONNRESET, libc::EIO, libc::ENXIO, libc::ENOTCONN];
        error.raw_os_error().is_some_and(|e| gone.contains(&e))
    }

    /// Ready for `what`, or so broken that a call will tell.
    fn is_ready(&self, what: PollFlags) -> bool {
        self.polls(what | PollFlags::HUP | PollFlags::ERR)
    }

    fn polls(&self, what: PollFlags) -> bool {
        let mut fds = [PollFd::new(&self.fd, what)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(what)
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Repeats a call that a signal interrupted.
fn again<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn reopen_or(fd: OwnedFd, direction: Direction, limit: usize) -> (OwnedFd, Access) {
    match reopen(fd.as_fd(), direction) {
        Some(own) => (own, Access::Nonblocking),
        None => (fd, Access::Polled(limit)),
    }
}

/// The same pipe or terminal under a description of our own.
fn reopen(fd: BorrowedFd<'_>, direction: Direction) -> Option<OwnedFd> {
    // Opening a pseudo-terminal's master again would make a new pseudo-terminal.
    if rustix::pty::ptsname(fd, Vec::new()).is_ok() {
        return None;
    }
    let way = match direction {
        Direction::Input => OFlags::RDONLY,
        Direction::Output => OFlags::WRONLY,
    };
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let own =
        rustix::fs::open(path, way | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
            .ok()?;
    let (old, new) = (rustix::fs::fstat(fd).ok()?, rustix::fs::fstat(&own).ok()?);
    let same = (old.st_dev, old.st_ino, old.st_rdev) == (new.st_dev, new.st_ino, new.st_rdev);
    same.then_some(own)
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
