//! A virtio socket device (virtio 1.2, section 5.10): stream connections between ports of the guest and unix sockets of
//! this host, in both directions.
//!
//! A connection (`connection`) joins a pair of ports to a non-blocking stream socket and does not know where that
//! came from: the device makes it by connecting to a path (`connector`) or accepting from one (`listener`). Bytes go
//! between the socket and the guest's buffers without a copy, except for those that the socket does not take at once:
//! they are held, and the guest's credit (`credit`) bounds them.
//!
//! Nothing here waits. A socket is watched only for what can be done with it: not for reading while the guest has no
//! credit or no buffer to spare, nor for writing while nothing is held.

mod buffers;
mod connection;
mod connector;
mod credit;
mod device;
#[cfg(any(test, feature = "mock"))]
mod fuzz;
mod listener;
mod opening;
mod outgoing;
mod packet;
mod spec;
mod stream;
mod table;

pub use device::Vsock;
#[cfg(any(test, feature = "mock"))]
#[doc(hidden)]
pub use fuzz::fuzz_one;
pub use spec::{Direction, PortSpec, VsockError, VsockSpec};

#[cfg(test)]
mod tests;
