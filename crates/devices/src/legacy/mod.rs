//! Devices of the PC that predate virtio, as far as a kernel cannot do without them.

mod ports;
mod serial;

pub use ports::{Ports, Request};
pub use serial::{Serial, SerialError};
