//! Frames in a stream, each after its length in 4 bytes, the highest first.

use crate::net::MAX_FRAME;

/// Bytes of a length.
pub const PREFIX: usize = 4;
/// Bytes of a buffer, and of them the least that are read at once, which is more than a frame needs.
const CAPACITY: usize = 256 << 10;
const AT_ONCE: usize = 128 << 10;

/// A length that no frame has: whatever follows, it is not the start of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer sends a frame of {0} bytes, more than the {MAX_FRAME} that one can have")]
pub struct TooLong(pub u32);

/// What was read of a stream and not yet taken out.
#[derive(Debug, Default)]
pub struct Frames {
    /// Empty until it is needed.
    buffer: Vec<u8>,
    /// What of it is in use.
    start: usize,
    end: usize,
}

impl Frames {
    /// The next frame; `None` when it is not all here.
    pub fn next(&self) -> Result<Option<&[u8]>, TooLong> {
        let bytes = &self.buffer[self.start..self.end];
        let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let len = u32::from_be_bytes(*prefix);
        match usize::try_from(len) {
            Ok(len) if len <= MAX_FRAME => Ok(rest.get(..len)),
            _ => Err(TooLong(len)),
        }
    }

    /// Goes on behind the frame that [`Frames::next`] tells.
    pub fn take(&mut self) {
        if let Ok(Some(frame)) = self.next() {
            self.start += PREFIX + frame.len();
        }
    }

    /// Where to read to. Not empty as long as [`Frames::next`] says `None`.
    pub fn room(&mut self) -> &mut [u8] {
        if self.buffer.is_empty() {
            self.buffer = vec![0; CAPACITY];
        }
        // What is left of a frame is moved seldom.
        if self.start == self.end || self.buffer.len() - self.end < AT_ONCE {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.buffer[self.end..]
    }

    /// So many bytes of the room were read.
    pub fn fill(&mut self, len: usize) {
        self.end = (self.end + len).min(self.buffer.len());
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(frames: &[Vec<u8>]) -> Vec<u8> {
        frames.iter().flat_map(|f| [&(f.len() as u32).to_be_bytes()[..], f].concat()).collect()
    }

    /// Feeds `bytes` in pieces of the lengths given, in turn; what came out, and the rest's verdict.
    fn decode(mut bytes: &[u8], pieces: &[usize]) -> (Vec<Vec<u8>>, Result<(), TooLong>) {
        let (mut frames, mut out) = (Frames::default(), Vec::new());
        for len in pieces.iter().copied().cycle() {
            loop {
                match frames.next() {
                    Ok(Some(frame)) => out.push(frame.to_vec()),
                    Ok(None) => break,
                    Err(e) => return (out, Err(e)),
                }
                frames.take();
            }
            if bytes.is_empty() {
                break;
            }
            let room = frames.room();
            assert!(!room.is_empty(), "no room though no frame is complete");
            let n = len.max(1).min(room.len()).min(bytes.len());
            room[..n].copy_from_slice(&bytes[..n]);
            frames.fill(n);
            bytes = &bytes[n..];
        }
        (out, Ok(()))
    }

    proptest! {
        #[test]
        fn frames_arrive_however_they_are_cut(
            lens in prop::collection::vec(prop_oneof![0..200usize, Just(MAX_FRAME), 1000..70_000usize.min(MAX_FRAME)], 0..12),
            pieces in prop::collection::vec(1..100_000usize, 1..6),
        ) {
            let frames: Vec<Vec<u8>> = lens.iter().enumerate().map(|(i, len)| vec![i as u8; *len]).collect();
            prop_assert_eq!(decode(&encode(&frames), &pieces), (frames, Ok(())));
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, pieces in prop::collection::vec(1..50usize, 1..4)) {
            let _ = decode(&bytes, &pieces);
        }
    }

    #[test]
    fn a_length_that_cannot_be_is_told() {
        let len = MAX_FRAME as u32 + 1;
        let bytes = [encode(&[vec![7; 20]]), len.to_be_bytes().to_vec()].concat();
        assert_eq!(decode(&bytes, &[3]), (vec![vec![7; 20]], Err(TooLong(len))));
    }
}
