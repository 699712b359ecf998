//! A socket of this host: of a stream, or one that keeps messages apart. Nothing here waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use krun_memory::VolatileSlice;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, connect, send, shutdown, socket_with,
};

use super::spec::SocketType;
use crate::sys;
use crate::sys::messages::{self, Contents, Peeked};

/// Room that a socket is to have for a message on its way to a program.
const MESSAGE_ROOM: usize = 256 << 10;

/// One end of a connection. Writing to it raises no signal.
#[derive(Debug)]
pub struct Socket(OwnedFd);

/// What came of reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// So many bytes, more than none.
    Data(usize),
    /// Nothing now.
    NotReady,
    /// The peer sends no more.
    End,
}

/// What came of looking for a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Some of a message, which stays where it is.
    Message(Peeked),
    /// Nothing now.
    NotReady,
    /// The peer sends no more.
    End,
}

/// What came of writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// So many bytes were taken, perhaps not all.
    Taken(usize),
    /// No room now.
    Full,
    /// The peer receives no more.
    Gone,
    /// The host has no room for a message of that length, and never will.
    TooLong,
}

impl Socket {
    /// Takes over a connected unix socket of this type.
    ///
    /// # Errors
    /// The host cannot set it up.
    pub fn of_type(socket: OwnedFd, kind: SocketType) -> io::Result<Self> {
        if kind == SocketType::SeqPacket {
            messages::keep_messages(socket.as_fd(), MESSAGE_ROOM)?;
        }
        Ok(Self(socket))
    }

    /// Connects to the unix socket at `path`; `None` when as many connections as fit wait there to be accepted.
    ///
    /// # Errors
    /// Nobody listens, or not with a socket of this type, or the host's other reasons.
    pub fn connect(path: &Path, kind: SocketType) -> io::Result<Option<Self>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, kind.of_host(), flags, None)?;
        let address = SocketAddrUnix::new(path.as_os_str().as_bytes())?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => return Self::of_type(socket, kind).map(Some),
                // Not in progress: unix sockets connect at once or, with this answer, not at all.
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Reads once into `room`, which is not empty.
    pub fn read(&self, room: &[VolatileSlice<'_>]) -> Read {
        match received(|| sys::read_into(self.0.as_fd(), room, true)) {
            Some(Ok(n @ 1..)) => Read::Data(n),
            Some(Ok(0)) | None => Read::End,
            Some(Err(NotReady)) => Read::NotReady,
        }
    }

    /// Copies the next bytes of the first message, from where the last look ended.
    pub fn look(&self, room: &[VolatileSlice<'_>]) -> Look {
        match received(|| messages::peek(self.0.as_fd(), room)) {
            Some(Ok(Some(peeked))) => Look::Message(peeked),
            Some(Ok(None)) | None => Look::End,
            Some(Err(NotReady)) => Look::NotReady,
        }
    }

    /// Drops the first message.
    pub fn discard(&self) {
        // There is one, and nobody else takes it.
        let _ = received(|| messages::discard(self.0.as_fd()));
    }

    /// Sends one message.
    pub fn send(&self, contents: Contents<'_>, end_of_record: bool) -> Write {
        written(|| messages::send(self.0.as_fd(), contents, end_of_record).map(|()| 0))
    }

    /// Writes once from guest memory.
    pub fn write(&self, data: &[VolatileSlice<'_>]) -> Write {
        written(|| sys::write_from(self.0.as_fd(), data, i32::MAX as usize, true))
    }

    /// Writes once from memory of this process.
    pub fn write_bytes(&self, data: &[u8]) -> Write {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        written(|| Ok(send(&self.0, data, flags)?))
    }

    /// Sends no more: the peer reads the end once it has read the rest.
    pub fn end_sending(&self) {
        // Only a connection that is gone cannot be shut down.
        let _ = shutdown(&self.0, Shutdown::Write);
    }

    /// Receives no more: the peer cannot write.
    pub fn end_receiving(&self) {
        let _ = shutdown(&self.0, Shutdown::Read);
    }

    /// Whether both directions have ended.
    pub fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }
}

/// Nothing has come.
struct NotReady;

/// Calls until there is an answer; `None` when the connection is broken.
fn received<T>(mut call: impl FnMut() -> io::Result<T>) -> Option<Result<T, NotReady>> {
    // A peer that closed with unread data makes one call fail, and what it had sent comes after.
    let mut was_reset = false;
    loop {
        match call() {
            Ok(value) => return Some(Ok(value)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Some(Err(NotReady)),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset && !was_reset => was_reset = true,
            Err(e) => {
                tracing::debug!("vsock: reading a socket: {e}");
                return None;
            }
        }
    }
}

fn written(mut call: impl FnMut() -> io::Result<usize>) -> Write {
    loop {
        match call() {
            Ok(n) => return Write::Taken(n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Write::Full,
            Err(e) if e.raw_os_error() == Some(Errno::MSGSIZE.raw_os_error()) => return Write::TooLong,
            Err(e) => {
                tracing::debug!("vsock: writing to a socket: {e}");
                return Write::Gone;
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
