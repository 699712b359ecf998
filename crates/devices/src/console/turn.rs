//! In which order the guest learns of the terminals of several devices.
//!
//! Linux numbers terminals (`hvc0`, `hvc1`) as it finds them, and listens to several devices side by side. So a device
//! tells of its ports once the terminals of the device before it have their numbers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::sys::Timer;

/// How long a device waits for the one before it. A driver that takes the device into service and leaves its terminals
/// alone is none of Linux's, which needs some milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// At once, for a timer.
const NOW: Duration = Duration::from_nanos(1);

/// Whether the terminals of one device have their numbers. Clones are about the same device.
#[derive(Debug, Clone, Default)]
pub struct Numbered(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    numbered: bool,
    /// Of the devices that come next.
    waiting: Vec<Arc<Timer>>,
}

impl Numbered {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No method leaves the state half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// They have, or, after a reset, have not.
    pub(crate) fn set(&self, numbered: bool) {
        let mut state = self.lock();
        if numbered && !state.numbered {
            for timer in &state.waiting {
                if let Err(e) = timer.set(NOW) {
                    tracing::debug!("a console waits longer than it must: {e}");
                }
            }
        }
        state.numbered = numbered;
    }

    /// The turn of a device that comes after this one.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn next(&self) -> io::Result<Turn> {
        let timer = Arc::new(Timer::new()?);
        self.lock().waiting.push(Arc::clone(&timer));
        Ok(Turn { before: self.clone(), timer, wait: Wait::NotYet })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    NotYet,
    Waits,
    Over,
}

/// A device's turn. Its descriptor is readable when it has come, or was waited for long enough.
#[derive(Debug)]
pub struct Turn {
    before: Numbered,
    timer: Arc<Timer>,
    wait: Wait,
}

impl Turn {
    /// A driver takes the device into service: from the beginning.
    pub(crate) fn restart(&mut self) {
        self.wait = Wait::NotYet;
    }

    /// Whether it has come. The first call that says no begins the wait, which ends sooner or later.
    pub(crate) fn has_come(&mut self) -> io::Result<bool> {
        // Held meanwhile, or the other device could be done between the look and the timer.
        let before = self.before.lock();
        if before.numbered {
            self.wait = Wait::Over;
        } else if self.wait == Wait::NotYet {
            self.timer.set(PATIENCE)?;
            self.wait = Wait::Waits;
        }
        Ok(self.wait == Wait::Over)
    }

    /// After the descriptor was readable: the wait, if there was one, is over.
    pub(crate) fn look(&mut self) {
        self.timer.take();
        if self.wait == Wait::Waits {
            self.wait = Wait::Over;
        }
    }
}

impl AsFd for Turn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn is_ready(turn: &Turn, seconds: i64) -> bool {
        let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
        poll(&mut [PollFd::new(turn, PollFlags::IN)], Some(&time)).unwrap() > 0
    }

    #[test]
    fn who_comes_next_is_woken_and_need_not_wait_again() {
        let first = Numbered::default();
        let mut turns = [first.next().unwrap(), first.next().unwrap()];
        assert!(!turns[0].has_come().unwrap() && !turns[0].has_come().unwrap());
        assert!(!is_ready(&turns[0], 0));
        first.set(true);
        assert!(is_ready(&turns[0], 20));
        turns[0].look();
        assert!(turns[0].has_come().unwrap());
        // One that had not asked is told the same.
        assert!(turns[1].has_come().unwrap());
        // What was once is not what is now.
        first.set(false);
        assert!(turns[0].has_come().unwrap());
        turns[0].restart();
        assert!(!turns[0].has_come().unwrap());
    }

    #[test]
    fn no_wait_lasts_for_ever() {
        let first = Numbered::default();
        let mut turn = first.next().unwrap();
        assert!(!turn.has_come().unwrap() && is_ready(&turn, 20));
        turn.look();
        assert!(turn.has_come().unwrap());
    }
}
