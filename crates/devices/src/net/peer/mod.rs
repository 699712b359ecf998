//! The host's side of a network device.

mod datagram;
mod frames;
mod stream;
mod tap;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SocketType, sockopt};

pub use datagram::Datagram;
pub use stream::Stream;
pub use tap::Tap;

use super::header::HEADER;
use super::spec::{NetError, PeerSpec};

/// With whom frames are exchanged. Nothing here blocks.
///
/// An error means that the connection is gone: [`Peer::close`] follows, then perhaps [`Peer::connect`]. A frame that the
/// host alone refuses is none: it is dropped, also when it has waited.
pub trait Peer: Send {
    /// For messages.
    fn name(&self) -> String;

    /// Its descriptor; `None` while it is closed.
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// Whether frames have virtio's header before them, both ways.
    fn has_header(&self) -> bool {
        false
    }

    /// Whether its queue is in use. One of several is not before this says so; the first one always is.
    fn set_active(&mut self, active: bool) -> io::Result<()> {
        let _ = active;
        Ok(())
    }

    /// What the guest's driver accepted.
    fn set_features(&mut self, features: u64) -> io::Result<()> {
        let _ = features;
        Ok(())
    }

    /// The next frame, the same one until [`Peer::take`]; `None` while there is none.
    fn next(&mut self) -> io::Result<Option<&[u8]>>;

    /// Goes on to the frame after that.
    fn take(&mut self);

    /// Room for a frame of `len` bytes, at most [`MAX_FRAME`](super::MAX_FRAME), which [`Peer::send`] is for. `None` while
    /// the peer is slow: its descriptor can be written to when it is no more.
    fn room(&mut self, len: usize) -> io::Result<Option<&mut [u8]>>;

    /// Sends what was put in the last room: `header` is for those that have it.
    fn send(&mut self, header: &[u8; HEADER]) -> io::Result<()>;

    /// Sends what is in buffers; false while the peer is slow and some of it is left.
    fn flush(&mut self) -> io::Result<bool>;

    /// The connection is gone; forgets what was in buffers. True when [`Peer::connect`] makes sense.
    fn close(&mut self) -> bool;

    /// Connects again.
    fn connect(&mut self) -> io::Result<()>;
}

/// Makes the first connection: a value for each queue that the peer has, at most `queues`.
pub fn open(spec: PeerSpec, queues: u16) -> Result<Vec<Box<dyn Peer>>, NetError> {
    Ok(match spec {
        PeerSpec::Stream(socket) => vec![Box::new(Stream::open(socket)?)],
        PeerSpec::Datagram { socket, vfkit } => vec![Box::new(Datagram::open(socket, vfkit)?)],
        PeerSpec::Tap(name) => {
            Tap::open(&name, queues)?.into_iter().map(|tap| Box::new(tap) as Box<dyn Peer>).collect()
        }
    })
}

/// Checks that a descriptor of the caller's is what it should be.
fn check_socket(fd: OwnedFd, wanted: SocketType, kind: &'static str) -> Result<OwnedFd, NetError> {
    match sockopt::socket_type(&fd) {
        Ok(found) if found == wanted => Ok(fd),
        Ok(_) => Err(NetError::NoSocket { kind, source: None }),
        Err(e) => Err(NetError::NoSocket { kind, source: Some(e.into()) }),
    }
}

/// Room for some frames of full size in the host's buffers; what the host does not grant is no loss.
fn widen(socket: impl AsFd) {
    let _ = sockopt::set_socket_send_buffer_size(&socket, 1 << 20);
    let _ = sockopt::set_socket_recv_buffer_size(&socket, 4 << 20);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    /// Fills the socket behind `peer`, so that a large frame waits, then has the host refuse that one.
    pub fn refusal_after_a_wait(peer: &mut dyn Peer, host: &UnixDatagram, other: &UnixDatagram) {
        const LARGE: usize = 60_000;
        const SMALL: usize = 60;
        let header = if peer.has_header() { HEADER } else { 0 };
        other.set_nonblocking(true).unwrap();
        let mut frames = 0;
        while let Some(room) = peer.room(LARGE).unwrap() {
            room.fill(1);
            peer.send(&[0; HEADER]).unwrap();
            frames += 1;
            assert!(frames < 10_000, "the socket is never full");
        }
        assert!(frames > 1 && !peer.flush().unwrap(), "no frame waits");
        // As small as the host allows.
        sockopt::set_socket_send_buffer_size(host, 1).unwrap();
        peer.room(SMALL).unwrap().expect("the refused frame is still there").fill(2);
        peer.send(&[0; HEADER]).unwrap();
        let mut lens = Vec::new();
        let mut bytes = vec![0; HEADER + LARGE + 1];
        while let Ok(len) = other.recv(&mut bytes) {
            lens.push(len);
            let _ = peer.flush().unwrap();
        }
        assert_eq!(lens.pop(), Some(header + SMALL), "the next frame is gone too");
        assert_eq!(lens, vec![header + LARGE; frames - 1]);
        // And a refusal of a frame that did not wait.
        peer.room(LARGE).unwrap().unwrap().fill(1);
        peer.send(&[0; HEADER]).unwrap();
        assert!(peer.flush().unwrap());
        assert!(other.recv(&mut bytes).is_err());
    }
}
