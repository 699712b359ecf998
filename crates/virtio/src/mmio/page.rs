//! The registers of a device as the driver reads them: one page of memory.
//!
//! Every read is answered from this page, so a machine can show it to the guest read only, and reads
//! then do not leave the guest at all. Writes must still reach the transport, which brings the page up
//! to date before it returns, and before an interrupt that tells of a change.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use krun_memory::{Error, Mapping};

use super::{CONFIG_MAX, MMIO_SIZE, reg};
use crate::device::ConfigSpace;

/// The pages of several devices, side by side in one mapping.
#[derive(Debug)]
pub struct RegisterPages(Mapping);

impl RegisterPages {
    /// Pages for `devices` devices, at least one.
    ///
    /// # Errors
    /// The host has no memory for them.
    pub fn new(devices: usize) -> Result<Self, Error> {
        Mapping::anonymous(devices.max(1) * MMIO_SIZE as usize).map(Self)
    }

    /// All of them, to be shown to the guest read only.
    pub fn mapping(&self) -> &Mapping {
        &self.0
    }

    /// The page of device `index`; `None` when there are not so many.
    pub fn page(&self, index: usize) -> Option<RegisterPage> {
        let at = index.checked_mul(MMIO_SIZE as usize)?;
        let inside = at.checked_add(MMIO_SIZE as usize)? <= self.0.len();
        inside.then(|| RegisterPage { memory: self.0.clone(), at, config: Mutex::new(()) })
    }
}

/// The page of one device.
#[derive(Debug)]
pub struct RegisterPage {
    memory: Mapping,
    at: usize,
    /// Held while the configuration space is copied: an older copy must not win.
    config: Mutex<()>,
}

impl RegisterPage {
    /// The register at `offset`, a multiple of 4; `None` outside of the page.
    fn word(&self, offset: u64) -> Option<&AtomicU32> {
        let offset = usize::try_from(offset).ok().filter(|o| *o < MMIO_SIZE as usize)?;
        self.memory.word(self.at + offset)
    }

    /// The value of a register.
    pub(super) fn get(&self, offset: u64) -> u32 {
        self.word(offset).map_or(0, |w| w.load(Ordering::SeqCst))
    }

    /// Changes the value of a register.
    pub(super) fn set(&self, offset: u64, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value, Ordering::SeqCst);
        }
    }

    /// Changes a register of 64 bits. Its halves do not change at once.
    pub(super) fn set_pair(&self, offset: u64, value: u64) {
        self.set(offset, value as u32);
        self.set(offset + 4, (value >> 32) as u32);
    }

    /// Sets bits of a register that another thread may change at the same time.
    pub(super) fn set_bits(&self, offset: u64, bits: u32) {
        if let Some(word) = self.word(offset) {
            word.fetch_or(bits, Ordering::SeqCst);
        }
    }

    /// Clears bits of a register that another thread may change at the same time.
    pub(super) fn clear_bits(&self, offset: u64, bits: u32) {
        if let Some(word) = self.word(offset) {
            word.fetch_and(!bits, Ordering::SeqCst);
        }
    }

    /// Brings the configuration space up to date.
    ///
    /// The generation changes before and after, so that a driver that compares it sees a change that
    /// went on between two of its reads. One whose reads all fell between two words of a change sees
    /// values of before beside values of after; the interrupt that follows makes it read again.
    pub(super) fn refresh(&self, config: &dyn ConfigSpace) {
        let _one = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = [0; CONFIG_MAX];
        config.read(0, &mut bytes);
        let (words, _) = bytes.as_chunks::<4>();
        let mut changed = false;
        for (at, &word) in (reg::CONFIG..).step_by(4).zip(words) {
            let value = u32::from_le_bytes(word);
            if self.get(at) != value {
                if !std::mem::replace(&mut changed, true) {
                    self.next_generation();
                }
                self.set(at, value);
            }
        }
        if changed {
            self.next_generation();
        }
    }

    fn next_generation(&self) {
        if let Some(word) = self.word(reg::CONFIG_GENERATION) {
            word.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// What a driver reads at `offset`: words as a whole, zeroes past the end.
    pub(super) fn read(&self, mut offset: u64, data: &mut [u8]) {
        data.fill(0);
        let mut rest = data;
        while !rest.is_empty() {
            let Some(word) = self.word(offset & !3) else { break };
            let word = word.load(Ordering::SeqCst).to_le_bytes();
            let part = &word[(offset & 3) as usize..];
            let (now, later) = rest.split_at_mut(part.len().min(rest.len()));
            now.copy_from_slice(&part[..now.len()]);
            offset += now.len() as u64;
            rest = later;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[derive(Default)]
    struct Config(AtomicU64);

    impl ConfigSpace for Config {
        fn read(&self, offset: u64, data: &mut [u8]) {
            assert_eq!((offset, data.len()), (0, CONFIG_MAX));
            data.fill(0);
            data[3..11].copy_from_slice(&self.0.load(Ordering::SeqCst).to_le_bytes());
        }
    }

    #[test]
    fn pages_lie_side_by_side_and_end() {
        let pages = RegisterPages::new(2).unwrap();
        let (a, b) = (pages.page(0).unwrap(), pages.page(1).unwrap());
        assert!(pages.page(2).is_none() && pages.page(usize::MAX).is_none());
        a.set(MMIO_SIZE - 4, 7);
        b.set_pair(0, 0x1_0000_0002);
        a.set(MMIO_SIZE, 9);
        assert_eq!((a.get(MMIO_SIZE - 4), b.get(0), b.get(4), a.get(MMIO_SIZE)), (7, 2, 1, 0));
        assert_eq!(pages.mapping().word(MMIO_SIZE as usize).unwrap().load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_read_of_any_width_is_made_of_words() {
        let pages = RegisterPages::new(1).unwrap();
        let page = pages.page(0).unwrap();
        page.set_pair(8, 0x0807_0605_0403_0201);
        page.set(MMIO_SIZE - 4, 0x0908_0706);
        for (at, want) in [(8, [1, 2, 3, 4, 5]), (10, [3, 4, 5, 6, 7]), (13, [6, 7, 8, 0, 0])] {
            let mut data = [0xff; 5];
            page.read(at, &mut data);
            assert_eq!(data, want, "{at}");
        }
        for (at, want) in [(MMIO_SIZE - 2, [8, 9, 0, 0]), (MMIO_SIZE, [0; 4]), (u64::MAX, [0; 4])] {
            let mut data = [0xff; 4];
            page.read(at, &mut data);
            assert_eq!(data, want, "{at:#x}");
        }
    }

    #[test]
    fn the_generation_tells_of_changes_only() {
        let pages = RegisterPages::new(1).unwrap();
        let page = pages.page(0).unwrap();
        let config = Config::default();
        page.refresh(&config);
        assert_eq!(page.get(reg::CONFIG_GENERATION), 0);
        config.0.store(0x55_0000_0000_00aa, Ordering::SeqCst);
        page.refresh(&config);
        assert_eq!(page.get(reg::CONFIG_GENERATION), 2);
        let mut data = [0; 8];
        page.read(reg::CONFIG + 3, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0x55_0000_0000_00aa);
        page.refresh(&config);
        assert_eq!(page.get(reg::CONFIG_GENERATION), 2);
    }
}
