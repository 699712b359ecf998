//! `krun run` that ends while the emulated host boots: the terminal is as it was and nothing is left.

#![allow(clippy::unwrap_used, reason = "helpers of tests are no test functions")]

use std::fs::{self, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, OutputModes, tcgetattr, tcsetattr};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A terminal, and a QEMU that is a script.
struct Scene {
    home: tempfile::TempDir,
    _master: OwnedFd,
    slave: OwnedFd,
}

impl Scene {
    fn new(qemu: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir_all(home.path().join("root")).unwrap();
        fs::write(home.path().join("vmlinux"), "a kernel").unwrap();
        let program = home.path().join("qemu-system-x86_64");
        fs::write(&program, format!("#!/bin/sh\necho $$ >\"$KRUN_TEST_PID.new\"\nmv \"$KRUN_TEST_PID.new\" \"$KRUN_TEST_PID\"\n{qemu}\n")).unwrap();
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = fs::File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        // Not what a terminal has by itself, so that a guess at what it was is wrong.
        let mut odd = tcgetattr(&slave).unwrap();
        odd.output_modes.remove(OutputModes::ONLCR);
        tcsetattr(&slave, OptionalActions::Now, &odd).unwrap();
        Self { home, _master: master, slave: slave.into() }
    }

    fn mode(&self) -> String {
        format!("{:?}", tcgetattr(&self.slave).unwrap())
    }

    fn pid_file(&self) -> PathBuf {
        self.home.path().join("pid")
    }

    fn run(&self) -> Child {
        let path = format!("{}:{}", self.home.path().display(), std::env::var("PATH").unwrap());
        Command::new(env!("CARGO_BIN_EXE_krun"))
            .args(["run", "--accel", "emulated", "--root"])
            .arg(self.home.path().join("root"))
            .args(["--", "true"])
            .env("PATH", path)
            .env("XDG_CACHE_HOME", self.home.path().join("cache"))
            .env("KRUN_HOST_KERNEL", self.home.path().join("vmlinux"))
            .env("KRUN_TEST_PID", self.pid_file())
            .stdin(self.slave.try_clone().unwrap())
            .stdout(self.slave.try_clone().unwrap())
            .stderr(self.slave.try_clone().unwrap())
            .spawn()
            .unwrap()
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_signal_ends_the_boot() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT] {
        let scene = Scene::new("exec sleep 1000");
        let before = scene.mode();
        let mut krun = scene.run();
        until("QEMU did not start", || scene.pid_file().exists());
        assert_eq!(scene.mode(), before, "Ctrl-C is a signal while there is nobody to take keys");
        let qemu = fs::read_to_string(scene.pid_file()).unwrap().trim().to_owned();
        kill_process(Pid::from_child(&krun), signal).unwrap();
        // As soon as it is asked: QEMU would sleep on, and then be started once more.
        assert_eq!(krun.wait().unwrap().signal(), Some(signal.as_raw()));
        assert_eq!(scene.mode(), before);
        let command = format!("/proc/{qemu}/cmdline");
        until("QEMU is left", || !fs::read(&command).is_ok_and(|c| c.starts_with(b"sleep")));
    }
}

#[test]
fn an_error_leaves_the_terminal_as_it_was() {
    let scene = Scene::new("echo no machine today; exit 1");
    let before = scene.mode();
    assert_eq!(scene.run().wait().unwrap().code(), Some(125));
    assert_eq!(scene.mode(), before);
}
