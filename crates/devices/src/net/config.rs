//! The configuration space (virtio 1.2, section 5.1.4).

use std::sync::atomic::{AtomicBool, Ordering};

use krun_virtio::ConfigSpace;

/// Bytes of it: address, status, most pairs of queues.
const LEN: usize = 10;
/// Bit of the status.
const LINK_UP: u16 = 1;

/// What the driver reads, shared with the transport.
#[derive(Debug)]
pub struct Config {
    mac: [u8; 6],
    up: AtomicBool,
    pairs: u16,
}

impl Config {
    pub fn new(mac: [u8; 6], pairs: u16) -> Self {
        Self { mac, up: true.into(), pairs }
    }

    pub fn link(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// True when that is a change.
    pub fn set_link(&self, up: bool) -> bool {
        self.up.swap(up, Ordering::AcqRel) != up
    }

    fn bytes(&self) -> [u8; LEN] {
        let [a, b, c, d, e, f] = self.mac;
        let [low, high] = if self.link() { LINK_UP } else { 0 }.to_le_bytes();
        let [pairs_low, pairs_high] = self.pairs.to_le_bytes();
        [a, b, c, d, e, f, low, high, pairs_low, pairs_high]
    }
}

impl ConfigSpace for Config {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes();
        let rest = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        data.fill(0);
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_is_seen() {
        let config = Config::new([2, 3, 4, 5, 6, 7], 3);
        let read = |at| {
            let mut data = [0xff; 4];
            config.read(at, &mut data);
            data
        };
        assert_eq!(
            (read(0), read(4), read(6), read(u64::MAX)),
            ([2, 3, 4, 5], [6, 7, 1, 0], [1, 0, 3, 0], [0; 4])
        );
        assert!(!config.set_link(true) && config.set_link(false));
        assert_eq!(read(6), [0, 0, 3, 0]);
    }
}
