//! The C library, as C programs use it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use krun::InputEvent;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::terminal::Pty;
use crate::harness::{Case, Env, Failure, contains, no_guest, same};
use crate::uinput::Uinput;

pub const CASE: Case = Case { name: "c_abi", host, guest: no_guest };
pub const FORK: Case = Case { name: "c_abi_fork", host: fork, guest: no_guest };
pub const USER: Case = Case { name: "c_abi_user", host: user, guest: no_guest };
pub const TERMINALS: Case = Case { name: "c_abi_terminals", host: terminals, guest: no_guest };

/// A C program that finds the library, and the bundle by its name.
fn program(env: &Env, path: &Path) -> Command {
    let mut libraries = path.parent().unwrap_or(Path::new("/")).to_owned().into_os_string();
    if let Some(dir) = env.kernel.as_ref().and_then(|kernel| kernel.parent()) {
        libraries.push(":");
        libraries.push(dir);
    }
    let mut command = Command::new(path);
    command.env("LD_LIBRARY_PATH", libraries).stdin(Stdio::null());
    command
}

/// `tests/c/calls.c` doing one of its things.
fn calls(env: &Env, what: &str, script: &str) -> Result<Command, Failure> {
    let mut command = program(env, &env.chroot_vm()?.with_file_name("calls"));
    command.arg(what).arg(&env.root).arg(script);
    Ok(command)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn host(env: &Env) -> Result<(), Failure> {
    let chroot_vm = || {
        let mut command = program(env, env.chroot_vm()?);
        command.arg(&env.root);
        Ok::<_, Failure>(command)
    };
    let output = chroot_vm()?.args(["/bin/sh", "-c", "echo out; echo err >&2; exit 37"]).output()?;
    same("output", (text(&output.stdout).as_str(), text(&output.stderr).as_str()), ("out\n", "err\n"))?;
    same("status", output.status.code(), Some(37))?;
    let output = chroot_vm()?.args(["/no/such/program"]).output()?;
    same("not found", output.status.code(), Some(127))
}

/// The child ends without writing what the parent had not yet written, and without the parent's handlers.
fn fork(env: &Env) -> Result<(), Failure> {
    let output = calls(env, "fork", "echo guest; exit 3")?.output()?;
    same("output", text(&output.stdout).as_str(), "guest\nparent\nchild 3\n")?;
    same("errors", text(&output.stderr).as_str(), "handler\n")?;
    same("status", output.status.code(), Some(0))
}

/// A program whose guest talks to us.
struct Talk {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Talk {
    fn start(mut command: Command) -> Result<Self, Failure> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let lines = BufReader::new(child.stdout.take().ok_or("no output")?);
        Ok(Self { child, lines })
    }

    /// The next line of the guest.
    fn line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    fn status(&mut self) -> Result<Option<i32>, Failure> {
        drop(self.child.stdin.take());
        Ok(self.child.wait()?.code())
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        // Nothing to kill after a test that passed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Root that becomes a user is that user alone, in every thread.
fn user(env: &Env) -> Result<(), Failure> {
    let kvm = "/dev/kvm";
    let before = fs::metadata(kvm)?.permissions();
    fs::set_permissions(kvm, fs::Permissions::from_mode(0o666))?;
    let result = as_user(env);
    fs::set_permissions(kvm, before)?;
    result
}

fn as_user(env: &Env) -> Result<(), Failure> {
    let mut talk = Talk::start(calls(env, "user", "echo ready; read -r line; exit 5")?)?;
    same("guest", talk.line()?.as_str(), "ready")?;
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{}/task", talk.child.id()))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let words: Vec<_> = status.split_whitespace().collect();
        let status = words.join(" ");
        contains("user", &status, "Uid: 12345 12345 12345 12345 ")?;
        contains("group", &status, "Gid: 23456 23456 23456 23456 ")?;
        contains("groups", &status, "Groups: 23456 NStgid:")?;
        threads += 1;
    }
    same("there are threads", threads > 2, true)?;
    same("status", talk.status()?, Some(5))
}

/// A guest that gets a device of the host, which `uinput` makes up, by `krun_add_input_device_fd`.
pub fn input_device(env: &Env, uinput: &Uinput) -> Result<(), Failure> {
    // Two events of 24 bytes: a key and the end of the report. Type, code and value are the last four numbers.
    let script = "cat /sys/class/input/event0/device/name; exec 3</dev/input/event0; echo ready
        dd bs=48 count=1 iflag=fullblock <&3 2>/dev/null | od -An -v -w24 -tu2; exit 6";
    let mut command = calls(env, "input", script)?;
    command.arg(&uinput.event);
    let mut talk = Talk::start(command)?;
    same("name", talk.line()?.as_str(), "krun test device")?;
    same("guest", talk.line()?.as_str(), "ready")?;
    let event = |kind, code, value| InputEvent { kind, code, value };
    uinput.send(&[event(1, 30, 1), event(0, 0, 0)])?;
    for wanted in [["1", "30", "1", "0"], ["0"; 4]] {
        let line = talk.line()?;
        let words: Vec<_> = line.split_whitespace().skip(8).collect();
        same("event", words.as_slice(), wanted.as_slice())?;
    }
    same("status", talk.status()?, Some(6))
}

/// Terminals of two consoles are followed, by a program without signal handlers.
fn terminals(env: &Env) -> Result<(), Failure> {
    let script = "for name in /sys/class/virtio-ports/*/name; do
            if test \"$(cat $name)\" = output; then port=${name%/name}; fi
        done
        for n in 0 1; do until (: <>/dev/hvc$n) 2>/dev/null; do sleep 0.1; done; done
        exec >/dev/${port##*/} 3<>/dev/hvc0 4<>/dev/hvc1
        size() { until test \"$(stty size <&$1)\" = \"$2\"; do sleep 0.1; done; }
        size 3 '33 77'; size 4 '33 77'; echo ready
        size 4 '50 132'; size 3 '33 77'; echo one
        size 4 '20 60'; size 3 '44 101'; echo both
        read -r line <&4; echo \"got $line\"; exit 6";
    let (first, mut second) = (Pty::open()?, Pty::open()?);
    let before = (first.mode()?, second.mode()?);
    let cooked = tcgetattr(second.slave.as_fd())?;
    let mut command = calls(env, "terminals", script)?;
    for pty in [&first, &second] {
        command.arg(text(rustix::termios::ttyname(&pty.slave, Vec::new())?.as_bytes()));
    }
    let mut talk = Talk::start(command)?;
    same("start", talk.line()?.as_str(), "ready")?;
    first.until_raw(true)?;
    second.until_raw(true)?;
    second.resize(132, 50)?;
    same("one size", talk.line()?.as_str(), "one")?;
    // Stopped, the shell uses it, and continued.
    let pid = Pid::from_child(&talk.child);
    kill_process(pid, Signal::STOP)?;
    waitpid(Some(pid), WaitOptions::UNTRACED)?;
    tcsetattr(second.slave.as_fd(), OptionalActions::Now, &cooked)?;
    first.resize(101, 44)?;
    second.resize(60, 20)?;
    kill_process(pid, Signal::CONT)?;
    second.until_raw(true)?;
    same("both sizes", talk.line()?.as_str(), "both")?;
    second.master.write_all(b"hello\n")?;
    same("input", talk.line()?.as_str(), "got hello")?;
    same("status", talk.status()?, Some(6))?;
    same("modes afterwards", (first.mode()?, second.mode()?), before)
}
