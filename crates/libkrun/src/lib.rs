//! The libkrun 1.x C ABI over the Rust crate `krun`: C strings, errno, contexts, process exit.
//!
//! What each function does is told in `include/libkrun.h`. No function unwinds into the caller.

#![allow(unsafe_code)]
// The contract of every function is the C header's.
#![allow(clippy::missing_safety_doc, missing_docs)]

mod args;
mod console;
mod context;
mod disks;
mod files;
mod input;
mod later;
mod log;
mod machine;
mod net;
mod start;
mod vhost_user;
mod vsock;
mod workload;

#[cfg(test)]
mod tests;

use std::panic::{AssertUnwindSafe, catch_unwind};

/// A negative answer of the ABI, as a positive errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Errno(i32);

const E2BIG: Errno = Errno(libc::E2BIG);
const EINVAL: Errno = Errno(libc::EINVAL);
const EEXIST: Errno = Errno(libc::EEXIST);
const ENOENT: Errno = Errno(libc::ENOENT);
const ENOTDIR: Errno = Errno(libc::ENOTDIR);
const ENOTSUP: Errno = Errno(libc::ENOTSUP);

type Answer<T = i32> = Result<T, Errno>;

/// Runs one call: an error becomes `-errno`, a panic -EIO instead of unwinding into C.
fn answer(call: impl FnOnce() -> Answer) -> i32 {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => value,
        Ok(Err(Errno(code))) => -code,
        Err(_) => -libc::EIO,
    }
}
