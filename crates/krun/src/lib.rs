//! Process isolation as a library: run a command in a microVM.
//!
//! ```no_run
//! use krun::{Command, Console, Share, Vm, VmConfig};
//!
//! let config = VmConfig {
//!     vcpus: 2,
//!     memory_mib: 512,
//!     shares: vec![Share::root("/srv/debian")],
//!     command: Command::new("python3").args(["-c", "print(1)"]),
//!     consoles: vec![Console::inherit()?],
//!     ..VmConfig::default()
//! };
//! let vm = Vm::start(config)?;
//! let status = vm.wait()?;
//! assert!(status.success());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! Starting returns a handle; the caller's process goes on, its signal handlers and streams are its own.
//! Files of shares are opened and closed by this process, so POSIX record locks (`F_SETLK`) that the program itself holds
//! on such a file are lost when the guest closes it, as fcntl(2) tells; open file description locks (`F_OFD_SETLK`) stay.
//!
//! A terminal that was given to the guest is in raw mode while the machine runs and is restored when it
//! ends, in whatever way; the guest follows its size. No signal handler is installed for this.

mod assemble;
mod command;
mod config;
mod disk;
mod error;
pub mod host;
mod input;
mod net;
mod reclaim;
mod vhost_user;
mod vm;
mod vsock;

pub use command::{Command, Limit, LimitError};
pub use config::{
    Cache, Console, Dax, Kernel, KernelFormat, Overlay, OverlayContent, Port, ROOT_TAG, Serial, Share,
    VmConfig,
};
pub use disk::{BlockError, Disk, DiskFormat, RootDisk, SyncMode};
pub use error::Error;
pub use input::Input;
pub use krun_devices::balloon::{BalloonError, MemoryStats};
pub use krun_devices::console::TerminalSize;
pub use krun_devices::input::{
    AxisInfo, DeviceIds, InputConfig, InputEvent, InputSender, InputSource, QueueFull,
};
pub use krun_devices::tty::{RawTerminal, size as terminal_size};
pub use krun_machine::boot::smbios::{OemStringError, check as check_oem_strings};
pub use krun_machine::{ExitCounts, Outcome, with_signals_blocked};
pub use krun_wire::{EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, EXIT_SETUP};
pub use net::{Net, NetError, NetPeer, Offloads};
pub use reclaim::BalloonStatus;
pub use vhost_user::{DeviceKind, VhostUser, VhostUserError};
pub use vm::{ExitStatus, Vm};
pub use vsock::{Vsock, VsockDirection, VsockError, VsockPort, VsockType};

/// The built-in init of guests: a static program.
pub static INIT: &[u8] = include_bytes!(env!("KRUN_INIT"));

/// Raises this process's soft limit of open files to the hard one. A guest's open files are open files of this
/// process, so programs that run guests want this; the library does not do it by itself.
///
/// # Errors
/// The host's.
pub fn raise_open_file_limit() -> std::io::Result<()> {
    krun_devices::fs::raise_nofile().map(|_| ())
}

/// Loads the kernel bundle, so that a later start does not depend on the file system of then.
///
/// # Errors
/// Where it was looked for, and how to get one.
pub fn preload_kernel() -> Result<(), Error> {
    krun_machine::preload_bundle().map_err(Error::from)
}
