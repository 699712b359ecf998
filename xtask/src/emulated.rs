//! The emulated host, as the `krun` command offers it.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::{kernel, packages};

/// A `krun` command with everything that its emulated host needs.
#[derive(Debug, Clone)]
pub struct Lab {
    krun: PathBuf,
    kernel: PathBuf,
}

/// How long a command may take; no limit where nothing is said.
#[derive(Debug, Default, Clone, Copy)]
pub struct Patience {
    /// In all.
    pub whole: Option<Duration>,
    /// Between two lines.
    pub silence: Option<Duration>,
}

/// How a command ended.
#[derive(Debug)]
pub enum End {
    /// By itself.
    Status(ExitStatus),
    /// It took too long.
    Limit,
    /// It said nothing for too long.
    Silence,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(status) => write!(f, "ended with {status}"),
            Self::Limit => write!(f, "took too long and was killed"),
            Self::Silence => write!(f, "said nothing for too long and was killed"),
        }
    }
}

impl Lab {
    /// Gets QEMU, the emulated host's kernel and its template.
    ///
    /// # Errors
    /// What is missing, or why it could not be made.
    pub fn ensure(krun: &Path) -> Result<Self, String> {
        packages::ensure("the emulated host", &["qemu-system-x86"])?;
        let lab = Self { krun: krun.to_owned(), kernel: kernel::ensure_host()? };
        let status =
            lab.command().arg("--prepare").status().map_err(|e| format!("{}: {e}", krun.display()))?;
        if status.success() {
            Ok(lab)
        } else {
            Err(format!("the emulated host cannot be prepared: {status}"))
        }
    }

    /// `krun run` in the emulated host, without its options.
    pub fn emulated(&self) -> Command {
        let mut command = Command::new(&self.krun);
        command.args(["run", "--accel", "emulated"]).env("KRUN_HOST_KERNEL", &self.kernel);
        command
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.krun);
        command.arg("lab").env("KRUN_HOST_KERNEL", &self.kernel).stdin(Stdio::null());
        command
    }

    /// Runs `words` there and gives back how it ended and what it printed; errors go to standard error.
    ///
    /// # Errors
    /// The command could not be started.
    pub fn capture(
        &self,
        words: &[OsString],
        env: &[(OsString, OsString)],
        writable: &[PathBuf],
    ) -> Result<(ExitStatus, String), String> {
        let mut text = String::new();
        let add = |line: &str| {
            text.push_str(line);
            text.push('\n');
        };
        match self.lines(words, env, writable, Patience::default(), add)? {
            End::Status(status) => Ok((status, text)),
            other => Err(format!("the emulated host {other}")),
        }
    }

    /// Runs `words` there as long as there is patience, with each line that it prints given to `line` at once; errors go to
    /// standard error. Gives back how it ended; beyond patience it is killed.
    ///
    /// # Errors
    /// The command could not be started.
    pub fn lines(
        &self,
        words: &[OsString],
        env: &[(OsString, OsString)],
        writable: &[PathBuf],
        patience: Patience,
        mut line: impl FnMut(&str),
    ) -> Result<End, String> {
        let mut command = self.command();
        for dir in writable {
            command.arg("--writable").arg(dir);
        }
        let failed = |e| format!("{}: {e}", self.krun.display());
        command.arg("--").args(words).envs(env.iter().cloned()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(failed)?;
        let (tell, told) = mpsc::channel();
        let out = child.stdout.take();
        let reader = thread::spawn(move || {
            let lines = out.into_iter().flat_map(|out| BufReader::new(out).split(b'\n'));
            // The other side is gone only after a kill.
            lines.map_while(Result::ok).map_while(|line| tell.send(line).ok()).for_each(drop);
        });
        let start = Instant::now();
        let mut end = None;
        while end.is_none() {
            let left = patience.whole.map_or(Duration::MAX, |whole| whole.saturating_sub(start.elapsed()));
            let silence = patience.silence.unwrap_or(Duration::MAX);
            match told.recv_timeout(left.min(silence)) {
                Ok(bytes) => line(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    end = Some(if silence < left { End::Silence } else { End::Limit });
                    child.kill().map_err(failed)?;
                }
            }
        }
        let status = child.wait().map_err(failed)?;
        let _ = reader.join();
        Ok(end.unwrap_or(End::Status(status)))
    }

    /// Runs `words` bit-exact, in a system of nothing but their program and `files` (`krun lab --exact`).
    ///
    /// # Errors
    /// The command could not be started.
    pub fn exact(&self, words: &[OsString], files: &[String]) -> Result<(ExitStatus, String), String> {
        let mut command = self.command();
        command.arg("--exact");
        for file in files {
            command.arg("--add").arg(file);
        }
        let out =
            command.arg("--").args(words).output().map_err(|e| format!("{}: {e}", self.krun.display()))?;
        let text = [out.stdout, out.stderr].concat();
        Ok((out.status, String::from_utf8_lossy(&text).into_owned()))
    }
}
