//! An interactive session: job control, window size, Ctrl-C; and the terminal afterwards.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use krun::{Console, Vm, VmConfig};
use rustix::termios::{
    LocalModes, OptionalActions, OutputModes, Winsize, tcgetattr, tcsetattr, tcsetwinsize,
};

use crate::harness::{Case, Env, Failure, no_guest, same};

pub const CASE: Case = Case { name: "terminal", host, guest: no_guest };
pub const CONTINUED: Case = Case { name: "terminal_continued", host: continued, guest: no_guest };
pub const RESTORED: Case = Case { name: "terminal_restored", host: restored, guest: no_guest };
pub const FOREGROUND: Case = Case { name: "terminal_foreground", host: foreground, guest: no_guest };

/// A pseudo-terminal: this side, and the side that the VM gets.
pub struct Pty {
    pub master: File,
    pub slave: OwnedFd,
}

impl Pty {
    /// One of 77 columns and 33 rows.
    pub fn open() -> Result<Self, Failure> {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let slave = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty())?;
        let pty = Self { master: File::from(master), slave };
        pty.resize(77, 33)?;
        Ok(pty)
    }

    /// Gives it another size.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<(), Failure> {
        Ok(tcsetwinsize(&self.master, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?)
    }

    /// It as the workload's standard streams.
    pub fn console(&self) -> Result<Console, Failure> {
        let copy = || self.slave.try_clone().map(Some);
        Ok(Console::Standard { input: copy()?, output: copy()?, error: copy()? })
    }

    /// The whole mode.
    pub fn mode(&self) -> Result<String, Failure> {
        Ok(format!("{:?}", tcgetattr(self.slave.as_fd())?))
    }

    /// Waits for raw mode, or its end.
    pub fn until_raw(&self, wanted: bool) -> Result<(), Failure> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.is_raw()? != wanted {
            if Instant::now() > deadline {
                return Err(Failure::Wrong(format!("raw mode is not {wanted}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
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
    /// The next word of a line that has arrived.
    fn word(&mut self) -> Result<String, Failure> {
        self.wait_for_more("\n")?;
        Ok(self.text.split_whitespace().next().unwrap_or_default().to_owned())
    }

    /// Waits for `part`, and takes everything up to its end.
    fn wait_for(&mut self, part: &str) -> Result<(), Failure> {
        let at = self.wait_for_more(part)?;
        self.text.drain(..at + part.len());
        Ok(())
    }

    /// Waits for `part` and tells where it begins.
    fn wait_for_more(&mut self, part: &str) -> Result<usize, Failure> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Some(at) = self.text.find(part) {
                return Ok(at);
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
    // Nobody says so to the library.
    pty.resize(101, 44)?;
    typed("until stty size | grep '44 101'; do sleep 0.1; done\n")?;
    screen.wait_for("44 101\r\n")?;
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
    let result: Result<(), Failure> = (|| {
        let mut screen = Screen { from: pty.master.try_clone()?, text: String::new() };
        let mut keys = pty.master.try_clone()?;
        screen.wait_for("prompt> ")?;
        same("raw while running", pty.is_raw()?, true)?;
        let pid = Pid::from_child(&child);
        kill_process(pid, Signal::STOP)?;
        waitpid(Some(pid), WaitOptions::UNTRACED)?;
        tcsetattr(pty.slave.as_fd(), OptionalActions::Now, &before)?;
        pty.resize(67, 21)?;
        same("raw while stopped", pty.is_raw()?, false)?;
        kill_process(pid, Signal::CONT)?;
        pty.until_raw(true)?;
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
    same("after the end", format!("{before:?}"), pty.mode()?)
}

fn restored(env: &Env) -> Result<(), Failure> {
    let pty = Pty::open()?;
    // Not what a terminal has by itself.
    let mut odd = tcgetattr(pty.slave.as_fd())?;
    odd.output_modes.remove(OutputModes::ONLCR);
    odd.local_modes.remove(LocalModes::ECHOCTL);
    tcsetattr(pty.slave.as_fd(), OptionalActions::Now, &odd)?;
    let before = pty.mode()?;
    let as_before = |when: &str| same(when, pty.mode()?, before.clone());

    let vm = session(env, &pty, "/bin/sh", &["-i"])?;
    same("raw while running", pty.is_raw()?, true)?;
    vm.kill();
    same("an end by kill has a status", vm.wait().is_ok(), false)?;
    as_before("after kill")?;
    drop(session(env, &pty, "/bin/sh", &["-i"])?);
    as_before("after drop")?;
    same("status", session(env, &pty, "/no/such/program", &[])?.wait()?.code(), 127)?;
    as_before("after a program that is not there")?;
    let mut config = env.program("/bin/sh", ["-i"]);
    config.consoles = vec![pty.console()?];
    config.kernel_args.push("init=/no/such/init".into());
    same("a panic has a status", Vm::start(config)?.wait().is_ok(), false)?;
    as_before("after a panic of the guest's kernel")?;
    let mut config = env.program("/bin/sh", ["-i"]);
    config.vcpus = 0;
    config.consoles = vec![pty.console()?];
    same("bad configuration starts", Vm::start(config).is_ok(), false)?;
    as_before("after an error")
}

/// `krun run` as a job of a shell: started in the background, in the foreground, stopped, in the foreground again.
fn foreground(env: &Env) -> Result<(), Failure> {
    let pty = Pty::open()?;
    let stream = || Ok::<_, Failure>(std::process::Stdio::from(pty.slave.try_clone()?));
    let mut shell = std::process::Command::new("setsid");
    shell.args(["--ctty", "bash", "--norc", "--noprofile", "--noediting", "-i"]).env("PS1", "host> ");
    let mut shell = shell.stdin(stream()?).stdout(stream()?).stderr(stream()?).spawn()?;
    let result = as_a_job(env, &pty);
    if result.is_err() {
        let _ = shell.kill();
    }
    shell.wait()?;
    result
}

fn as_a_job(env: &Env, pty: &Pty) -> Result<(), Failure> {
    let mut screen = Screen { from: pty.master.try_clone()?, text: String::new() };
    let mut keys = pty.master.try_clone()?;
    let mut typed = |text: &str| keys.write_all(text.as_bytes());
    screen.wait_for("host> ")?;
    let before = pty.mode()?;
    let krun = env.krun()?;
    let words: Vec<_> =
        std::iter::once(krun.get_program()).chain(krun.get_args()).map(|w| w.to_string_lossy()).collect();
    // What is typed is echoed, and must not be taken for what is answered.
    typed(&format!("{} -it -e PS1='gu''est: ' -- /bin/sh -i & echo p''id $!.\n", words.join(" ")))?;
    screen.wait_for("pid ")?;
    let pid = screen.word()?.trim_end_matches('.').parse::<i32>()?;
    let pid = rustix::process::Pid::from_raw(pid).ok_or("no process")?;
    screen.wait_for("guest: ")?;
    same("in the background", pty.mode()?, before.clone())?;
    typed("fg\n")?;
    pty.until_raw(true)?;
    typed("stty size\n")?;
    screen.wait_for("33 77")?;
    rustix::process::kill_process(pid, rustix::process::Signal::STOP)?;
    screen.wait_for("host> ")?;
    pty.until_raw(false)?;
    pty.resize(67, 21)?;
    typed("fg\n")?;
    pty.until_raw(true)?;
    // The size takes its own way into the guest.
    typed("until stty size | grep '21 67'; do sleep 0.1; done\n")?;
    screen.wait_for("21 67\r\n")?;
    typed("exit 9\n")?;
    screen.wait_for("host> ")?;
    same("after the end", pty.mode()?, before)?;
    typed("echo sta''tus $?; exit\n")?;
    screen.wait_for("status 9")
}
