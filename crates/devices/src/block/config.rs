//! The configuration space (virtio 1.2, section 5.2.4).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use krun_virtio::ConfigSpace;

use super::image::SECTOR;
use super::request::{MAX_DISCARD, MAX_SEGMENTS, MAX_ZEROES};

/// Bytes of it.
const LEN: usize = 60;
/// Offset of the field that the driver may write: whether there is a write-back cache.
const WRITEBACK: usize = 32;

/// Segments of a request's data: what a queue of [`super::device::QUEUE_SIZE`] holds beside header and
/// status.
pub const SEG_MAX: u32 = 254;

/// What the driver reads, shared with the transport.
pub struct Config {
    /// Bytes of the disk.
    size: AtomicU64,
    writeback: AtomicBool,
    block_size: u32,
    queues: u16,
}

impl Config {
    pub fn new(size: u64, block_size: u32, queues: u16) -> Self {
        Self { size: size.into(), writeback: true.into(), block_size, queues }
    }

    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// True when the size is another one than before.
    pub fn set_size(&self, size: u64) -> bool {
        self.size.swap(size, Ordering::AcqRel) != size
    }

    /// Whether the driver counts on a cache and flushes it.
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    pub fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::Release);
    }

    fn bytes(&self) -> [u8; LEN] {
        let mut out = [0; LEN];
        let mut put = |at: usize, value: &[u8]| out[at..at + value.len()].copy_from_slice(value);
        put(0, &(self.size() / SECTOR).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &self.block_size.to_le_bytes());
        put(WRITEBACK, &[u8::from(self.writeback())]);
        put(34, &self.queues.to_le_bytes());
        let alignment = self.block_size / SECTOR as u32;
        for (at, value) in
            [(36, MAX_DISCARD), (40, MAX_SEGMENTS), (44, alignment), (48, MAX_ZEROES), (52, MAX_SEGMENTS)]
        {
            put(at, &value.to_le_bytes());
        }
        // Zeroes may be holes.
        put(56, &[1]);
        out
    }
}

impl ConfigSpace for Config {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|o| o.checked_add(i));
            *byte = at.and_then(|at| bytes.get(at)).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(WRITEBACK), &[value]) = (usize::try_from(offset), data) {
            self.set_writeback(value != 0);
        }
    }
}
