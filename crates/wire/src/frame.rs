//! Length-prefixed messages on a byte stream: a little-endian `u32`, then that many bytes.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;

/// Longest message accepted, in bytes.
pub const MAX_FRAME: usize = 64 * 1024;

/// One message with its length before it.
pub fn encode_frame<T: Serialize>(message: &T) -> Vec<u8> {
    // Serialising plain data into a growing vector has no way to fail.
    let mut bytes = postcard::to_extend(message, vec![0u8; 4]).unwrap_or_else(|_| vec![0u8; 4]);
    let len = u32::try_from(bytes.len() - 4).unwrap_or(u32::MAX);
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes
}

/// Collects bytes and gives back whole messages.
#[derive(Debug, Default)]
pub struct FrameReader {
    pending: Vec<u8>,
}

impl FrameReader {
    /// Adds bytes as they arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// The next whole message, if it has arrived.
    ///
    /// # Errors
    /// A message that is too long or does not decode; the stream cannot be used any further.
    #[expect(clippy::should_implement_trait, reason = "what comes next depends on the type asked for")]
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        let Some(header) = self.pending.first_chunk::<4>() else { return Ok(None) };
        let len = u32::from_le_bytes(*header) as usize;
        if len > MAX_FRAME {
            return Err(Error::FrameTooLong(len as u64));
        }
        let Some(body) = self.pending.get(4..4 + len) else { return Ok(None) };
        let message = postcard::from_bytes(body).map_err(Error::Decode)?;
        self.pending.drain(..4 + len);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ToGuest, ToHost};

    #[test]
    fn messages_arrive_in_any_pieces() {
        let mut stream = encode_frame(&ToGuest::Signal(15));
        stream.extend(encode_frame(&ToGuest::Shutdown { grace_ms: 5 }));
        let (mut reader, mut got) = (FrameReader::default(), Vec::new());
        for byte in stream {
            reader.push(&[byte]);
            while let Some(m) = reader.next::<ToGuest>().unwrap() {
                got.push(m);
            }
        }
        assert_eq!(got, [ToGuest::Signal(15), ToGuest::Shutdown { grace_ms: 5 }]);
    }

    #[test]
    fn a_huge_length_is_refused_before_it_is_stored() {
        let mut reader = FrameReader::default();
        reader.push(&u32::MAX.to_le_bytes());
        assert_eq!(reader.next::<ToHost>(), Err(Error::FrameTooLong(u64::from(u32::MAX))));
    }
}
