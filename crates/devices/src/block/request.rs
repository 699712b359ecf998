//! Requests as the driver writes them (virtio 1.2, section 5.2.6).

use std::io::Read;
use std::sync::Arc;

use krun_memory::{GuestAddress, GuestMemory};
use krun_virtio::{Chain, DeviceError};

use super::image::SECTOR;
use super::pool::{Job, Range};
use super::sys::Buffers;

/// Answers (section 5.2.6).
pub mod status {
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
}

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Bytes of a request's header: type, reserved, sector.
const HEADER: u32 = 16;
/// Bytes of a range in a discard or write-zeroes request.
const SEGMENT: usize = 16;
/// Most ranges in such a request.
pub const MAX_SEGMENTS: u32 = 32;
/// Most sectors of a range that is discarded.
pub const MAX_DISCARD: u32 = 1 << 22;
/// Most sectors of a range that becomes zeroes: the host may have to write them.
pub const MAX_ZEROES: u32 = 1 << 17;

/// What requests are checked against.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Bytes of the disk.
    pub size: u64,
    pub read_only: bool,
    /// A write must be on stable storage when it is answered.
    pub durable: bool,
    /// A flush has nothing to do.
    pub no_flush: bool,
}

/// What is to be done for a request.
pub enum Action {
    /// Answer with this status.
    Answer(u8),
    /// Store the disk's id, then answer.
    Id,
    /// Do it, then answer.
    Run(Job),
}

/// A request, checked.
pub struct Request {
    pub action: Action,
    /// Where the status byte belongs: the last writable one.
    pub status_at: GuestAddress,
}

/// Reads the request of `chain`.
///
/// # Errors
/// The driver left out the header or the status byte.
pub fn parse(chain: &Chain, memory: &Arc<GuestMemory>, rules: &Rules) -> Result<Request, DeviceError> {
    let broken = |what: &str| DeviceError::Driver(format!("request without {what}"));
    let mut header = [0u8; HEADER as usize];
    let mut reader = chain.reader(memory);
    reader.read_exact(&mut header).map_err(|_| broken("a header"))?;
    let &(last, len) = chain.writable().last().ok_or_else(|| broken("a status byte"))?;
    let status_at = GuestAddress(last.0 + u64::from(len) - 1);
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector));
    let action = match kind {
        T_IN => transfer(memory, skip_end(chain.writable()), sector, rules)
            .map_or(Action::Answer(status::IOERR), |(buffers, offset)| {
                Action::Run(Job::Read { buffers, offset })
            }),
        T_OUT if rules.read_only => Action::Answer(status::IOERR),
        T_OUT => transfer(memory, skip_start(chain.readable()), sector, rules)
            .map_or(Action::Answer(status::IOERR), |(buffers, offset)| {
                Action::Run(Job::Write { buffers, offset, durable: rules.durable })
            }),
        T_FLUSH if rules.no_flush || rules.read_only => Action::Answer(status::OK),
        T_FLUSH => Action::Run(Job::Flush),
        T_GET_ID => Action::Id,
        T_DISCARD | T_WRITE_ZEROES => {
            let mut data = vec![0; (MAX_SEGMENTS as usize * SEGMENT).min(reader.remaining())];
            let whole = reader.remaining() == data.len();
            match reader.read_exact(&mut data) {
                Ok(()) if whole => ranges(&data, kind == T_WRITE_ZEROES, rules),
                _ => Action::Answer(status::IOERR),
            }
        }
        _ => Action::Answer(status::UNSUPP),
    };
    Ok(Request { action, status_at })
}

/// The data of a transfer and its place in bytes; `None` when they are not whole sectors of the disk.
fn transfer(
    memory: &Arc<GuestMemory>,
    data: Vec<(GuestAddress, u32)>,
    sector: u64,
    rules: &Rules,
) -> Option<(Buffers, u64)> {
    let len: u64 = data.iter().map(|r| u64::from(r.1)).sum();
    let offset = place(sector, len, rules)?;
    Some((Buffers::new(memory, &data)?, offset))
}

/// Checks a range and gives its start in bytes.
fn place(sector: u64, len: u64, rules: &Rules) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    let fits = offset.checked_add(len)? <= rules.size;
    (fits && len > 0 && len.is_multiple_of(SECTOR)).then_some(offset)
}

/// Discard and write-zeroes: sector, number of sectors, flags, for each range.
fn ranges(data: &[u8], zeroes: bool, rules: &Rules) -> Action {
    if rules.read_only || data.is_empty() || !data.len().is_multiple_of(SEGMENT) {
        return Action::Answer(status::IOERR);
    }
    let mut ranges = Vec::new();
    for segment in data.chunks_exact(SEGMENT) {
        let word =
            |at: usize| u32::from_le_bytes([segment[at], segment[at + 1], segment[at + 2], segment[at + 3]]);
        let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
        let (count, flags) = (word(8), word(12));
        // Only write-zeroes has a flag: the sectors may be unmapped.
        if flags & !u32::from(zeroes) != 0 {
            return Action::Answer(status::UNSUPP);
        }
        let limit = if zeroes { MAX_ZEROES } else { MAX_DISCARD };
        let len = u64::from(count) * SECTOR;
        match place(sector, len, rules) {
            Some(offset) if count <= limit => ranges.push(Range { offset, len, unmap: flags == 1 }),
            _ => return Action::Answer(status::IOERR),
        }
    }
    Action::Run(match zeroes {
        true => Job::Zero { ranges, durable: rules.durable },
        false => Job::Discard(ranges),
    })
}

/// What follows the header.
fn skip_start(ranges: &[(GuestAddress, u32)]) -> Vec<(GuestAddress, u32)> {
    let mut skip = HEADER;
    let mut out = Vec::with_capacity(ranges.len());
    for &(at, len) in ranges {
        let cut = skip.min(len);
        skip -= cut;
        if cut < len {
            out.push((GuestAddress(at.0 + u64::from(cut)), len - cut));
        }
    }
    out
}

/// All but the status byte.
fn skip_end(ranges: &[(GuestAddress, u32)]) -> Vec<(GuestAddress, u32)> {
    let mut out = ranges.to_vec();
    if let Some(last) = out.last_mut() {
        last.1 -= 1;
        if last.1 == 0 {
            out.pop();
        }
    }
    out
}
