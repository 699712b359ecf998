//! What the guest has sent on a connection and the host's socket has not taken.

use std::collections::VecDeque;

use krun_memory::VolatileSlice;

/// Messages without contents that are held at most. Credit bounds all others, but these cost none.
const MOST_EMPTY: usize = 1024;

/// A message, complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Bytes.
    pub len: u32,
    /// It ends a record.
    pub end_of_record: bool,
}

/// Bytes in order, and where messages end in them, if there are messages.
#[derive(Debug, Default)]
pub struct Held {
    bytes: VecDeque<u8>,
    messages: VecDeque<Message>,
    empty: usize,
    /// Bytes of the last message, which is not complete.
    partial: u32,
}

impl Held {
    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.messages.is_empty()
    }

    /// Whether there is a part of a message that is not complete.
    pub fn is_partial(&self) -> bool {
        self.partial > 0
    }

    /// Whether there is something that the socket could take.
    pub fn is_waiting(&self) -> bool {
        !self.messages.is_empty() || self.bytes.len() > self.partial as usize
    }

    /// Keeps all but the first `skip` bytes.
    pub fn push(&mut self, data: &[VolatileSlice<'_>], mut skip: usize) {
        let mut chunk = [0; 4096];
        for piece in data {
            let mut at = skip.min(piece.len());
            skip -= at;
            while at < piece.len()
                && let Ok(part) = piece.subslice(at, chunk.len().min(piece.len() - at))
            {
                let n = part.copy_to(&mut chunk[..]);
                self.bytes.extend(&chunk[..n]);
                at += n;
            }
        }
    }

    /// Keeps a part of a message. False when that would be one message too many.
    pub fn push_part(&mut self, data: &[VolatileSlice<'_>], is_end: bool, end_of_record: bool) -> bool {
        let before = self.bytes.len();
        self.push(data, 0);
        // What is held is bounded by credit, which has 32 bits.
        self.partial += (self.bytes.len() - before) as u32;
        if is_end {
            let message = Message { len: std::mem::take(&mut self.partial), end_of_record };
            self.empty += usize::from(message.len == 0);
            self.messages.push_back(message);
        }
        self.empty <= MOST_EMPTY
    }

    /// The first message, and its bytes.
    pub fn first(&self) -> Option<(Message, &[u8], &[u8])> {
        let message = *self.messages.front()?;
        let (a, b) = self.bytes.as_slices();
        let a = &a[..a.len().min(message.len as usize)];
        Some((message, a, &b[..message.len as usize - a.len()]))
    }

    /// Drops the first message; how many bytes it had.
    pub fn pop(&mut self) -> usize {
        let Some(message) = self.messages.pop_front() else { return 0 };
        self.empty -= usize::from(message.len == 0);
        self.bytes.drain(..message.len as usize);
        message.len as usize
    }

    /// The first bytes, where there are no messages; none when nothing is held.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    /// Drops the first `n` bytes.
    pub fn advance(&mut self, n: usize) {
        self.bytes.drain(..n);
    }

    /// Drops all, and gives memory back; how many bytes there were.
    pub fn clear(&mut self) -> usize {
        std::mem::take(self).bytes.len()
    }

    /// Drops what is no complete message; how many bytes there were.
    pub fn drop_partial(&mut self) -> usize {
        let partial = std::mem::take(&mut self.partial) as usize;
        self.bytes.truncate(self.bytes.len() - partial);
        partial
    }
}
