//! Signals of the calling thread.
#![allow(unsafe_code)]

/// Blocks `signal` on this thread. Returns whether it was blocked before.
pub(crate) fn block(signal: libc::c_int) -> bool {
    // SAFETY: both sets are initialised by `sigemptyset` before use and outlive the calls; the mask of
    // this thread alone changes.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        let mut before = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut set);
        libc::sigemptyset(&raw mut before);
        libc::sigaddset(&raw mut set, signal);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut before);
        libc::sigismember(&raw const before, signal) == 1
    }
}

/// Unblocks `signal` on this thread.
fn unblock(signal: libc::c_int) {
    // SAFETY: as in `block`; the earlier mask is not asked for.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// Runs `body` with `signal` blocked on this thread. Async-signal-safe if `body` is.
pub(crate) fn with_blocked<T>(signal: libc::c_int, body: impl FnOnce() -> T) -> T {
    let was_blocked = block(signal);
    let value = body();
    if !was_blocked {
        unblock(signal);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_is_as_before() {
        std::thread::spawn(|| {
            assert!(!block(libc::SIGUSR1));
            with_blocked(libc::SIGUSR1, || assert!(block(libc::SIGUSR1)));
            assert!(block(libc::SIGUSR1), "blocked before, so blocked after");
            with_blocked(libc::SIGUSR2, || assert!(block(libc::SIGUSR2)));
            assert!(!block(libc::SIGUSR2));
        })
        .join()
        .unwrap();
    }
}
