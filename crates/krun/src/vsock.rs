//! Sockets between the guest and this host.

use std::path::PathBuf;

use krun_devices::vsock::{Vsock as Device, VsockSpec};

pub use krun_devices::vsock::{Direction as VsockDirection, PortSpec as VsockPort, VsockError};

/// A socket device: programs of the guest use `AF_VSOCK` with stream sockets. The guest's context id is 3, the host's 2.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vsock {
    /// Ports that are joined to unix sockets of this host.
    pub ports: Vec<VsockPort>,
}

impl Vsock {
    /// Connections of the guest to `port` of the host go to the unix socket at `path`, where a program of this host
    /// listens.
    #[must_use]
    pub fn connect(self, port: u32, path: impl Into<PathBuf>) -> Self {
        self.with(port, path, VsockDirection::FromGuest)
    }

    /// A unix socket is created at `path`, and removed when the machine has ended; connections to it go to `port` of the
    /// guest, where a program of the guest listens. A socket that a program left behind there gives way.
    #[must_use]
    pub fn listen(self, port: u32, path: impl Into<PathBuf>) -> Self {
        self.with(port, path, VsockDirection::FromHost)
    }

    fn with(mut self, port: u32, path: impl Into<PathBuf>, direction: VsockDirection) -> Self {
        self.ports.push(VsockPort { port, path: path.into(), direction });
        self
    }

    pub(crate) fn device(self) -> Result<Device, VsockError> {
        Device::new(VsockSpec { ports: self.ports, ..VsockSpec::default() })
    }
}
