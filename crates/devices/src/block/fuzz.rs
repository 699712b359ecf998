//! Body of the fuzz target: a driver that asks for whatever the input says. Panics when a promise is broken.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::sync::Arc;

use krun_memory::{Bytes, GuestAddress};
use krun_virtio::DeviceError;
use krun_virtio::mock::{BASE, Buffer, Harness};
use rustix::fs::{MemfdFlags, memfd_create};

use super::device::Block;
use super::raw::Raw;
use super::{BlockSpec, SyncMode};

/// Bytes of the disk: not a whole number of pages, and few, so that its end is hit.
const SIZE: u64 = 512 * 129;
/// Where the buffers of hand-made chains lie, far from the ring.
const AREA: u64 = BASE + (15 << 20);

/// Takes `len` bytes off the front; fewer if there are fewer.
fn take<'a>(data: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (head, tail) = data.split_at(len.min(data.len()));
    *data = tail;
    head
}

/// One input.
pub fn fuzz_one(mut data: &[u8]) {
    let &[features, flags] = take(&mut data, 2) else { return };
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(SIZE).unwrap();
    let sync = [SyncMode::None, SyncMode::Relaxed, SyncMode::Full][usize::from(flags >> 2) % 3];
    let (threads_only, read_only) = (flags & 1 != 0, flags & 2 != 0);
    let spec = BlockSpec { threads_only, read_only, sync, ..BlockSpec::default() };
    let image = Arc::new(Raw::new(file.try_clone().unwrap(), false).unwrap());
    let device = Block::with_image(spec, image).unwrap();
    let Ok(mut h) = Harness::with_features(device, u64::from(features) << 8 | u64::MAX << 28) else { return };
    for _ in 0..64 {
        let &[op, arg] = take(&mut data, 2) else { break };
        let result = match op % 8 {
            0..=5 => {
                if op % 8 < 4 {
                    request(&mut h, op, arg, &mut data)
                } else {
                    chain(&mut h, arg, &mut data)
                }
                h.kick(0)
            }
            6 => {
                h.config().write(u64::from(arg), take(&mut data, 1));
                Ok(())
            }
            _ => h.restart(),
        };
        // Nothing else may go wrong than what the driver is to blame for, and that ends the device.
        match result.and_then(|()| h.drain()) {
            Ok(()) => assert_eq!(h.held(0), 0, "an answer is missing"),
            Err(DeviceError::Driver(_)) => break,
            Err(e) => panic!("a valid ring and a sound host, but {e}"),
        }
        while h.collect(0).is_some() {}
    }
    drop(h);
    assert_eq!(file.metadata().unwrap().len(), SIZE, "written past the end");
}

/// A request of the right shape.
fn request(h: &mut Harness, op: u8, arg: u8, data: &mut &[u8]) {
    let kind = [0u32, 1, 4, 8, 11, 13, u32::from(arg)][usize::from(arg) % 7];
    let sector = take(data, 1).first().map_or(u64::MAX, |b| u64::from(*b));
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    let sectors = [512 * u32::from(op & 3), 1];
    match kind {
        1 => {
            let body = vec![arg; sectors[0] as usize];
            h.add(0, &[&header, &body], &[1]);
        }
        11 | 13 => {
            let body = take(data, 16 * usize::from(op >> 6));
            h.add(0, &[&header, body], &[1]);
        }
        _ => {
            h.add(0, &[&header], &sectors);
        }
    }
}

/// A chain of any shape within memory, whose buffers may overlap.
fn chain(h: &mut Harness, arg: u8, data: &mut &[u8]) {
    let content = take(data, usize::from(arg) % 48);
    h.memory().write_slice(content, GuestAddress(AREA)).unwrap();
    let mut buffers = Vec::new();
    for _ in 0..1 + arg % 6 {
        let &[at, len] = take(data, 2) else { break };
        let len = (u32::from(len & 0x7f) << (len >> 7 << 2)).max(1);
        buffers.push(Buffer { at: AREA + u64::from(at), len, writable: false });
    }
    let readable = buffers.len().saturating_sub(usize::from(arg >> 6));
    buffers.iter_mut().skip(readable).for_each(|b| b.writable = true);
    if !buffers.is_empty() {
        h.driver(0).add_buffers(&buffers);
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
