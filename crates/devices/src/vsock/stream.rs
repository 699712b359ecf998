//! A stream socket of this host. Nothing here waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use krun_memory::VolatileSlice;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, send, shutdown,
    socket_with,
};

use crate::sys;

/// One end of a connection. Writing to it raises no signal.
#[derive(Debug)]
pub struct Stream(OwnedFd);

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

/// What came of writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// So many bytes were taken, perhaps not all.
    Taken(usize),
    /// No room now.
    Full,
    /// The peer receives no more.
    Gone,
}

impl Stream {
    /// Takes over a connected socket of any family.
    pub fn new(socket: impl Into<OwnedFd>) -> Self {
        Self(socket.into())
    }

    /// Connects to the unix socket at `path`; `None` when as many connections as fit wait there to be accepted.
    ///
    /// # Errors
    /// Nobody listens, or the host's other reasons.
    pub fn connect(path: &Path) -> io::Result<Option<Self>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let address = SocketAddrUnix::new(path.as_os_str().as_bytes())?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => return Ok(Some(Self(socket))),
                // Not in progress: unix sockets connect at once or, with this answer, not at all.
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Reads once into `room`, which is not empty.
    pub fn read(&self, room: &[VolatileSlice<'_>]) -> Read {
        // A peer that closed with unread data makes one call fail, and what it had sent comes after.
        let mut was_reset = false;
        loop {
            match sys::read_into(self.0.as_fd(), room, true) {
                Ok(0) => return Read::End,
                Ok(n) => return Read::Data(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Read::NotReady,
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset && !was_reset => was_reset = true,
                Err(e) => {
                    tracing::debug!("vsock: reading a socket: {e}");
                    return Read::End;
                }
            }
        }
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

fn written(mut call: impl FnMut() -> io::Result<usize>) -> Write {
    loop {
        match call() {
            Ok(n) => return Write::Taken(n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Write::Full,
            Err(e) => {
                tracing::debug!("vsock: writing to a socket: {e}");
                return Write::Gone;
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
