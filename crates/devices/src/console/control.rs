//! The control protocol of a multiport console (virtio 1.2, section 5.3.6.2), without queues.
//!
//! What has to be told to the driver is kept as state, not as a list of messages: a guest that never
//! takes its messages, or asks for the same thing a million times, costs no memory.

use super::spec::TerminalSize;

/// Bytes of a message without payload: `le32 id, le16 event, le16 value`.
pub const HEADER: usize = 8;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_REMOVE: u16 = 2;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

bitflags::bitflags! {
    /// What the driver is still to be told about a port, in the order of the telling.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Due: u8 {
        const ADD = 1;
        const CONSOLE = 2;
        const RESIZE = 4;
        const OPEN = 8;
        const NAME = 16;
        const REMOVE = 32;
    }
}

/// What a message from the driver means for the data path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// A process (or the terminal layer) in the guest opened the port.
    Opened(usize),
    /// It closed the port.
    Closed(usize),
}

#[derive(Debug)]
struct Port {
    name: Vec<u8>,
    console: bool,
    size: Option<TerminalSize>,
    /// The host side is there: `PORT_OPEN` with 1 has been or will be sent.
    host_open: bool,
    /// The driver has set the port up.
    ready: bool,
    /// Taken away from the guest for good.
    removed: bool,
    /// The driver has done with it what it will do at the start: opened it, which it does to a terminal that it has
    /// numbered, or failed to set it up.
    settled: bool,
    due: Due,
}

/// The device's side of the protocol.
#[derive(Debug)]
pub struct Control {
    ports: Vec<Port>,
}

/// What is constant about a port.
#[derive(Debug, Clone)]
pub struct PortFacts {
    /// Name, may be empty.
    pub name: String,
    /// Whether it is a terminal.
    pub console: bool,
    /// Whether anything is connected on the host's side.
    pub connected: bool,
}

impl Control {
    /// The state before the driver's first message.
    pub fn new(
        facts: impl IntoIterator<Item = PortFacts>,
        size: impl Fn(usize) -> Option<TerminalSize>,
    ) -> Self {
        let port = |(n, f): (usize, PortFacts)| Port {
            name: f.name.into_bytes(),
            console: f.console,
            size: if f.console { size(n) } else { None },
            host_open: f.connected,
            ready: false,
            removed: false,
            settled: false,
            due: Due::empty(),
        };
        Self { ports: facts.into_iter().enumerate().map(port).collect() }
    }

    /// Takes a message from the driver. `Err` says why it is ignored.
    pub fn receive(&mut self, message: [u8; HEADER]) -> Result<Option<Change>, String> {
        let [i0, i1, i2, i3, e0, e1, v0, v1] = message;
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        let event = u16::from_le_bytes([e0, e1]);
        let value = u16::from_le_bytes([v0, v1]);
        if event == DEVICE_READY {
            if value == 0 {
                return Err("the driver could not set the device up".into());
            }
            for port in self.ports.iter_mut().filter(|p| !p.removed) {
                port.due |= Due::ADD;
            }
            return Ok(None);
        }
        let n = usize::try_from(id).unwrap_or(usize::MAX);
        let port = self.ports.get_mut(n).ok_or_else(|| format!("event {event} for port {id}"))?;
        match event {
            PORT_READY if value == 0 => {
                port.ready = false;
                port.settled = true;
                port.due = Due::empty();
                Err(format!("the driver could not set port {id} up"))
            }
            PORT_READY => {
                port.ready = true;
                port.greet();
                Ok(None)
            }
            PORT_OPEN if value == 0 => Ok(Some(Change::Closed(n))),
            PORT_OPEN => {
                port.settled = true;
                Ok(Some(Change::Opened(n)))
            }
            _ => Err(format!("event {event} for port {id}")),
        }
    }

    /// The next message for the driver, which is then counted as told.
    pub fn next_message(&mut self) -> Option<Vec<u8>> {
        let (id, port) = self.ports.iter_mut().enumerate().find(|(_, p)| !p.due.is_empty())?;
        let first = Due::from_bits_truncate(port.due.bits() & port.due.bits().wrapping_neg());
        port.due.remove(first);
        let (event, value, payload) = match first {
            Due::ADD => (PORT_ADD, 0, Vec::new()),
            Due::CONSOLE => (CONSOLE_PORT, 1, Vec::new()),
            Due::RESIZE => {
                let size = port.size.unwrap_or_default();
                (RESIZE, 0, [size.cols.to_le_bytes(), size.rows.to_le_bytes()].concat())
            }
            Due::OPEN => (PORT_OPEN, u16::from(port.host_open), Vec::new()),
            Due::NAME => (PORT_NAME, 1, port.name.clone()),
            _ => (PORT_REMOVE, 0, Vec::new()),
        };
        let id = u32::try_from(id).unwrap_or(u32::MAX);
        let mut message = Vec::with_capacity(HEADER + payload.len());
        message.extend(id.to_le_bytes());
        message.extend(u16::to_le_bytes(event));
        message.extend(u16::to_le_bytes(value));
        message.extend(payload);
        Some(message)
    }

    /// Whether there is something to tell.
    pub fn has_message(&self) -> bool {
        self.ports.iter().any(|p| !p.due.is_empty())
    }

    /// Whether the guest has numbered all terminals that it will number.
    pub fn are_terminals_settled(&self) -> bool {
        self.ports.iter().filter(|p| p.console).all(|p| p.settled || p.removed)
    }

    /// The host's terminal has a new size.
    pub fn resize(&mut self, port: usize, size: TerminalSize) {
        if let Some(p) = self.ports.get_mut(port).filter(|p| p.console && p.size != Some(size)) {
            p.size = Some(size);
            if p.ready && !p.removed {
                p.due |= Due::RESIZE;
            }
        }
    }

    /// The host's side is closed: readers in the guest find the end of file.
    pub fn close(&mut self, port: usize) {
        if let Some(p) = self.ports.get_mut(port).filter(|p| p.host_open) {
            p.host_open = false;
            if p.ready && !p.removed {
                p.due |= Due::OPEN;
            }
        }
    }

    /// Takes the port away from the guest.
    pub fn remove(&mut self, port: usize) {
        if let Some(p) = self.ports.get_mut(port).filter(|p| !p.removed) {
            p.removed = true;
            // A driver that was told to add the port may not have answered yet.
            p.due = if p.ready { Due::REMOVE } else { Due::empty() };
        }
    }
}

impl Port {
    /// The port's introduction. A reader that opens a port before it is known to be connected sees the
    /// end of file, and guests find a port by its name: so the name comes last.
    fn greet(&mut self) {
        if self.removed {
            self.due = Due::REMOVE;
            return;
        }
        self.due.set(Due::CONSOLE, self.console);
        self.due.set(Due::RESIZE, self.size.is_some());
        self.due.set(Due::OPEN, true);
        self.due.set(Due::NAME, !self.name.is_empty());
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
