//! The conversation with the program that started the emulated host.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use krun_wire::host::{FromHostRole, HostCommand, ToHostRole};
use krun_wire::{FrameReader, encode_frame};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::failure::Failure;
use crate::log::uptime;
use crate::ports;
use crate::relay::Backoff;

/// How long a port may take to appear.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes read at once.
const CHUNK: usize = 4096;

/// Opens a port, waiting for the driver to find it.
pub fn open_port(name: &str) -> Result<OwnedFd, Failure> {
    let mut backoff = Backoff::new(Duration::ZERO, PATIENCE);
    loop {
        match ports::open(name) {
            Ok(Some(fd)) => return Ok(fd),
            Ok(None) if backoff.again() => {
                std::thread::sleep(backoff.due().saturating_sub(uptime()));
            }
            Ok(None) => return Err(Failure::setup(format!("There is no port named {name}."))),
            Err(e) => return Err(Failure::setup(format!("The port {name} cannot be opened: {e}."))),
        }
    }
}

/// Waits until something can be done with `fd`.
fn wait_for(fd: BorrowedFd<'_>, events: PollFlags) -> Result<PollFlags, Errno> {
    let mut fds = [PollFd::from_borrowed_fd(fd, events)];
    loop {
        match poll(&mut fds, None) {
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
            Ok(_) => return Ok(fds[0].revents()),
        }
    }
}

/// The port and what has arrived.
#[derive(Debug)]
pub struct Channel {
    port: OwnedFd,
    reader: FrameReader,
}

fn broken(why: impl std::fmt::Display) -> Failure {
    Failure::setup(format!("The program that started the emulated host is gone: {why}."))
}

impl Channel {
    /// Opens the port `name`.
    ///
    /// # Errors
    /// It does not appear.
    pub fn open(name: &str) -> Result<Self, Failure> {
        Ok(Self { port: open_port(name)?, reader: FrameReader::default() })
    }

    /// The port, to wait for messages.
    pub fn port(&self) -> BorrowedFd<'_> {
        self.port.as_fd()
    }

    /// Sends a message.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn send(&mut self, message: &FromHostRole) -> Result<(), Failure> {
        let frame = encode_frame(message);
        let mut rest = &frame[..];
        while !rest.is_empty() {
            let ready = wait_for(self.port(), PollFlags::OUT).map_err(broken)?;
            if !ready.contains(PollFlags::OUT) {
                return Err(broken("the port is closed"));
            }
            match rustix::io::write(&self.port, rest) {
                Ok(n) => rest = &rest[n..],
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(broken(e)),
            }
        }
        Ok(())
    }

    /// Waits until the other side is gone.
    pub fn wait_for_end(&mut self) {
        while self.receive().is_ok() {
            if wait_for(self.port(), PollFlags::IN).is_err() {
                return;
            }
        }
    }

    /// Takes what has arrived, without waiting.
    ///
    /// # Errors
    /// The other side is gone, or sends something that is no message.
    pub fn receive(&mut self) -> Result<Vec<ToHostRole>, Failure> {
        let (mut messages, mut chunk) = (Vec::new(), [0; CHUNK]);
        loop {
            while let Some(message) = self.reader.next().map_err(broken)? {
                messages.push(message);
            }
            match rustix::io::read(&self.port, &mut chunk) {
                Ok(0) if messages.is_empty() => return Err(broken("the port is closed")),
                Ok(0) | Err(Errno::AGAIN) => return Ok(messages),
                Ok(n) => self.reader.push(&chunk[..n]),
                Err(Errno::INTR) => {}
                Err(e) => return Err(broken(e)),
            }
        }
    }

    /// Waits for the command.
    ///
    /// # Errors
    /// The other side is gone, or sends something else.
    pub fn command(&mut self) -> Result<HostCommand, Failure> {
        let mut bytes = Vec::new();
        loop {
            // One message at a time: what follows the command is for the time when it runs.
            match self.reader.next().map_err(broken)? {
                Some(ToHostRole::Part(part)) => bytes.extend(part),
                Some(ToHostRole::Run(part)) => {
                    bytes.extend(part);
                    return HostCommand::decode(&bytes).map_err(broken);
                }
                Some(other) => return Err(broken(format!("{other:?} came before a command"))),
                None => self.more()?,
            }
        }
    }

    fn more(&mut self) -> Result<(), Failure> {
        wait_for(self.port(), PollFlags::IN).map_err(broken)?;
        let mut chunk = [0; CHUNK];
        match rustix::io::read(&self.port, &mut chunk) {
            Ok(0) => Err(broken("the port is closed")),
            Ok(n) => {
                self.reader.push(&chunk[..n]);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(e) => Err(broken(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (Channel, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (port, host) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        (Channel { port, reader: FrameReader::default() }, host)
    }

    #[test]
    fn a_command_arrives_in_parts_and_what_follows_is_kept() {
        let (mut channel, host) = pair();
        let command = HostCommand { argv: vec![vec![b'x'; 50_000]; 2], ..HostCommand::default() };
        let sent = command.clone();
        let sender = std::thread::spawn(move || {
            for message in sent.messages().into_iter().chain([ToHostRole::Signal(15)]) {
                let frame = encode_frame(&message);
                let mut rest = &frame[..];
                while !rest.is_empty() {
                    let events = wait_for(host.as_fd(), PollFlags::OUT).unwrap();
                    assert!(events.contains(PollFlags::OUT));
                    rest = &rest[rustix::io::write(&host, rest).unwrap_or(0)..];
                }
            }
            host
        });
        assert_eq!(channel.command().unwrap(), command);
        let host = sender.join().unwrap();
        assert_eq!(channel.receive().unwrap(), [ToHostRole::Signal(15)]);
        assert_eq!(channel.receive().unwrap(), []);
        channel.send(&FromHostRole::Exit { status: 3, sent: [1, 2] }).unwrap();
        let (mut reader, mut bytes) = (FrameReader::default(), [0; 64]);
        let n = rustix::io::read(&host, &mut bytes[..]).unwrap();
        reader.push(&bytes[..n]);
        assert_eq!(reader.next(), Ok(Some(FromHostRole::Exit { status: 3, sent: [1, 2] })));
        drop(host);
        channel.wait_for_end();
        assert!(channel.receive().is_err() && channel.send(&FromHostRole::Ready).is_err());
    }

    #[test]
    fn nonsense_and_an_early_end_are_told() {
        let (mut channel, host) = pair();
        rustix::io::write(&host, &encode_frame(&ToHostRole::Signal(1))).unwrap();
        assert!(channel.command().unwrap_err().reason.contains("before a command"));
        let (mut channel, host) = pair();
        rustix::io::write(&host, &[0xff; 8]).unwrap();
        assert!(channel.command().is_err());
        let (mut channel, host) = pair();
        rustix::io::write(&host, &encode_frame(&ToHostRole::Run(vec![0xff]))).unwrap();
        assert!(channel.command().is_err());
        let (mut channel, host) = pair();
        drop(host);
        assert!(channel.command().unwrap_err().reason.contains("is gone"));
    }
}
