//! A virtio socket device (virtio 1.2, section 5.10): connections between ports of the guest and unix sockets of this host,
//! in both directions, of streams and of messages (`SOCK_SEQPACKET`).
//!
//! A connection (`connection`) joins a pair of ports to a non-blocking socket of the same type and does not know where that
//! came from: the device makes it by connecting to a path (`connector`) or accepting from one (`listener`). Bytes go
//! between the socket and the guest's buffers without a copy, except for those that the socket does not take at once:
//! they are held (`held`), and the guest's credit (`credit`) bounds them.
//!
//! A message from the guest is held until its end has come, and is then sent as a whole. One for the guest stays in the
//! socket until the guest has all of it, so it costs no memory here however slowly the guest takes it.
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
mod held;
mod listener;
mod opening;
mod outgoing;
mod packet;
mod socket;
mod spec;
mod table;

pub use device::{Vsock, VsockHandle};
#[cfg(any(test, feature = "mock"))]
#[doc(hidden)]
pub use fuzz::fuzz_one;
pub use spec::{Direction, PortSpec, SocketType, VsockError, VsockSpec};

#[cfg(test)]
mod tests;
