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
use super::{Peer, check_socket, widen};
use crate::net::MAX_FRAME;
use crate::net::header::HEADER;
use crate::net::spec::{NetError, Socket};

const KIND: &str = "stream";
/// Most bytes of frames that go in one system call, unless one frame is longer. Linux passes so much on in one piece,
/// which holds whole frames then: versions of passt before 2024 lose their place in the stream when a frame comes in more
/// than two pieces.
const BATCH: usize = 48_000;
/// A read of fewer bytes is an answer or a question, after which nothing more is expected at once. In a flow of data it
/// pays to look again.
const FEW: usize = 4096;

/// The connection and what is under way.
#[derive(Debug)]
pub struct Stream {
    path: Option<PathBuf>,
    socket: Option<OwnedFd>,
    input: Frames,
    /// The last read got all that there was, which was little.
    drained: bool,
    output: Output,
}

/// Frames with their lengths.
#[derive(Debug, Default)]
struct Output {
    /// Empty until it is needed.
    buffer: Vec<u8>,
    /// What of it waits.
    start: usize,
    end: usize,
    /// Length of the frame for which there was room after that.
    next: usize,
}

impl Output {
    /// A batch, or a little less of one and a frame of any length.
    const CAPACITY: usize = BATCH + PREFIX + MAX_FRAME;

    fn waiting(&self) -> usize {
        self.end - self.start
    }

    /// Whether a frame is to go with those that wait.
    fn fits(&self, len: usize) -> bool {
        self.waiting() == 0 || self.waiting() + PREFIX + len <= BATCH
    }

    /// Where the next frame is to be put.
    fn room(&mut self, len: usize) -> &mut [u8] {
        if self.buffer.is_empty() {
            self.buffer = vec![0; Self::CAPACITY];
        }
        self.next = len;
        &mut self.buffer[self.end + PREFIX..][..len]
    }

    /// The frame is there.
    fn add(&mut self) {
        let prefix = (self.next as u32).to_be_bytes();
        self.buffer[self.end..][..PREFIX].copy_from_slice(&prefix);
        self.end += PREFIX + self.next;
    }

    fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }
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
        Ok(Self {
            path,
            socket: Some(socket),
            input: Frames::default(),
            drained: false,
            output: Output::default(),
        })
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
            // What has come since is told by the descriptor: a call less for each wake-up.
            if std::mem::take(&mut self.drained) {
                return Ok(None);
            }
            let socket = self.socket.as_ref().ok_or_else(gone)?;
            match recv(socket, self.input.room(), RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer has closed it"));
                }
                Ok((len, _)) => {
                    self.drained = len < FEW;
                    self.input.fill(len);
                }
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

    fn room(&mut self, len: usize) -> io::Result<Option<&mut [u8]>> {
        debug_assert!(len <= MAX_FRAME);
        if !self.output.fits(len) && !self.flush()? {
            return Ok(None);
        }
        Ok(Some(self.output.room(len)))
    }

    fn send(&mut self, _: &[u8; HEADER]) -> io::Result<()> {
        self.output.add();
        Ok(())
    }

    fn flush(&mut self) -> io::Result<bool> {
        let socket = self.socket.as_ref().ok_or_else(gone)?;
        let output = &mut self.output;
        while output.waiting() > 0 {
            let bytes = &output.buffer[output.start..output.end];
            match send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(len) => output.start += len,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    // So that what is gone does not pile up before what is to go.
                    output.buffer.copy_within(output.start..output.end, 0);
                    (output.start, output.end) = (0, output.waiting());
                    return Ok(false);
                }
                Err(e) => return Err(e.into()),
            }
        }
        output.clear();
        Ok(true)
    }

    fn close(&mut self) -> bool {
        self.socket = None;
        self.input.clear();
        self.drained = false;
        self.output.clear();
        self.path.is_some()
    }

    fn connect(&mut self) -> io::Result<()> {
        let socket = connected(self.path.as_deref().ok_or_else(gone)?)?;
        widen(&socket);
        self.socket = Some(socket);
        Ok(())
    }
}
