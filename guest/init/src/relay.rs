//! Pipes between the command and ports of the console device.
//!
//! A port's device file can be open only once, so a program could not open `/dev/stdout` if it were one;
//! and a writer to a port whose host side is gone waits for ever or gets `ENODEV` instead of `SIGPIPE`.
//! With a pipe in between everything is as on any other system. Data is not copied on its way out: the
//! pipe's pages are moved to the device. And since the pipe takes the first bytes, ports are opened only
//! when there is something to send, after the command was started: opening one is a conversation
//! with the host, which a short command need not wait for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};

use crate::log::uptime;
use crate::ports;

/// Most bytes moved at once.
const CHUNK: usize = 64 * 1024;
/// Most chunks moved before others get a turn.
const CHUNKS_PER_TURN: usize = 16;
/// How long a port that was promised may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at such a port.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Waits that grow: for things that appear on their own and cannot be waited for otherwise.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
    step: Duration,
    give_up: Duration,
}

impl Backoff {
    /// The first try is due after `first`, the last one `patience` later at the latest.
    pub fn new(first: Duration, patience: Duration) -> Self {
        let now = uptime();
        Self { next: now + first, step: Duration::from_millis(1), give_up: now + first + patience }
    }

    /// When the next try is due.
    pub fn due(&self) -> Duration {
        self.next
    }

    /// Whether a try is due now.
    pub fn is_due(&self) -> bool {
        uptime() >= self.next
    }

    /// Sets the next try. `false`: there was the last one.
    pub fn again(&mut self) -> bool {
        let now = uptime();
        self.next = now + self.step;
        self.step = (self.step * 2).min(Duration::from_millis(100));
        now < self.give_up
    }
}

/// Times that depend on the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Patience {
    /// How long after the start the port of standard input is opened. That takes some of the processor's
    /// time, and a command that has ended by then did not need it.
    pub head_start: Duration,
    /// How long a port may look closed after it was opened. Some hosts announce its name before they
    /// announce that it is connected.
    pub grace: Duration,
}

/// Opens a port by its name; tests have other ways.
type Opener = fn(&str) -> io::Result<Option<OwnedFd>>;

/// The host's end.
#[derive(Debug)]
enum Port {
    Unopened {
        open: Opener,
        backoff: Backoff,
        grace: Duration,
    },
    Open {
        fd: OwnedFd,
        /// Something went through, or it was seen to block.
        connected: bool,
        /// Until when it may look closed without being so.
        grace_ends: Duration,
    },
    Gone,
}

impl Port {
    fn new(open: Opener, after: Duration, grace: Duration) -> Self {
        Self::Unopened { open, backoff: Backoff::new(after, PATIENCE), grace }
    }

    /// Opens it if it can be opened now.
    fn open(&mut self, name: &str) {
        let Self::Unopened { open, backoff, grace } = self else { return };
        if !backoff.is_due() {
            return;
        }
        match open(name) {
            Ok(Some(fd)) => *self = Self::Open { fd, connected: false, grace_ends: uptime() + *grace },
            Ok(None) if backoff.again() => {}
            Ok(None) | Err(_) => *self = Self::Gone,
        }
    }

    /// It may look closed only because the host has not said yet that it is open.
    fn may_be_early(&self) -> bool {
        matches!(self, Self::Open { connected: false, grace_ends, .. } if uptime() < *grace_ends)
    }
}

/// Something to wait for.
#[derive(Debug)]
pub struct Interest<'a> {
    /// The descriptor.
    pub fd: BorrowedFd<'a>,
    /// Which of its events.
    pub events: PollFlags,
}

/// The command's standard output or error.
#[derive(Debug)]
pub struct Output {
    name: &'static str,
    /// The end that is read; `None` once all is sent or nobody takes any more.
    pipe: Option<OwnedFd>,
    port: Port,
    /// The port is full.
    full: bool,
    /// The pipe has bytes for a port that is not open yet.
    waiting: bool,
}

impl Output {
    /// Makes a pipe to the port `name`; also gives the end for the command.
    pub fn new(name: &'static str, patience: Patience) -> Result<(Self, OwnedFd), Errno> {
        Self::with_opener(name, ports::open, patience)
    }

    fn with_opener(name: &'static str, open: Opener, patience: Patience) -> Result<(Self, OwnedFd), Errno> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&read, true)?;
        Ok((
            Self {
                name,
                pipe: Some(read),
                port: Port::new(open, Duration::ZERO, patience.grace),
                full: false,
                waiting: false,
            },
            write,
        ))
    }

    /// What to wait for now.
    pub fn interest(&self) -> Option<Interest<'_>> {
        let pipe = self.pipe.as_ref()?;
        match &self.port {
            Port::Open { .. } if self.full && self.port.may_be_early() => None,
            Port::Open { fd, .. } if self.full => Some(Interest { fd: fd.as_fd(), events: PollFlags::OUT }),
            Port::Unopened { .. } if self.waiting => None,
            _ => Some(Interest { fd: pipe.as_fd(), events: PollFlags::IN }),
        }
    }

    /// When to call [`Output::turn`] whatever happens.
    pub fn due(&self) -> Option<Duration> {
        match &self.port {
            Port::Unopened { backoff, .. } if self.waiting => Some(backoff.due()),
            _ => (self.full && self.port.may_be_early()).then(|| uptime() + LOOK_AGAIN),
        }
    }

    /// Moves what can be moved; `events` are those of [`Output::interest`].
    pub fn turn(&mut self, events: PollFlags) {
        if self.full {
            if events.contains(PollFlags::OUT) || self.port.may_be_early() {
                self.full = false;
            } else {
                if events.intersects(PollFlags::HUP | PollFlags::ERR) {
                    // Dropping the pipe is what tells the command: SIGPIPE, or EPIPE.
                    self.pipe = None;
                }
                return;
            }
        } else if self.waiting || events.contains(PollFlags::IN) {
            self.port.open(self.name);
            self.waiting = matches!(self.port, Port::Unopened { .. });
        } else if events.intersects(PollFlags::HUP | PollFlags::ERR) {
            // Every end of the command's is closed. So the host sees the end too.
            *self = Self { pipe: None, port: Port::Gone, ..*self };
            return;
        }
        self.send();
    }

    fn send(&mut self) {
        let Some(pipe) = &self.pipe else { return };
        let (fd, connected) = match &mut self.port {
            Port::Open { fd, connected, .. } => (fd, connected),
            Port::Unopened { .. } => return,
            Port::Gone => {
                self.pipe = None;
                return;
            }
        };
        for _ in 0..CHUNKS_PER_TURN {
            match splice(pipe, None, &*fd, None, CHUNK, SpliceFlags::NONBLOCK | SpliceFlags::MOVE) {
                Ok(0) => return,
                Ok(_) => *connected = true,
                // Either the pipe is empty or the port is full.
                Err(Errno::AGAIN) => {
                    self.full = rustix::io::ioctl_fionread(pipe).is_ok_and(|n| n > 0);
                    return;
                }
                Err(Errno::INTR) => {}
                Err(_) => {
                    self.pipe = None;
                    return;
                }
            }
        }
    }

    /// Whether everything that was written has been handed over.
    pub fn is_drained(&self) -> bool {
        self.pipe.as_ref().is_none_or(|pipe| rustix::io::ioctl_fionread(pipe).is_ok_and(|n| n == 0))
    }
}

/// The command's standard input.
#[derive(Debug)]
pub struct Input {
    name: &'static str,
    port: Port,
    /// The end that is written; `None` once the input has ended or nobody reads.
    pipe: Option<OwnedFd>,
    buffer: Vec<u8>,
    /// What of the buffer came from the port and is not in the pipe yet.
    pending: std::ops::Range<usize>,
}

impl Input {
    /// Makes a pipe from the port `name`; also gives the end for the command.
    pub fn new(name: &'static str, patience: Patience) -> Result<(Self, OwnedFd), Errno> {
        Self::with_opener(name, ports::open, patience)
    }

    fn with_opener(name: &'static str, open: Opener, patience: Patience) -> Result<(Self, OwnedFd), Errno> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&write, true)?;
        let port = Port::new(open, patience.head_start, patience.grace);
        Ok((Self { name, port, pipe: Some(write), buffer: Vec::new(), pending: 0..0 }, read))
    }

    /// What to wait for now: the pipe, then the port.
    pub fn interests(&self) -> [Option<Interest<'_>>; 2] {
        let Some(pipe) = &self.pipe else { return [None, None] };
        let full = !self.pending.is_empty();
        let events = if full { PollFlags::OUT } else { PollFlags::empty() };
        let pipe = Some(Interest { fd: pipe.as_fd(), events });
        let port = match &self.port {
            // A port that is not connected would report that all the time.
            Port::Open { fd, .. } if !full && !self.port.may_be_early() => {
                Some(Interest { fd: fd.as_fd(), events: PollFlags::IN })
            }
            _ => None,
        };
        [pipe, port]
    }

    /// When to call [`Input::turn`] whatever happens.
    pub fn due(&self) -> Option<Duration> {
        self.pipe.as_ref()?;
        match &self.port {
            Port::Unopened { backoff, .. } => Some(backoff.due()),
            port => port.may_be_early().then(|| uptime() + LOOK_AGAIN),
        }
    }

    /// Moves what can be moved; `pipe` are the events of [`Input::interests`]' pipe.
    pub fn turn(&mut self, pipe: PollFlags) {
        if pipe.contains(PollFlags::ERR) {
            // Nobody reads any more. Closing the port makes the host stop as well.
            self.end();
        }
        if self.pipe.is_none() {
            return;
        }
        self.port.open(self.name);
        for _ in 0..CHUNKS_PER_TURN {
            if (self.pending.is_empty() && !self.receive()) || !self.pass_on() {
                return;
            }
        }
    }

    fn end(&mut self) {
        self.pipe = None;
        self.port = Port::Gone;
        self.buffer = Vec::new();
        self.pending = 0..0;
    }

    /// Fills the buffer. `false`: there is nothing now, or nothing any more.
    fn receive(&mut self) -> bool {
        let early = self.port.may_be_early();
        let Port::Open { fd, connected, .. } = &mut self.port else {
            if matches!(self.port, Port::Gone) {
                self.end();
            }
            return false;
        };
        self.buffer.resize(CHUNK, 0);
        let (mut len, mut ended) = (0, false);
        // A read gives one buffer of the driver's at most, a page.
        while len < CHUNK {
            match rustix::io::read(&*fd, &mut self.buffer[len..]) {
                Ok(0) => {
                    ended = !early;
                    break;
                }
                Ok(n) => len += n,
                Err(Errno::AGAIN) => {
                    *connected = true;
                    break;
                }
                Err(Errno::INTR) => {}
                Err(_) => {
                    ended = true;
                    break;
                }
            }
        }
        *connected |= len > 0;
        self.pending = 0..len;
        if len == 0 && ended {
            self.end();
        }
        len > 0
    }

    /// Empties the buffer into the pipe. `false`: the pipe is full or gone.
    fn pass_on(&mut self) -> bool {
        while !self.pending.is_empty() {
            let Some(pipe) = &self.pipe else { return false };
            match rustix::io::write(pipe, &self.buffer[self.pending.clone()]) {
                Ok(n) => self.pending.start += n,
                Err(Errno::AGAIN) => return false,
                Err(Errno::INTR) => {}
                Err(_) => {
                    self.end();
                    return false;
                }
            }
        }
        true
    }
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;
