//! A pair of queues with the peer behind it.

use std::io;

use krun_event::Interest;
use krun_virtio::{Cx, DeviceError};

use super::peer::Peer;
use super::receive::{self, Receive};
use super::transmit::{self, Transmit};

/// The pair, and why it waits.
pub struct Pair {
    /// Also the token of its peer's descriptor.
    index: usize,
    pub peer: Box<dyn Peer>,
    rx: Receive,
    tx: Transmit,
    /// The guest has no room for what the peer has.
    starved: bool,
    /// The peer is slow.
    full: bool,
    /// What the peer's descriptor is watched for.
    watch: Option<Interest>,
}

/// What became of the peer.
#[derive(Debug)]
pub enum Outcome {
    Fine,
    /// It is gone.
    Lost(io::Error),
}

impl Pair {
    pub fn new(index: usize, peer: Box<dyn Peer>) -> Self {
        let (rx, tx) = (Receive::new(2 * index), Transmit::new(2 * index + 1));
        Self { index, peer, rx, tx, starved: true, full: false, watch: None }
    }

    /// Begins with the driver's queues, of which the first has so many entries.
    pub fn start(&mut self, merge: bool, limit: u16) {
        self.rx.reset(merge, limit);
    }

    /// Forgets the driver.
    pub fn stop(&mut self) {
        self.rx.reset(false, 0);
        (self.starved, self.full, self.watch) = (true, false, None);
    }

    /// Passes on what the peer has.
    pub fn receive(&mut self, cx: &mut Cx<'_>) -> Result<Outcome, DeviceError> {
        if self.peer.fd().is_none() {
            return Ok(Outcome::Fine);
        }
        let stopped = self.rx.run(self.peer.as_mut(), cx)?;
        self.starved = matches!(stopped, receive::Stopped::Starved);
        match stopped {
            receive::Stopped::Lost(why) => Ok(Outcome::Lost(why)),
            _ => self.watch(cx).map(|()| Outcome::Fine),
        }
    }

    /// Sends what the guest has.
    pub fn transmit(&mut self, features: u64, cx: &mut Cx<'_>) -> Result<Outcome, DeviceError> {
        if self.peer.fd().is_none() {
            return self.discard(cx).map(|()| Outcome::Fine);
        }
        let stopped = self.tx.run(self.peer.as_mut(), features, cx)?;
        self.full = matches!(stopped, transmit::Stopped::Full);
        match stopped {
            transmit::Stopped::Lost(why) => Ok(Outcome::Lost(why)),
            _ => self.watch(cx).map(|()| Outcome::Fine),
        }
    }

    /// Throws away what the guest has to send.
    pub fn discard(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        self.tx.discard(cx)
    }

    /// The peer's descriptor is ready.
    pub fn ready(
        &mut self,
        (readable, writable): (bool, bool),
        features: u64,
        cx: &mut Cx<'_>,
    ) -> Result<Outcome, DeviceError> {
        if readable
            && !self.starved
            && let Outcome::Lost(why) = self.receive(cx)?
        {
            return Ok(Outcome::Lost(why));
        }
        if writable && self.full { self.transmit(features, cx) } else { Ok(Outcome::Fine) }
    }

    /// Watches the peer for what can be done then.
    pub fn watch(&mut self, cx: &Cx<'_>) -> Result<(), DeviceError> {
        let wanted = match (self.starved, self.full) {
            (false, false) => Some(Interest::Read),
            (false, true) => Some(Interest::Both),
            (true, true) => Some(Interest::Write),
            (true, false) => None,
        };
        let Some(fd) = self.peer.fd().filter(|_| wanted != self.watch) else { return Ok(()) };
        match (self.watch, wanted) {
            (None, Some(interest)) => cx.watch(&fd, self.index as u64, interest),
            (Some(_), Some(interest)) => cx.rewatch(&fd, self.index as u64, interest),
            (_, None) => cx.unwatch(&fd),
        }
        .map_err(|source| DeviceError::Host { what: format!("watch {}", self.peer.name()), source })?;
        self.watch = wanted;
        Ok(())
    }

    /// Leaves the peer alone, until the guest gives a buffer or a frame.
    pub fn unwatch(&mut self, cx: &Cx<'_>) {
        if let Some(fd) = self.peer.fd().filter(|_| self.watch.is_some()) {
            let _ = cx.unwatch(&fd);
        }
        (self.watch, self.starved, self.full) = (None, true, false);
    }

    /// The peer is gone, what it was sent and what waited for it; true when it may come back.
    pub fn close(&mut self, cx: &mut Cx<'_>) -> Result<bool, DeviceError> {
        let starved = self.starved;
        self.unwatch(cx);
        self.starved = starved;
        let hope = self.peer.close();
        // A driver that waits for room does not notify again.
        self.discard(cx).map(|()| hope)
    }
}
