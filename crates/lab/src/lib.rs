//! The emulated host: for machines whose KVM is missing or cannot run a kernel.
//!
//! QEMU emulates a machine with nested virtualisation. A Linux kernel with KVM runs on it, with our own
//! init as process 1, and sees this machine's files through 9p. A [`Command`] runs there as it would here,
//! except that `/dev/kvm` works.
//!
//! Booting that kernel takes about a second, so it is done once: the booted machine is saved as a
//! template, keyed by everything that went into it, and each command resumes a copy-on-write view of it.
//!
//! # What differs from this machine
//! - The root is this machine's, read-only; only [`Command::writable`] directories can be written, besides
//!   `/tmp` (this machine's, changes stay in memory) and `/run` (empty).
//! - The command runs as root there. Files are still reached with the rights of whoever started it here, so
//!   as a plain user it can do to files what that user can, and changes of ownership are refused.
//! - When the command ends, processes that it left behind are killed.

mod command;
mod cpio;
mod error;
mod exact;
mod qemu;
mod qmp;
mod running;
mod streams;
mod sys;
mod template;

use std::path::{Path, PathBuf};

pub use command::{Command, Stream};
pub use error::Error;
pub use exact::{Exact, ExactFile, Source};
pub use krun_wire::host::WindowSize;
pub use qemu::WRITABLE_SLOTS;
pub use running::Running;

/// What the emulated host is made of.
#[derive(Debug, Clone)]
pub struct Engine {
    /// The QEMU program.
    pub qemu: PathBuf,
    /// An ELF kernel with KVM, 9p and virtio-console built in.
    pub kernel: PathBuf,
    /// Our init, a static program.
    pub init: Vec<u8>,
    /// Memory in MiB. It is only taken as it is used.
    pub memory_mib: u32,
    /// Processors. Emulated ones run in turns; one is fastest for nearly everything.
    pub cpus: u8,
    /// Where templates are kept; without one every command boots the machine.
    pub cache: Option<PathBuf>,
}

impl Engine {
    /// An engine with QEMU from `PATH`, 4 GiB, one processor, and templates in the user's cache.
    ///
    /// # Errors
    /// QEMU or the kernel is missing; the text says how to get it.
    pub fn new(kernel: &Path, init: Vec<u8>) -> Result<Self, Error> {
        let qemu = qemu::find()?;
        std::fs::metadata(kernel).map_err(|source| Error::NoKernel { path: kernel.to_owned(), source })?;
        Ok(Self { qemu, kernel: kernel.to_owned(), init, memory_mib: 4096, cpus: 1, cache: default_cache() })
    }

    /// Starts a command; the template is made first if there is none. Returns when the command runs.
    ///
    /// # Errors
    /// What is missing or was refused, or why the command could not be started ([`Error::Command`]).
    pub fn run(&self, command: Command) -> Result<Running, Error> {
        running::start(self, command)
    }

    /// Runs a command on a machine that executes the same instructions at the same times in every run, and
    /// waits for its end. Gives back its exit status and what it printed.
    ///
    /// # Errors
    /// What is missing or was refused; the machine ended without a status.
    pub fn run_exact(&self, command: &Exact) -> Result<(i32, Vec<u8>), Error> {
        exact::run(self, command)
    }

    /// Makes the template if there is none, so that the first command need not. Gives back its directory.
    ///
    /// # Errors
    /// It cannot be made; commands then boot the machine each time.
    pub fn prepare(&self) -> Result<PathBuf, Error> {
        let engine = self.clone();
        // QEMU dies with the thread that starts it, which here is one that waits for its end.
        let made = std::thread::spawn(move || template::ensure(&engine)).join();
        made.unwrap_or_else(|_| Err(Error::internal("making the template")))
    }
}

/// `${XDG_CACHE_HOME:-~/.cache}/krun/lab`.
fn default_cache() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("krun/lab")).filter(|p| p.is_absolute())
}
