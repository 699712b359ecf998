//! What host and driver share.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use krun_event::Wake;
use krun_virtio::ConfigSpace;

use super::MemoryStats;

/// `free_page_hint_cmd_id`: no hints are wanted, those given stay valid.
pub(super) const HINT_STOP: u32 = 0;
/// `free_page_hint_cmd_id`: no hints are wanted, the driver may use the pages again.
pub(super) const HINT_DONE: u32 = 1;
/// Most separate ranges kept of one round of hints.
const MAX_RANGES: usize = 1 << 16;

/// What a snapshot of a balloon holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BalloonState {
    /// Pages of 4 KiB that the guest shall give up.
    pub target_pages: u32,
    /// Pages that it has given up, as its driver says.
    pub actual_pages: u32,
    /// The `free_page_hint_cmd_id` that the driver was told last.
    pub hint_command: u32,
    /// Bytes that went back to the host so far.
    pub released: u64,
}

/// The part of a round of hints that has arrived.
#[derive(Debug, Default)]
pub(super) struct Hints {
    /// The driver has taken the command up.
    pub active: bool,
    /// The driver has told all.
    pub complete: bool,
    /// Guest physical address and length, neighbours joined.
    pub ranges: Vec<(u64, u64)>,
}

impl Hints {
    /// Takes a range in.
    pub fn push(&mut self, at: u64, len: u64) {
        let room = self.ranges.len() < MAX_RANGES;
        match self.ranges.last_mut() {
            Some((last, have)) if *last + *have == at => *have += len,
            // The kernel hands out free blocks downwards as often as upwards.
            Some((last, have)) if at + len == *last => (*last, *have) = (at, *have + len),
            _ if room => self.ranges.push((at, len)),
            _ => {}
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub state: BalloonState,
    /// Features that the driver accepted; `None` while it does not run.
    pub features: Option<u64>,
    /// The configuration changed and the driver has not been told.
    pub notify: bool,
    pub stats: MemoryStats,
    /// Statistics were asked for and have not come.
    pub stats_wanted: bool,
    /// How often they have come.
    pub stats_round: u64,
    pub hints: Hints,
    /// The last command that asked for hints; a driver takes a number up once.
    pub last_hint: u32,
}

/// Held for a few instructions at a time by the device's thread, by vCPUs that access the configuration,
/// and by whoever has a handle.
#[derive(Debug)]
pub(super) struct Shared {
    inner: Mutex<Inner>,
    /// Something of `inner` changed that a handle may wait for.
    pub changed: Condvar,
    /// The device's thread has something to do.
    pub wake: Wake,
    /// Held by whoever asks for hints: one round at a time.
    pub hinting: Mutex<()>,
}

impl Shared {
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            inner: Mutex::default(),
            changed: Condvar::new(),
            wake: Wake::new()?,
            hinting: Mutex::default(),
        })
    }

    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Offset of `actual` in the configuration.
const ACTUAL: u64 = 4;

impl ConfigSpace for Shared {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock().state;
        let fields = [state.target_pages, state.actual_pages, state.hint_command, 0];
        let bytes = fields.map(u32::to_le_bytes);
        let bytes = bytes.as_flattened();
        let from = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        let known = from.len().min(data.len());
        data.fill(0);
        data[..known].copy_from_slice(&from[..known]);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // The driver stores it whole; anything else is not its doing.
        if let (ACTUAL, Ok(bytes)) = (offset, data.try_into()) {
            self.lock().state.actual_pages = u32::from_le_bytes(bytes);
            self.changed.notify_all();
        }
    }
}
