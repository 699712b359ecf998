//! From a description to a running virtual machine.
//!
//! ```text
//! Spec ──▶ Board ──▶ BootImage ──▶ Running ──▶ Outcome
//! what     where     memory and    vCPUs and   how it
//! is       it is     registers     devices     ended
//! wanted
//! ```
//! Each step but the last two is a plain value that can be printed and checked without a hypervisor.

pub mod board;
pub mod boot;
mod error;
pub mod host;
mod run;
pub mod spec;
mod sys;

pub use error::Error;
pub use krun_event::with_signals_blocked;
pub use krun_hv::ExitCounts;
pub use run::{Machine, Outcome, Running};
pub use spec::{Entry, Kernel, KernelFormat, SerialSpec, Spec, SpecError};

/// Loads the kernel library that [`Kernel::Bundle`] without a path means, for good: a later start finds it
/// even when the file system or this process's view of it has changed.
///
/// # Errors
/// None was found, or it cannot be used.
pub fn preload_bundle() -> Result<(), Error> {
    boot::kernel::bundle::Bundle::load(None).map_err(boot::BootError::from)?;
    Ok(())
}
