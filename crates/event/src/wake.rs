//! A wake-up that any thread, or the kernel, can give.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

/// Where `preadv2` reads as `readv` does.
const AT_POSITION: u64 = u64::MAX;

/// A counter with a descriptor that is readable while it is not zero (an eventfd). Clones share it.
///
/// That its calls do not block is a flag of the open file, which each process that was handed the descriptor can
/// clear. From then on [`Self::wake`] may block, when the counter is at its limit, and [`Self::take`], when it is zero:
/// what may be in the hands of another process is for [`Self::wake_shared`] and [`Self::take_shared`].
#[derive(Debug, Clone)]
pub struct Wake {
    fd: Arc<OwnedFd>,
}

impl Wake {
    /// Creates one that is not set.
    ///
    /// # Errors
    /// The host's reason, in practice that no descriptor is left.
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { fd: Arc::new(fd) })
    }

    /// Sets it. Never blocks: a counter at its limit is set already.
    pub fn wake(&self) {
        // EAGAIN means the counter is full, so the reader is due to wake anyway.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// [`Self::wake`] where another process has the descriptor. A counter that it left at its limit does not block
    /// this, whatever it did to the flags. The host has no write that cannot block whatever the flags are, so a process
    /// that changes flags and counter all the time can still hit the moment between the check and the write.
    pub fn wake_shared(&self) {
        if fcntl_setfl(&self.fd, OFlags::NONBLOCK).is_ok() && self.is_ready(PollFlags::OUT) {
            self.wake();
        }
    }

    /// [`Self::take`] where another process has the descriptor: never blocks, whatever that does to it.
    pub fn take_shared(&self) -> bool {
        let mut count = [0u8; 8];
        loop {
            let buffers = &mut [IoSliceMut::new(&mut count)];
            match preadv2(&self.fd, buffers, AT_POSITION, ReadWriteFlags::NOWAIT) {
                Ok(_) => return true,
                Err(Errno::INTR) => {}
                // A host before Linux 5.8.
                Err(Errno::OPNOTSUPP) => {
                    let ready = fcntl_setfl(&self.fd, OFlags::NONBLOCK).is_ok();
                    return ready && self.is_ready(PollFlags::IN) && self.take();
                }
                Err(_) => return false,
            }
        }
    }

    fn is_ready(&self, events: PollFlags) -> bool {
        let mut fds = [PollFd::new(&self.fd, events)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|n| n > 0) && fds[0].revents().contains(events)
    }

    /// Clears it; true when it was set.
    pub fn take(&self) -> bool {
        let mut count = [0u8; 8];
        loop {
            match rustix::io::read(&self.fd, &mut count) {
                Ok(_) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Wake {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_wakes_are_taken_at_once() {
        let w = Wake::new().unwrap();
        assert!(!w.take());
        w.wake();
        w.clone().wake();
        assert!(w.take());
        assert!(!w.take());
    }

    #[test]
    fn who_has_the_descriptor_too_cannot_make_it_block() {
        use std::sync::mpsc;
        use std::time::Duration;

        let (done, returned) = mpsc::channel();
        // On a thread of its own, or a mistake would hang the test for ever.
        std::thread::spawn(move || {
            let w = Wake::new().unwrap();
            let theirs = rustix::io::dup(&w).unwrap();
            let blocking = || fcntl_setfl(&theirs, OFlags::empty()).unwrap();
            let mut seen = Vec::new();
            blocking();
            seen.push(w.take_shared());
            w.wake_shared();
            blocking();
            seen.push(w.take_shared());
            rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            blocking();
            w.wake_shared();
            seen.push(w.take_shared());
            blocking();
            seen.push(w.take_shared());
            done.send(seen).unwrap();
        });
        let seen = returned.recv_timeout(Duration::from_secs(20)).expect("no call blocks");
        assert_eq!(seen, [false, true, true, false]);
    }
}
