//! While the command runs: its streams, its signals, its end.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use krun_wire::host::{ToHostRole, WindowSize};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, WaitStatus};
use rustix::pty::OpenptFlags;
use rustix::termios::{Winsize, tcsetwinsize};

use super::channel::Channel;
use super::pump::Pump;
use crate::failure::Failure;
use crate::log::uptime;
use crate::relay::Interest;
use crate::spawn::Command;
use crate::stdio::Streams;
use crate::sys;

/// How long processes that outlive the command may take to die once they are killed.
const DEATH: Duration = Duration::from_secs(2);
/// What a terminal takes as the end of its input.
const END_OF_INPUT: u8 = 4;

/// The ports of the command's streams.
#[derive(Debug)]
pub struct Ports {
    /// Standard input, or what is typed.
    pub input: OwnedFd,
    /// Standard output (or what the terminal shows) and error.
    pub outputs: [OwnedFd; 2],
}

/// What the command's streams are.
#[derive(Debug)]
pub struct Plan {
    /// A terminal of this size; `None`: pipes.
    pub terminal: Option<WindowSize>,
    /// Standard error is a pipe even so.
    pub error_apart: bool,
}

/// A running command.
#[derive(Debug)]
pub struct Session {
    command: Pid,
    status: Option<i32>,
    /// No process is left but this one.
    alone: bool,
    signals: OwnedFd,
    input: Option<Pump>,
    outputs: Vec<Pump>,
    /// The side of the terminal that is not the command's.
    terminal: Option<OwnedFd>,
    /// Keeps the command's side of the terminal open: what was printed last would go with it.
    _streams: Streams,
}

fn fail(what: &'static str) -> impl Fn(Errno) -> Failure {
    move |e| Failure::setup(format!("The command's standard streams: {what}: {e}."))
}

/// The command's ends of its streams, and the pumps that serve them.
struct Wiring {
    streams: Streams,
    input: Pump,
    outputs: Vec<Pump>,
    terminal: Option<OwnedFd>,
}

impl Wiring {
    fn pipes(ports: Ports) -> Result<Self, Failure> {
        let (input, to_input) = pipe_with(PipeFlags::CLOEXEC).map_err(fail("no pipe"))?;
        rustix::io::ioctl_fionbio(&to_input, true).map_err(fail("no pipe"))?;
        let (mut ends, mut outputs) = (vec![input], Vec::new());
        for port in ports.outputs {
            let (end, pump) = output_pipe(port)?;
            ends.push(end);
            outputs.push(pump);
        }
        let numbers = [ends[0].as_raw_fd(), ends[1].as_raw_fd(), ends[2].as_raw_fd()];
        let streams = Streams::prepared(numbers, ends, None);
        Ok(Self { streams, input: Pump::copying(ports.input, to_input), outputs, terminal: None })
    }

    fn terminal(ports: Ports, size: WindowSize, error_apart: bool) -> Result<Self, Failure> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = rustix::pty::openpt(flags).map_err(fail("no terminal"))?;
        rustix::pty::unlockpt(&ours).map_err(fail("no terminal"))?;
        let name = rustix::pty::ptsname(&ours, Vec::new()).map_err(fail("no terminal"))?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let theirs = rustix::fs::open(&name, flags, Mode::empty()).map_err(fail("no terminal"))?;
        resize(&ours, size);
        rustix::io::ioctl_fionbio(&ours, true).map_err(fail("no terminal"))?;
        let copy = || rustix::io::fcntl_dupfd_cloexec(&ours, 3).map_err(fail("no terminal"));
        let [output, error] = ports.outputs;
        let (input, mut outputs) =
            (Pump::copying(ports.input, copy()?), vec![Pump::copying(copy()?, output)]);
        let (mut numbers, mut ends) = ([theirs.as_raw_fd(); 3], Vec::new());
        if error_apart {
            let (end, pump) = output_pipe(error)?;
            numbers[2] = end.as_raw_fd();
            ends.push(end);
            outputs.push(pump);
        }
        let streams = Streams::prepared(numbers, ends, Some(theirs));
        Ok(Self { streams, input, outputs, terminal: Some(ours) })
    }
}

/// A pipe's end for the command, and the pump from it to a port.
fn output_pipe(port: OwnedFd) -> Result<(OwnedFd, Pump), Failure> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(fail("no pipe"))?;
    rustix::io::ioctl_fionbio(&read, true).map_err(fail("no pipe"))?;
    Ok((write, Pump::splicing(read, port)))
}

fn resize(terminal: &OwnedFd, size: WindowSize) {
    let size = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    // A size that cannot be set is no reason to end a session.
    let _ = tcsetwinsize(terminal, size);
}

/// A command's exit status as shells tell it.
fn status_of(status: WaitStatus) -> Option<i32> {
    status.exit_status().or_else(|| status.terminating_signal().map(|n| 128 + n))
}

/// What was waited for, in order: signals, messages, the input's two ends, each output's two ends.
struct Woken {
    signals: bool,
    messages: bool,
    input: [PollFlags; 2],
    outputs: Vec<[PollFlags; 2]>,
}

impl Session {
    /// Starts the command.
    ///
    /// # Errors
    /// 125 to 127, as [`Command::start`].
    pub fn start(command: &Command, ports: Ports, plan: &Plan) -> Result<Self, Failure> {
        let wiring = match plan.terminal {
            None => Wiring::pipes(ports),
            Some(size) => Wiring::terminal(ports, size, plan.error_apart),
        }?;
        let Wiring { mut streams, input, outputs, terminal } = wiring;
        let signals = sys::child_signals()
            .map_err(|e| Failure::setup(format!("Init cannot learn of its children's ends: {e}.")))?;
        let pid = command.start(&streams)?;
        streams.hand_over();
        let (status, alone, input) = (None, false, Some(input));
        Ok(Self { command: pid, status, alone, signals, input, outputs, terminal, _streams: streams })
    }

    /// Serves the command until it has ended and the ports have taken its output; gives back its status
    /// and how much they took.
    ///
    /// # Errors
    /// The host is gone.
    pub fn run(mut self, channel: &mut Channel) -> Result<(i32, [u64; 2]), Failure> {
        let status = loop {
            if let Some(status) = self.status {
                break status;
            }
            self.turn(channel)?;
        };
        self.input = None;
        self.end_others();
        while !self.outputs.iter().all(Pump::is_empty) {
            self.turn(channel)?;
        }
        let sent = |n: usize| self.outputs.get(n).map_or(0, Pump::moved);
        Ok((status, [sent(0), sent(1)]))
    }

    /// Runs the command with `console` as its output, and nothing as its input; gives back its status.
    ///
    /// # Errors
    /// 125 to 127, as [`Command::start`].
    pub fn on_console(command: &Command, console: &OwnedFd) -> Result<i32, Failure> {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(fail("/dev/null"))?;
        let numbers = [null.as_raw_fd(), console.as_raw_fd(), console.as_raw_fd()];
        let pid = command.start(&Streams::prepared(numbers, vec![null], None))?;
        loop {
            match rustix::process::wait(WaitOptions::empty()) {
                Ok(Some((ended, status))) if ended == pid => {
                    if let Some(status) = status_of(status) {
                        return Ok(status);
                    }
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(fail("waiting for the command")(e)),
            }
        }
    }

    fn turn(&mut self, channel: &mut Channel) -> Result<(), Failure> {
        let woken = self.wait(channel);
        if woken.signals {
            self.reap();
        }
        for (output, events) in self.outputs.iter_mut().zip(woken.outputs) {
            output.turn(events);
        }
        if let Some(input) = &mut self.input
            && input.turn(woken.input)
        {
            self.input = None;
            if let Some(terminal) = &self.terminal {
                let _ = rustix::io::write(terminal, &[END_OF_INPUT]);
            }
        }
        if woken.messages {
            for message in channel.receive()? {
                self.obey(message);
            }
        }
        Ok(())
    }

    fn wait(&self, channel: &Channel) -> Woken {
        fn add<'a>(fds: &mut Vec<PollFd<'a>>, interest: Option<Interest<'a>>) -> Option<usize> {
            let Interest { fd, events } = interest?;
            fds.push(PollFd::from_borrowed_fd(fd, events));
            Some(fds.len() - 1)
        }
        let mut fds = vec![
            PollFd::new(&self.signals, PollFlags::IN),
            PollFd::from_borrowed_fd(channel.port(), PollFlags::IN),
        ];
        let nothing = [None, None];
        let input = self.input.as_ref().map_or(nothing, |i| i.interests().map(|x| add(&mut fds, x)));
        let outputs: Vec<_> = self.outputs.iter().map(|o| o.interests().map(|x| add(&mut fds, x))).collect();
        let known = poll(&mut fds, None).is_ok();
        let events = |at: Option<usize>| match at {
            Some(n) if known => fds[n].revents(),
            _ => PollFlags::empty(),
        };
        Woken {
            signals: !events(Some(0)).is_empty(),
            messages: !events(Some(1)).is_empty(),
            input: input.map(events),
            outputs: outputs.into_iter().map(|pair| pair.map(events)).collect(),
        }
    }

    /// Collects every child that has ended.
    fn reap(&mut self) {
        let mut info = [0; 128];
        while rustix::io::read(&self.signals, &mut info).is_ok() {}
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.command => {
                    self.status = status_of(status);
                }
                Ok(Some(_)) => {}
                Ok(None) => return,
                // No children, and every process is a descendant of this one.
                Err(_) => {
                    self.alone = true;
                    return;
                }
            }
        }
    }

    /// Kills what outlives the command, and waits until it has closed its files.
    fn end_others(&mut self) {
        self.reap();
        if self.alone {
            return;
        }
        sys::signal_everyone(libc::SIGKILL);
        let deadline = uptime() + DEATH;
        while !self.alone && uptime() < deadline {
            let rest = deadline.saturating_sub(uptime());
            let seconds = i64::try_from(rest.as_secs()).unwrap_or(i64::MAX);
            let rest = Timespec { tv_sec: seconds, tv_nsec: rest.subsec_nanos().into() };
            let _ = poll(&mut [PollFd::new(&self.signals, PollFlags::IN)], Some(&rest));
            self.reap();
        }
    }

    fn obey(&mut self, message: ToHostRole) {
        match message {
            ToHostRole::Signal(number) if self.status.is_none() => {
                // Those that a terminal sends reach the whole group, as they would from a terminal.
                let group = matches!(
                    number,
                    libc::SIGINT | libc::SIGQUIT | libc::SIGHUP | libc::SIGTSTP | libc::SIGCONT
                );
                sys::signal(self.command, group, number);
            }
            ToHostRole::Resize(size) => {
                if let Some(terminal) = &self.terminal {
                    resize(terminal, size);
                }
            }
            ToHostRole::Signal(_) | ToHostRole::Part(_) | ToHostRole::Run(_) => {}
        }
    }
}
