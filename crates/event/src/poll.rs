//! Level-triggered readiness of descriptors.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

/// Descriptors that one wait tells of; others that are ready come with the next.
const AT_ONCE: usize = 64;
/// What makes a descriptor readable, and what writable. An end and an error are told in any case.
const READABLE: EventFlags = EventFlags::IN.union(EventFlags::PRI).union(ENDED);
const WRITABLE: EventFlags = EventFlags::OUT.union(ENDED);
const ENDED: EventFlags = EventFlags::HUP.union(EventFlags::ERR);

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

/// Waits for several descriptors at once, level-triggered: one that stays ready is reported again. A wait is one call of
/// the host and no more, which counts in a device that sleeps after each request.
#[derive(Debug)]
pub struct Poll {
    epoll: OwnedFd,
}

impl Poll {
    /// Creates an empty set.
    ///
    /// # Errors
    /// The host's reason, in practice that no descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)? })
    }

    /// Adds `fd` under `token`. The caller removes it with [`Poll::remove`] before it closes it; the host drops one that
    /// was closed, once no copy of it is open.
    ///
    /// # Errors
    /// A descriptor that cannot be waited for (a regular file, for one) or is there already.
    pub fn add(&self, fd: &impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(token), flags(interest))?)
    }

    /// Changes what is waited for.
    ///
    /// # Errors
    /// The descriptor was not added.
    pub fn modify(&self, fd: &impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, EventData::new_u64(token), flags(interest))?)
    }

    /// Removes `fd`.
    ///
    /// # Errors
    /// The descriptor was not added.
    pub fn remove(&self, fd: &impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    /// Waits until a descriptor is ready or `timeout` has passed (`None`: for ever) and appends what
    /// is ready to `out`.
    ///
    /// # Errors
    /// The host's reason; an interrupted wait is repeated.
    pub fn wait(&mut self, out: &mut Vec<Ready>, timeout: Option<Duration>) -> io::Result<()> {
        // One that is longer than the host can say is none.
        let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
        let mut room = [MaybeUninit::<Event>::uninit(); AT_ONCE];
        let events = loop {
            match epoll::wait(&self.epoll, &mut room[..], timeout.as_ref()) {
                Ok((events, _)) => break events,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        };
        out.extend(events.iter().map(|event| {
            // Copied, as the event's fields are not aligned.
            let (flags, data) = (event.flags, event.data);
            Ready {
                token: data.u64(),
                readable: flags.intersects(READABLE),
                writable: flags.intersects(WRITABLE),
            }
        }));
        Ok(())
    }
}

fn flags(interest: Interest) -> EventFlags {
    match interest {
        Interest::Read => READABLE,
        Interest::Write => WRITABLE,
        Interest::Both => READABLE | WRITABLE,
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

    #[test]
    fn what_is_waited_for_is_told() {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let (mut p, mut out) = (Poll::new().unwrap(), Vec::new());
        let mut wait = |p: &mut Poll| {
            out.clear();
            p.wait(&mut out, Some(Duration::from_millis(1))).unwrap();
            out.first().map(|r| (r.token, r.readable, r.writable))
        };
        p.add(&a, u64::MAX, Interest::Read).unwrap();
        assert_eq!(wait(&mut p), None);
        assert_eq!(p.add(&a, 1, Interest::Read).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        p.modify(&a, 2, Interest::Write).unwrap();
        assert_eq!(wait(&mut p), Some((2, false, true)));
        p.modify(&a, 3, Interest::Both).unwrap();
        drop(b);
        assert_eq!(wait(&mut p), Some((3, true, true)));
        p.remove(&a).unwrap();
        assert_eq!(wait(&mut p), None);
        assert!(p.remove(&a).is_err());
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(p.add(&file, 1, Interest::Read).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn more_than_one_wait_tells_come_with_the_next() {
        let (mut p, mut out) = (Poll::new().unwrap(), Vec::new());
        let wakes: Vec<_> = (0..AT_ONCE + 1).map(|_| Wake::new().unwrap()).collect();
        for (n, w) in wakes.iter().enumerate() {
            p.add(w, n as u64, Interest::Read).unwrap();
            w.wake();
        }
        let mut left = wakes.len();
        while left > 0 {
            out.clear();
            p.wait(&mut out, Some(Duration::from_secs(10))).unwrap();
            assert!(!out.is_empty());
            left -= out.iter().filter(|r| wakes[r.token as usize].take()).count();
        }
    }
}
