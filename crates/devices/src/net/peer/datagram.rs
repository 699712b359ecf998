//! A peer on a datagram socket: gvproxy, vmnet-helper.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, recv, send,
    socket_with,
};

use super::{Peer, check_socket, widen};
use crate::net::header::HEADER;
use crate::net::spec::{NetError, Socket};
use crate::net::{Complaint, ETHERNET_HEADER, MAX_FRAME};

const KIND: &str = "datagram";
/// First datagram of a connection, for peers that tell it from others by that.
const MAGIC: &[u8] = b"VFKT";
/// Datagrams that are no frames before the device's other work has its turn.
const PATIENCE: u32 = 64;

/// The connection and the frame that was received last.
#[derive(Debug)]
pub struct Datagram {
    path: Option<PathBuf>,
    vfkit: bool,
    socket: Option<(OwnedFd, Option<OwnName>)>,
    /// Empty until it is needed; a byte more than a frame can have.
    frame: Vec<u8>,
    /// Bytes of it that are the next frame.
    len: Option<usize>,
    output: Output,
    complaint: Complaint,
}

/// The frame that is sent.
#[derive(Debug, Default)]
struct Output {
    /// As long as the frame.
    frame: Vec<u8>,
    /// It was not taken yet.
    waits: bool,
}

/// Where the peer sends its answers; the name goes away with the value.
#[derive(Debug)]
struct OwnName(PathBuf);

impl Drop for OwnName {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Datagram {
    pub fn open(socket: Socket, vfkit: bool) -> Result<Self, NetError> {
        let (path, socket) = match socket {
            Socket::Fd(fd) => (None, (check_socket(fd, SocketType::DGRAM, KIND)?, None)),
            Socket::Path(path) => match connected(&path, vfkit) {
                Ok(socket) => (Some(path), socket),
                Err(source) => return Err(NetError::Connect { kind: KIND, path, source }),
            },
        };
        widen(&socket.0);
        Ok(Self {
            path,
            vfkit,
            socket: Some(socket),
            frame: Vec::new(),
            len: None,
            output: Output::default(),
            complaint: Complaint::default(),
        })
    }

    fn socket(&self) -> io::Result<&OwnedFd> {
        self.socket.as_ref().map(|s| &s.0).ok_or_else(gone)
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the peer is not connected")
}

fn connected(path: &Path, vfkit: bool) -> io::Result<(OwnedFd, Option<OwnName>)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    let name = bind_own(&socket, path)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    if vfkit {
        send(&socket, MAGIC, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    }
    Ok((socket, Some(name)))
}

/// Gives the socket a name, beside the peer's: the peer sees that directory. Where nothing can be made there, or
/// the name would be too long, in the directory for temporary files.
fn bind_own(socket: &OwnedFd, peer: &Path) -> io::Result<OwnName> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mut beside = peer.as_os_str().to_owned();
    let suffix = format!("-krun-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    beside.push(&suffix);
    let mut result = Err(io::ErrorKind::InvalidInput.into());
    for path in [PathBuf::from(beside), std::env::temp_dir().join(format!("net{suffix}.sock"))] {
        result =
            SocketAddrUnix::new(&path).and_then(|address| bind(socket, &address)).map_err(io::Error::from);
        if result.is_ok() {
            return Ok(OwnName(path));
        }
    }
    result.map(|()| OwnName(PathBuf::new()))
}

impl Peer for Datagram {
    fn name(&self) -> String {
        match &self.path {
            Some(path) => format!("the datagram socket {}", path.display()),
            None => "the datagram socket".into(),
        }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(|s| s.0.as_fd())
    }

    fn next(&mut self) -> io::Result<Option<&[u8]>> {
        for _ in 0..PATIENCE {
            if let Some(len) = self.len {
                return Ok(self.frame.get(..len));
            }
            self.frame.resize(MAX_FRAME + 1, 0);
            let socket = self.socket.as_ref().map(|s| &s.0).ok_or_else(gone)?;
            match recv(socket, &mut self.frame[..], RecvFlags::DONTWAIT) {
                Ok((len, _)) if (ETHERNET_HEADER..=MAX_FRAME).contains(&len) => self.len = Some(len),
                Ok((len, _)) => tracing::debug!("network: a datagram of {len} bytes is no frame"),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(None)
    }

    fn take(&mut self) {
        self.len = None;
    }

    fn room(&mut self, len: usize) -> io::Result<Option<&mut [u8]>> {
        if !self.flush()? {
            return Ok(None);
        }
        self.output.frame.resize(len, 0);
        Ok(Some(&mut self.output.frame))
    }

    fn send(&mut self, _: &[u8; HEADER]) -> io::Result<()> {
        self.output.waits = true;
        self.flush().map(|_| ())
    }

    fn flush(&mut self) -> io::Result<bool> {
        while self.output.waits {
            match send(self.socket()?, &self.output.frame, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(_) => self.output.waits = false,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                // Larger than the host's buffers, which no waiting changes.
                Err(e @ (Errno::MSGSIZE | Errno::NOBUFS)) => {
                    self.output.waits = false;
                    let (name, len) = (self.name(), self.output.frame.len());
                    self.complaint.about(&format_args!("{name} refuses a frame of {len} bytes: {e}"));
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    fn close(&mut self) -> bool {
        (self.socket, self.len, self.output.waits) = (None, None, false);
        self.path.is_some()
    }

    fn connect(&mut self) -> io::Result<()> {
        let socket = connected(self.path.as_deref().ok_or_else(gone)?, self.vfkit)?;
        widen(&socket.0);
        self.socket = Some(socket);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::peer::tests::refusal_after_a_wait;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn the_peer_can_answer_and_the_name_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peer");
        let peer = UnixDatagram::bind(&path).unwrap();
        let mut datagram = Datagram::open(Socket::Path(path.clone()), true).unwrap();
        let mut bytes = [0; 100];
        let (len, from) = peer.recv_from(&mut bytes).unwrap();
        assert_eq!(&bytes[..len], MAGIC);
        let own = from.as_pathname().unwrap().to_owned();
        for data in [&[][..], &[1; 13], &[2; MAX_FRAME + 1], &[3; MAX_FRAME]] {
            peer.send_to(data, &own).unwrap();
        }
        // What is no frame is left out.
        assert_eq!(datagram.next().unwrap(), Some(&[3; MAX_FRAME][..]));
        datagram.take();
        assert_eq!(datagram.next().unwrap(), None);
        let send = |datagram: &mut Datagram| {
            datagram.room(60).unwrap().unwrap().fill(4);
            datagram.send(&[0; HEADER])
        };
        send(&mut datagram).unwrap();
        assert_eq!(peer.recv(&mut bytes).unwrap(), 60);
        drop(peer);
        assert!(send(&mut datagram).is_err());
        assert!(datagram.close());
        assert!(!own.exists(), "the name stays behind");
        assert!(datagram.connect().is_err(), "nobody is there");
        std::fs::remove_file(&path).unwrap();
        let peer = UnixDatagram::bind(&path).unwrap();
        datagram.connect().unwrap();
        assert_eq!(peer.recv(&mut bytes).unwrap(), 4);
        drop(datagram);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_frame_that_is_refused_after_it_waited_is_no_loss() {
        let (ours, peer) = UnixDatagram::pair().unwrap();
        let host = ours.try_clone().unwrap();
        let mut datagram = Datagram::open(Socket::Fd(ours.into()), false).unwrap();
        refusal_after_a_wait(&mut datagram, &host, &peer);
    }

    #[test]
    fn a_stream_is_refused() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let error = Datagram::open(Socket::Fd(a.into()), false).unwrap_err();
        assert!(error.to_string().contains("no unix datagram socket"), "{error}");
    }
}
