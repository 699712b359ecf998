//! The block device (virtio 1.2, section 5.2): a disk from an image of this host.
//!
//! A request becomes a job; jobs run beside the device's thread, by io_uring or on threads of their own, and
//! own the guest's buffers until they are done. A reset waits for them. What the host cannot do is an I/O
//! error for the guest, which may try again.

mod config;
mod device;
mod engine;
mod format;
#[cfg(any(test, feature = "mock"))]
mod fuzz;
mod image;
mod pool;
mod raw;
mod request;
mod spec;
mod sys;
#[cfg(test)]
mod tests;

pub use device::{Block, BlockHandle};
#[cfg(any(test, feature = "mock"))]
#[doc(hidden)]
pub use fuzz::fuzz_one;
pub use spec::{BlockError, BlockSpec, DiskFormat, SyncMode};
