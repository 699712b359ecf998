//! Devices of the PC that predate virtio, as far as a kernel cannot do without them.

mod ports;
mod serial;

pub use ports::{Ports, Request};
#[cfg(any(test, feature = "mock"))]
#[doc(hidden)]
pub use serial::fuzz_one as fuzz_serial;
pub use serial::{Serial, SerialError};
