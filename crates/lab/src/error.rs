//! What can go wrong.

use std::io;
use std::path::PathBuf;

/// What can go wrong with the emulated host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No QEMU.
    #[error(
        "the emulated host needs {program}, which is not in PATH; on Debian: \
         apt-get install --no-install-recommends qemu-system-x86"
    )]
    NoQemu {
        /// The program that was looked for.
        program: &'static str,
    },
    /// No kernel for the emulated host.
    #[error("the emulated host's kernel {} cannot be read: {source}", path.display())]
    NoKernel {
        /// Where it was looked for.
        path: PathBuf,
        /// This machine's answer.
        source: io::Error,
    },
    /// A directory that cannot be made writable there.
    #[error("the emulated host cannot write to {}: {why}", path.display())]
    Writable {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file that cannot be put there.
    #[error("the emulated host cannot have a file {}: {why}", path.display())]
    File {
        /// Where it was to be.
        path: PathBuf,
        /// What is wrong with that.
        why: String,
    },
    /// More writable directories than there are devices for them.
    #[error("the emulated host can write to {limit} directories outside each other; {given} were given")]
    TooManyWritable {
        /// How many there can be.
        limit: usize,
        /// How many were given.
        given: usize,
    },
    /// Something that this machine refused.
    #[error("the emulated host: {what}: {source}")]
    Host {
        /// What was tried.
        what: String,
        /// The answer.
        source: io::Error,
    },
    /// QEMU ended early or said something unexpected.
    #[error(
        "the emulated host: {what}{}",
        if log.is_empty() { String::new() } else { format!("; QEMU and the kernel in it said:\n{log}") }
    )]
    Qemu {
        /// What happened.
        what: String,
        /// The last of what QEMU and the kernel printed.
        log: String,
    },
    /// The command could not be started.
    #[error("{reason}")]
    Command {
        /// 125: the emulated host could not be set up for it; 126: it cannot be executed; 127: not found.
        status: i32,
        /// Why, in one or two sentences.
        reason: String,
    },
}

impl Error {
    pub(crate) fn host<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source: source.into() }
    }

    pub(crate) fn internal(what: &str) -> Self {
        Self::Qemu { what: format!("{what} failed for an unknown reason"), log: String::new() }
    }
}
