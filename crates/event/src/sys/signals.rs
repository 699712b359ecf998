//! Signals stay with the host program's threads.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

/// Runs `body` with every signal blocked on this thread. Threads that it starts inherit that, so that
/// the program's handlers never run on them.
pub fn with_signals_blocked<T>(body: impl FnOnce() -> T) -> T {
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both sets are valid for writing; sigfillset initialises `all` before it is read.
    let changed = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) == 0
    };
    let restore = Restore(changed.then_some(before));
    let value = body();
    drop(restore);
    value
}

struct Restore(Option<MaybeUninit<libc::sigset_t>>);

impl Drop for Restore {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // SAFETY: the set was filled in by the pthread_sigmask call that succeeded.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocked_mask(task: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{task}/status")).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("SigBlk:\t")).unwrap();
        u64::from_str_radix(line, 16).unwrap()
    }

    #[test]
    fn a_thread_started_inside_has_all_signals_blocked_and_the_caller_gets_its_mask_back() {
        let before = blocked_mask("thread-self");
        let inside =
            with_signals_blocked(|| std::thread::spawn(|| blocked_mask("thread-self"))).join().unwrap();
        // SIGTERM, SIGINT, SIGCHLD, SIGWINCH.
        for signal in [15, 2, 17, 28] {
            assert_ne!(inside & 1 << (signal - 1), 0, "{signal}");
        }
        assert_eq!(blocked_mask("thread-self"), before);
    }
}
