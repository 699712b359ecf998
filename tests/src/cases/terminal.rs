//! An interactive session: job control, window size, Ctrl-C; and the terminal afterwards.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use krun::{Console, Vm, VmConfig};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::harness::{Case, Env, Failure, no_guest, same};

pub const CASE: Case = Case { name: "terminal", host, guest: no_guest };
pub const CONTINUED: Case = Case { name: "terminal_continued", host: continued, guest: no_guest };
pub const RESTORED: Case = Case { name: "terminal_restored", host: restored, guest: no_guest };

/// A pseudo-terminal: this side, and the side that the VM gets.
struct Pty {
    master: File,
    slave: OwnedFd,
}

impl Pty {
    fn open() -> Result<Self, Failure> {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let slave = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty())?;
        tcsetwinsize(&master, Winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 })?;
        Ok(Self { master: File::from(master), slave })
    }

    fn console(&self) -> Result<Console, Failure> {
        let copy = || self.slave.try_clone().map(Some);
        Ok(Console::Standard { input: copy()?, output: copy()?, error: copy()? })
    }

    fn is_raw(&self) -> Result<bool, Failure> {
        Ok(!tcgetattr(self.slave.as_fd())?.local_modes.contains(LocalModes::ICANON))
    }
}

/// Reads from the terminal until `part` has appeared since the last call.
struct Screen {
    from: File,
    text: String,
}

impl Screen {
    fn wait_for(&mut self, part: &str) -> Result<(), Failure> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Some(at) = self.text.find(part) {
                self.text.drain(..at + part.len());
                return Ok(());
            }
            let mut ready = [rustix::event::PollFd::new(&self.from, rustix::event::PollFlags::IN)];
            let pause = rustix::time::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            if rustix::event::poll(&mut ready, Some(&pause))? > 0 {
                let mut chunk = [0u8; 4096];
                let n = self.from.read(&mut chunk)?;
                self.text.push_str(&String::from_utf8_lossy(&chunk[..n]));
            }
        }
        Err(Failure::Wrong(format!("{part:?} did not appear; the screen ends with {:?}", self.text)))
    }
}

fn session(env: &Env, pty: &Pty, program: &str, args: &[&str]) -> Result<Vm, Failure> {
    let config: VmConfig = env.program(program, args.iter().copied());
    let command = config.command.env("PS1", "prompt> ").env("TERM", "xterm");
    Ok(Vm::start(VmConfig { command, consoles: vec![pty.console()?], ..config })?)
}

fn host(env: &Env) -> Result<(), Failure> {
    let pty = Pty::open()?;
    let vm = session(env, &pty, "/bin/bash", &["--norc", "--noprofile", "-i"])?;
    let mut screen = Screen { from: pty.master.try_clone()?, text: String::new() };
    let mut keys = pty.master.try_clone()?;
    let mut typed = |text: &str| keys.write_all(text.as_bytes());
    screen.wait_for("prompt> ")?;
    typed("stty size\n")?;
    screen.wait_for("33 77")?;
    vm.resize(101, 44);
    std::thread::sleep(Duration::from_millis(300));
    typed("stty size\n")?;
    screen.wait_for("44 101")?;
    // Ctrl-C ends the foreground job, not the shell.
    typed("sleep 1000\n")?;
    std::thread::sleep(Duration::from_millis(700));
    typed("\x03")?;
    screen.wait_for("prompt> ")?;
    typed("echo status $?\n")?;
    screen.wait_for("status 130")?;
    // Ctrl-Z stops it and fg goes on.
    typed("sleep 1000\n")?;
    std::thread::sleep(Duration::from_millis(700));
    typed("\x1a")?;
    screen.wait_for("Stopped")?;
    typed("jobs; kill %1; tty\n")?;
    screen.wait_for("/dev/hvc0")?;
    typed("exit 12\n")?;
    same("status", vm.wait()?.code(), 12)?;
    same("raw after the end", pty.is_raw()?, false)
}

/// `krun run` that was stopped and goes on finds a terminal that the shell has used in between.
fn continued(env: &Env) -> Result<(), Failure> {
    use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
    let pty = Pty::open()?;
    let before = tcgetattr(pty.slave.as_fd())?;
    let stream = || Ok::<_, Failure>(std::process::Stdio::from(pty.slave.try_clone()?));
    let mut command = env.krun()?;
    command.args(["-it", "-e", "PS1=prompt> ", "--", "/bin/sh", "-i"]);
    let mut child = command.stdin(stream()?).stdout(stream()?).stderr(stream()?).spawn()?;
    let result = (|| {
        let mut screen = Screen { from: pty.master.try_clone()?, text: String::new() };
        let mut keys = pty.master.try_clone()?;
        screen.wait_for("prompt> ")?;
        same("raw while running", pty.is_raw()?, true)?;
        let pid = Pid::from_child(&child);
        kill_process(pid, Signal::STOP)?;
        waitpid(Some(pid), WaitOptions::UNTRACED)?;
        rustix::termios::tcsetattr(pty.slave.as_fd(), rustix::termios::OptionalActions::Now, &before)?;
        tcsetwinsize(&pty.master, Winsize { ws_row: 21, ws_col: 67, ws_xpixel: 0, ws_ypixel: 0 })?;
        same("raw while stopped", pty.is_raw()?, false)?;
        kill_process(pid, Signal::CONT)?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while !pty.is_raw()? {
            if Instant::now() > deadline {
                return Err(Failure::Wrong("the terminal is not in raw mode again".into()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(Duration::from_millis(500));
        keys.write_all(b"stty size\n")?;
        screen.wait_for("21 67")?;
        keys.write_all(b"exit 9\n")?;
        Ok(())
    })();
    if result.is_err() {
        let _ = child.kill();
    }
    let status = child.wait()?;
    result?;
    same("status", status.code(), Some(9))?;
    same("raw after the end", pty.is_raw()?, false)
}

fn restored(env: &Env) -> Result<(), Failure> {
    let pty = Pty::open()?;
    same("raw before", pty.is_raw()?, false)?;
    let vm = session(env, &pty, "/bin/sh", &["-i"])?;
    same("raw while running", pty.is_raw()?, true)?;
    vm.kill();
    let _ = vm.wait();
    same("raw after kill", pty.is_raw()?, false)?;
    drop(session(env, &pty, "/bin/sh", &["-i"])?);
    same("raw after drop", pty.is_raw()?, false)?;
    let mut config = env.program("/bin/sh", ["-i"]);
    config.vcpus = 0;
    config.consoles = vec![pty.console()?];
    same("bad configuration starts", Vm::start(config).is_ok(), false)?;
    same("raw after an error", pty.is_raw()?, false)
}
