//! Network interfaces.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use krun_devices::net::{self, NetSpec, PeerSpec, Socket};
use krun_virtio::VirtioDevice;

pub use krun_devices::net::{NetError, Offloads};

use crate::{Error, VmConfig};

/// A network interface of the guest. The first one is `eth0`.
#[derive(Debug)]
pub struct Net {
    /// Where its frames go, and come from.
    pub peer: NetPeer,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Work that guest and peer take on for each other.
    pub offloads: Offloads,
    /// Init asks a DHCP server for its address, route and name servers before it runs the workload. Without an answer
    /// the workload runs all the same, some seconds later.
    pub dhcp: bool,
}

/// The other side of a network interface.
#[derive(Debug)]
pub enum NetPeer {
    /// A unix stream socket on which passt, socket_vmnet or another QEMU-style peer listens. When the connection is lost
    /// the guest's link goes down, and up again when the peer is back.
    Stream(PathBuf),
    /// The same, connected already. When it is lost the link stays down.
    StreamFd(OwnedFd),
    /// A unix datagram socket of gvproxy or vmnet-helper, connected again like a stream.
    Datagram {
        /// Where the peer listens. The VM's own socket is made beside it, and removed at the end.
        path: PathBuf,
        /// Send the four bytes `VFKT` first, as gvproxy wants it with `-listen-vfkit`.
        vfkit: bool,
    },
    /// The same, connected already.
    DatagramFd(OwnedFd),
    /// A tap interface of this host, by name. The guest has as many pairs of queues as processors, up to
    /// [`NetPeer::MAX_PAIRS`], unless the interface was made for one queue.
    Tap(String),
}

impl Net {
    /// An interface with DHCP and the offloads that suit every peer of its kind: all for a tap interface, none for
    /// others. `number` makes the hardware address one of its own: 52:54:00:6b:72:NN, which no other network device
    /// in the same network may have.
    pub fn new(peer: NetPeer, number: u8) -> Self {
        let offloads = if matches!(peer, NetPeer::Tap(_)) { Offloads::all() } else { Offloads::empty() };
        Self { peer, mac: [0x52, 0x54, 0, 0x6b, 0x72, number], offloads, dhcp: true }
    }
}

impl NetPeer {
    /// Most pairs of queues of an interface.
    pub const MAX_PAIRS: u16 = NetSpec::MAX_PAIRS;

    fn spec(self) -> PeerSpec {
        match self {
            Self::Stream(path) => PeerSpec::Stream(Socket::Path(path)),
            Self::StreamFd(fd) => PeerSpec::Stream(Socket::Fd(fd)),
            Self::Datagram { path, vfkit } => PeerSpec::Datagram { socket: Socket::Path(path), vfkit },
            Self::DatagramFd(fd) => PeerSpec::Datagram { socket: Socket::Fd(fd), vfkit: false },
            Self::Tap(name) => PeerSpec::Tap(name),
        }
    }
}

/// Names of the interfaces that init configures: the guest's kernel counts them in the order of the devices.
pub(crate) fn dhcp(nets: &[Net]) -> Vec<Vec<u8>> {
    let with_dhcp = nets.iter().enumerate().filter(|(_, net)| net.dhcp);
    with_dhcp.map(|(n, _)| format!("eth{n}").into_bytes()).collect()
}

/// The devices of all interfaces, in order.
pub(crate) fn devices(config: &mut VmConfig) -> Result<Vec<Box<dyn VirtioDevice>>, Error> {
    let pairs = config.vcpus.into();
    let device = |net: Net| -> Result<Box<dyn VirtioDevice>, Error> {
        let spec = NetSpec { mac: net.mac, peer: net.peer.spec(), offloads: net.offloads, pairs };
        Ok(Box::new(net::Net::new(spec)?))
    };
    config.nets.drain(..).map(device).collect()
}
