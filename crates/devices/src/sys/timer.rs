//! A timer that can be watched like any descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// Readable once its time has come, until [`Timer::take`].
#[derive(Debug)]
pub struct Timer(OwnedFd);

impl Timer {
    /// Creates one that is not set.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Sets it to `after`, which is not zero, from now, whether or not it was set.
    ///
    /// # Errors
    /// None in practice.
    pub fn set(&self, after: Duration) -> io::Result<()> {
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let time = Timespec {
            tv_sec: after.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: after.subsec_nanos().into(),
        };
        timerfd_settime(
            &self.0,
            TimerfdTimerFlags::empty(),
            &Itimerspec { it_interval: never, it_value: time },
        )?;
        Ok(())
    }

    /// Has it not be due, even if it was already.
    pub fn disarm(&self) {
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let spec = Itimerspec { it_interval: never, it_value: never };
        if let Err(e) = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &spec) {
            tracing::warn!(errno = e.raw_os_error(), "a timer is not disarmed");
        }
    }

    /// Clears it.
    pub fn take(&self) {
        let mut count = [0; 8];
        // Nothing to read: it was not due.
        let _ = rustix::io::read(&self.0, &mut count);
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
