//! A tap interface of the host (Linux: Documentation/networking/tuntap.rst).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::Peer;
use crate::net::header::HEADER;
use crate::net::spec::NetError;
use crate::net::{Complaint, MAX_FRAME, sys};

/// The interface and the frame that was received last.
#[derive(Debug)]
pub struct Tap {
    name: String,
    file: Option<OwnedFd>,
    /// Empty until it is needed.
    frame: Vec<u8>,
    /// Bytes of it that are the next frame with its header.
    len: Option<usize>,
    /// A frame for the host with its header before it.
    output: Vec<u8>,
    /// It was not taken yet.
    waits: bool,
    complaint: Complaint,
}

impl Tap {
    /// Attaches to the interface with up to so many queues; one that was made for one queue has one. Only the first is
    /// in use.
    pub fn open(name: &str, queues: u16) -> Result<Vec<Self>, NetError> {
        let fail = |source| NetError::Tap { name: name.into(), source };
        let (first, several) = sys::open_tap(name, HEADER, queues > 1).map_err(fail)?;
        let mut files = vec![first];
        while several && files.len() < queues.into() {
            match sys::open_tap_queue(name, HEADER) {
                Ok(file) => files.push(file),
                Err(e) => {
                    tracing::info!("network: {name} has {} queues and not {queues}: {e}", files.len());
                    break;
                }
            }
        }
        let mut taps: Vec<_> = files.into_iter().map(|file| Self::new(name, file)).collect();
        taps.iter_mut().skip(1).try_for_each(|tap| tap.set_active(false)).map_err(fail)?;
        Ok(taps)
    }

    fn new(name: &str, file: OwnedFd) -> Self {
        Self {
            name: name.into(),
            file: Some(file),
            frame: Vec::new(),
            len: None,
            output: Vec::new(),
            waits: false,
            complaint: Complaint::default(),
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

    fn set_active(&mut self, active: bool) -> io::Result<()> {
        (self.len, self.waits) = (None, false);
        sys::attach_tap_queue(self.file()?, active)
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

    fn room(&mut self, len: usize) -> io::Result<Option<&mut [u8]>> {
        if !self.flush()? {
            return Ok(None);
        }
        self.output.resize(HEADER + len, 0);
        Ok(Some(&mut self.output[HEADER..]))
    }

    fn send(&mut self, header: &[u8; HEADER]) -> io::Result<()> {
        self.output[..HEADER].copy_from_slice(header);
        self.waits = true;
        self.flush().map(|_| ())
    }

    fn flush(&mut self) -> io::Result<bool> {
        while self.waits {
            match rustix::io::write(self.file()?, &self.output) {
                Ok(_) => self.waits = false,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                // The interface is gone.
                Err(e @ Errno::BADFD) => return Err(e.into()),
                // The interface is down, or the kernel does not believe the header.
                Err(e) => {
                    self.waits = false;
                    let (name, len) = (&self.name, self.output.len() - HEADER);
                    self.complaint
                        .about(&format_args!("the tap interface {name} refuses a frame of {len} bytes: {e}"));
                }
            }
        }
        Ok(true)
    }

    fn close(&mut self) -> bool {
        (self.file, self.len, self.waits) = (None, None, false);
        false
    }

    fn connect(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::peer::tests::refusal_after_a_wait;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn a_frame_that_is_refused_after_it_waited_is_no_loss() {
        // A socket tells the same as an interface, but for the words.
        let (ours, peer) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let host = ours.try_clone().unwrap();
        refusal_after_a_wait(&mut Tap::new("none", ours.into()), &host, &peer);
    }
}
