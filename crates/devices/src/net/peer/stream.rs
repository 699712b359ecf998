//! A peer on a stream socket: passt, QEMU's `-netdev stream`, socket_vmnet.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send,
    socket_with,
};

use super::frames::{Frames, PREFIX};
use super::{Peer, Sent, check_socket, widen};
use crate::net::MAX_FRAME;
use crate::net::header::HEADER;
use crate::net::spec::{NetError, Socket};

const KIND: &str = "stream";
/// Most bytes of frames that go in one system call, unless one frame is longer. Linux passes so much on in one piece,
/// which holds whole frames then: versions of passt before 2024 lose their place in the stream when a frame comes in more
/// than two pieces.
const BATCH: usize = 48_000;

/// The connection and what is under way.
#[derive(Debug)]
pub struct Stream {
    path: Option<PathBuf>,
    socket: Option<OwnedFd>,
    input: Frames,
    /// Frames with their lengths, of which `sent` bytes are gone.
    output: Vec<u8>,
    sent: usize,
}

impl Stream {
    pub fn open(socket: Socket) -> Result<Self, NetError> {
        let (path, socket) = match socket {
            Socket::Fd(fd) => (None, check_socket(fd, SocketType::STREAM, KIND)?),
            Socket::Path(path) => match connected(&path) {
                Ok(socket) => (Some(path), socket),
                Err(source) => return Err(NetError::Connect { kind: KIND, path, source }),
            },
        };
        widen(&socket);
        Ok(Self { path, socket: Some(socket), input: Frames::default(), output: Vec::new(), sent: 0 })
    }
}

fn connected(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the peer is not connected")
}

impl Peer for Stream {
    fn name(&self) -> String {
        match &self.path {
            Some(path) => format!("the stream socket {}", path.display()),
            None => "the stream socket".into(),
        }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    fn next(&mut self) -> io::Result<Option<&[u8]>> {
        let invalid = |e| io::Error::new(io::ErrorKind::InvalidData, e);
        while self.input.next().map_err(invalid)?.is_none() {
            let socket = self.socket.as_ref().ok_or_else(gone)?;
            match recv(socket, self.input.room(), RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer has closed it"));
                }
                Ok((len, _)) => self.input.fill(len),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.input.next().map_err(invalid)
    }

    fn take(&mut self) {
        self.input.take();
    }

    fn send(&mut self, _: &[u8; HEADER], frame: &[u8]) -> io::Result<Sent> {
        debug_assert!(frame.len() <= MAX_FRAME);
        let waiting = self.output.len() - self.sent;
        if waiting > 0 && waiting + PREFIX + frame.len() > BATCH && matches!(self.flush()?, Sent::Full) {
            return Ok(Sent::Full);
        }
        self.output.extend_from_slice(&(frame.len() as u32).to_be_bytes());
        self.output.extend_from_slice(frame);
        Ok(Sent::Taken)
    }

    fn flush(&mut self) -> io::Result<Sent> {
        let socket = self.socket.as_ref().ok_or_else(gone)?;
        while self.sent < self.output.len() {
            match send(socket, &self.output[self.sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(len) => self.sent += len,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    // So that what is gone does not pile up before what is to go.
                    self.output.drain(..self.sent);
                    self.sent = 0;
                    return Ok(Sent::Full);
                }
                Err(e) => return Err(e.into()),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(Sent::Taken)
    }

    fn close(&mut self) -> bool {
        self.socket = None;
        self.input.clear();
        self.output.clear();
        self.sent = 0;
        self.path.is_some()
    }

    fn connect(&mut self) -> io::Result<()> {
        let socket = connected(self.path.as_deref().ok_or_else(gone)?)?;
        widen(&socket);
        self.socket = Some(socket);
        Ok(())
    }
}
