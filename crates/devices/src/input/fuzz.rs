//! Body of the fuzz target: a driver and a host that do whatever the input says. Panics when a promise is
//! broken.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use krun_virtio::DeviceError;
use krun_virtio::mock::Harness;

use super::{Input, InputConfig, InputEvent, Queue};

/// Takes `len` bytes off the front; fewer if there are fewer.
fn take<'a>(data: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (head, tail) = data.split_at(len.min(data.len()));
    *data = tail;
    head
}

/// One input.
pub fn fuzz_one(mut data: &[u8]) {
    let (queue, sender) = Queue::new().unwrap();
    let config = InputConfig::new("fuzz").with(1, [1, 2, 3]);
    let mut h = Harness::new(Input::new(config, Box::new(queue)));
    for _ in 0..256 {
        let &[op, arg] = take(&mut data, 2) else { return };
        let result = match op % 6 {
            0 if h.driver(0).in_flight() < 60 => {
                h.add(0, &[], &[u32::from(arg).max(1)]);
                h.kick(0)
            }
            1 => {
                let bytes = take(&mut data, usize::from(arg).max(1));
                if bytes.is_empty() {
                    return;
                }
                h.add(1, &[bytes], &[]);
                h.kick(1)
            }
            2 => {
                h.config().write(u64::from(arg % 4), take(&mut data, 2));
                let mut read = [0; 16];
                h.config().read(u64::from(arg), &mut read);
                Ok(())
            }
            3 => {
                let _ = sender.send(&[InputEvent { kind: 1, code: arg.into(), value: 1 }]);
                while sender.receive().is_some() {}
                h.poll(Duration::ZERO).map(|_| ())
            }
            4 => {
                (0..2).for_each(|q| while h.collect(q).is_some() {});
                Ok(())
            }
            5 => h.restart(),
            _ => Ok(()),
        };
        match result {
            Ok(()) => assert_eq!((h.held(0), h.held(1)), (0, 0), "no buffer is kept"),
            Err(DeviceError::Driver(_)) => return,
            Err(e) => panic!("a valid ring and a sound host, but {e}"),
        }
        while h.collect(1).is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn promises_hold(data in prop::collection::vec(any::<u8>(), 0..600)) {
            super::fuzz_one(&data);
        }
    }
}
