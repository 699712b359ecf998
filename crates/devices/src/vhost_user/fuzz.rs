//! A hostile back end: everything that it can say.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use krun_event::Wake;
use krun_virtio::QueueAddresses;

use super::channel::Channel;
use super::message::{Flags, Header, Request};
use super::requests::{Asked, Requests};
use super::session::{Ring, Session, Setup};

/// What is asked, in order.
const ORDER: [Request; 16] = [
    Request::GetFeatures,
    Request::GetProtocolFeatures,
    Request::GetQueueNum,
    Request::SetBackendReqFd,
    Request::GetConfig,
    Request::GetInflightFd,
    Request::SetFeatures,
    Request::SetMemTable,
    Request::SetVringNum,
    Request::SetVringBase,
    Request::SetVringAddr,
    Request::SetVringCall,
    Request::SetVringErr,
    Request::SetVringKick,
    Request::SetVringEnable,
    Request::GetVringBase,
];

/// Answers and other bytes: each piece begins with its length and with a byte that says what it is.
fn answers(mut data: &[u8]) -> Vec<u8> {
    let (mut bytes, mut order) = (Vec::new(), ORDER.iter().cycle());
    while let [len, kind, rest @ ..] = data {
        let (piece, rest) = rest.split_at(rest.len().min(*len as usize));
        data = rest;
        if let (1.., Some(&request)) = (kind % 8, order.next()) {
            let size = piece.len() as u32;
            bytes.extend(Header { request: request as u32, flags: Flags::REPLY, size }.encode());
        }
        bytes.extend(piece);
    }
    bytes
}

/// A pair of sockets of which the other end has said `bytes` and says no more.
fn said(bytes: &[u8]) -> std::io::Result<(UnixStream, UnixStream)> {
    let (ours, mut theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    // What does not fit is not said.
    let _ = theirs.write(bytes)?;
    theirs.shutdown(Shutdown::Write)?;
    Ok((ours, theirs))
}

/// The answers to all that is asked of a back end, and its own requests, from `data`.
#[doc(hidden)]
pub fn fuzz_back_end(data: &[u8]) {
    let _ = converse(&answers(data));
    let _ = requests(data);
}

fn converse(bytes: &[u8]) -> std::io::Result<()> {
    // The other end is kept: what it is told goes nowhere, and is no error.
    let (ours, _theirs) = said(bytes)?;
    let channel = Channel::new(ours.into(), Instant::now() + Duration::from_secs(1), Wake::new()?);
    let Ok(mut session) = Session::negotiate(channel) else { return Ok(()) };
    if let Ok(config) = session.config(12) {
        assert_eq!(config.len(), 12);
    }
    let inflight = session.inflight(1, 128).ok().flatten();
    let wake = Wake::new()?;
    let rings = [Ring { queue: 0, size: 128, at: QueueAddresses::default(), base: 0, kick: &wake }];
    let inflight = inflight.as_ref();
    let setup = Setup { features: 0, memory: &[], rings: &rings, call: &wake, error: &wake, inflight };
    let _ = session.start(&setup);
    let _ = session.set_config(0, &[0; 4]);
    let _ = session.stop(&[0]);
    Ok(())
}

fn requests(data: &[u8]) -> std::io::Result<()> {
    let (mut ours, theirs) = Requests::pair()?;
    let mut theirs = UnixStream::from(theirs);
    theirs.set_nonblocking(true)?;
    let written = theirs.write(data)?;
    let mut taken = 0;
    while let Ok(asked) = ours.next() {
        if asked == Asked::Nothing {
            break;
        }
        taken += 1;
    }
    assert!(taken * super::message::HEADER <= written);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    fn piece() -> impl Strategy<Value = Vec<u8>> {
        let number =
            prop::sample::select(vec![0u64, 1, 1 << 30, 1 << 30 | 1 << 32, 0x3221, 0x3229, 0x1029, u64::MAX])
                .prop_map(|n| n.to_ne_bytes().to_vec());
        let config = Just([&[0u8, 0, 0, 0, 12][..], &[0; 19]].concat());
        let payload = prop_oneof![6 => number, 1 => config, 1 => prop::collection::vec(any::<u8>(), 0..40)];
        (payload, any::<u8>()).prop_map(|(p, kind)| [&[p.len() as u8, kind][..], &p].concat())
    }

    proptest! {
        #[test]
        fn a_back_end_breaks_nothing(pieces in prop::collection::vec(piece(), 0..30)) {
            super::fuzz_back_end(&pieces.concat());
        }

        #[test]
        fn bytes_break_nothing(data in prop::collection::vec(any::<u8>(), 0..300)) {
            super::fuzz_back_end(&data);
        }
    }
}
