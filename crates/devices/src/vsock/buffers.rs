//! Receive buffers of the guest's that are filled together: one system call for what fits into all of them, and the driver
//! sees them at once.

use std::io::Write;

use krun_memory::{GuestMemory, VolatileSlice};
use krun_virtio::{Chain, Cx, DeviceError};

use super::packet::Header;
use crate::sys::MAX_PIECES;

/// Buffers taken from a queue, each with room for a header and at least a byte of data.
#[derive(Debug)]
pub struct Buffers<'m> {
    queue: usize,
    memory: &'m GuestMemory,
    chains: Vec<Chain>,
}

/// Room for data in several buffers, in order.
#[derive(Debug)]
pub struct Room<'m> {
    /// As many pieces as one system call takes.
    pub pieces: Vec<VolatileSlice<'m>>,
    /// Bytes of all pieces.
    pub len: usize,
}

impl<'m> Buffers<'m> {
    /// Takes buffers from `queue`: at most `most`, and no more than `bytes` of data need; perhaps none, for want of them.
    ///
    /// # Errors
    /// The driver broke a rule of the ring, or gave a buffer that has no room for data.
    pub fn take(cx: &mut Cx<'m>, queue: usize, most: usize, bytes: usize) -> Result<Self, DeviceError> {
        let mut this = Self { queue, memory: cx.memory(), chains: Vec::with_capacity(most) };
        let mut room = 0;
        while this.chains.len() < most
            && (room < bytes || this.chains.is_empty())
            && let Some(chain) = cx.pop(queue)?
        {
            let len = chain.writable_len();
            if len as usize <= Header::SIZE {
                let text = format!("a receive buffer of {len} bytes has no room for data");
                return Err(DeviceError::Driver(text));
            }
            room += len as usize - Header::SIZE;
            this.chains.push(chain);
        }
        Ok(this)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// Bytes of data that buffer `index` takes; `None` when there are not so many buffers.
    pub fn capacity(&self, index: usize) -> Option<usize> {
        self.chains.get(index).map(|c| c.writable_len() as usize - Header::SIZE)
    }

    /// Where at most `limit` bytes of data go.
    pub fn room(&self, limit: usize) -> Room<'m> {
        let (mut pieces, mut len) = (Vec::with_capacity(self.chains.len()), 0);
        for chain in &self.chains {
            let body = chain.writer(self.memory).split_at(Header::SIZE);
            for piece in body.room() {
                let n = piece.len().min(limit - len);
                let Ok(part) = piece.subslice(0, n) else { continue };
                if n == 0 || pieces.len() == MAX_PIECES {
                    return Room { pieces, len };
                }
                pieces.push(part);
                len += n;
            }
        }
        Room { pieces, len }
    }

    /// Gives the first buffers back with these headers, whose data is in them, and the rest unused.
    ///
    /// # Errors
    /// The ring cannot be accessed.
    pub fn give_back(self, cx: &mut Cx<'m>, headers: &[Header]) -> Result<(), DeviceError> {
        let Self { queue, memory, mut chains } = self;
        for chain in chains.drain(headers.len().min(chains.len())..).rev() {
            cx.unpop(queue, chain);
        }
        for (chain, header) in chains.iter().zip(headers) {
            chain
                .writer(memory)
                .write_all(&header.to_bytes())
                .map_err(|e| DeviceError::Driver(format!("a receive buffer: {e}")))?;
        }
        let lens = headers.iter().map(|h| Header::SIZE as u32 + h.len);
        cx.complete_together(queue, chains.into_iter().zip(lens))
    }
}
