//! A command that runs in the emulated host.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use krun_wire::host::{FromHostRole, HostCommand, ToHostRole, WindowSize};
use krun_wire::{FrameReader, encode_frame};
use rustix::process::{Signal, pidfd_send_signal};

use crate::qemu::{self, Birth, Ports, Qemu};
use crate::streams::{self, Arrived, Stop};
use crate::{Command, Engine, Error, template};

/// How long a machine may take to start the command, once booted, before it is taken as broken.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long it may take to boot.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);

/// A running command. Dropping it ends the command and its machine.
#[derive(Debug)]
pub struct Running {
    /// The thread that owns QEMU, and its finding.
    supervisor: Mutex<Option<JoinHandle<Result<i32, Error>>>>,
    control: UnixStream,
    /// For killing QEMU.
    handle: OwnedFd,
    /// Ends what is still being passed on.
    stop: Mutex<Option<Stop>>,
}

/// What the supervisor gives back once the command runs.
struct Started {
    control: UnixStream,
    handle: OwnedFd,
    stop: Stop,
}

/// Starts `command`; returns when it runs.
pub fn start(engine: &Engine, command: Command) -> Result<Running, Error> {
    let engine = engine.clone();
    let (tell, told) = mpsc::channel();
    // QEMU is killed with the thread that started it, so that thread stays until QEMU's end.
    let supervisor = std::thread::Builder::new()
        .name("krun-lab".into())
        .spawn(move || supervise(&engine, command, &tell))
        .map_err(Error::host("starting a thread"))?;
    match told.recv() {
        Ok(Started { control, handle, stop }) => {
            let (supervisor, stop) = (Mutex::new(Some(supervisor)), Mutex::new(Some(stop)));
            Ok(Running { supervisor, control, handle, stop })
        }
        Err(_) => match supervisor.join() {
            Ok(Err(e)) => Err(e),
            Ok(Ok(_)) | Err(_) => Err(Error::internal("starting the emulated host")),
        },
    }
}

impl Running {
    /// Waits for the command's end and gives back its exit status; 128+n if signal n ended it.
    ///
    /// # Errors
    /// The machine ended before the command, on its own or by [`Running::kill`]; or another call of this
    /// has the status.
    pub fn wait(&self) -> Result<i32, Error> {
        let supervisor = self.supervisor.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(supervisor) = supervisor else { return Err(Error::internal("waiting a second time")) };
        supervisor.join().unwrap_or_else(|_| Err(Error::internal("watching the emulated host")))
    }

    /// Sends a signal to the command: those that terminals send (INT, QUIT, HUP, TSTP, CONT) to its
    /// process group, others to its first process.
    ///
    /// # Errors
    /// The machine is gone.
    pub fn signal(&self, number: i32) -> Result<(), Error> {
        self.tell(&ToHostRole::Signal(number))
    }

    /// Tells the command's terminal its new size.
    ///
    /// # Errors
    /// The machine is gone.
    pub fn resize(&self, size: WindowSize) -> Result<(), Error> {
        self.tell(&ToHostRole::Resize(size))
    }

    fn tell(&self, message: &ToHostRole) -> Result<(), Error> {
        // One write, so messages of several threads do not mix.
        let sent = (&self.control).write_all(&encode_frame(message));
        sent.map_err(Error::host("talking to the emulated host"))
    }

    /// Ends the machine at once, as pulling its plug does; [`Running::wait`] then returns. Output that
    /// nobody has taken is lost.
    pub fn kill(&self) {
        // It may have ended on its own.
        let _ = pidfd_send_signal(&self.handle, Signal::KILL);
        drop(self.stop.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        // Whatever the result is, nobody asked for it.
        let _ = self.wait();
    }
}

/// Everything from the machine's start to its end, on one thread.
fn supervise(engine: &Engine, mut command: Command, tell: &Sender<Started>) -> Result<i32, Error> {
    let exports = command.exports()?;
    let message = command.message(&exports);
    let streams = [
        std::mem::take(&mut command.stdin).open(0)?,
        std::mem::take(&mut command.stdout).open(1)?,
        std::mem::take(&mut command.stderr).open(2)?,
    ];
    let (qemu, ports, mut reader) = begin(engine, &message, &exports)?;
    let Ports { control, stdio } = ports;
    let copy = |s: &UnixStream| s.try_clone().map_err(Error::host("duplicating a socket"));
    let [stdin, stdout, stderr] = streams;
    let [input_port, output_port, error_port] = &stdio;
    let (stop_input, stop) = (Stop::new()?, Stop::new()?);
    let arrived: [Arc<Arrived>; 2] = [Arc::default(), Arc::default()];
    let outputs = [
        streams::output(copy(output_port)?, stdout, Arc::clone(&arrived[0]), &stop)?,
        streams::output(copy(error_port)?, stderr, Arc::clone(&arrived[1]), &stop)?,
    ];
    let input = streams::input(stdin, copy(input_port)?, &stop_input)?;
    let started = Started { control: copy(&control)?, handle: qemu.handle()?, stop };
    // Whoever started this is gone if it does not listen; the machine then ends with `qemu`.
    let _ = tell.send(started);
    let result = status(&control, &mut reader);
    drop(stop_input);
    let result = match result {
        Ok((status, sent)) => {
            arrived.iter().zip(sent).for_each(|(arrived, sent)| arrived.wait_for(sent));
            // Nothing is left in it that anybody needs.
            drop(qemu);
            Ok(status)
        }
        Err(e) => {
            let failure = match e {
                Some(e) => e,
                None => qemu.failure("the machine ended before the command"),
            };
            drop(qemu);
            Err(failure)
        }
    };
    // The machine's ends are closed, so these come to an end too.
    for output in outputs {
        let _ = output.join();
    }
    if let Some(input) = input {
        let _ = input.join();
    }
    result
}

/// Waits for the command's status and how much it printed. `Err(None)`: the machine ended.
fn status(control: &UnixStream, reader: &mut FrameReader) -> Result<(i32, [u64; 2]), Option<Error>> {
    match next(control, reader) {
        Ok(Some(FromHostRole::Exit { status, sent })) => Ok((status, sent)),
        Ok(Some(FromHostRole::Failed { status, reason })) => Err(Some(Error::Command { status, reason })),
        Ok(Some(other)) => {
            let what = format!("its init said {other:?} while the command ran");
            Err(Some(Error::Qemu { what, log: String::new() }))
        }
        Ok(None) => Err(None),
        Err(e) => Err(Some(e)),
    }
}

/// The next message. `None`: the machine has ended.
fn next(mut control: &UnixStream, reader: &mut FrameReader) -> Result<Option<FromHostRole>, Error> {
    let mut chunk = [0; 4096];
    loop {
        let message = reader.next().map_err(|e| Error::Qemu { what: e.to_string(), log: String::new() })?;
        if message.is_some() {
            return Ok(message);
        }
        match control.read(&mut chunk) {
            Ok(0) => return Ok(None),
            Ok(n) => reader.push(&chunk[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            // A socket whose other end died with unread bytes in it.
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
            Err(e) => return Err(Error::host("listening to the emulated host")(e)),
        }
    }
}

/// Starts a machine and the command on it: from the template, or else by booting one.
fn begin(
    engine: &Engine,
    message: &HostCommand,
    exports: &[PathBuf],
) -> Result<(Qemu, Ports, FrameReader), Error> {
    match template::ensure(engine) {
        Ok(dir) => {
            let resumed = template::resume(engine, &dir, exports)
                .and_then(|(qemu, ports)| launch(qemu, ports, message));
            match resumed {
                Ok(running) => return Ok(running),
                Err(e @ Error::Command { .. }) => return Err(e),
                Err(e) => {
                    tracing::warn!("the saved emulated host cannot be continued, booting a new one: {e}");
                    template::discard(&dir);
                }
            }
        }
        Err(e) => tracing::warn!("the emulated host cannot be saved for the next time: {e}"),
    }
    let (qemu, ports) = boot(engine, exports)?;
    launch(qemu, ports, message)
}

/// Boots a machine; its initial RAM disk is in memory.
fn boot(engine: &Engine, exports: &[PathBuf]) -> Result<(Qemu, Ports), Error> {
    let initrd = qemu::in_memory(&template::initrd(engine).finish())?;
    let path = qemu::inherited_path(&initrd);
    let (qemu, ports) = Qemu::spawn(engine, &path, Birth::Cold { initrd }, exports)?;
    wait_first(&ports)?;
    Ok((qemu, ports))
}

/// Waits until the machine says something, without taking it.
fn wait_first(ports: &Ports) -> Result<(), Error> {
    let timeout = rustix::event::Timespec::try_from(BOOT_PATIENCE).ok();
    let events = rustix::event::PollFlags::IN;
    let mut fds = [rustix::event::PollFd::new(&ports.control, events)];
    rustix::event::poll(&mut fds, timeout.as_ref()).map_err(Error::host("waiting for the emulated host"))?;
    Ok(())
}

/// Gives the machine its command and waits until that runs.
fn launch(qemu: Qemu, ports: Ports, message: &HostCommand) -> Result<(Qemu, Ports, FrameReader), Error> {
    let mut control = &ports.control;
    let patience = |time| control.set_read_timeout(time).map_err(Error::host("preparing a socket"));
    patience(Some(START_PATIENCE))?;
    let mut message = message.clone();
    message.time = SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|t| (t.as_secs(), t.subsec_nanos()));
    for part in message.messages() {
        if control.write_all(&encode_frame(&part)).is_err() {
            return Err(qemu.failure("the machine ended before it took the command"));
        }
    }
    let mut reader = FrameReader::default();
    loop {
        match next(control, &mut reader) {
            Ok(Some(FromHostRole::Ready)) => {}
            Ok(Some(FromHostRole::Started)) => break,
            Ok(Some(FromHostRole::Failed { status, reason })) => {
                return Err(Error::Command { status, reason });
            }
            Ok(Some(other)) => return Err(qemu.failure(format!("its init said {other:?} before the start"))),
            Ok(None) => return Err(qemu.failure("the machine ended before the command started")),
            Err(e) => return Err(qemu.failure(e.to_string())),
        }
    }
    patience(None)?;
    Ok((qemu, ports, reader))
}
