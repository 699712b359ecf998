//! Network devices (virtio 1.2, section 5.1): Ethernet frames between the guest and a peer on the host.
//!
//! A [`NetSpec`] names the peer: a user-mode network such as passt or gvproxy on a unix socket, or a tap
//! interface. Frames are copied, so that neither side can change one that was looked at: from the guest's
//! buffers into a buffer of the peer's, and back. What a peer sends waits with the peer while the guest has no
//! room for it, and what the guest sends waits in its queue while the peer is slow.

mod checksum;
mod config;
mod control;
mod device;
#[cfg(any(test, feature = "mock"))]
mod fuzz;
mod header;
mod pair;
mod peer;
mod receive;
mod spec;
mod sys;
#[cfg(test)]
mod tests;
mod transmit;

pub use device::Net;
#[cfg(any(test, feature = "mock"))]
#[doc(hidden)]
pub use fuzz::{fuzz_guest, fuzz_peer};
pub use spec::{NetError, NetSpec, Offloads, PeerSpec, Socket};

/// Bytes of an Ethernet header.
const ETHERNET_HEADER: usize = 14;
/// Longest frame: an IP packet of the largest length that its header can say, with a VLAN tag before it.
const MAX_FRAME: usize = ETHERNET_HEADER + 4 + 65535;

/// Feature bits of the device (virtio 1.2, section 5.1.3).
mod feature {
    pub const CSUM: u32 = 0;
    pub const GUEST_CSUM: u32 = 1;
    pub const MAC: u32 = 5;
    pub const GUEST_TSO4: u32 = 7;
    pub const GUEST_TSO6: u32 = 8;
    pub const GUEST_UFO: u32 = 10;
    pub const HOST_TSO4: u32 = 11;
    pub const HOST_TSO6: u32 = 12;
    pub const HOST_UFO: u32 = 14;
    pub const MRG_RXBUF: u32 = 15;
    pub const STATUS: u32 = 16;
    pub const CTRL_VQ: u32 = 17;
    pub const MQ: u32 = 22;
}

/// Says that something was left out: at its first, second, fourth, eighth time and so on, as a guest or a peer
/// may do it all the time.
#[derive(Debug, Default)]
struct Complaint(u64);

impl Complaint {
    fn about(&mut self, what: &dyn std::fmt::Display) {
        self.0 += 1;
        if self.0.is_power_of_two() {
            tracing::warn!("network: {what} ({} so far)", self.0);
        }
    }
}
