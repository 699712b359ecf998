//! Buffers in windows.
//!
//! A driver may name a buffer that lies in a window ([`krun_memory::Window`]): a program in the guest has a file mapped
//! there and has it written elsewhere, past the caches. What a window shows may go away at any time, and a device that
//! touched it then would end this process; nor may it be handed to calls that a device makes, for whose failure it would
//! answer. So a queue lends the device memory of its own in place of such a buffer: filled when the chain is taken, and
//! copied back, as far as the device wrote to it, when it is completed. What is not there reads as zeroes, and what is
//! written to it is lost: so it is for the guest's processors too.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use krun_memory::{GuestAddress, GuestMemory, Mapping, Memfd};

/// Windows of a machine, by where the guest sees them.
#[derive(Debug, Default)]
pub struct Windows(Vec<(GuestAddress, Mapping)>);

impl Windows {
    /// These windows.
    pub fn new(list: Vec<(GuestAddress, Mapping)>) -> Self {
        Self(list)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The window that holds all of `len` bytes at `at`, and where in it.
    fn find(&self, at: u64, len: u32) -> Option<(usize, usize)> {
        let end = at.checked_add(u64::from(len))?;
        self.0.iter().enumerate().find_map(|(n, (start, window))| {
            let offset = at.checked_sub(start.0)?;
            let inside = end <= start.0 + window.len() as u64;
            Some((n, usize::try_from(offset).ok()?)).filter(|_| inside)
        })
    }
}

/// Memory for a device to use in place of buffers in windows.
#[derive(Debug)]
pub struct Bounce {
    windows: Arc<Windows>,
    memory: Memfd,
    /// What is not lent: offset and length.
    free: Mutex<BTreeMap<u64, u64>>,
    /// How often something came back that a device had.
    returns: AtomicU64,
}

/// A buffer that was lent. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Loan {
    bounce: Arc<Bounce>,
    window: usize,
    /// Where in the window the buffer is.
    at: usize,
    len: u32,
    /// Where in the memory it is for now, and how much was taken there.
    place: u64,
    taken: u64,
    pub(crate) writable: bool,
    /// A device has it.
    handed: bool,
}

/// Why no buffer was lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is in no window.
    NoWindow,
    /// All is lent, or the host has no memory.
    NoRoom,
}

impl Bounce {
    /// Where devices see the memory, far above all that a guest has. A driver that names it finds what it left there
    /// itself.
    const BASE: u64 = 1 << 62;
    /// Bytes that can be lent at a time; pages are the host's until used.
    pub const SIZE: u64 = 64 << 20;
    const PAGE: u64 = 4096;

    /// Memory for buffers in `windows`, and the guest's `memory` with it.
    ///
    /// # Errors
    /// The host has no memory.
    pub fn new(
        windows: &Arc<Windows>,
        memory: &GuestMemory,
    ) -> Result<(Arc<Self>, GuestMemory), krun_memory::Error> {
        let file = Memfd::new(Self::SIZE)?;
        let region = file.map(0, Self::SIZE as usize)?.at(GuestAddress(Self::BASE))?;
        let memory = memory
            .insert_region(Arc::new(region))
            .map_err(|e| krun_memory::Error::Layout { at: Self::BASE, why: e.to_string() })?;
        let free = Mutex::new(BTreeMap::from([(0, Self::SIZE)]));
        let bounce = Self { windows: Arc::clone(windows), memory: file, free, returns: AtomicU64::new(0) };
        Ok((Arc::new(bounce), memory))
    }

    /// Lends a buffer in place of `len` bytes at `at`, filled with what is there.
    pub(crate) fn lend(self: &Arc<Self>, at: u64, len: u32, writable: bool) -> Result<Loan, Refusal> {
        let (window, at) = self.windows.find(at, len).ok_or(Refusal::NoWindow)?;
        let taken = u64::from(len).next_multiple_of(Self::PAGE);
        let place = self.take(taken).ok_or(Refusal::NoRoom)?;
        let loan = Loan { bounce: Arc::clone(self), window, at, len, place, taken, writable, handed: false };
        // One that is to be written is filled as well: a device that fails halfway may say that it wrote all of it.
        let range = at..at + len as usize;
        match self.windows.0[window].1.copy_to_file(range, self.memory.file(), place) {
            Ok(true) => {}
            Ok(false) => tracing::debug!(at, len, "a buffer in a window is not all there"),
            Err(error) => {
                tracing::warn!(%error, "a buffer in a window cannot be copied");
                return Err(Refusal::NoRoom);
            }
        }
        Ok(loan)
    }

    /// Whether anything is lent.
    pub(crate) fn is_lent(&self) -> bool {
        self.free().values().sum::<u64>() < Self::SIZE
    }

    /// A number that is another one once something came back that a device had. What is given back because the rest of
    /// its chain finds no room does not count: two queues that wait would wake each other without an end.
    pub(crate) fn returns(&self) -> u64 {
        self.returns.load(Ordering::Acquire)
    }

    fn free(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, u64>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, len: u64) -> Option<u64> {
        let mut free = self.free();
        let (at, room) = free.iter().find(|(_, room)| **room >= len).map(|(at, room)| (*at, *room))?;
        free.remove(&at);
        if room > len {
            free.insert(at + len, room - len);
        }
        Some(at)
    }

    fn give(&self, at: u64, len: u64, counts: bool) {
        let mut free = self.free();
        let (mut at, mut len) = (at, len);
        if let Some((&before, &room)) = free.range(..at).next_back()
            && before + room == at
        {
            free.remove(&before);
            (at, len) = (before, len + room);
        }
        if let Some(room) = free.remove(&(at + len)) {
            len += room;
        }
        free.insert(at, len);
        let all = len == Self::SIZE;
        drop(free);
        self.returns.fetch_add(u64::from(counts), Ordering::AcqRel);
        if all {
            self.release();
        }
    }

    /// Nothing is lent: gives the host most of the memory back.
    fn release(&self) {
        const KEPT: u64 = 1 << 20;
        if let Err(error) = self.memory.punch(KEPT, Self::SIZE - KEPT) {
            tracing::debug!(%error, "memory for buffers in windows is kept");
        }
    }
}

impl Loan {
    /// Where the device finds it.
    pub(crate) fn address(&self) -> u64 {
        Bounce::BASE + self.place
    }

    /// A device gets it.
    pub(crate) fn hand_out(&mut self) {
        self.handed = true;
    }

    /// The device is done: copies back the `written` bytes that it wrote. What follows is left alone, for somebody else
    /// may have written there meanwhile.
    pub(crate) fn settle(&self, written: u32) {
        let written = written.min(self.len) as usize;
        if !self.writable || written == 0 {
            return;
        }
        let range = self.at..self.at + written;
        match self.bounce.windows.0[self.window].1.copy_from_file(
            range,
            self.bounce.memory.file(),
            self.place,
        ) {
            Ok(true) => {}
            Ok(false) => tracing::debug!(at = self.at, len = self.len, "a buffer in a window is gone"),
            Err(error) => tracing::warn!(%error, "a buffer in a window cannot be copied back"),
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.bounce.give(self.place, self.taken, self.handed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 0x1_0000_0000;

    fn bounce() -> Arc<Bounce> {
        let window = krun_memory::Window::new(128 << 20).unwrap();
        let windows = Arc::new(Windows::new(vec![(GuestAddress(AT), window.mapping().clone())]));
        let ram = krun_memory::assemble(&[(GuestAddress(0), Mapping::anonymous(4096).unwrap())]).unwrap();
        Bounce::new(&windows, &ram).unwrap().0
    }

    #[test]
    fn only_what_lies_in_a_window_is_lent() {
        let b = bounce();
        let end = AT + (128 << 20);
        for (at, len) in [(0, 1), (AT - 1, 2), (end - 1, 2), (end, 1), (u64::MAX, 2), (u64::MAX - 3, 4)] {
            assert_eq!(b.lend(at, len, true).err(), Some(Refusal::NoWindow), "{at:#x} {len}");
        }
        assert!(b.lend(AT, 1, true).is_ok() && b.lend(end - 1, 1, false).is_ok());
        assert!(!b.is_lent());
    }

    #[test]
    fn what_comes_back_can_be_lent_again_in_one_piece() {
        let b = bounce();
        let mut all: Vec<_> = (0..64).map(|_| b.lend(AT, 1 << 20, false).unwrap()).collect();
        assert_eq!(b.lend(AT, 1, false).err(), Some(Refusal::NoRoom));
        let returns = b.returns();
        all.truncate(63);
        all.push(b.lend(AT, 1 << 20, false).unwrap());
        assert_eq!(b.returns(), returns, "no device had it");
        all.iter_mut().for_each(Loan::hand_out);
        // Odd ones first, so that neighbours join on both sides.
        for n in (0..64).rev().filter(|n| n % 2 == 1) {
            all.remove(n);
        }
        assert!(b.returns() != returns && b.is_lent());
        assert_eq!(b.lend(AT, 2 << 20, false).err(), Some(Refusal::NoRoom));
        all.clear();
        assert!(!b.is_lent());
        assert!(b.lend(AT, Bounce::SIZE as u32, false).is_ok());
        assert_eq!(b.lend(AT, Bounce::SIZE as u32 + 1, false).err(), Some(Refusal::NoRoom));
    }
}
