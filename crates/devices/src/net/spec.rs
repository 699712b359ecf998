//! What a network device is made from.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use super::feature;

/// A network device.
#[derive(Debug)]
pub struct NetSpec {
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// With whom frames are exchanged.
    pub peer: PeerSpec,
    /// What the peer takes on for the guest, or the guest for the peer. One that needs another one which is not
    /// there is left out.
    pub offloads: Offloads,
    /// Most pairs of queues, up to [`NetSpec::MAX_PAIRS`]: as many as the guest has processors. Only a tap interface
    /// has more than one, and only if it is made here or was made for several.
    pub pairs: u16,
}

impl NetSpec {
    /// More than this many pairs are of no use, as one thread serves them.
    pub const MAX_PAIRS: u16 = 8;
}

/// The other side.
#[derive(Debug)]
pub enum PeerSpec {
    /// A stream with the length of each frame before it, in 4 bytes, the highest first: passt, QEMU,
    /// socket_vmnet.
    Stream(Socket),
    /// Datagrams: gvproxy, vmnet-helper.
    Datagram {
        /// Where.
        socket: Socket,
        /// The peer at a path expects the datagram `VFKT` before all others.
        vfkit: bool,
    },
    /// A tap interface of this host, by its name. It is made if there is none and the host permits.
    Tap(String),
}

/// A unix socket.
#[derive(Debug)]
pub enum Socket {
    /// The peer listens here. A connection that is lost is made anew.
    Path(PathBuf),
    /// Connected already. When it is lost the network is gone.
    Fd(OwnedFd),
}

bitflags::bitflags! {
    /// Work on checksums and segments, with the numbers of virtio's feature bits.
    ///
    /// A peer on a unix socket gets frames with their checksums filled in. With one of the `HOST_*` it gets
    /// segments of up to 64 KiB, whatever the guest's MTU, as passt and gvproxy take them.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// The guest leaves checksums open.
        const CSUM = 1 << feature::CSUM;
        /// The guest takes frames whose checksum is open.
        const GUEST_CSUM = 1 << feature::GUEST_CSUM;
        /// The guest takes segments of TCP over IPv4 larger than its MTU.
        const GUEST_TSO4 = 1 << feature::GUEST_TSO4;
        /// The same over IPv6.
        const GUEST_TSO6 = 1 << feature::GUEST_TSO6;
        /// The guest takes datagrams of UDP larger than its MTU.
        const GUEST_UFO = 1 << feature::GUEST_UFO;
        /// The guest sends segments of TCP over IPv4 larger than its MTU.
        const HOST_TSO4 = 1 << feature::HOST_TSO4;
        /// The same over IPv6.
        const HOST_TSO6 = 1 << feature::HOST_TSO6;
        /// The guest sends datagrams of UDP larger than its MTU.
        const HOST_UFO = 1 << feature::HOST_UFO;
    }
}

impl Offloads {
    /// Without those that need one that is not there (virtio 1.2, section 5.1.3.1).
    pub(super) fn consistent(mut self) -> Self {
        if !self.contains(Self::CSUM) {
            self -= Self::HOST_TSO4 | Self::HOST_TSO6 | Self::HOST_UFO;
        }
        if !self.contains(Self::GUEST_CSUM) {
            self -= Self::GUEST_TSO4 | Self::GUEST_TSO6 | Self::GUEST_UFO;
        }
        self
    }
}

/// Why there is no network device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The peer cannot be reached.
    #[error("network: cannot connect to the {kind} socket {}: {source}; the peer has to listen there before the VM starts", path.display())]
    Connect {
        /// `stream` or `datagram`.
        kind: &'static str,
        /// Where.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The descriptor is something else.
    #[error("network: the descriptor is no unix {kind} socket{}", source.as_ref().map(|e| format!(": {e}")).unwrap_or_default())]
    NoSocket {
        /// `stream` or `datagram`.
        kind: &'static str,
        /// The host's answer, if it was one.
        source: Option<io::Error>,
    },
    /// The tap interface cannot be had.
    #[error(
        "network: cannot use the tap interface {name:?}: {source}; it needs CAP_NET_ADMIN, or an interface made for this user: ip tuntap add {name} mode tap user USER"
    )]
    Tap {
        /// Its name.
        name: String,
        /// The host's answer.
        source: io::Error,
    },
    /// No hardware address of one interface.
    #[error("network: {} is not the address of an interface: it is {}", show(mac), if mac[0] & 1 != 0 { "a multicast address" } else { "zero" })]
    Mac {
        /// The address.
        mac: [u8; 6],
    },
    /// The host has no room for the device.
    #[error("network: {source}")]
    Host {
        /// Its answer.
        source: io::Error,
    },
}

fn show(mac: &[u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}
