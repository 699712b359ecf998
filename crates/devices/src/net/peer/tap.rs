//! A tap interface of the host (Linux: Documentation/networking/tuntap.rst).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::{Peer, Sent};
use crate::net::header::HEADER;
use crate::net::spec::NetError;
use crate::net::{MAX_FRAME, sys};

/// The interface and the frame that was received last.
#[derive(Debug)]
pub struct Tap {
    name: String,
    file: Option<OwnedFd>,
    /// Empty until it is needed.
    frame: Vec<u8>,
    /// Bytes of it that are the next frame with its header.
    len: Option<usize>,
    /// A frame for the host in one piece.
    output: Vec<u8>,
}

impl Tap {
    pub fn open(name: String) -> Result<Self, NetError> {
        match sys::open_tap(&name, HEADER) {
            Ok(file) => Ok(Self { name, file: Some(file), frame: Vec::new(), len: None, output: Vec::new() }),
            Err(source) => Err(NetError::Tap { name, source }),
        }
    }

    fn file(&self) -> io::Result<&OwnedFd> {
        self.file.as_ref().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Peer for Tap {
    fn name(&self) -> String {
        format!("the tap interface {}", self.name)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    fn has_header(&self) -> bool {
        true
    }

    fn set_features(&mut self, features: u64) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), |file| sys::set_offloads(file, features))
    }

    fn next(&mut self) -> io::Result<Option<&[u8]>> {
        while self.len.is_none() {
            self.frame.resize(HEADER + MAX_FRAME, 0);
            let file = self.file.as_ref().ok_or(io::ErrorKind::NotConnected)?;
            match rustix::io::read(file, &mut self.frame[..]) {
                // Cut off by the interface's MTU, which is at most 65535.
                Ok(len) if len > HEADER => self.len = Some(len),
                Ok(_) | Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(self.len.and_then(|len| self.frame.get(..len)))
    }

    fn take(&mut self) {
        self.len = None;
    }

    fn send(&mut self, header: &[u8; HEADER], frame: &[u8]) -> io::Result<Sent> {
        self.output.clear();
        self.output.extend_from_slice(header);
        self.output.extend_from_slice(frame);
        loop {
            return match rustix::io::write(self.file()?, &self.output) {
                Ok(_) => Ok(Sent::Taken),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Ok(Sent::Full),
                // The interface is gone.
                Err(e @ Errno::BADFD) => Err(e.into()),
                // The interface is down, or the kernel does not believe the header.
                Err(e) => Ok(Sent::Refused(e.into())),
            };
        }
    }

    fn close(&mut self) -> bool {
        (self.file, self.len) = (None, None);
        false
    }

    fn connect(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
