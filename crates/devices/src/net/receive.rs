//! Frames for the guest.

use std::collections::VecDeque;
use std::io::{self, Write};

use krun_virtio::{Chain, Cx, DeviceError};

use super::header::{self, HEADER};
use super::peer::Peer;
use super::{Complaint, ETHERNET_HEADER};

/// The guest's buffers that were taken from its queue.
#[derive(Debug)]
pub struct Receive {
    queue: usize,
    /// In order; all of them are writable for more than a header.
    buffers: VecDeque<Chain>,
    /// Bytes of room in them.
    room: usize,
    /// Several buffers may hold a frame.
    merge: bool,
    /// Buffers that the guest can make available.
    limit: usize,
    complaint: Complaint,
}

/// Why no more frames are passed on.
#[derive(Debug)]
pub enum Stopped {
    /// The peer has none.
    Empty,
    /// The guest has no room.
    Starved,
    /// The peer is gone.
    Lost(io::Error),
}

impl Receive {
    /// For the queue with this index.
    pub fn new(queue: usize) -> Self {
        let (buffers, complaint) = Default::default();
        Self { queue, buffers, room: 0, merge: false, limit: 0, complaint }
    }

    /// Forgets the guest's buffers.
    pub fn reset(&mut self, merge: bool, limit: u16) {
        self.buffers.clear();
        (self.room, self.merge, self.limit) = (0, merge, limit.into());
    }

    /// Passes on what the peer has, as long as the guest has room.
    pub fn run(&mut self, peer: &mut dyn Peer, cx: &mut Cx<'_>) -> Result<Stopped, DeviceError> {
        let own_header = peer.has_header();
        loop {
            let frame = match peer.next() {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(Stopped::Empty),
                Err(e) => return Ok(Stopped::Lost(e)),
            };
            let (mut head, frame) = match frame.split_first_chunk::<HEADER>() {
                Some((head, rest)) if own_header => (*head, rest),
                _ => (header::PLAIN, frame),
            };
            if frame.len() < ETHERNET_HEADER {
                self.complaint.about(&format_args!("the peer's frame of {} bytes is dropped", frame.len()));
            } else if !self.find_room(HEADER + frame.len(), cx)? {
                return Ok(Stopped::Starved);
            } else {
                self.store(&mut head, frame, cx)?;
            }
            peer.take();
        }
    }

    /// Takes buffers until there is room for `len` bytes; false if there are too few now. One that will never
    /// fit has room, as it is dropped.
    fn find_room(&mut self, len: usize, cx: &mut Cx<'_>) -> Result<bool, DeviceError> {
        while self.buffers.is_empty() || self.merge && self.room < len && self.buffers.len() < self.limit {
            let Some(chain) = cx.pop(self.queue)? else { return Ok(false) };
            let room = chain.writable_len() as usize;
            if room < HEADER {
                let text = format!("a receive buffer of {room} bytes; the header alone takes {HEADER}");
                return Err(DeviceError::Driver(text));
            }
            self.room = self.room.saturating_add(room);
            self.buffers.push_back(chain);
        }
        Ok(true)
    }

    /// Stores a frame in the buffers that [`Self::find_room`] found.
    fn store(&mut self, head: &mut [u8; HEADER], frame: &[u8], cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let total = HEADER + frame.len();
        let (mut count, mut room) = (0, 0);
        while room < total && count < if self.merge { self.buffers.len() } else { 1 } {
            room += self.buffers[count].writable_len() as usize;
            count += 1;
        }
        if room < total {
            self.complaint.about(&format_args!(
                "the peer's frame of {} bytes is dropped: the guest's buffers hold {}",
                frame.len(),
                room - HEADER
            ));
            return Ok(());
        }
        header::set_buffers(head, count as u16);
        let mut parts = [&head[..], frame];
        let memory = cx.memory();
        let filled = self.buffers.drain(..count).map(|chain| {
            let mut writer = chain.writer(memory);
            for part in &mut parts {
                // Takes what fits, and guest memory does not fail.
                let len = writer.write(part).unwrap_or(0);
                *part = &part[len..];
            }
            let written = writer.written();
            (chain, written)
        });
        self.room = self.room.saturating_sub(room);
        // Together: a driver that sees one buffer of a frame expects to see the others.
        cx.complete_together(self.queue, filled)
    }
}
