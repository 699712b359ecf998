//! How many of this process's descriptors guests may have.

use std::os::fd::RawFd;

use rustix::process::{Resource, getrlimit};

/// Descriptors that a guest's doings opened have numbers below the first of these, and those that are kept only to save
/// work have numbers below the second. The lowest free number is always the one given out, so a higher one tells that
/// the process, whatever else it does, has nearly as many descriptors as it may have.
///
/// An eighth of the process's limit of open files is left alone, and half is not for what could be opened again.
pub(crate) fn descriptors_for_guests() -> (RawFd, RawFd) {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
    let limit = RawFd::try_from(limit).unwrap_or(RawFd::MAX);
    let spared = (limit / 8).clamp(16, 1024);
    (limit.saturating_sub(spared), limit / 2)
}
