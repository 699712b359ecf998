//! Bodies of the fuzz targets: a guest, and a peer, that do whatever the input says. They panic when a promise is
//! broken.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use krun_virtio::DeviceError;
use krun_virtio::mock::Harness;

use super::header::HEADER;
use super::peer::Stream;
use super::{Net, Offloads, Socket, feature};

/// The first pair's queue.
const RX: usize = 0;

/// Takes `len` bytes off the front; fewer if there are fewer.
fn take<'a>(data: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (head, tail) = data.split_at(len.min(data.len()));
    *data = tail;
    head
}

/// A device with a pair of queues for each of the streams given back.
fn device(features: u64, pairs: usize) -> (Harness, Vec<UnixStream>) {
    let (ours, theirs): (Vec<_>, Vec<_>) = (0..pairs).map(|_| UnixStream::pair().unwrap()).unzip();
    theirs.iter().for_each(|t| t.set_nonblocking(true).unwrap());
    let peers = ours.into_iter().map(|fd| Box::new(Stream::open(Socket::Fd(fd.into())).unwrap()) as _);
    let net = Net::with_peers([2, 0, 0, 0, 0, 1], peers.collect(), Offloads::all());
    (Harness::with_features(net, features).unwrap(), theirs)
}

/// The lengths of the frames that the device has sent, each of which must be whole.
fn check_output(peer: &mut UnixStream) {
    let mut bytes = Vec::new();
    if let Err(e) = peer.read_to_end(&mut bytes) {
        assert_eq!(e.kind(), ErrorKind::WouldBlock);
    }
    let mut rest = &bytes[..];
    while let Some((prefix, tail)) = rest.split_first_chunk::<4>() {
        let len = u32::from_be_bytes(*prefix) as usize;
        assert!((super::ETHERNET_HEADER..=super::MAX_FRAME).contains(&len), "a frame of {len} bytes");
        rest = tail.get(len..).expect("a frame is cut off");
    }
    assert!(rest.is_empty());
}

/// Asks for a number of pairs, in this or another way.
fn ask(h: &mut Harness, pairs: usize, command: &[u8], answers: bool) -> Result<(), DeviceError> {
    let has = |h: &Harness, bit: u32| h.features() & 1 << bit != 0;
    let several = has(h, feature::MQ);
    if !has(h, feature::CTRL_VQ) || !answers && command.is_empty() {
        return Ok(());
    }
    let queue = if several { 2 * pairs } else { 2 };
    if h.driver(queue).in_flight() > 0 {
        return Ok(());
    }
    let parts: &[&[u8]] = if command.is_empty() { &[] } else { &[command] };
    let used = h.request(queue, parts, if answers { &[1] } else { &[] })?;
    let fits = matches!(*command, [4, 0, low, 0] if several && (1..=pairs).contains(&usize::from(low)));
    assert_eq!(used.data, if answers { vec![u8::from(!fits)] } else { vec![] });
    Ok(())
}

/// Chains of any shape with any header, the peer being well-behaved.
pub fn fuzz_guest(mut data: &[u8]) {
    let features = take(&mut data, 4).try_into().map_or(0, u32::from_le_bytes);
    // Two bits that are no features of the device.
    let pairs = 1 + (features >> 30) as usize;
    let (mut h, mut peers) = device(u64::from(features) | 1 << 29, pairs);
    for _ in 0..128 {
        let &[op, arg, long] = take(&mut data, 3) else { return };
        let pair = usize::from(op / 7) % pairs;
        let (rx, tx) = (2 * pair, 2 * pair + 1);
        let result = match op % 7 {
            0 | 1 if h.driver(tx).in_flight() < 200 => {
                let head = take(&mut data, usize::from(arg) % (HEADER + 4));
                let body = vec![arg; usize::from(long) * usize::from(op)];
                let parts: Vec<&[u8]> = [head, &body[..]].into_iter().filter(|p| !p.is_empty()).collect();
                if parts.is_empty() {
                    continue;
                }
                h.add(tx, &parts, if long == 7 { &[5] } else { &[] });
                h.kick(tx)
            }
            2 if h.driver(rx).in_flight() < 200 => {
                let out: &[&[u8]] = if long == 7 { &[&[1, 2]] } else { &[] };
                h.add(rx, out, &[u32::from(arg) * u32::from(long) + 1]);
                h.kick(rx)
            }
            3 => {
                let frame = vec![1; usize::from(arg) * usize::from(long)];
                let message = [&(frame.len() as u32).to_be_bytes()[..], &frame].concat();
                let peer = &mut peers[pair];
                peer.set_nonblocking(false).unwrap();
                // The socket's buffer may be full of what the guest does not fetch.
                peer.set_write_timeout(Some(Duration::from_millis(1))).unwrap();
                let whole = peer.write_all(&message).is_ok();
                peer.set_nonblocking(true).unwrap();
                if !whole {
                    return;
                }
                h.poll(Duration::ZERO).map(|_| ())
            }
            4 => h.restart(),
            5 => ask(&mut h, pairs, &[arg & 4, 0, long % 8, 0][..usize::from(op / 7) % 5], arg & 1 == 0),
            _ => h.drain(),
        };
        match result {
            Ok(()) => {}
            Err(DeviceError::Driver(_)) => return,
            Err(e) => panic!("a valid ring and a sound host, but {e}"),
        }
        for (pair, peer) in peers.iter_mut().enumerate() {
            assert_eq!(h.held(2 * pair + 1), 0, "a buffer is kept though its frame was copied");
            check_output(peer);
        }
        (0..2 * pairs).for_each(|q| while h.collect(q).is_some() {});
    }
}

/// Any bytes in a stream, in any pieces, and its end.
pub fn fuzz_peer(mut data: &[u8]) {
    let &[flags, room] = take(&mut data, 2) else { return };
    let (mut h, mut peers) = device(if flags & 1 == 0 { u64::MAX } else { 1 << 29 }, 1);
    let Some(mut peer) = peers.pop() else { return };
    let merge = flags & 1 == 0;
    let room = HEADER as u32 + u32::from(room) * 8;
    let mut received = 0;
    while !data.is_empty() {
        while h.driver(RX).in_flight() < 64 {
            h.add(RX, &[], &[room]);
        }
        h.kick(RX).unwrap();
        let len = usize::from(data[0]) + 1;
        let piece = take(&mut data, len);
        if let Err(e) = peer.write_all(piece) {
            if e.kind() == ErrorKind::WouldBlock {
                // The frame needs more than the buffers that the guest has, and the socket is full.
                return;
            }
            // The device has given up a stream that is none; the link is down.
            let mut status = [0; 2];
            h.config().read(6, &mut status);
            assert_eq!(status, [0, 0], "{e}");
            return;
        }
        while h.poll(Duration::ZERO).unwrap() > 0 {}
        let mut left = 0u16;
        while let Some(used) = h.collect(RX) {
            received += used.data.len();
            if left == 0 {
                // The header may fill the first one.
                assert!(used.data.len() >= HEADER);
                left = u16::from_le_bytes([used.data[10], used.data[11]]);
                assert!(left == 1 || merge && left > 1, "a frame in {left} buffers");
            }
            left -= 1;
            assert!(left == 0 || used.written == room, "a buffer is not full though others follow");
        }
        assert_eq!(left, 0, "buffers of a frame are missing");
    }
    assert!(received <= 1 << 24);
    drop(peer);
    h.poll(Duration::ZERO).unwrap();
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    /// Frames among other bytes.
    fn stream() -> impl Strategy<Value = Vec<u8>> {
        let frame = (14..3000usize, any::<u8>())
            .prop_map(|(len, fill)| [&(len as u32).to_be_bytes()[..], &vec![fill; len]].concat());
        let piece = prop_oneof![4 => frame, 1 => prop::collection::vec(any::<u8>(), 0..5)];
        let head = prop::array::uniform2(any::<u8>());
        (head, prop::collection::vec(piece, 0..12)).prop_map(|(head, p)| [&head[..], &p.concat()].concat())
    }

    proptest! {
        #[test]
        fn a_guest_breaks_nothing(data in prop::collection::vec(any::<u8>(), 0..600)) {
            super::fuzz_guest(&data);
        }

        #[test]
        fn a_peer_breaks_nothing(data in stream()) {
            super::fuzz_peer(&data);
        }
    }
}
