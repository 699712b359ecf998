//! Process 1 of the emulated host: runs one command of this machine where `/dev/kvm` works.
//!
//! It boots to the point where it waits for a command, which is where the machine is saved as a template.
//! A machine resumed from it continues here: it gets the command, mounts this machine's file systems, runs
//! the command and reports its end. A machine that was not resumed does the same without noticing.

mod channel;
mod files;
mod pump;
mod session;
mod sys;

use krun_wire::host::{COMMAND_PATH, CONTROL_PORT, EXIT_MARK, FromHostRole, HostCommand, HostRoot};
use krun_wire::{InitConfig, Rlimit, STDIO_PORTS};
use rustix::process::Resource;
use rustix::system::RebootCommand;
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::config::Setup;
use crate::failure::Failure;
use crate::log::Log;
use crate::spawn::Command;
use channel::Channel;
use session::{Plan, Ports, Session};

/// Open files: a VMM with a guest that opens thousands needs as many, and the one beside it too.
const FILES: u64 = 1 << 20;

/// Longest command in the initial RAM disk, in bytes.
const MAX_COMMAND: usize = 4 << 20;

/// Runs one command of the outer machine; ends the machine.
pub fn run() -> i32 {
    crate::sys::reserve_standard_streams();
    let mut log = Log::default();
    let status = serve(&mut log).unwrap_or_else(|failure| {
        // Without a channel the console is all there is; whoever started the machine looks there.
        log.say(&failure.reason);
        failure.status
    });
    finish(status)
}

fn serve(log: &mut Log) -> Result<i32, Failure> {
    files::first()?;
    if let Ok(bytes) = crate::config::read_file(COMMAND_PATH.as_bytes(), MAX_COMMAND) {
        return alone(&bytes, log);
    }
    let mut channel = Channel::open(CONTROL_PORT)?;
    let [input, output, error] = STDIO_PORTS.map(channel::open_port);
    let ports = Ports { input: input?, outputs: [output?, error?] };
    channel.send(&FromHostRole::Ready)?;
    let command = channel.command()?;
    let streams = Plan { terminal: command.terminal, error_apart: command.error_apart };
    let result = prepare(command, log)
        .and_then(|program| Session::start(&program, ports, &streams))
        .and_then(|session| {
            channel.send(&FromHostRole::Started)?;
            session.run(&mut channel)
        });
    let (status, message) = match result {
        Ok((status, sent)) => (status, FromHostRole::Exit { status, sent }),
        Err(Failure { status, reason }) => {
            let reason = format!("{reason}{}", log.warnings());
            (status, FromHostRole::Failed { status, reason })
        }
    };
    // What programs wrote through mappings must be with the host before it hears of the end.
    rustix::fs::sync();
    channel.send(&message)?;
    // The other side ends the machine when it has everything.
    channel.wait_for_end();
    Ok(status)
}

/// Runs the command of a machine without ports; tells its status on the console.
fn alone(bytes: &[u8], log: &mut Log) -> Result<i32, Failure> {
    let command = HostCommand::decode(bytes)
        .map_err(|e| Failure::setup(format!("{COMMAND_PATH} cannot be read: {e}.")))?;
    let console = files::console()?;
    let status = prepare(command, log).and_then(|program| Session::on_console(&program, &console));
    let status = status.unwrap_or_else(|failure| {
        let _ = rustix::io::write(&console, format!("krun: {}\n", failure.reason).as_bytes());
        failure.status
    });
    let end = [EXIT_MARK, status.to_string().as_bytes(), b"\n"].concat();
    let _ = rustix::io::write(&console, &end);
    let _ = rustix::termios::tcdrain(&console);
    Ok(status)
}

/// Makes the machine what the command needs; gives back the command.
fn prepare(command: HostCommand, log: &mut Log) -> Result<Command, Failure> {
    if let Some((seconds, nanoseconds)) = command.time {
        let time =
            Timespec { tv_sec: i64::try_from(seconds).unwrap_or(i64::MAX), tv_nsec: nanoseconds.into() };
        clock_settime(ClockId::Realtime, time)
            .map_err(|e| Failure::setup(format!("The clock cannot be set: {e}.")))?;
    }
    if let Err(e) = sys::stir(&command.entropy) {
        log.warn(format!("Random numbers may repeat: {e}."));
    }
    match command.root {
        HostRoot::Shared => files::shared_root(&command.exports, log)?,
        HostRoot::Initial => files::initial_root(log),
    }
    if !command.hostname.is_empty() {
        let _ = rustix::system::sethostname(&command.hostname);
    }
    if let Err(e) = crate::loopback() {
        log.warn(format!("The loopback interface is down: {e}."));
    }
    // Nobody else's limits are there to be respected on this machine.
    let unlimited = |resource: u32| Rlimit { resource, soft: u64::MAX, hard: u64::MAX };
    let files = Rlimit { resource: Resource::Nofile as u32, soft: FILES, hard: FILES };
    let _ = std::fs::write("/proc/sys/fs/nr_open", FILES.to_string());
    let mut words = command.argv.into_iter();
    let config = InitConfig {
        exec: words.next().unwrap_or_default(),
        args: words.collect(),
        env: command.env,
        cwd: command.cwd,
        rlimits: vec![
            files,
            unlimited(Resource::Memlock as u32),
            unlimited(Resource::Nproc as u32),
            unlimited(Resource::Core as u32),
        ],
        ..InitConfig::default()
    };
    Command::new(Setup { config, ..Setup::default() })
}

/// Ends the machine: the emulator is told to end where others would start again.
fn finish(status: i32) -> i32 {
    let _ = rustix::system::reboot(RebootCommand::Restart);
    status
}
