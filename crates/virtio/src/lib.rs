//! Virtio 1.2: split queues, the device trait and the MMIO transport.
//!
//! A device owns what the bytes mean; the queue owns the rules of the ring; a transport owns the
//! registers. None of them knows the hypervisor: interrupts and doorbells are handed in as values.

mod bounce;
mod chain;
mod device;
#[cfg(any(test, feature = "mock"))]
#[doc(hidden)]
pub mod fuzz;
pub mod mmio;
#[cfg(any(test, feature = "mock"))]
#[doc(hidden)]
pub mod mock;
mod queue;
mod ring;
mod worker;

pub use bounce::{Bounce, Windows};
pub use chain::{Chain, Reader, Slices, Writer};
pub use device::{
    ConfigSpace, Cx, DeviceError, DeviceInfo, Interrupt, SharedMemory, ShmRegion, VirtioDevice,
};
pub use mmio::{MmioTransport, RegisterPage, RegisterPages, reg};
pub use queue::{Queue, QueueAddresses, QueueError, QueueState, RingPart};

/// Feature bits that belong to the transport and the ring (virtio 1.2, section 6).
pub mod feature {
    /// Drivers may use descriptors with the indirect flag.
    pub const RING_INDIRECT_DESC: u32 = 28;
    /// `used_event` and `avail_event` are in use.
    pub const RING_EVENT_IDX: u32 = 29;
    /// The device follows virtio 1.0 or later.
    pub const VERSION_1: u32 = 32;
}

#[cfg(test)]
mod tests;
