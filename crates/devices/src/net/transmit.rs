//! Frames from the guest.

use std::io::{self, Read};

use krun_virtio::{Chain, Cx, DeviceError};

use super::header::{HEADER, Header};
use super::peer::{Peer, Sent};
use super::{Complaint, MAX_FRAME};

/// Index of the queue.
pub const QUEUE: usize = 1;

/// The frame that is being sent.
#[derive(Debug, Default)]
pub struct Transmit {
    header: [u8; HEADER],
    frame: Vec<u8>,
    /// `frame` is to be sent.
    pending: bool,
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
    /// Forgets the frame that is being sent.
    pub fn reset(&mut self) {
        self.pending = false;
    }

    /// Sends what the guest has, as long as the peer takes it.
    pub fn run(
        &mut self,
        peer: &mut dyn Peer,
        features: u64,
        cx: &mut Cx<'_>,
    ) -> Result<Stopped, DeviceError> {
        loop {
            if self.pending {
                match peer.send(&self.header, &self.frame) {
                    Ok(Sent::Taken) => {}
                    Ok(Sent::Full) => return Ok(Stopped::Full),
                    Ok(Sent::Refused(e)) => {
                        let len = self.frame.len();
                        self.complaint
                            .about(&format_args!("{} refuses a frame of {len} bytes: {e}", peer.name()));
                    }
                    Err(e) => return Ok(Stopped::Lost(e)),
                }
                self.pending = false;
            }
            let Some(chain) = cx.pop(QUEUE)? else { break };
            self.pending = self.load(&chain, cx, features, !peer.has_header());
            cx.complete(QUEUE, chain, 0)?;
        }
        Ok(match peer.flush() {
            Ok(Sent::Full) => Stopped::Full,
            Ok(_) => Stopped::Empty,
            Err(e) => Stopped::Lost(e),
        })
    }

    /// Throws away what the guest has.
    pub fn discard(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        self.pending = false;
        while let Some(chain) = cx.pop(QUEUE)? {
            cx.complete(QUEUE, chain, 0)?;
        }
        Ok(())
    }

    /// Copies a frame out of the guest's memory and makes it ready to send; false if it is not to be.
    fn load(&mut self, chain: &Chain, cx: &Cx<'_>, features: u64, fill: bool) -> bool {
        let mut reader = chain.reader(cx.memory());
        let result = reader.read_exact(&mut self.header);
        // One byte too many is enough to know.
        self.frame.resize(reader.remaining().min(MAX_FRAME + 1), 0);
        if let Err(e) = result.and_then(|()| reader.read_exact(&mut self.frame)) {
            let len = chain.readable_len();
            self.complaint.about(&format_args!("the guest's {len} bytes are no frame with a header: {e}"));
            return false;
        }
        let header = Header(&self.header);
        if let Err(e) = header.check(&self.frame, features) {
            self.complaint.about(&e);
            return false;
        }
        if fill {
            header.fill(&mut self.frame);
        }
        true
    }
}
