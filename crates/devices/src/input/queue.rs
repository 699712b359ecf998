//! Events from this program.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use krun_event::Wake;

use super::{InputEvent, InputSource};

/// Most events that wait, in each direction.
const LIMIT: usize = 4096;

/// The guest is slow, or has no driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{LIMIT} input events wait for the guest already")]
pub struct QueueFull;

#[derive(Debug, Default)]
struct Events {
    to_guest: VecDeque<InputEvent>,
    from_guest: VecDeque<InputEvent>,
}

#[derive(Debug)]
struct Shared {
    events: Mutex<Events>,
    wake: Wake,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Events> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives events to an input device, from any thread. Clones give to the same one.
#[derive(Debug, Clone)]
pub struct InputSender {
    shared: Arc<Shared>,
}

/// What an [`InputSender`] gives to.
#[derive(Debug)]
pub struct Queue {
    shared: Arc<Shared>,
}

impl Queue {
    /// A queue and its sender.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> io::Result<(Self, InputSender)> {
        let shared = Arc::new(Shared { events: Mutex::default(), wake: Wake::new()? });
        Ok((Self { shared: Arc::clone(&shared) }, InputSender { shared }))
    }
}

impl InputSender {
    /// Gives `events` to the guest, all or none. A group that belongs together ends with `EV_SYN`, all zeroes.
    ///
    /// # Errors
    /// [`QueueFull`].
    pub fn send(&self, events: &[InputEvent]) -> Result<(), QueueFull> {
        let mut inner = self.shared.lock();
        if inner.to_guest.len() + events.len() > LIMIT {
            return Err(QueueFull);
        }
        inner.to_guest.extend(events);
        self.shared.wake.wake();
        Ok(())
    }

    /// The oldest event that the guest has sent, such as a light to be switched; those that are not fetched are
    /// forgotten after a while.
    pub fn receive(&self) -> Option<InputEvent> {
        self.shared.lock().from_guest.pop_front()
    }
}

impl InputSource for Queue {
    fn ready(&self) -> io::Result<BorrowedFd<'_>> {
        Ok(self.shared.wake.as_fd())
    }

    fn next(&mut self) -> io::Result<Option<InputEvent>> {
        let mut inner = self.shared.lock();
        let event = inner.to_guest.pop_front();
        if event.is_none() {
            self.shared.wake.take();
        }
        Ok(event)
    }

    fn send(&mut self, event: InputEvent) {
        let mut inner = self.shared.lock();
        if inner.from_guest.len() == LIMIT {
            inner.from_guest.pop_front();
        }
        inner.from_guest.push_back(event);
    }
}
