//! A running VM.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use krun_devices::balloon::BalloonHandle;
use krun_devices::block::BlockHandle;
use krun_devices::fs::ExitCode;
use krun_devices::tty::RawTerminal;
use krun_machine::{ExitCounts, Machine, Outcome, Running};
use krun_wire::{FrameReader, ToGuest, ToHost, encode_frame};

use crate::assemble::{Parts, assemble};
use crate::{Error, VmConfig};

/// How the workload ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus(u8);

impl ExitStatus {
    /// The workload's code, or 128 + the number of the signal that killed it; 125 when the guest could
    /// not be set up, 126 when the program cannot be executed, 127 when it was not found.
    pub fn code(self) -> i32 {
        i32::from(self.0)
    }

    /// Whether the code is 0.
    pub fn success(self) -> bool {
        self.0 == 0
    }
}

/// A virtual machine that was started. Dropping it ends the machine.
///
/// All methods may be called from any thread.
#[derive(Debug)]
pub struct Vm {
    running: Running,
    exit_code: Arc<ExitCode>,
    control: Option<Mutex<UnixStream>>,
    consoles: Vec<krun_devices::console::ConsoleHandle>,
    vhost_user: Vec<krun_devices::vhost_user::VhostUserHandle>,
    vsock: Option<krun_devices::vsock::VsockHandle>,
    pub(crate) balloon: Option<BalloonHandle>,
    pub(crate) disks: Vec<BlockHandle>,
    terminals: Vec<Arc<RawTerminal>>,
    result: Mutex<Option<Result<ExitStatus, Arc<Error>>>>,
}

impl Vm {
    /// Builds and starts a machine. Returns as soon as its processors run.
    ///
    /// # Errors
    /// What cannot work, with the value that is wrong and what would work; nothing is left behind.
    pub fn start(config: VmConfig) -> Result<Self, Error> {
        let Parts {
            spec,
            devices,
            exit_code,
            control,
            consoles,
            vhost_user,
            vsock,
            terminals,
            balloon,
            disks,
        } = assemble(config)?;
        let running = Machine::start(spec, devices)?;
        let vm = Self {
            running,
            exit_code,
            control: control.map(Mutex::new),
            consoles,
            vhost_user,
            vsock,
            balloon,
            disks,
            terminals,
            result: Mutex::new(None),
        };
        vm.enter_raw_mode()?;
        Ok(vm)
    }

    /// Waits for the end of the workload and of the machine.
    ///
    /// # Errors
    /// [`Error::Ended`] when the machine ended without the workload's status: the guest's kernel
    /// panicked, say, or [`Vm::kill`] was called.
    pub fn wait(&self) -> Result<ExitStatus, Arc<Error>> {
        let outcome = self.running.wait();
        self.finish(outcome)
    }

    /// The same without waiting; `None` while the machine runs.
    ///
    /// # Errors
    /// As for [`Vm::wait`].
    pub fn try_wait(&self) -> Result<Option<ExitStatus>, Arc<Error>> {
        self.running.try_wait().map(|outcome| self.finish(outcome)).transpose()
    }

    fn finish(&self, outcome: Outcome) -> Result<ExitStatus, Arc<Error>> {
        self.restore_terminals();
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        result.get_or_insert_with(|| self.judge(outcome).map_err(Arc::new)).clone()
    }

    fn judge(&self, outcome: Outcome) -> Result<ExitStatus, Error> {
        let failure = self.reported_failure();
        // A machine that was killed took with it what its program had written last.
        match self.exit_code.get().filter(|_| outcome != Outcome::Killed) {
            // The low byte, as wait(2) has it.
            Some(code) => {
                if let Some(reason) = failure {
                    tracing::info!("the guest's init: {reason}");
                }
                Ok(ExitStatus((code & 0xff) as u8))
            }
            None => Err(Error::Ended { outcome, reason: failure }),
        }
    }

    /// What init said on the control port before the guest ended.
    fn reported_failure(&self) -> Option<String> {
        let mut stream = self.control.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut reader, mut chunk) = (FrameReader::default(), [0u8; 4096]);
        // The machine's end is closed, so this ends; a guest that floods the port is cut off.
        for _ in 0..64 {
            match stream.read(&mut chunk) {
                Ok(n) if n > 0 => reader.push(&chunk[..n]),
                _ => break,
            }
            while let Ok(Some(message)) = reader.next::<ToHost>() {
                if let ToHost::Failed { reason, .. } = message {
                    return Some(reason);
                }
            }
        }
        None
    }

    fn send(&self, message: &ToGuest) {
        let Some(control) = &self.control else { return };
        let mut stream = control.lock().unwrap_or_else(PoisonError::into_inner);
        // A guest that reads nothing fills the socket; the message is lost, as a signal to a stopped
        // process group may be, and `kill` remains.
        if let Err(e) = stream.write_all(&encode_frame(message)) {
            tracing::warn!("control port: {e}");
        }
    }

    /// Sends a signal (Linux's number) to the workload.
    pub fn signal(&self, signal: i32) {
        self.send(&ToGuest::Signal(signal));
    }

    /// Asks the workload to end with TERM, then KILL after `grace`, and the guest to power off.
    pub fn shutdown(&self, grace: Duration) {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        self.send(&ToGuest::Shutdown { grace_ms });
    }

    /// Ends the machine now. What the guest had not yet written is lost.
    pub fn kill(&self) {
        self.running.kill();
        for console in &self.consoles {
            console.abandon();
        }
        for device in &self.vhost_user {
            device.abandon();
        }
        if let Some(device) = &self.vsock {
            device.abandon();
        }
    }

    /// Tells the guest the size, in characters, of a terminal whose size this host does not know: a
    /// [`Port::Terminal`](crate::Port::Terminal) on a socket, say. `console` is its place in [`VmConfig::consoles`], `port` that in
    /// the console's list (0 for [`Console::Standard`](crate::Console::Standard)). Terminals of this host are followed without
    /// this. False when there is no such port, or it is no terminal.
    pub fn resize(&self, console: usize, port: usize, columns: u16, rows: u16) -> bool {
        self.consoles.get(console).is_some_and(|c| c.resize(port, columns, rows))
    }

    /// Looks at the host's terminals now: the guest is told a new size, and they are put in raw mode again if the
    /// shell has used them in between. For programs that handle `SIGWINCH` and `SIGCONT`; without this it is done twice a
    /// second.
    ///
    /// # Errors
    /// [`Error::Terminal`].
    pub fn refresh_terminals(&self) -> Result<(), Error> {
        for console in &self.consoles {
            console.refresh();
        }
        // A guest that has not found its consoles yet looks at nothing.
        self.enter_raw_mode()
    }

    fn enter_raw_mode(&self) -> Result<(), Error> {
        self.terminals.iter().try_for_each(|t| t.enter()).map_err(|source| Error::Terminal { source })
    }

    /// Gives the host's terminals back as they were. Done by `wait` and on drop too.
    pub fn restore_terminals(&self) {
        self.terminals.iter().for_each(|t| t.restore());
    }

    /// How often the virtual processors came back to this process so far, by reason.
    pub fn exits(&self) -> ExitCounts {
        self.running.exits()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
        let _ = self.running.wait();
        self.restore_terminals();
    }
}
