//! Packets: a header, and data behind it in those that carry some (virtio 1.2, section 5.10.6).

use std::io::Read;

use bitflags::bitflags;
use krun_virtio::Reader;

/// The host's context id.
pub const HOST_CID: u64 = 2;
/// Type of stream connections.
pub const STREAM: u16 = 1;

/// Type of connections that keep messages apart.
pub const SEQPACKET: u16 = 2;
/// Flag of an RW packet of theirs: the message ends here.
pub const END_OF_MESSAGE: u32 = 1;
/// Another: and with it a record.
pub const END_OF_RECORD: u32 = 2;

/// Operations.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

bitflags! {
    /// What the sender of a SHUTDOWN will do no more: its flags.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub struct Ended: u32 {
        /// Receive.
        const RECEIVE = 1;
        /// Send.
        const SEND = 2;
    }
}

/// A packet's header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender's context id.
    pub src_cid: u64,
    /// The receiver's.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's.
    pub dst_port: u32,
    /// Bytes of data.
    pub len: u32,
    /// [`STREAM`], [`SEQPACKET`], or something unknown.
    pub kind: u16,
    /// One of [`op`].
    pub op: u16,
    /// Of a SHUTDOWN: [`Ended`]. Of an RW: [`END_OF_MESSAGE`], [`END_OF_RECORD`].
    pub flags: u32,
    /// Bytes for which the sender has room on this connection.
    pub buf_alloc: u32,
    /// Bytes that the sender's user has taken so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Bytes of a header.
    pub const SIZE: usize = 44;

    /// Reads one; `None` when there is less than that.
    pub fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let mut bytes = [0; Self::SIZE];
        reader.read_exact(&mut bytes).ok()?;
        Some(Self::from_bytes(&bytes))
    }

    fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        fn field<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
            let mut out = [0; N];
            if let Some((head, tail)) = rest.split_at_checked(N) {
                out.copy_from_slice(head);
                *rest = tail;
            }
            out
        }
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(field(&mut rest)),
            dst_cid: u64::from_le_bytes(field(&mut rest)),
            src_port: u32::from_le_bytes(field(&mut rest)),
            dst_port: u32::from_le_bytes(field(&mut rest)),
            len: u32::from_le_bytes(field(&mut rest)),
            kind: u16::from_le_bytes(field(&mut rest)),
            op: u16::from_le_bytes(field(&mut rest)),
            flags: u32::from_le_bytes(field(&mut rest)),
            buf_alloc: u32::from_le_bytes(field(&mut rest)),
            fwd_cnt: u32::from_le_bytes(field(&mut rest)),
        }
    }

    /// As it is sent.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; Self::SIZE];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// The RST that answers this packet, from where it was sent to; none answers an RST.
    pub fn refusal(&self) -> Option<Self> {
        (self.op != op::RST).then_some(Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        })
    }
}

#[cfg(any(test, feature = "mock"))]
#[allow(clippy::unwrap_used)]
impl Header {
    /// Takes one off the front of a packet.
    pub fn split(packet: &[u8]) -> (Self, &[u8]) {
        let (head, data) = packet.split_at(Self::SIZE);
        (Self::from_bytes(head.try_into().unwrap()), data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_standard_has_them() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 0x2122_2324,
            len: 0x3132_3334,
            kind: 0x4142,
            op: 0x5152,
            flags: 0x6162_6364,
            buf_alloc: 0x7172_7374,
            fwd_cnt: 0x8182_8384,
        };
        let bytes = header.to_bytes();
        assert_eq!((bytes[0], bytes[8], bytes[16], bytes[20], bytes[24]), (8, 2, 0x14, 0x24, 0x34));
        assert_eq!((bytes[28], bytes[30], bytes[32], bytes[36], bytes[40]), (0x42, 0x52, 0x64, 0x74, 0x84));
        assert_eq!(Header::from_bytes(&bytes), header);
    }

    #[test]
    fn a_refusal_goes_back_and_is_not_refused() {
        let header =
            Header { src_cid: 3, dst_cid: 9, src_port: 5, dst_port: 6, op: 77, kind: 2, ..Header::default() };
        let rst = header.refusal().unwrap();
        assert_eq!((rst.src_cid, rst.dst_cid, rst.src_port, rst.dst_port), (9, 3, 6, 5));
        assert_eq!((rst.op, rst.kind, rst.refusal()), (op::RST, 2, None));
    }
}
