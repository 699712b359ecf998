//! A driver for tests: rings in guest memory, a harness that runs a device step by step, and one that
//! goes through the registers as a guest would.
//!
//! These are tools for tests: what a driver may not do, or a device must not, ends in a panic.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod echo;
mod harness;
mod mmio;
mod queue;

use krun_memory::{GuestAddress, GuestMemory, Mapping, Memfd};

pub use echo::Echo;
pub use harness::Harness;
pub use mmio::MmioDriver;
#[cfg(test)]
pub(crate) use mmio::page;
pub use queue::{Buffer, DriverQueue, Used};

/// Where the test memory starts; below it nothing is memory.
pub const BASE: u64 = 0x10_0000;
/// Bytes of guest memory for each queue: its ring and its buffers.
pub const QUEUE_SPACE: u64 = 16 << 20;

/// Guest memory of `len` bytes from [`BASE`]; pages cost nothing until touched.
pub fn memory(len: u64) -> GuestMemory {
    let mapping = Mapping::anonymous(len as usize).unwrap();
    krun_memory::assemble(&[(GuestAddress(BASE), mapping)]).unwrap()
}

/// Guest memory with room for `queues` queues, in a file if another process is to see it.
fn queue_memory(queues: usize, shared: bool) -> GuestMemory {
    let len = QUEUE_SPACE * queues.max(1) as u64;
    if !shared {
        return memory(len);
    }
    // Not at its beginning, which would hide a mistake.
    let file = Memfd::new(len + 4096).unwrap();
    krun_memory::assemble(&[(GuestAddress(BASE), file.map(4096, len as usize).unwrap())]).unwrap()
}
