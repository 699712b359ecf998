//! The header before each frame (virtio 1.2, section 5.1.6).

use super::{checksum, feature};

/// Bytes of it.
pub const HEADER: usize = 12;
/// Offset of the number of buffers that a received frame takes.
const NUM_BUFFERS: usize = 10;
/// Flag: the checksum is open.
const NEEDS_CSUM: u8 = 1;
/// Bit of the segmentation's kind that says that one of the segments has ECN's mark.
const GSO_ECN: u8 = 0x80;

/// A frame that is not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    #[error("the guest's frame is dropped: its checksum is open, without the feature")]
    Checksum,
    #[error(
        "the guest's frame is dropped: the checksum at {start} + {offset} does not lie in its {len} bytes"
    )]
    ChecksumOutside { start: u16, offset: u16, len: usize },
    #[error(
        "the guest's frame is dropped: segmentation of kind {0}, without the feature or an open checksum"
    )]
    Segmentation(u8),
}

/// The header of a frame from the guest.
#[derive(Debug, Clone, Copy)]
pub struct Header<'a>(pub &'a [u8; HEADER]);

impl Header<'_> {
    fn word(self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    /// Checks what the header says against the features and the frame.
    pub fn check(self, frame: &[u8], features: u64) -> Result<(), BadFrame> {
        let has = |bit: u32| features & 1 << bit != 0;
        let (flags, kind) = (self.0[0], self.0[1] & !GSO_ECN);
        let open = flags & NEEDS_CSUM != 0;
        if open && !has(feature::CSUM) {
            return Err(BadFrame::Checksum);
        }
        let (start, offset) = (self.word(6), self.word(8));
        if open && frame.len() < usize::from(start) + usize::from(offset) + 2 {
            return Err(BadFrame::ChecksumOutside { start, offset, len: frame.len() });
        }
        let known = match kind {
            0 => return Ok(()),
            1 => has(feature::HOST_TSO4),
            3 => has(feature::HOST_UFO),
            4 => has(feature::HOST_TSO6),
            _ => false,
        };
        if known && open { Ok(()) } else { Err(BadFrame::Segmentation(kind)) }
    }

    /// Fills the checksum of a frame that was checked, if it is open.
    pub fn fill(self, frame: &mut [u8]) {
        if self.0[0] & NEEDS_CSUM != 0 {
            checksum::fill(frame, self.word(6).into(), self.word(8).into());
        }
    }
}

/// The header of a frame for the guest that has none.
pub const PLAIN: [u8; HEADER] = [0; HEADER];

/// Says how many buffers a frame for the guest takes.
pub fn set_buffers(header: &mut [u8; HEADER], count: u16) {
    header[NUM_BUFFERS..].copy_from_slice(&count.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u8, kind: u8, start: u16, offset: u16) -> [u8; HEADER] {
        let mut h = PLAIN;
        (h[0], h[1]) = (flags, kind);
        h[6..8].copy_from_slice(&start.to_le_bytes());
        h[8..10].copy_from_slice(&offset.to_le_bytes());
        h
    }

    #[test]
    fn lies_are_found() {
        let frame = [0; 60];
        let check = |h: [u8; HEADER], features: &[u32]| {
            Header(&h).check(&frame, features.iter().fold(0, |all, bit| all | 1 << bit))
        };
        let tso = &[feature::CSUM, feature::HOST_TSO4];
        assert_eq!(check(header(0, 0, 0, 0), &[]), Ok(()));
        assert_eq!(check(header(1, 0, 34, 16), &[]), Err(BadFrame::Checksum));
        assert_eq!(check(header(1, 0, 34, 16), tso), Ok(()));
        assert_eq!(check(header(1, 0, 58, 0), tso), Ok(()));
        let outside = BadFrame::ChecksumOutside { start: 59, offset: 0, len: 60 };
        assert_eq!(check(header(1, 0, 59, 0), tso), Err(outside));
        assert!(check(header(1, 0, u16::MAX, u16::MAX), tso).is_err());
        assert_eq!(check(header(1, 0x81, 34, 16), tso), Ok(()));
        for (flags, kind) in [(0, 1), (1, 3), (1, 4), (1, 5), (1, 2)] {
            assert_eq!(check(header(flags, kind, 34, 16), tso), Err(BadFrame::Segmentation(kind)));
        }
    }
}
