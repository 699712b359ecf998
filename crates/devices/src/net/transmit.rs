//! Frames from the guest.

use std::io::{self, Read};

use krun_virtio::{Chain, Cx, DeviceError};

use super::header::{HEADER, Header};
use super::peer::Peer;
use super::{Complaint, ETHERNET_HEADER, MAX_FRAME};

/// Takes frames out of the guest's memory.
#[derive(Debug)]
pub struct Transmit {
    queue: usize,
    complaint: Complaint,
}

/// Why no more frames are sent.
#[derive(Debug)]
pub enum Stopped {
    /// The guest has none, or will be asked again.
    Empty,
    /// The peer is slow.
    Full,
    /// The peer is gone.
    Lost(io::Error),
}

impl Transmit {
    /// For the queue with this index.
    pub fn new(queue: usize) -> Self {
        Self { queue, complaint: Complaint::default() }
    }

    /// Sends what the guest has, as long as the peer takes it.
    pub fn run(
        &mut self,
        peer: &mut dyn Peer,
        features: u64,
        cx: &mut Cx<'_>,
    ) -> Result<Stopped, DeviceError> {
        while let Some(chain) = cx.pop(self.queue)? {
            let Some(len) = self.frame_len(&chain) else {
                cx.complete(self.queue, chain, 0)?;
                continue;
            };
            let fill = !peer.has_header();
            let header = match peer.room(len) {
                Ok(Some(room)) => self.load(room, &chain, cx, features, fill),
                Ok(None) => {
                    cx.unpop(self.queue, chain);
                    return Ok(Stopped::Full);
                }
                Err(e) => {
                    cx.unpop(self.queue, chain);
                    return Ok(Stopped::Lost(e));
                }
            };
            cx.complete(self.queue, chain, 0)?;
            if let Some(Err(e)) = header.map(|header| peer.send(&header)) {
                return Ok(Stopped::Lost(e));
            }
        }
        Ok(match peer.flush() {
            Ok(true) => Stopped::Empty,
            Ok(false) => Stopped::Full,
            Err(e) => Stopped::Lost(e),
        })
    }

    /// Throws away what the guest has.
    pub fn discard(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = cx.pop(self.queue)? {
            cx.complete(self.queue, chain, 0)?;
        }
        Ok(())
    }

    /// Bytes of the frame, if it can be one.
    fn frame_len(&mut self, chain: &Chain) -> Option<usize> {
        let total = chain.readable_len() as usize;
        let len = total.checked_sub(HEADER).filter(|len| (ETHERNET_HEADER..=MAX_FRAME).contains(len));
        if len.is_none() {
            self.complaint.about(&format_args!(
                "the guest's {total} bytes are dropped: a frame with its header takes {} to {}",
                HEADER + ETHERNET_HEADER,
                HEADER + MAX_FRAME
            ));
        }
        len
    }

    /// Copies a frame out of the guest's memory and makes it ready to send; `None` if it is not to be.
    fn load(
        &mut self,
        room: &mut [u8],
        chain: &Chain,
        cx: &Cx<'_>,
        features: u64,
        fill: bool,
    ) -> Option<[u8; HEADER]> {
        let (mut reader, mut bytes) = (chain.reader(cx.memory()), [0; HEADER]);
        if let Err(e) = reader.read_exact(&mut bytes).and_then(|()| reader.read_exact(room)) {
            self.complaint.about(&format_args!("the guest's frame cannot be read: {e}"));
            return None;
        }
        let header = Header(&bytes);
        if let Err(e) = header.check(room, features) {
            self.complaint.about(&e);
            return None;
        }
        if fill {
            header.fill(room);
        }
        Some(bytes)
    }
}
