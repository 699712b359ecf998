//! Why a VM could not start or ended badly.

use std::ffi::OsString;
use std::io;

use krun_devices::balloon::BalloonError;
use krun_devices::block::BlockError;
use krun_devices::console::ConsoleError;
use krun_devices::fs::FsError;
use krun_devices::input::EvdevError;
use krun_devices::net::NetError;
use krun_devices::vhost_user::VhostUserError;
use krun_devices::vsock::VsockError;
use krun_machine::Outcome;

/// An error of this crate. Its text says what is wrong and what would work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The machine: its description, its kernel or the hypervisor.
    #[error(transparent)]
    Machine(#[from] krun_machine::Error),
    /// A share.
    #[error(transparent)]
    Share(#[from] FsError),
    /// More DAX windows than this process can fill with mappings.
    #[error("DAX windows of {} MiB: at most {} MiB for one guest", total >> 20, crate::Dax::MAX_TOTAL >> 20)]
    DaxWindows {
        /// All together, in bytes.
        total: u64,
    },
    /// A console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// An input device of the host.
    #[error(transparent)]
    Input(#[from] EvdevError),
    /// A socket device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] BlockError),
    /// A network device.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A device of another process.
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
    /// A disk that the VM does not have.
    #[error("the VM has no disk {id:?}")]
    NoDisk {
        /// What was asked for.
        id: String,
    },
    /// The memory balloon.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// The memory balloon, of a VM without one.
    #[error("the VM was started without a memory balloon")]
    NoBalloon,
    /// A string that cannot be passed to a program.
    #[error("{text:?} has a NUL byte in it, which no argument, variable or path can have")]
    Nul {
        /// The string.
        text: OsString,
    },
    /// A terminal that cannot be put in raw mode.
    #[error("the terminal cannot be put in raw mode: {source}")]
    Terminal {
        /// The host's answer.
        source: io::Error,
    },
    /// The command's terminal would come after too many others.
    #[error(
        "the command's terminal would be hvc{number} in the guest, and Linux makes only {limit} terminals (hvc0 to hvc{}): \
         put its console before others, so that at most {} terminals come first",
        limit - 1,
        limit - 1
    )]
    TerminalNumber {
        /// Terminals before it.
        number: u32,
        /// Terminals that Linux makes.
        limit: u32,
    },
    /// The host refused something small.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// The machine ended and the workload's status is not known.
    #[error("the guest ended without reporting a status ({outcome}){}", reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default())]
    Ended {
        /// How the machine ended.
        outcome: Outcome,
        /// What init said, if it did.
        reason: Option<String>,
    },
}

impl Error {
    /// The host's error number behind it, if there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        let mut source: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = source {
            if let Some(code) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
                return Some(code);
            }
            source = error.source();
        }
        None
    }
}
