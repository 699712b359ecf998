//! What a console device is made of: plain data, checked before anything starts.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::tty::{self, RawTerminal};

/// Most ports of one device.
pub const MAX_PORTS: usize = 32;
/// Longest name of a port in bytes. The guest's kernel shows it as a line in sysfs.
pub const MAX_NAME: usize = 255;

/// Size of a terminal in character cells.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TerminalSize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// What the guest makes of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortKind {
    /// A terminal, `/dev/hvcN`: the first console port is `hvc0`, the next `hvc1`.
    Console {
        /// Size at the start; `None`: that of the descriptors if one is a terminal, else unknown.
        size: Option<TerminalSize>,
    },
    /// A byte stream, `/dev/vportDpN`, found by its name in `/sys/class/virtio-ports/*/name`.
    Stream,
}

/// One port. The descriptors stay open until the device is dropped.
#[derive(Debug)]
pub struct PortSpec {
    /// Name shown in the guest; a console port may have an empty one.
    pub name: String,
    /// What it is.
    pub kind: PortKind,
    /// Where the guest's input comes from.
    ///
    /// The end of input is passed on once the guest has read all that came before it. A stream port is
    /// closed as a whole then: the protocol has no half-closed state, and a guest that goes on writing
    /// to a port with an output waits for ever.
    pub input: Option<OwnedFd>,
    /// Where the guest's output goes; `None` throws it away.
    ///
    /// When nobody takes it any more (a closed pipe, a terminal that hung up) the port is removed from
    /// the guest: writers get `ENODEV`, and a console's session is hung up.
    pub output: Option<OwnedFd>,
    /// The end of the VM waits until all output has been taken. Not to be set where the one who takes it
    /// is this process, and looks only after the end: a guest that fills the port would keep the VM for ever.
    pub waited_for: bool,
    /// The terminal of a console: in raw mode whenever this process has it in the foreground, and the guest is told
    /// when its size changes.
    pub terminal: Option<Arc<RawTerminal>>,
}

impl PortSpec {
    /// A terminal.
    pub fn console(input: Option<OwnedFd>, output: Option<OwnedFd>, size: Option<TerminalSize>) -> Self {
        let kind = PortKind::Console { size };
        Self { name: String::new(), kind, input, output, waited_for: true, terminal: None }
    }

    /// A named byte stream.
    pub fn stream(name: impl Into<String>, input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        Self { name: name.into(), kind: PortKind::Stream, input, output, waited_for: true, terminal: None }
    }

    /// A named byte stream over a socket, in both directions.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    pub fn duplex(name: impl Into<String>, socket: OwnedFd) -> io::Result<Self> {
        // Two descriptors, since a descriptor can be watched under one token only.
        let output = socket.try_clone()?;
        Ok(Self::stream(name, Some(socket), Some(output)))
    }

    /// Whether it is a terminal of the guest.
    pub fn is_console(&self) -> bool {
        matches!(self.kind, PortKind::Console { .. })
    }

    /// The size to start with, if the port is a console and somebody knows it.
    pub(super) fn initial_size(&self) -> Option<TerminalSize> {
        let PortKind::Console { size } = self.kind else { return None };
        let ask = |fd: &Option<OwnedFd>| fd.as_ref().and_then(|fd| tty::size(fd.as_fd()));
        size.or_else(|| ask(&self.output)).or_else(|| ask(&self.input))
    }
}

/// All ports of a device, in the order of their numbers. Early boot output of most guests goes to port 0
/// if it is a console.
#[derive(Debug, Default)]
pub struct ConsoleSpec {
    /// The ports.
    pub ports: Vec<PortSpec>,
}

/// Why a console cannot be made or used so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConsoleError {
    /// Too few or too many ports.
    #[error("a console has 1 to {MAX_PORTS} ports, not {0}")]
    PortCount(usize),
    /// A name that the guest could not show.
    #[error("console port {port}: name {name:?} {why}")]
    Name {
        /// Port number.
        port: usize,
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The host failed.
    #[error("console: {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

impl ConsoleSpec {
    /// Checks the whole of it.
    ///
    /// # Errors
    /// The first thing wrong.
    pub fn validate(&self) -> Result<(), ConsoleError> {
        if self.ports.is_empty() || self.ports.len() > MAX_PORTS {
            return Err(ConsoleError::PortCount(self.ports.len()));
        }
        for (port, p) in self.ports.iter().enumerate() {
            let bad = |why| Err(ConsoleError::Name { port, name: p.name.clone(), why });
            if p.name.is_empty() && !p.is_console() {
                return bad("is empty");
            }
            if p.name.len() > MAX_NAME {
                return bad("is longer than 255 bytes");
            }
            if p.name.chars().any(char::is_control) {
                return bad("contains a control character");
            }
            if !p.name.is_empty() && self.ports[..port].iter().any(|other| other.name == p.name) {
                return bad("is taken by another port");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streams(names: &[&str]) -> ConsoleSpec {
        ConsoleSpec { ports: names.iter().map(|n| PortSpec::stream(*n, None, None)).collect() }
    }

    #[test]
    fn accepts_consoles_without_names_and_unique_streams() {
        let mut spec = streams(&["krun-stdin", "krun-stdout"]);
        spec.ports.insert(0, PortSpec::console(None, None, None));
        spec.ports.push(PortSpec::console(None, None, None));
        assert!(spec.validate().is_ok());
    }

    #[test]
    fn refuses_each_kind_of_bad_name() {
        let long = "x".repeat(MAX_NAME + 1);
        for (names, part) in [
            (vec![""], "is empty"),
            (vec![long.as_str()], "longer"),
            (vec!["a\0b"], "control"),
            (vec!["a\nb"], "control"),
            (vec!["a", "b", "a"], "taken"),
        ] {
            let error = streams(&names).validate().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        assert!(streams(&[&long[1..]]).validate().is_ok());
    }

    #[test]
    fn refuses_no_port_and_too_many() {
        assert!(matches!(ConsoleSpec::default().validate(), Err(ConsoleError::PortCount(0))));
        let names: Vec<String> = (0..=MAX_PORTS).map(|n| n.to_string()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        assert!(matches!(streams(&names).validate(), Err(ConsoleError::PortCount(33))));
        assert!(streams(&names[1..]).validate().is_ok());
    }
}
