//! Level-triggered readiness of descriptors.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use polling::{Event, Events, PollMode, Poller};

/// What to wait for on a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Data to read, a peer that closed, or an error.
    Read,
    /// Room to write, or an error.
    Write,
    /// Both.
    Both,
}

/// A descriptor that became ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// The token it was registered with.
    pub token: u64,
    /// Reading will not block (or will report the error or end).
    pub readable: bool,
    /// Writing will not block (or will report the error).
    pub writable: bool,
}

/// Waits for several descriptors at once, level-triggered: one that stays ready is reported again.
#[derive(Debug)]
pub struct Poll {
    poller: Poller,
    events: Events,
}

impl Poll {
    /// Creates an empty set.
    ///
    /// # Errors
    /// The host's reason, in practice that no descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { poller: Poller::new()?, events: Events::new() })
    }

    /// Adds `fd` under `token`. The caller removes it with [`Poll::remove`] before it closes it.
    ///
    /// # Errors
    /// A descriptor that cannot be waited for (a regular file, for one) or is there already.
    #[allow(unsafe_code)]
    pub fn add(&self, fd: &impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        let raw = fd.as_fd().as_raw_fd();
        // SAFETY: the descriptor is open now. Should the caller close it without `remove`, epoll and
        // kqueue drop it from the set by themselves; no memory is at stake.
        unsafe { self.poller.add_with_mode(raw, event(token, interest), PollMode::Level) }
    }

    /// Changes what is waited for.
    ///
    /// # Errors
    /// The descriptor was not added.
    pub fn modify(&self, fd: &impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        self.poller.modify_with_mode(fd.as_fd(), event(token, interest), PollMode::Level)
    }

    /// Removes `fd`.
    ///
    /// # Errors
    /// The descriptor was not added.
    pub fn remove(&self, fd: &impl AsFd) -> io::Result<()> {
        self.poller.delete(fd.as_fd())
    }

    /// Waits until a descriptor is ready or `timeout` has passed (`None`: for ever) and appends what
    /// is ready to `out`.
    ///
    /// # Errors
    /// The host's reason; an interrupted wait is repeated.
    pub fn wait(&mut self, out: &mut Vec<Ready>, timeout: Option<Duration>) -> io::Result<()> {
        self.events.clear();
        loop {
            match self.poller.wait(&mut self.events, timeout) {
                Ok(_) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        out.extend(self.events.iter().map(|e| Ready {
            token: e.key as u64,
            readable: e.readable,
            writable: e.writable,
        }));
        Ok(())
    }
}

fn event(token: u64, interest: Interest) -> Event {
    let key = token as usize;
    match interest {
        Interest::Read => Event::readable(key),
        Interest::Write => Event::writable(key),
        Interest::Both => Event::all(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Wake;

    #[test]
    fn stays_ready_until_taken() {
        let (w, mut p, mut out) = (Wake::new().unwrap(), Poll::new().unwrap(), Vec::new());
        p.add(&w, 7, Interest::Read).unwrap();
        w.wake();
        for _ in 0..2 {
            p.wait(&mut out, None).unwrap();
        }
        assert_eq!(out.len(), 2);
        assert_eq!((out[0].token, out[0].readable), (7, true));
        w.take();
        p.wait(&mut out, Some(Duration::ZERO)).unwrap();
        assert_eq!(out.len(), 2);
    }
}
