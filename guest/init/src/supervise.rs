//! What process 1 does while the command runs: reap, pass on signals and streams, keep leases, watch the end.

use std::os::fd::OwnedFd;
use std::time::Duration;

use krun_wire::ToGuest;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, WaitOptions, WaitStatus};

use crate::control::Control;
use crate::log::{Log, uptime};
use crate::net::Network;
use crate::relay::Interest;
use crate::stdio::Streams;
use crate::sys;

/// How long processes that outlive the command may take to die once they are killed. One that sleeps
/// in the kernel may never do so.
const DEATH: Duration = Duration::from_secs(2);

/// How long output may still go out after everything was killed.
const LAST_WORDS: Duration = Duration::from_millis(250);

/// The state of the command and of init's duties.
pub struct Supervisor<'a> {
    command: Pid,
    /// Its exit status, once it has ended.
    status: Option<i32>,
    /// No process is left but this one.
    alone: bool,
    signals: OwnedFd,
    streams: &'a mut Streams,
    network: Network,
    control: Control,
    /// When to kill everything, as the host wants.
    kill_at: Option<Duration>,
    /// When to stop handing over output, as follows from that.
    drain_until: Option<Duration>,
    log: &'a mut Log,
}

/// A command's exit status as shells tell it.
fn status_of(status: WaitStatus) -> Option<i32> {
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal))
}

impl<'a> Supervisor<'a> {
    /// Takes over right after the command's start. `signals` tells of children's ends.
    pub fn new(
        command: Pid,
        signals: OwnedFd,
        streams: &'a mut Streams,
        network: Network,
        log: &'a mut Log,
    ) -> Self {
        let control = Control::new(command.as_raw_nonzero().get());
        Self {
            command,
            status: None,
            alone: false,
            signals,
            streams,
            network,
            control,
            kill_at: None,
            drain_until: None,
            log,
        }
    }

    /// Runs until the command has ended and its output is with the host; gives back its exit status.
    pub fn run(mut self) -> i32 {
        let status = loop {
            if let Some(status) = self.status {
                break status;
            }
            self.turn();
        };
        self.end_others();
        self.streams.input = None;
        // The host may take the rest of the output as slowly as it likes, unless it wants the end.
        while !self.outputs_are_drained() && self.drain_until.is_none_or(|at| uptime() < at) {
            self.turn();
        }
        self.streams.drain_terminal();
        status
    }

    fn outputs_are_drained(&self) -> bool {
        self.streams.outputs.iter().all(crate::relay::Output::is_drained)
    }

    /// Waits for something to happen and does what follows from it.
    fn turn(&mut self) {
        // In this order: the signals, the outputs, then the input's pipe and port, then the control port.
        let (signals, outputs, pipe) = self.wait();
        if !signals.is_empty() {
            self.reap();
        }
        for (output, events) in self.streams.outputs.iter_mut().zip(outputs) {
            output.turn(events);
        }
        if let Some(input) = &mut self.streams.input {
            input.turn(pipe);
        }
        let (messages, trouble) = self.control.turn();
        for message in messages {
            self.obey(&message);
        }
        if let Some(trouble) = trouble {
            self.log.say(&trouble);
        }
        self.network.turn(self.log);
        if self.kill_at.is_some_and(|at| uptime() >= at) {
            self.kill_at = None;
            sys::signal_everyone(libc::SIGKILL);
        }
    }

    /// The events of the signals' descriptor, of each output, and of the input's pipe.
    fn wait(&self) -> (PollFlags, Vec<PollFlags>, PollFlags) {
        fn add<'a>(fds: &mut Vec<PollFd<'a>>, interest: Option<Interest<'a>>) -> Option<usize> {
            let Interest { fd, events } = interest?;
            fds.push(PollFd::from_borrowed_fd(fd, events));
            Some(fds.len() - 1)
        }
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        let outputs: Vec<_> = self.streams.outputs.iter().map(|o| add(&mut fds, o.interest())).collect();
        let pipe = self.streams.input.as_ref().and_then(|input| {
            let [pipe, port] = input.interests();
            add(&mut fds, port);
            add(&mut fds, pipe)
        });
        add(&mut fds, self.control.interest());
        // Looked at in any case.
        fds.extend(self.network.sockets().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let timeout = self.next_due().map(|due| timespec(due.saturating_sub(uptime())));
        if poll(&mut fds, timeout.as_ref()).is_err() {
            // Interrupted: nothing is known, and the next turn asks again.
            return (PollFlags::empty(), vec![PollFlags::empty(); outputs.len()], PollFlags::empty());
        }
        let events = |at: Option<usize>| at.map_or(PollFlags::empty(), |n| fds[n].revents());
        (fds[0].revents(), outputs.into_iter().map(events).collect(), events(pipe))
    }

    fn next_due(&self) -> Option<Duration> {
        let outputs = self.streams.outputs.iter().filter_map(crate::relay::Output::due);
        let input = self.streams.input.as_ref().and_then(crate::relay::Input::due);
        let drain = self.drain_until.filter(|_| self.status.is_some());
        outputs
            .chain(input)
            .chain(self.kill_at)
            .chain(drain)
            .chain(self.control.due())
            .chain(self.network.due())
            .min()
    }

    /// Collects every child that has ended.
    fn reap(&mut self) {
        let mut info = [0; 128];
        while rustix::io::read(&self.signals, &mut info).is_ok() {}
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.command => self.status = status_of(status),
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
            let mut fds = [PollFd::new(&self.signals, PollFlags::IN)];
            let _ = poll(&mut fds, Some(&timespec(deadline.saturating_sub(uptime()))));
            self.reap();
        }
    }

    fn obey(&mut self, message: &ToGuest) {
        match *message {
            ToGuest::Signal(number) if self.status.is_none() => {
                // Those that a terminal sends reach the whole group, as they would from a terminal.
                let group = matches!(
                    number,
                    libc::SIGINT
                        | libc::SIGQUIT
                        | libc::SIGHUP
                        | libc::SIGTSTP
                        | libc::SIGCONT
                        | libc::SIGWINCH
                );
                sys::signal(self.command, group, number);
            }
            ToGuest::Signal(_) => {}
            ToGuest::Shutdown { grace_ms } => {
                if self.status.is_none() {
                    sys::signal(self.command, true, libc::SIGTERM);
                    // A stopped process would not notice.
                    sys::signal(self.command, true, libc::SIGCONT);
                }
                let at = uptime() + Duration::from_millis(grace_ms.into());
                let at = self.kill_at.map_or(at, |earlier| earlier.min(at));
                self.kill_at = Some(at);
                self.drain_until = Some(at + LAST_WORDS);
            }
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}
