//! Body of the fuzz target: a driver and a host that do whatever the input says. Panics when a promise is
//! broken.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use krun_virtio::DeviceError;
use krun_virtio::mock::Harness;

use super::Balloon;

const QUEUES: usize = 5;

/// Takes `len` bytes off the front; fewer if there are fewer.
fn take<'a>(data: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (head, tail) = data.split_at(len.min(data.len()));
    *data = tail;
    head
}

/// One input.
pub fn fuzz_one(mut data: &[u8]) {
    let features = take(&mut data, 1).first().map_or(0, |b| u64::from(*b));
    let device = Balloon::new().unwrap();
    let handle = device.handle();
    let Ok(mut h) = Harness::with_features(device, features | u64::MAX << 28) else { return };
    for _ in 0..64 {
        let &[op, arg] = take(&mut data, 2) else { return };
        let result = match op % 8 {
            0..=4 => {
                let queue = usize::from(op) % QUEUES;
                let bytes = take(&mut data, usize::from(arg));
                let room: &[u32] = if arg & 1 == 0 { &[] } else { &[0x3001] };
                if bytes.is_empty() && room.is_empty() {
                    continue;
                }
                h.add(queue, if bytes.is_empty() { &[] } else { std::slice::from_ref(&bytes) }, room);
                let result = h.kick(queue);
                while h.collect(queue).is_some() {}
                result
            }
            5 => {
                h.config().write(u64::from(arg), take(&mut data, 4));
                let mut read = [0; 16];
                h.config().read(u64::from(arg), &mut read);
                Ok(())
            }
            6 => {
                let _ = handle.set_target(u64::from(arg));
                let _ = handle.stats(Duration::ZERO);
                let _ = handle.free_ranges(Duration::ZERO);
                h.poll(Duration::ZERO).map(|_| ())
            }
            _ => h.restart(),
        };
        match result {
            Ok(()) => assert!(
                (0..QUEUES).all(|q| h.held(q) <= u16::from(q == 2)),
                "only a statistics buffer is kept"
            ),
            Err(DeviceError::Driver(_)) => return,
            Err(e) => panic!("a valid ring and a sound host, but {e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn promises_hold(data in prop::collection::vec(any::<u8>(), 0..400)) {
            super::fuzz_one(&data);
        }
    }
}
