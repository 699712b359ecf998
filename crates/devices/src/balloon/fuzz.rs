//! Body of the fuzz target: a driver and a host that do whatever the input says. Panics when a promise is
//! broken.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use krun_virtio::DeviceError;
use krun_virtio::mock::Harness;

use super::Balloon;

const QUEUES: usize = 5;
/// `num_pages` and `actual` in the configuration.
const TARGET: u64 = 0;
const ACTUAL: u64 = 4;

/// Takes `len` bytes off the front; fewer if there are fewer.
fn take<'a>(data: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (head, tail) = data.split_at(len.min(data.len()));
    *data = tail;
    head
}

fn word(h: &Harness, at: u64) -> u32 {
    let mut bytes = [0; 4];
    h.config().read(at, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// Whether a list of pages has some that rings lie in.
fn names_rings(h: &mut Harness, list: &[u8]) -> bool {
    let rings: Vec<_> = (0..QUEUES)
        .map(|q| {
            let (at, size) = (h.driver(q).addresses(), u64::from(h.driver(q).size()));
            at.desc >> 12..=(at.used + 6 + 8 * size) >> 12
        })
        .collect();
    let pages = list.chunks_exact(4).map(|b| u64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])));
    pages.into_iter().any(|page| rings.iter().any(|r| r.contains(&page)))
}

/// One input.
pub fn fuzz_one(mut data: &[u8]) {
    let features = take(&mut data, 1).first().map_or(0, |b| u64::from(*b));
    let device = Balloon::new().unwrap();
    let handle = device.handle();
    let Ok(mut h) = Harness::with_features(device, features | u64::MAX << 28) else { return };
    let mut target = 0;
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
                if queue == 0 && names_rings(&mut h, bytes) {
                    // They are empty now, and say anything.
                    return;
                }
                while h.collect(queue).is_some() {}
                result
            }
            5 => {
                let bytes = take(&mut data, 4);
                h.config().write(u64::from(arg), bytes);
                if let (ACTUAL, &[a, b, c, d]) = (u64::from(arg), bytes) {
                    assert_eq!(word(&h, ACTUAL), u32::from_le_bytes([a, b, c, d]), "the driver's own number");
                }
                let mut past = [0xff; 16];
                h.config().read(u64::from(arg) + 16, &mut past);
                assert_eq!(past, [0; 16], "there is nothing past the end");
                Ok(())
            }
            6 => {
                target = u32::from(arg) << 8;
                handle.set_target(arg.into()).unwrap();
                let _ = handle.stats(Duration::ZERO);
                for (at, len) in handle.free_ranges(Duration::ZERO).unwrap_or_default() {
                    assert!(len > 0 && at.checked_add(len).is_some(), "{len} bytes at {at:#x}");
                }
                h.poll(Duration::ZERO).map(|_| ())
            }
            _ => h.restart(),
        };
        assert_eq!(word(&h, TARGET), target, "the target is the host's alone");
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

    #[test]
    fn a_driver_may_give_its_rings_away() {
        super::fuzz_one(b"\0\0\0\0\x04\0\x01\0\0\0\0\0z");
        super::fuzz_one(&[0x29, 0, 1, 0, 0, 0, 0, 0x29, 0, 1, 0, 0, 0, 0, 0, 0x60, 0x60]);
    }

    proptest! {
        #[test]
        fn promises_hold(data in prop::collection::vec(any::<u8>(), 0..400)) {
            super::fuzz_one(&data);
        }
    }
}
