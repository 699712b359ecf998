//! What keeps a machine from starting.

use std::io;

use crate::board::BoardError;
use crate::boot::BootError;
use crate::spec::SpecError;

/// A machine that did not start. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value that no machine can have.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// What does not fit into the address space or has no interrupt line.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The hypervisor.
    #[error(transparent)]
    Hypervisor(#[from] krun_hv::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] krun_memory::Error),
    /// Kernel or initramfs cannot be brought into guest memory.
    #[error("cannot load {len} bytes at {at:#x}: {source}")]
    Load {
        /// Guest physical address.
        at: u64,
        /// Bytes.
        len: u64,
        /// The reason.
        source: io::Error,
    },
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] krun_devices::legacy::SerialError),
    /// A device's doorbells.
    #[error("device {name}: {source}")]
    Device {
        /// The device.
        name: String,
        /// The host's reason.
        source: io::Error,
    },
    /// The host refused a thread.
    #[error("cannot start a thread for vCPU {id}: {source}")]
    Thread {
        /// Which vCPU.
        id: u32,
        /// The host's reason.
        source: io::Error,
    },
    /// A vCPU's thread died before it ran.
    #[error("the thread of vCPU {id} ended before it ran")]
    Lost {
        /// Which vCPU.
        id: u32,
    },
}
