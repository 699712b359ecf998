//! The emulated host, as the `krun` command offers it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{kernel, packages};

/// A `krun` command with everything that its emulated host needs.
#[derive(Debug, Clone)]
pub struct Lab {
    krun: PathBuf,
    kernel: PathBuf,
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
    ) -> Result<(std::process::ExitStatus, String), String> {
        let mut command = self.command();
        for dir in writable {
            command.arg("--writable").arg(dir);
        }
        let out = command
            .arg("--")
            .args(words)
            .envs(env.iter().cloned())
            .stderr(Stdio::inherit())
            .output()
            .map_err(|e| format!("{}: {e}", self.krun.display()))?;
        Ok((out.status, String::from_utf8_lossy(&out.stdout).into_owned()))
    }

    /// Runs `words` bit-exact, in a system of nothing but their program and `files` (`krun lab --exact`).
    ///
    /// # Errors
    /// The command could not be started.
    pub fn exact(
        &self,
        words: &[OsString],
        files: &[String],
    ) -> Result<(std::process::ExitStatus, String), String> {
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
