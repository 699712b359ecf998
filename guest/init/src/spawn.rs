//! Starting the command.

use std::cell::Cell;
use std::ffi::{CStr, CString};
use std::io;

use krun_wire::Rlimit;
use rustix::fs::{FileType, Gid, Uid};
use rustix::io::Errno;
use rustix::process::Pid;

use crate::accounts::{self, Identity};
use crate::config::{Setup, read_file};
use crate::failure::{Failure, show};
use crate::stdio::Streams;
use crate::sys;

/// Where programs are looked for when the environment has no `PATH`.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Longest `/etc/passwd` or `/etc/group` that is read, in bytes.
const MAX_ACCOUNTS: usize = 16 << 20;
/// `RLIMIT_NOFILE`, whose type in `libc` differs between C libraries.
const NOFILE: u32 = 7;

/// Open files a process may have if nothing else was said: the kernel's own limit for its first process
/// is too low for many servers to raise theirs.
const DEFAULT_FILES: Rlimit = Rlimit { resource: NOFILE, soft: 1024, hard: 524_288 };

/// Everything the new process needs, in the form the system calls want it.
#[derive(Debug)]
pub struct Command {
    args: Vec<CString>,
    env: Vec<CString>,
    /// What to try to execute, in order.
    candidates: Vec<CString>,
    cwd: CString,
    limits: Vec<Rlimit>,
    identity: Option<Identity>,
}

/// Files to try for a program's name.
fn candidates(program: &[u8], path: Option<&[u8]>) -> Vec<Vec<u8>> {
    if program.contains(&b'/') {
        return vec![program.to_vec()];
    }
    let directories = path.unwrap_or(DEFAULT_PATH).split(|b| *b == b':');
    // An empty element is the working directory.
    directories.map(|d| if d.is_empty() { b"." } else { d }).map(|d| [d, b"/", program].concat()).collect()
}

fn variable<'a>(env: &'a [Vec<u8>], prefix: &[u8]) -> Option<&'a [u8]> {
    env.iter().find_map(|entry| entry.strip_prefix(prefix))
}

fn c_string(bytes: Vec<u8>, what: &str) -> Result<CString, Failure> {
    CString::new(bytes).map_err(|_| Failure::setup(format!("The {what} contains a NUL byte.")))
}

fn c_strings(list: impl IntoIterator<Item = Vec<u8>>, what: &str) -> Result<Vec<CString>, Failure> {
    list.into_iter().map(|bytes| c_string(bytes, what)).collect()
}

impl Command {
    /// Works out what to start.
    ///
    /// # Errors
    /// 125: an unknown user, or a string that no program can be given.
    pub fn new(setup: Setup) -> Result<Self, Failure> {
        let config = setup.config;
        let mut identity = match &config.user {
            Some(user) => {
                let file = |path: &[u8]| read_file(path, MAX_ACCOUNTS).unwrap_or_default();
                Some(accounts::identify(user, &file(b"/etc/passwd"), &file(b"/etc/group"))?)
            }
            None => None,
        };
        if let Some(identity) = &mut identity {
            identity.groups.extend(setup.extra_groups);
        }
        let mut env = config.env;
        if variable(&env, b"HOME=").is_none() {
            let home = identity.as_ref().map_or(&b"/root"[..], |i| &i.home);
            env.push([b"HOME=", home].concat());
        }
        let candidates = candidates(&config.exec, variable(&env, b"PATH="));
        Ok(Self {
            args: c_strings([config.exec].into_iter().chain(config.args), "command or an argument")?,
            env: c_strings(env, "environment")?,
            candidates: c_strings(candidates, "command or PATH")?,
            cwd: c_string(config.cwd, "working directory")?,
            limits: config.rlimits,
            identity,
        })
    }

    /// Raises what the kernel permits any process to what the limits ask for. The kernel keeps the last word: then
    /// setting the limit fails, and says so.
    pub fn make_room(&self) {
        const MOST: &str = "/proc/sys/fs/nr_open";
        let permitted = std::fs::read_to_string(MOST).ok().and_then(|text| text.trim().parse::<u64>().ok());
        let asked = self.limits.iter().filter(|l| l.resource == NOFILE).map(|l| l.hard).max();
        if let (Some(permitted), Some(asked)) = (permitted, asked)
            && asked > permitted
        {
            let _ = std::fs::write(MOST, asked.to_string());
        }
    }

    /// The user it will run as.
    pub fn uid(&self) -> u32 {
        self.identity.as_ref().map_or(0, |i| i.uid)
    }

    /// Starts it. When this returns, the program runs.
    ///
    /// # Errors
    /// 127 or 126: there is no such program, or it cannot be executed. 125: anything before that.
    pub fn start(&self, streams: &Streams) -> Result<Pid, Failure> {
        let failed = Cell::new(None);
        let child = || failed.set(Some(self.become_program(streams)));
        let pid = sys::run_until_exec(&mut { child })
            .map_err(|e| Failure::setup(format!("No process can be created: {e}.")))?;
        match failed.take() {
            None => Ok(pid),
            Some((stage, error)) => {
                let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
                Err(self.explain(stage, &error))
            }
        }
    }

    /// Becomes the program in place of this process; says why if that fails.
    pub fn replace_init(&self, streams: &Streams) -> Failure {
        let (stage, error) = self.become_program(streams);
        self.explain(stage, &error)
    }

    /// Makes this process what the command needs and becomes the program. Returns where that failed.
    ///
    /// It runs in a process that shares init's memory: nothing here changes what init relies on.
    fn become_program(&self, streams: &Streams) -> (Stage, io::Error) {
        // Fails only for a process that leads a group already, and then there is nothing to do.
        let _ = rustix::process::setsid();
        if let Some(terminal) = streams.terminal() {
            // A console that is no terminal cannot be controlled, which is fine.
            let _ = rustix::process::ioctl_tiocsctty(terminal);
        }
        for (number, fd) in (0..).zip(streams.command) {
            if fd != number
                && let Err(e) = sys::assign_stream(fd, number)
            {
                return (Stage::Streams, e);
            }
        }
        if !self.limits.iter().any(|l| l.resource == DEFAULT_FILES.resource) {
            // Better than the kernel's, but nothing to fail for.
            let _ = sys::set_limit(&DEFAULT_FILES);
        }
        for limit in &self.limits {
            if let Err(e) = sys::set_limit(limit) {
                return (Stage::Limit(limit.resource), e);
            }
        }
        if let Some(identity) = &self.identity {
            // The working directory may be one that only the user can enter, or only root.
            let entered = rustix::process::chdir(&self.cwd);
            if let Err(e) = assume(identity) {
                return (Stage::User, e.into());
            }
            if let Err(e) = entered.or_else(|_| rustix::process::chdir(&self.cwd)) {
                return (Stage::Directory, e.into());
            }
        } else if let Err(e) = rustix::process::chdir(&self.cwd) {
            return (Stage::Directory, e.into());
        }
        sys::unblock_signals();
        (Stage::Execute, self.execute())
    }

    /// Tries the candidates, as shells do: a file that may not be executed is remembered, not final.
    fn execute(&self) -> io::Error {
        let (args, env) = (sys::PointerList::new(&self.args), sys::PointerList::new(&self.env));
        let mut worst = None;
        for candidate in &self.candidates {
            let error = sys::execute(candidate, &args, &env);
            match Errno::from_io_error(&error) {
                Some(Errno::NOENT | Errno::NOTDIR) => {}
                Some(Errno::ACCESS) => worst = worst.or(Some(error)),
                _ => return error,
            }
        }
        worst.unwrap_or_else(|| Errno::NOENT.into())
    }

    fn explain(&self, stage: Stage, error: &io::Error) -> Failure {
        match stage {
            Stage::Streams => Failure::setup(format!("The standard streams cannot be set up: {error}.")),
            Stage::Limit(resource) => {
                Failure::setup(format!("Resource limit {resource} cannot be set: {error}."))
            }
            Stage::User => Failure::setup(format!("The user and groups cannot be set: {error}.")),
            Stage::Directory => {
                let cwd = show(self.cwd.as_bytes());
                match Errno::from_io_error(error) {
                    Some(Errno::NOENT) => {
                        Failure::setup(format!("The working directory {cwd} does not exist in the guest."))
                    }
                    _ => Failure::setup(format!("The working directory {cwd} cannot be entered: {error}.")),
                }
            }
            Stage::Execute => self.explain_execute(error),
        }
    }

    fn explain_execute(&self, error: &io::Error) -> Failure {
        let program = show(self.args.first().map_or(b"", |a| a.as_bytes()));
        let found = self.candidates.iter().find_map(|c| Some((c, self.file_type(c)?)));
        match (Errno::from_io_error(error), found) {
            (Some(Errno::NOENT | Errno::NOTDIR), Some((file, _))) => Failure::not_found(format!(
                "{} is there, but the program that runs it is not: the dynamic loader, or the interpreter after \"#!\" in its first line.",
                show(file.as_bytes())
            )),
            (Some(Errno::NOENT | Errno::NOTDIR), None) if self.candidates.len() == 1 => {
                Failure::not_found(format!("{program} does not exist in the guest."))
            }
            (Some(Errno::NOENT | Errno::NOTDIR), None) => {
                Failure::not_found(format!("{program} was not found in the guest's PATH."))
            }
            (Some(Errno::ACCESS), Some((file, FileType::Directory))) => {
                Failure::not_executable(format!("{} is a directory.", show(file.as_bytes())))
            }
            (Some(Errno::ACCESS), _) => Failure::not_executable(format!(
                "{program} may not be executed: it lacks the permission, or lies below a directory that does."
            )),
            (Some(Errno::NOEXEC), _) => Failure::not_executable(format!(
                "{program} is no program for this machine: built for another one, damaged, or a script without \"#!\"."
            )),
            _ => Failure::not_executable(format!("{program} cannot be executed: {error}.")),
        }
    }

    /// The type of a candidate's file, seen from the command's working directory.
    fn file_type(&self, candidate: &CStr) -> Option<FileType> {
        let path = match candidate.to_bytes() {
            absolute @ [b'/', ..] => absolute.to_vec(),
            relative => [self.cwd.as_bytes(), b"/", relative].concat(),
        };
        rustix::fs::stat(path).ok().map(|s| FileType::from_raw_mode(s.st_mode))
    }
}

/// Where starting a command failed.
#[derive(Debug, Clone, Copy)]
enum Stage {
    Streams,
    Limit(u32),
    User,
    Directory,
    Execute,
}

fn assume(identity: &Identity) -> Result<(), Errno> {
    let groups: Vec<Gid> = identity.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    rustix::thread::set_thread_groups(&groups)?;
    let (gid, uid) = (Gid::from_raw(identity.gid), Uid::from_raw(identity.uid));
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
}

#[cfg(test)]
#[path = "spawn_tests.rs"]
mod tests;
