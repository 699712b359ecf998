//! What this host can do.

use std::path::PathBuf;

use krun_hv::Platform;
pub use krun_hv::{Finding, Probe, nested_virtualisation, probe};

use crate::Error;
use crate::boot::BootError;
use crate::boot::kernel::bundle::Bundle;
use crate::spec::MAX_VCPUS;

/// The largest number of vCPUs that a machine can have here.
///
/// # Errors
/// The hypervisor cannot be used.
pub fn max_vcpus() -> Result<u32, Error> {
    Ok(Platform::open()?.max_vcpus().min(MAX_VCPUS))
}

/// Where the kernel library is that a machine boots if none is named.
///
/// # Errors
/// Where it was looked for, and how to get one.
pub fn bundle() -> Result<PathBuf, Error> {
    Ok(Bundle::load(None).map_err(BootError::from)?.path)
}
