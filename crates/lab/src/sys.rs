//! The child process and the processor's time stamp counter.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// Starts `command` with `inherited` open under the same numbers, in a process group of its own. It is
/// killed when the calling thread ends.
///
/// # Errors
/// This machine's.
pub fn spawn(command: &mut Command, inherited: Vec<OwnedFd>) -> io::Result<Child> {
    let numbers: Vec<RawFd> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    let parent = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: between fork and exec the closure makes system calls only, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            for number in &numbers {
                if libc::fcntl(*number, libc::F_SETFD, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the line above.
            if libc::getppid() != parent {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            Ok(())
        });
    }
    // A terminal's signals are for the caller, which passes on what it wants passed on.
    let child = command.process_group(0).spawn();
    drop(inherited);
    child
}

/// The time stamp counter that QEMU's emulation shows to its machine; `None`: it counts nanoseconds.
pub fn time_stamp() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction, and user programs may execute it unless the
    // kernel was told to forbid that for this process.
    return Some(unsafe { std::arch::x86_64::_rdtsc() });
    #[cfg(not(target_arch = "x86_64"))]
    None
}
