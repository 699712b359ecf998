//! Memory that the guest gives back.

use std::time::Duration;

use krun_devices::balloon::{BalloonHandle, MemoryStats, PAGE};

use crate::{Error, Vm};

/// How much memory a guest has given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BalloonStatus {
    /// Bytes that it shall give up, see [`Vm::set_balloon`].
    pub target: u64,
    /// Bytes that it has given up.
    pub actual: u64,
    /// Bytes that went back to the host since the start, also such as the guest has taken again since.
    pub released: u64,
}

impl Vm {
    fn balloon(&self) -> Result<&BalloonHandle, Error> {
        self.balloon.as_ref().ok_or(Error::NoBalloon)
    }

    /// Asks the guest to give up `mib` MiB of its memory in all, for the host to use; 0 gives all back. Returns
    /// at once: [`Vm::balloon_status`] says how far the guest is. A guest that runs out of memory takes some back.
    ///
    /// Memory that the guest has freed goes back without this, some seconds later.
    ///
    /// # Errors
    /// [`Error::NoBalloon`], or more than a balloon can hold.
    pub fn set_balloon(&self, mib: u64) -> Result<(), Error> {
        Ok(self.balloon()?.set_target(mib)?)
    }

    /// How much memory the guest has given up.
    ///
    /// # Errors
    /// [`Error::NoBalloon`].
    pub fn balloon_status(&self) -> Result<BalloonStatus, Error> {
        let state = self.balloon()?.state();
        Ok(BalloonStatus {
            target: u64::from(state.target_pages) * PAGE,
            actual: u64::from(state.actual_pages) * PAGE,
            released: state.released,
        })
    }

    /// Asks the guest's kernel what its memory is used for.
    ///
    /// # Errors
    /// [`Error::NoBalloon`], or a guest that does not answer within `timeout`.
    pub fn memory_stats(&self, timeout: Duration) -> Result<MemoryStats, Error> {
        Ok(self.balloon()?.stats(timeout)?)
    }

    /// Asks the guest which of its memory is free now: guest physical addresses and lengths in bytes, in no
    /// order. Only hints: the guest may use such memory again at any time.
    ///
    /// # Errors
    /// [`Error::NoBalloon`], or a guest that does not answer within `timeout`.
    pub fn free_memory_hints(&self, timeout: Duration) -> Result<Vec<(u64, u64)>, Error> {
        Ok(self.balloon()?.free_ranges(timeout)?)
    }
}
