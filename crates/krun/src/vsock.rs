//! Sockets between the guest and this host.

use std::path::PathBuf;

use krun_devices::vsock::{Vsock as Device, VsockSpec};

pub use krun_devices::vsock::{
    Direction as VsockDirection, PortSpec as VsockPort, SocketType as VsockType, VsockError,
};

/// A socket device: programs of the guest use `AF_VSOCK`, with `SOCK_STREAM` or `SOCK_SEQPACKET`. The guest's context id is
/// 3, the host's 2.
///
/// A message of a `SOCK_SEQPACKET` socket can be as long as the receiver has room for: 256 KiB to the host, less when there
/// are more than a hundred connections (the guest's program then gets `EMSGSIZE`), and 256 KiB to the guest unless its
/// program sets `SO_VM_SOCKETS_BUFFER_SIZE`; but what the host's program sends must fit into its own `SO_SNDBUF` first
/// (`EMSGSIZE` from about 208 KiB on, by default). One that the receiver has no room for ends its connection.
///
/// A program of the host that sends much to the guest may gain by a larger buffer of its socket: `SO_SNDBUF` of 1 MiB, for
/// example.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vsock {
    /// Ports that are joined to unix sockets of this host.
    pub ports: Vec<VsockPort>,
}

impl Vsock {
    /// Connections of the guest to `port` of the host go to the unix socket at `path`, where a program of this host
    /// listens. The guest chooses the type of socket, and is refused where the program listens with another.
    #[must_use]
    pub fn connect(self, port: u32, path: impl Into<PathBuf>) -> Self {
        self.with(port, path, VsockDirection::FromGuest, VsockType::Stream)
    }

    /// A unix socket is created at `path`, and removed when the machine has ended; connections to it go to `port` of the
    /// guest, where a program of the guest listens. A socket that a program left behind there gives way.
    #[must_use]
    pub fn listen(self, port: u32, path: impl Into<PathBuf>) -> Self {
        self.with(port, path, VsockDirection::FromHost, VsockType::Stream)
    }

    /// The same with a socket of type `SOCK_SEQPACKET`, which keeps messages apart, here and in the guest.
    #[must_use]
    pub fn listen_seqpacket(self, port: u32, path: impl Into<PathBuf>) -> Self {
        self.with(port, path, VsockDirection::FromHost, VsockType::SeqPacket)
    }

    fn with(
        mut self,
        port: u32,
        path: impl Into<PathBuf>,
        direction: VsockDirection,
        socket: VsockType,
    ) -> Self {
        self.ports.push(VsockPort { port, path: path.into(), direction, socket });
        self
    }

    pub(crate) fn device(self) -> Result<Device, VsockError> {
        Device::new(VsockSpec { ports: self.ports, ..VsockSpec::default() })
    }
}
