//! The host's side of a balloon.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::device::feature;
use super::state::{HINT_DONE, Hints, Inner, Shared};
use super::{BalloonState, MemoryStats, PAGE};

/// Why the guest's balloon gave no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BalloonError {
    /// No driver runs.
    #[error("the guest has no driver for its balloon running (yet); ask again once it has booted")]
    NotRunning,
    /// The driver lacks the ability.
    #[error("the guest's balloon driver has no {what}")]
    NotOffered {
        /// Which.
        what: &'static str,
    },
    /// The guest is slow or does not answer.
    #[error("the guest's balloon driver did not send its {what} in time")]
    Timeout {
        /// What was waited for.
        what: &'static str,
    },
    /// More than a balloon can hold.
    #[error("a balloon of {mib} MiB: at most {} MiB", (u64::from(u32::MAX) * PAGE) >> 20)]
    TooLarge {
        /// What was asked for.
        mib: u64,
    },
}

/// A way to a balloon from any thread. Clones reach the same one.
#[derive(Debug, Clone)]
pub struct BalloonHandle {
    pub(super) shared: Arc<Shared>,
}

impl BalloonHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The amounts as they are now.
    pub fn state(&self) -> BalloonState {
        self.shared.lock().state
    }

    /// Asks the guest to give up `mib` MiB of its memory in all; 0 gives everything back. It does so page by
    /// page: [`BalloonHandle::state`] says how far it is. May be called before the guest's driver runs.
    ///
    /// # Errors
    /// [`BalloonError::TooLarge`].
    pub fn set_target(&self, mib: u64) -> Result<(), BalloonError> {
        let pages = mib.checked_mul((1 << 20) / PAGE).and_then(|pages| u32::try_from(pages).ok());
        let pages = pages.ok_or(BalloonError::TooLarge { mib })?;
        let mut inner = self.shared.lock();
        if inner.state.target_pages != pages {
            inner.state.target_pages = pages;
            inner.notify = true;
            self.shared.wake.wake();
        }
        Ok(())
    }

    /// Waits until `done` says so, while a driver that accepted feature `bit` runs.
    fn wait<T>(
        &self,
        bit: u32,
        what: &'static str,
        timeout: Duration,
        ask: impl FnOnce(&mut Inner),
        mut done: impl FnMut(&mut Inner) -> Option<T>,
    ) -> Result<T, BalloonError> {
        let deadline = Instant::now() + timeout;
        let mut inner = self.shared.lock();
        let mut ask = Some(ask);
        loop {
            let features = inner.features.ok_or(BalloonError::NotRunning)?;
            if features & 1 << bit == 0 {
                return Err(BalloonError::NotOffered { what });
            }
            if let Some(ask) = ask.take() {
                ask(&mut inner);
                self.shared.wake.wake();
            }
            if let Some(value) = done(&mut inner) {
                return Ok(value);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(BalloonError::Timeout { what });
            }
            let waited = self.shared.changed.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Asks the guest for statistics of its memory and waits for them.
    ///
    /// # Errors
    /// [`BalloonError`] when none come.
    pub fn stats(&self, timeout: Duration) -> Result<MemoryStats, BalloonError> {
        let before = std::cell::Cell::new(0);
        self.wait(
            feature::STATS,
            "statistics",
            timeout,
            |inner| {
                before.set(inner.stats_round);
                inner.stats_wanted = true;
            },
            |inner| (inner.stats_round != before.get()).then_some(inner.stats),
        )
    }

    /// Asks the guest which of its memory is free, and waits for the answer: guest physical addresses and
    /// lengths, in no order.
    ///
    /// These are hints: the guest uses such memory again whenever it likes, also before this returns, and says
    /// nothing. They serve who tracks writes, as a snapshot does: what was hinted and not written since need
    /// not be saved. Nothing is given back to the host here; that is what free page reporting is for.
    ///
    /// # Errors
    /// [`BalloonError`] when no answer comes.
    pub fn free_ranges(&self, timeout: Duration) -> Result<Vec<(u64, u64)>, BalloonError> {
        let _one = self.shared.hinting.lock().unwrap_or_else(PoisonError::into_inner);
        let result = self.wait(
            feature::FREE_PAGE_HINT,
            "free page hints",
            timeout,
            |inner| {
                inner.hints = Hints::default();
                inner.last_hint = inner.last_hint.wrapping_add(1).max(HINT_DONE + 1);
                inner.state.hint_command = inner.last_hint;
                inner.notify = true;
            },
            |inner| inner.hints.complete.then(|| std::mem::take(&mut inner.hints.ranges)),
        );
        // Whatever came of it, the driver may have its pages back.
        let mut inner = self.shared.lock();
        inner.hints = Hints::default();
        if inner.state.hint_command > HINT_DONE {
            inner.state.hint_command = HINT_DONE;
            inner.notify = true;
            self.shared.wake.wake();
        }
        result
    }
}
