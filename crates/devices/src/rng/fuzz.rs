//! Body of the fuzz target: requests of any shape, in any order with resets. Panics when a promise is broken.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use krun_virtio::DeviceError;
use krun_virtio::mock::Harness;

use super::{LIMIT, Rng};

/// One input: for each request the number of its buffers, then their lengths in units of 512 bytes.
pub fn fuzz_one(data: &[u8]) {
    let mut h = Harness::new(Rng::new());
    let mut bytes = data.iter().copied();
    for _ in 0..64 {
        let Some(op) = bytes.next() else { return };
        let (inputs, outputs) = (usize::from(op & 3), usize::from(op >> 2 & 3));
        if op & 0xf0 == 0xf0 {
            h.restart().unwrap();
            continue;
        }
        let lens: Vec<u32> = bytes.by_ref().take(outputs).map(|b| u32::from(b) * 512 + 1).collect();
        let inputs = vec![&b"input"[..]; inputs];
        if inputs.is_empty() && lens.is_empty() {
            continue;
        }
        match h.request(0, &inputs, &lens) {
            Ok(done) => {
                let room: u32 = lens.iter().sum();
                assert_eq!(done.written as usize, (room as usize).min(LIMIT), "as much as fits");
            }
            Err(DeviceError::Driver(_)) => return,
            Err(e) => panic!("a valid ring, but {e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn promises_hold(data in prop::collection::vec(any::<u8>(), 0..200)) {
            super::fuzz_one(&data);
        }
    }
}
