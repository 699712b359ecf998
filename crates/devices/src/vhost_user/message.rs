//! Messages of the vhost-user protocol (QEMU: docs/interop/vhost-user.rst): a header of three words, then the
//! payload, all in this machine's byte order.

use bitflags::bitflags;

/// Bytes of a header.
pub const HEADER: usize = 12;
/// Most bytes of a payload that is taken.
pub const PAYLOAD_MAX: usize = 4096;
/// Most regions of guest memory in a table.
pub const REGIONS_MAX: usize = 8;

/// Feature bit by which a back end offers protocol features. Not the guest's.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// What is asked of the back end, by the names that the protocol has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names say it, and the protocol the rest")]
pub enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    SetVringErr = 14,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SetBackendReqFd = 21,
    GetConfig = 24,
    SetConfig = 25,
    GetInflightFd = 31,
    SetInflightFd = 32,
    ResetDevice = 34,
}

/// What a back end asks of us, on a socket of its own: its configuration has changed.
pub const CONFIG_CHANGE: u32 = 2;

bitflags! {
    /// Parts of the protocol that both sides must know.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Protocol: u64 {
        /// The back end says how many queues it has.
        const MQ = 1 << 0;
        /// Requests without an answer of their own are acknowledged.
        const REPLY_ACK = 1 << 3;
        /// The back end may ask something of us.
        const BACKEND_REQ = 1 << 5;
        /// The back end has the configuration space.
        const CONFIG = 1 << 9;
        /// Requests under way are noted in memory that outlives the back end.
        const INFLIGHT = 1 << 12;
        /// The device can be reset.
        const RESET_DEVICE = 1 << 13;
    }
}

bitflags! {
    /// Second word of a header, but for the version in its lowest bits.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Flags: u32 {
        const REPLY = 1 << 2;
        const NEED_REPLY = 1 << 3;
    }
}

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;

/// The words before a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub request: u32,
    pub flags: Flags,
    pub size: u32,
}

/// A header that cannot be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("version {0} of the protocol, not {VERSION}")]
    Version(u32),
    #[error("{0} bytes of payload; at most {PAYLOAD_MAX} are taken")]
    Size(u32),
}

impl Header {
    pub fn encode(self) -> [u8; HEADER] {
        words(&[self.request, self.flags.bits() | VERSION, self.size])
    }

    pub fn decode(bytes: [u8; HEADER]) -> Result<Self, HeaderError> {
        let [request, flags, size] = [0, 4, 8].map(|at| u32_at(&bytes, at));
        if flags & VERSION_MASK != VERSION {
            return Err(HeaderError::Version(flags & VERSION_MASK));
        }
        if size as usize > PAYLOAD_MAX {
            return Err(HeaderError::Size(size));
        }
        Ok(Self { request, flags: Flags::from_bits_truncate(flags), size })
    }
}

/// Words one after the other.
pub fn words<const N: usize, const BYTES: usize>(words: &[u32; N]) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// The word at `at`, or 0 past the end.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_ne_bytes(*b))
}

/// The double word at `at`, or 0 past the end.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_ne_bytes(*b))
}

/// A region of guest memory as the back end is told of it. Its addresses in this process are none of the back end's
/// business: those of the guest stand in for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address.
    pub at: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in its file.
    pub offset: u64,
}

/// Payload of [`Request::SetMemTable`].
pub fn memory_table(regions: &[Region]) -> Vec<u8> {
    let mut bytes = words::<2, 8>(&[regions.len() as u32, 0]).to_vec();
    for r in regions {
        for word in [r.at, r.size, r.at, r.offset] {
            bytes.extend(word.to_ne_bytes());
        }
    }
    bytes
}

/// Where a ring is, payload of [`Request::SetVringAddr`]; addresses are the guest's.
pub fn ring_addresses(queue: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    let mut bytes = words::<2, 8>(&[queue, 0]).to_vec();
    for word in [desc, used, avail, 0] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes
}

/// Memory in which requests under way are noted, payload of [`Request::SetInflightFd`] and of the answer to
/// [`Request::GetInflightFd`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InflightArea {
    pub size: u64,
    pub offset: u64,
    pub queues: u16,
    pub queue_size: u16,
}

impl InflightArea {
    /// Bytes of it, with what the compiler of other front ends puts at the end.
    pub const LEN: usize = 24;

    pub fn encode(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&self.size.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_ne_bytes());
        bytes[16..18].copy_from_slice(&self.queues.to_ne_bytes());
        bytes[18..20].copy_from_slice(&self.queue_size.to_ne_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Self {
        let half = |at| u32_at(bytes, at).to_ne_bytes();
        let [q0, q1, s0, s1] = half(16);
        Self {
            size: u64_at(bytes, 0),
            offset: u64_at(bytes, 8),
            queues: u16::from_ne_bytes([q0, q1]),
            queue_size: u16::from_ne_bytes([s0, s1]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_checked() {
        let header = Header { request: 24, flags: Flags::NEED_REPLY, size: 12 };
        assert_eq!(header.encode(), words(&[24u32, 9, 12]));
        assert_eq!(Header::decode(header.encode()), Ok(header));
        assert_eq!(Header::decode(words(&[1, 2, 8])), Err(HeaderError::Version(2)));
        assert_eq!(Header::decode(words(&[1, 5, 4097])), Err(HeaderError::Size(4097)));
    }

    #[test]
    fn tables_are_laid_out_as_the_protocol_has_them() {
        let region = Region { at: 0x1000, size: 0x2000, offset: 0x3000 };
        let bytes = memory_table(&[region, region]);
        assert_eq!(bytes.len(), 8 + 2 * 32);
        let at = [0, 8, 16, 24, 32].map(|at| u64_at(&bytes, at));
        assert_eq!(at, [2, 0x1000, 0x2000, 0x1000, 0x3000]);
        let bytes = ring_addresses(3, 1, 2, 3);
        assert_eq!([0, 8, 16, 24, 32].map(|at| u64_at(&bytes, at)), [3, 1, 2, 3, 0]);
        let area = InflightArea { size: 7, offset: 8, queues: 2, queue_size: 256 };
        assert_eq!(InflightArea::decode(&area.encode()), area);
    }
}
