//! The console device (virtio 1.2, section 5.3): terminals and named byte streams.
//!
//! ```text
//!   host descriptors        worker thread                          guest
//!   ────────────────        ─────────────                          ─────
//!   stream (in)  ──read──▶  port ──▶ receive queue                 /dev/hvcN, /dev/vportDpN
//!   stream (out) ◀─write──  port ◀── transmit queue
//!   ConsoleHandle ──wake─▶  control ◀─▶ control queues (2 and 3)   sizes, names, open and closed
//! ```
//!
//! # Behaviour
//! - Input is read when the port is open in the guest and the guest has a buffer for it, straight into
//!   that buffer. Output is written straight from guest memory. A side that is slow holds up its own
//!   port and direction alone.
//! - A terminal's driver in Linux waits with interrupts off until its output is taken: a host terminal
//!   that is stopped stops that guest CPU.
//! - The end of input reaches a stream's reader after all data. A terminal has no end of input: when
//!   the host's terminal hangs up, the guest's does.
//! - An output that nobody takes any more ends the port: see [`PortSpec::output`].
//! - Of several devices each tells of its ports when the terminals of the one before it have their numbers: see
//!   [`Console::after`].

mod control;
mod device;
#[cfg(any(test, feature = "mock"))]
mod fuzz;
mod port;
mod spec;
mod stream;
#[cfg(test)]
pub(crate) mod test_util;
mod turn;

pub use device::{Console, ConsoleHandle};
#[cfg(any(test, feature = "mock"))]
#[doc(hidden)]
pub use fuzz::fuzz_one;
pub use spec::{ConsoleError, ConsoleSpec, MAX_NAME, MAX_PORTS, PortKind, PortSpec, TerminalSize};
pub use turn::{Numbered, Turn};
