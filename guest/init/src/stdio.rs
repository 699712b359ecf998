//! What the command's standard streams are.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use krun_wire::{STDIO_PORTS, Stdio};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::failure::Failure;
use crate::log::uptime;
use crate::ports;
use crate::relay::{Backoff, Input, Output, Patience};
use crate::sys::standard_stream;

/// How long a port may look closed when it is not known how the host announces ports.
const GRACE: Duration = Duration::from_millis(50);
/// How long the terminal may take to appear.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where streams go that have no port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    Console,
    /// `/dev/hvcN`.
    Terminal(u32),
    Null,
}

/// Which streams go where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    rest: Rest,
    /// Bit n: stream n has a port.
    ports: u8,
    /// How long a port may look closed at first.
    grace: Duration,
}

impl Plan {
    /// As the host said.
    pub fn given(stdio: Stdio) -> Self {
        let (rest, ports) = match stdio {
            Stdio::Console => (Rest::Console, 0),
            Stdio::Terminal { number, ports } => (Rest::Terminal(number), ports),
            Stdio::Ports(ports) => (Rest::Null, ports),
        };
        Self { rest, ports, grace: Duration::ZERO }
    }

    /// Ports for the streams that have one by now, the console for the others.
    pub fn discovered() -> Self {
        Self { rest: Rest::Console, ports: ports::existing(&STDIO_PORTS), grace: GRACE }
    }

    fn has_port(self, stream: usize) -> bool {
        self.ports & 1 << stream != 0
    }

    /// Tells the user something where the command's errors would have gone.
    pub fn complain(self, text: &str) {
        let line = format!("krun: {text}\n");
        let written = if self.has_port(2) {
            say_to_port(line.as_bytes())
        } else if let Rest::Terminal(number) = self.rest {
            terminal(number, Duration::from_millis(100))
                .and_then(|fd| write_all(&fd, line.as_bytes()))
                .is_ok()
        } else {
            false
        };
        if !written {
            let _ = write_all(&standard_stream(2), line.as_bytes());
        }
    }
}

/// Writes to the port of standard error, waiting a little for it to appear and to take the text.
fn say_to_port(line: &[u8]) -> bool {
    let mut backoff = Backoff::new(Duration::ZERO, Duration::from_secs(1));
    loop {
        match ports::open(STDIO_PORTS[2]) {
            Ok(Some(fd)) => return rustix::io::write(&fd, line).is_ok(),
            Ok(None) if backoff.again() => pause_until(backoff.due()),
            _ => return false,
        }
    }
}

/// Sleeps until a time of [`uptime`].
fn pause_until(due: Duration) {
    std::thread::sleep(due.saturating_sub(uptime()));
}

/// Opens a port that the command itself will use.
fn open_port(name: &str) -> Result<OwnedFd, Errno> {
    let mut backoff = Backoff::new(Duration::ZERO, PATIENCE);
    loop {
        match ports::open(name) {
            Ok(Some(fd)) => {
                rustix::io::ioctl_fionbio(&fd, false)?;
                return Ok(fd);
            }
            Ok(None) if backoff.again() => pause_until(backoff.due()),
            Ok(None) => return Err(Errno::NODEV),
            Err(e) => return Err(Errno::from_io_error(&e).unwrap_or(Errno::IO)),
        }
    }
}

fn write_all(fd: &impl AsFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn terminal(number: u32, patience: Duration) -> Result<OwnedFd, Errno> {
    let path = format!("/dev/hvc{number}");
    let mut backoff = Backoff::new(Duration::ZERO, patience);
    loop {
        match rustix::fs::open(&path, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()) {
            // The device file may be there before there is a console behind it.
            Err(Errno::NOENT | Errno::NODEV | Errno::NXIO) if backoff.again() => pause_until(backoff.due()),
            other => return other,
        }
    }
}

/// The command's streams and init's ends of them.
#[derive(Debug)]
pub struct Streams {
    /// What becomes descriptors 0 to 2 of the command.
    pub command: [RawFd; 3],
    /// Owns those of `command` that init does not need once the command has them.
    handed_over: Vec<OwnedFd>,
    /// The terminal, unless it is the console.
    own_terminal: Option<OwnedFd>,
    /// The stream that is the console, for the command to control.
    console: Option<RawFd>,
    /// Standard input from a port.
    pub input: Option<Input>,
    /// Standard output and error to ports.
    pub outputs: Vec<Output>,
}

impl Streams {
    /// Opens what `plan` says. Standard input's port is opened `head_start` from now. With `direct` the ports themselves become the streams, not pipes: for a
    /// command that takes init's place, so that nobody is left to connect the two.
    ///
    /// # Errors
    /// 125: the terminal or a port does not appear, or there is no `/dev/null`.
    pub fn open(plan: Plan, head_start: Duration, direct: bool) -> Result<Self, Failure> {
        let fail =
            |what: &str, e: Errno| Failure::setup(format!("The command's standard streams: {what}: {e}."));
        let mut streams = Self {
            command: [0, 1, 2],
            handed_over: Vec::new(),
            own_terminal: None,
            console: None,
            input: None,
            outputs: Vec::new(),
        };
        let patience = Patience { head_start, grace: plan.grace };
        let has_rest = (0..3).any(|stream| !plan.has_port(stream));
        let rest = match plan.rest {
            Rest::Console => None,
            Rest::Terminal(number) => {
                let fd = terminal(number, PATIENCE).map_err(|e| fail(&format!("hvc{number}"), e))?;
                Some(streams.own_terminal.insert(fd).as_raw_fd())
            }
            Rest::Null if has_rest => {
                let fd = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|e| fail("/dev/null", e))?;
                let raw = fd.as_raw_fd();
                streams.handed_over.push(fd);
                Some(raw)
            }
            Rest::Null => None,
        };
        for (stream, name) in STDIO_PORTS.into_iter().enumerate() {
            if !plan.has_port(stream) {
                match rest {
                    Some(fd) => streams.command[stream] = fd,
                    None => streams.console = RawFd::try_from(stream).ok(),
                }
                continue;
            }
            let pipe = |e| fail("no pipe", e);
            let end = if direct {
                open_port(name).map_err(|e| fail(name, e))?
            } else if stream == 0 {
                let (input, end) = Input::new(name, patience).map_err(pipe)?;
                streams.input = Some(input);
                end
            } else {
                let (output, end) = Output::new(name, patience).map_err(pipe)?;
                streams.outputs.push(output);
                end
            };
            streams.command[stream] = end.as_raw_fd();
            streams.handed_over.push(end);
        }
        Ok(streams)
    }

    /// Streams that the caller connects itself: `command` are numbers of descriptors in `ends`, or of the
    /// terminal.
    pub fn prepared(command: [RawFd; 3], ends: Vec<OwnedFd>, terminal: Option<OwnedFd>) -> Self {
        let (console, input, outputs) = (None, None, Vec::new());
        Self { command, handed_over: ends, own_terminal: terminal, console, input, outputs }
    }

    /// The terminal for the command to control. It may turn out to be none: the console can be anything.
    pub fn terminal(&self) -> Option<BorrowedFd<'_>> {
        let own = self.own_terminal.as_ref().map(AsFd::as_fd);
        own.or_else(|| self.console.map(standard_stream))
    }

    /// Closes what only the command needs now: otherwise its pipes would never end.
    pub fn hand_over(&mut self) {
        self.handed_over.clear();
    }

    /// Waits until the terminal has taken all that was written to it.
    pub fn drain_terminal(&self) {
        if let Some(terminal) = self.terminal() {
            let _ = rustix::termios::tcdrain(terminal);
        }
    }

    /// Gives the streams to a user, who may want to open them again by name.
    pub fn give_to(&self, uid: u32) {
        let owner = Some(rustix::fs::Uid::from_raw(uid));
        for fd in self.handed_over.iter().chain(&self.own_terminal) {
            // `/dev/null` may stay as it is; a refusal for the others costs the user that one ability.
            if rustix::fs::fstat(fd).is_ok_and(|s| s.st_rdev != NULL_DEVICE) {
                let _ = rustix::fs::fchown(fd, owner, None);
            }
        }
    }
}

/// `/dev/null` is device 1:3.
const NULL_DEVICE: u64 = 1 << 8 | 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_become_pipes_and_the_rest_is_null() {
        let streams = Streams::open(Plan::given(Stdio::Ports(0b101)), Duration::ZERO, false).unwrap();
        assert!(streams.input.is_some() && streams.outputs.len() == 1 && streams.terminal().is_none());
        assert_eq!(streams.handed_over.len(), 3);
        assert!(streams.command.iter().all(|fd| *fd > 2), "{:?}", streams.command);
    }

    #[test]
    fn the_console_is_left_as_it_is() {
        let streams = Streams::open(Plan::given(Stdio::Console), Duration::ZERO, false).unwrap();
        assert_eq!((streams.command, streams.console), ([0, 1, 2], Some(2)));
        assert!(streams.handed_over.is_empty());
    }

    #[test]
    fn the_null_device_has_this_number() {
        let stat = rustix::fs::stat("/dev/null").unwrap();
        assert_eq!(stat.st_rdev, NULL_DEVICE);
    }
}
