//! The memory balloon (virtio 1.2, section 5.5): memory that the guest does not use goes back to the host.
//!
//! - *Free page reporting*: the guest tells of free memory by itself, in blocks of 2 MiB and more, some
//!   seconds after it was freed. It may use it again at any time.
//! - *Inflating*: the host asks for an amount with [`BalloonHandle::set_target`]; the guest gives up pages
//!   one by one, and takes them back when told so or when it runs out of memory (deflate on OOM).
//! - *Free page hints*: the host asks which memory is free now, see [`BalloonHandle::free_ranges`].
//! - *Statistics* of the guest's memory, on request.

mod device;
#[cfg(any(test, feature = "mock"))]
mod fuzz;
mod handle;
mod state;
mod stats;
#[cfg(test)]
mod tests;

pub use device::Balloon;
#[cfg(any(test, feature = "mock"))]
#[doc(hidden)]
pub use fuzz::fuzz_one;
pub use handle::{BalloonError, BalloonHandle};
pub use state::BalloonState;
pub use stats::MemoryStats;

/// Bytes of a page as the balloon counts them, whatever the guest's pages are.
pub const PAGE: u64 = 4096;
