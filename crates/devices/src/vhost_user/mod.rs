//! Devices whose other half is another process, spoken to by the vhost-user protocol (QEMU:
//! docs/interop/vhost-user.rst).
//!
//! The process maps the guest's memory and serves the queues itself: a driver's notification goes from the host's
//! kernel to it, and its interrupt back, without this process. What is left here is to tell it where everything is, to
//! pass the configuration space on, and to see that it is there. It is trusted with the guest's memory, and with
//! nothing of this process: what it answers is checked, and it must answer in time.

mod backend;
mod channel;
mod device;
#[cfg(any(test, feature = "mock"))]
mod fuzz;
mod kind;
mod message;
mod requests;
mod session;
mod spec;
#[cfg(test)]
mod tests;

pub use channel::ChannelError;
pub use device::{VhostUser, VhostUserHandle};
#[cfg(any(test, feature = "mock"))]
#[doc(hidden)]
pub use fuzz::fuzz_back_end;
pub use kind::{DeviceKind, KindError};
pub use message::Request;
pub use spec::{MAX_QUEUES, VhostUserError, VhostUserSpec};
