//! Process 1 of the guest: prepares a plain Linux system, runs one command, and reports its exit status.
//!
//! Everything it needs to know is in a file of the root share ([`krun_wire::CONFIG_PATH`]), or on the
//! kernel's command line in the form of upstream's library. Its run is part of every start, so it asks
//! the host (files of the root, ports) for as little as possible before the command runs.
//!
//! Built by the build script of the crate `krun`. By hand:
//!
//! ```sh
//! RUSTFLAGS='-C linker=rust-lld -C link-self-contained=yes -C target-feature=+crt-static
//!     -C relocation-model=static -C force-unwind-tables=no' \
//! cargo build -p krun-init --profile init --target x86_64-unknown-linux-musl
//! ```
//!
//! Without the musl target, `x86_64-unknown-linux-gnu` with the last three flags gives a program twice
//! the size.
#![cfg_attr(not(test), no_main)]
// The entry, from which everything is reached, is not part of the test program.
#![cfg_attr(test, allow(dead_code))]

mod accounts;
mod cmdline;
mod config;
mod control;
mod failure;
mod host;
mod json;
mod log;
mod mounts;
mod net;
mod oci;
mod ports;
mod relay;
mod report;
mod root;
mod spawn;
mod stdio;
mod supervise;
mod sys;

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use krun_wire::EXIT_SETUP;

use crate::config::Setup;
use crate::failure::{Failure, show};
use crate::log::Log;
use crate::net::Network;
use crate::spawn::Command;
use crate::stdio::{Plan, Streams};
use crate::supervise::Supervisor;

/// Least and longest time by which the command is ahead of the conversation about its input.
const HEAD_START: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(20)];

/// The program, after its entry: see [`sys`].
fn run(args: &[Vec<u8>], env: &[Vec<u8>]) -> i32 {
    if env.iter().any(|entry| entry == b"krun_role=host") {
        return host::run();
    }
    sys::reserve_standard_streams();
    let mut log = Log::default();
    log.step("init runs");
    let (root, given) = config::from_host();
    report_panics(root.as_ref());
    let mut plan = Plan::given(krun_wire::Stdio::Console);
    let mut verbose = false;
    let status = match guest(given, args, env, &mut log, &mut plan, &mut verbose) {
        Ok(status) => status,
        Err(failure) => {
            let reason = format!("{}{}", failure.reason, log.warnings());
            let failure = Failure { reason, ..failure };
            // The ports are found below /sys and /dev.
            if rustix::fs::access("/sys/class", rustix::fs::Access::EXISTS).is_err() && root::leave().is_ok()
            {
                // What does not work now leaves the console to complain on.
                let _ = mounts::base(&mut log);
            }
            control::tell_failure(&failure);
            plan.complain(&failure.reason);
            failure.status
        }
    };
    report::finish(root.as_ref(), status, &mut log, verbose)
}

/// Everything between reading the configuration and the command's end.
fn guest(
    given: Result<Option<krun_wire::InitConfig>, Failure>,
    args: &[Vec<u8>],
    env: &[Vec<u8>],
    log: &mut Log,
    plan: &mut Plan,
    verbose: &mut bool,
) -> Result<i32, Failure> {
    let mounted = mounts::base(log);
    log.step("base file systems are mounted");
    let mut setup = config::begin(given?, args, env)?;
    *verbose = setup.config.verbose;
    *plan = if setup.discover_ports { Plan::discovered() } else { Plan::given(setup.config.stdio) };
    if setup.config.block_root.is_none() {
        mounted?;
    }
    let network = prepare(&mut setup, log)?;
    let replace_init = setup.replace_init;
    let command = Command::new(setup)?;
    command.make_room();
    // Init's own time so far shows the pace of the machine, which may be an emulated one.
    let head_start = (log.age() * 4).clamp(HEAD_START[0], HEAD_START[1]);
    let mut streams = Streams::open(*plan, head_start, replace_init)?;
    if command.uid() != 0 {
        streams.give_to(command.uid());
    }
    log.step("ready to start the command");
    if replace_init {
        return Err(command.replace_init(&streams));
    }
    let signals = sys::child_signals()
        .map_err(|e| Failure::setup(format!("Init cannot learn of its children's ends: {e}.")))?;
    let pid = command.start(&streams)?;
    log.step("the command runs");
    streams.hand_over();
    // The key combination is for whoever sits at a machine; a guest has no such person.
    let _ = rustix::system::reboot(rustix::system::RebootCommand::CadOff);
    if *verbose {
        log.flush();
    }
    log.clear_warnings();
    let status = Supervisor::new(pid, signals, &mut streams, network, log).run();
    log.step("the command has ended");
    if streams.terminal().is_some() && !*verbose {
        report::silence_kernel();
    }
    Ok(status)
}

/// Makes the system what the configuration says; gives back the leases of its interfaces.
fn prepare(setup: &mut Setup, log: &mut Log) -> Result<Network, Failure> {
    if let Some(root) = &setup.config.block_root {
        root::switch(root)?;
        log.clear_warnings();
        mounts::base(log)?;
        log.step("the root is a block device");
    }
    setup.complete()?;
    let config = &setup.config;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    mounts::temporary_directories(log);
    for share in &config.mounts {
        mounts::share(share)?;
    }
    for tmpfs in &config.tmpfs {
        mounts::tmpfs(tmpfs)?;
    }
    rustix::system::sethostname(&config.hostname).map_err(|e| {
        Failure::setup(format!("The host name {} cannot be set: {e}.", show(&config.hostname)))
    })?;
    if let Err(e) = loopback() {
        log.warn(format!("The loopback interface is down: {e}."));
    }
    if config.dhcp.is_empty() {
        return Ok(Network::default());
    }
    let network = net::configure(&config.dhcp, log);
    log.step("the network is configured");
    Ok(network)
}

/// Brings up 127.0.0.1 and ::1.
fn loopback() -> std::io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    // Any socket serves. Kernels that forward sockets to the host leave this family alone.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    sys::interface_up(socket.as_fd(), c"lo")
}

/// A mistake in init itself ends as any failed set-up does, not as a kernel panic.
fn report_panics(root: Option<&OwnedFd>) {
    let root = root.and_then(|file| file.try_clone().ok());
    std::panic::set_hook(Box::new(move |info| {
        Plan::given(krun_wire::Stdio::Console).complain(&format!("Init failed: {info}."));
        if let Some(file) = &root {
            // The machine ends either way; without a status the host says that it did so early.
            let _ = sys::report_status(file.as_fd(), EXIT_SETUP);
        }
        let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    }));
}
