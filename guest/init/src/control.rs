//! The control port: the host's wishes, and news for it.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use krun_wire::{CONTROL_PORT, FrameReader, ToGuest, ToHost, encode_frame};
use rustix::event::PollFlags;
use rustix::io::Errno;

use crate::failure::Failure;
use crate::ports;
use crate::relay::{Backoff, Interest};

/// How long after the command's start the port is opened: opening it takes part of the processor's time,
/// and a command that ends sooner does not need it. What the host sends until then waits there.
const HEAD_START: Duration = Duration::from_millis(25);
/// How long the port may take to appear. Hosts without one exist.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes read at once.
const CHUNK: usize = 4096;

/// The port, in whatever state.
#[derive(Debug)]
enum State {
    Unopened(Backoff),
    Open(OwnedFd),
    Gone,
}

/// The conversation with the host.
#[derive(Debug)]
pub struct Control {
    state: State,
    reader: FrameReader,
    /// Bytes to send.
    outbox: Vec<u8>,
}

impl Control {
    /// A conversation that begins with the news that the command runs.
    pub fn new(started: i32) -> Self {
        Self {
            state: State::Unopened(Backoff::new(HEAD_START, PATIENCE)),
            reader: FrameReader::default(),
            outbox: encode_frame(&ToHost::Started { pid: started }),
        }
    }

    /// When to call [`Control::turn`] whatever happens.
    pub fn due(&self) -> Option<Duration> {
        if let State::Unopened(backoff) = &self.state { Some(backoff.due()) } else { None }
    }

    /// What to wait for.
    pub fn interest(&self) -> Option<Interest<'_>> {
        let State::Open(fd) = &self.state else { return None };
        let out = if self.outbox.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        Some(Interest { fd: fd.as_fd(), events: PollFlags::IN | out })
    }

    /// Opens the port if it is time, sends what can be sent, and gives back what arrived. An unreadable
    /// stream ends the conversation; the string says why.
    pub fn turn(&mut self) -> (Vec<ToGuest>, Option<String>) {
        if let State::Unopened(backoff) = &mut self.state {
            if !backoff.is_due() {
                return (Vec::new(), None);
            }
            match ports::open(CONTROL_PORT) {
                Ok(Some(fd)) => self.state = State::Open(fd),
                Ok(None) if backoff.again() => {}
                Ok(None) | Err(_) => self.state = State::Gone,
            }
        }
        self.send();
        self.receive()
    }

    fn send(&mut self) {
        let State::Open(fd) = &self.state else { return };
        while !self.outbox.is_empty() {
            match rustix::io::write(fd, &self.outbox) {
                Ok(n) => drop(self.outbox.drain(..n)),
                Err(Errno::INTR) => {}
                // Full, or closed: reading tells which.
                Err(_) => return,
            }
        }
    }

    fn receive(&mut self) -> (Vec<ToGuest>, Option<String>) {
        let (mut messages, mut chunk) = (Vec::new(), [0; CHUNK]);
        loop {
            let State::Open(fd) = &self.state else { return (messages, None) };
            match rustix::io::read(fd, &mut chunk) {
                Ok(n) if n > 0 => self.reader.push(&chunk[..n]),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return (messages, None),
                // Nobody is there any more.
                Ok(_) | Err(_) => self.state = State::Gone,
            }
            loop {
                match self.reader.next() {
                    Ok(Some(message)) => messages.push(message),
                    Ok(None) => break,
                    Err(e) => {
                        self.state = State::Gone;
                        return (messages, Some(format!("the control port is closed: {e}")));
                    }
                }
            }
        }
    }
}

/// Tells the host that the command could not be started. The port may not be there.
pub fn tell_failure(failure: &Failure) {
    let message = ToHost::Failed { status: failure.status, reason: failure.reason.clone() };
    if let Ok(Some(fd)) = ports::open(CONTROL_PORT) {
        // A port that does not take a few bytes has nobody behind it.
        let _ = rustix::io::write(&fd, &encode_frame(&message));
    }
}
