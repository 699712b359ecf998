//! What a device is made of, as plain values.

use std::collections::HashSet;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::listener::check_path;
use super::packet::{SEQPACKET, STREAM};

/// Longest path of a unix socket, in bytes.
const MAX_PATH: usize = 107;
/// The port number that means any.
const ANY_PORT: u32 = u32::MAX;

/// Who connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The guest, to a port of the host (CID 2): the path is connected to, each time.
    FromGuest,
    /// Programs of the host, to the socket at the path, which the device creates and removes: each connection is made to
    /// the port of the guest.
    FromHost,
}

/// What kind of socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum SocketType {
    /// Bytes in order.
    #[default]
    Stream,
    /// Messages in order, each as it was sent (`SOCK_SEQPACKET`).
    SeqPacket,
}

impl SocketType {
    /// As packets have it (virtio 1.2, section 5.10.6).
    pub(super) fn kind(self) -> u16 {
        match self {
            Self::Stream => STREAM,
            Self::SeqPacket => SEQPACKET,
        }
    }

    /// The other way round.
    pub(super) fn of_kind(kind: u16) -> Option<Self> {
        [Self::Stream, Self::SeqPacket].into_iter().find(|t| t.kind() == kind)
    }

    /// As the host has it.
    pub(super) fn of_host(self) -> rustix::net::SocketType {
        match self {
            Self::Stream => rustix::net::SocketType::STREAM,
            Self::SeqPacket => rustix::net::SocketType::SEQPACKET,
        }
    }
}

/// A port that is joined to a unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSpec {
    /// Number of the port.
    pub port: u32,
    /// Path of the socket.
    pub path: PathBuf,
    /// Who connects.
    pub direction: Direction,
    /// What kind of socket is created for [`Direction::FromHost`]. Of no meaning for the other direction: the guest
    /// chooses, and the program at the path must listen with a socket of that kind.
    pub socket: SocketType,
}

/// The device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockSpec {
    /// The guest's context id.
    pub cid: u32,
    /// Its ports; others refuse connections.
    pub ports: Vec<PortSpec>,
    /// Most connections at a time.
    pub max_connections: usize,
}

impl Default for VsockSpec {
    fn default() -> Self {
        Self { cid: 3, ports: Vec::new(), max_connections: 1 << 14 }
    }
}

/// Why there can be no such device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VsockError {
    /// The guest cannot have this context id.
    #[error("vsock: a guest cannot have the context id {cid}; use 3 or more, but not 4294967295")]
    Cid {
        /// What was given.
        cid: u32,
    },
    /// There is no such port.
    #[error("vsock: 4294967295 is no port number; it stands for any port")]
    Port,
    /// A port is there twice.
    #[error("vsock: port {port} is there twice in the same direction")]
    Twice {
        /// Its number.
        port: u32,
    },
    /// A path that no socket can have.
    #[error(
        "vsock port {port}: {path:?} is no path of a socket: it takes 1 to {MAX_PATH} bytes without a NUL"
    )]
    Path {
        /// Number of the port.
        port: u32,
        /// What was given.
        path: PathBuf,
    },
    /// Something else is where a socket is to be created.
    #[error("vsock: no socket can be created at {}: {what}", path.display())]
    Occupied {
        /// The path.
        path: PathBuf,
        /// What is there, and what to do.
        what: &'static str,
    },
    /// The host refused.
    #[error("vsock: {what}: {source}")]
    Host {
        /// What was tried, on what.
        what: String,
        /// The host's answer.
        source: io::Error,
    },
}

impl VsockSpec {
    /// Checks what can be checked without the host.
    ///
    /// # Errors
    /// The first value that cannot be.
    pub fn validate(&self) -> Result<(), VsockError> {
        if self.cid <= 2 || self.cid == u32::MAX {
            return Err(VsockError::Cid { cid: self.cid });
        }
        let mut seen = HashSet::new();
        for p in &self.ports {
            p.validate()?;
            if !seen.insert((p.port, p.direction)) {
                return Err(VsockError::Twice { port: p.port });
            }
        }
        Ok(())
    }
}

impl PortSpec {
    /// Checks what can be checked without the host.
    ///
    /// # Errors
    /// [`VsockError::Port`], [`VsockError::Path`].
    pub fn validate(&self) -> Result<(), VsockError> {
        if self.port == ANY_PORT {
            return Err(VsockError::Port);
        }
        let bytes = self.path.as_os_str().as_bytes();
        if bytes.is_empty() || bytes.len() > MAX_PATH || bytes.contains(&0) {
            return Err(VsockError::Path { port: self.port, path: self.path.clone() });
        }
        Ok(())
    }

    /// Checks the values, and that the socket can be created if the device is to do that.
    ///
    /// # Errors
    /// [`PortSpec::validate`]'s, [`VsockError::Occupied`], or the host's.
    pub fn check(&self) -> Result<(), VsockError> {
        self.validate()?;
        match self.direction {
            Direction::FromGuest => Ok(()),
            Direction::FromHost => check_path(&self.path).map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(ports: &[(u32, &str, Direction)]) -> VsockSpec {
        let port = |(port, path, direction): &(u32, &str, Direction)| PortSpec {
            port: *port,
            path: path.into(),
            direction: *direction,
            socket: SocketType::Stream,
        };
        VsockSpec { ports: ports.iter().map(port).collect(), ..VsockSpec::default() }
    }

    #[test]
    fn what_cannot_be_is_told() {
        use Direction::{FromGuest, FromHost};
        assert!(spec(&[(1, "/a", FromGuest), (1, "/b", FromHost), (0, "c", FromHost)]).validate().is_ok());
        let long = "x".repeat(108);
        for (ports, text) in [
            (vec![(1, "/a", FromGuest), (1, "/b", FromGuest)], "port 1 is there twice"),
            (vec![(u32::MAX, "/a", FromGuest)], "4294967295 is no port"),
            (vec![(7, "", FromHost)], "port 7"),
            (vec![(7, "a\0b", FromHost)], "1 to 107 bytes"),
            (vec![(7, &long, FromHost)], "1 to 107 bytes"),
        ] {
            let error = spec(&ports).validate().unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        for cid in [0, 2, u32::MAX] {
            assert!(VsockSpec { cid, ..VsockSpec::default() }.validate().is_err());
        }
    }
}
