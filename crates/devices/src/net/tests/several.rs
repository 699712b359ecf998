//! Several pairs of queues: as for a tap interface, but with a stream behind each.

use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use krun_virtio::VirtioDevice;
use krun_virtio::mock::Harness;

use super::{HEADER, MAC, PATIENCE, fill, frame, get, link, put, received_on, until};
use crate::net::peer::{Peer, Stream};
use crate::net::{Net, Offloads, Socket, feature};

/// Of three pairs.
const CONTROL: usize = 6;

fn streams() -> (impl Iterator<Item = Stream>, Vec<UnixStream>) {
    let (ours, theirs): (Vec<_>, Vec<_>) = (0..3).map(|_| UnixStream::pair().unwrap()).unzip();
    theirs.iter().for_each(|t| t.set_read_timeout(Some(PATIENCE)).unwrap());
    (ours.into_iter().map(|fd| Stream::open(Socket::Fd(fd.into())).unwrap()), theirs)
}

fn three() -> (Net, Vec<UnixStream>) {
    let (ours, theirs) = streams();
    (Net::with_peers(MAC, ours.map(|s| Box::new(s) as _).collect(), Offloads::empty()), theirs)
}

/// A stream that is switched on and off as a tap interface's queue is: only one that is in use can be used.
struct Reluctant {
    stream: Stream,
    active: bool,
    /// Does not let itself be switched.
    refuses: Arc<AtomicBool>,
}

impl Peer for Reluctant {
    fn name(&self) -> String {
        "the reluctant peer".into()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.stream.fd()
    }

    fn set_active(&mut self, active: bool) -> io::Result<()> {
        // Of a queue that is in that state already, the host says that the request is invalid.
        if self.refuses.load(Ordering::Relaxed) || active == self.active {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.active = active;
        Ok(())
    }

    fn next(&mut self) -> io::Result<Option<&[u8]>> {
        self.stream.next()
    }

    fn take(&mut self) {
        self.stream.take();
    }

    fn room(&mut self, len: usize) -> io::Result<Option<&mut [u8]>> {
        self.stream.room(len)
    }

    fn send(&mut self, header: &[u8; HEADER]) -> io::Result<()> {
        self.stream.send(header)
    }

    fn flush(&mut self) -> io::Result<bool> {
        self.stream.flush()
    }

    fn close(&mut self) -> bool {
        self.stream.close()
    }

    fn connect(&mut self) -> io::Result<()> {
        self.stream.connect()
    }
}

/// The answer to a command.
fn command(h: &mut Harness, queue: usize, parts: &[&[u8]]) -> u8 {
    let used = h.request(queue, parts, &[1]).unwrap();
    assert_eq!(used.written, 1);
    used.data[0]
}

fn set(h: &mut Harness, pairs: u16) -> u8 {
    command(h, CONTROL, &[&[4, 0], &pairs.to_le_bytes()])
}

#[test]
fn the_driver_sees_them() {
    let (net, _peers) = three();
    let info = net.info();
    assert_eq!(info.queue_sizes.len(), 7);
    assert_eq!(info.features & (1 << feature::MQ | 1 << feature::CTRL_VQ), 1 << 22 | 1 << 17);
    let mut most = [0; 2];
    net.config().read(8, &mut most);
    assert_eq!(most, [3, 0]);
}

#[test]
fn frames_go_through_those_in_use() {
    let (net, mut peers) = three();
    let mut h = Harness::new(net);
    // There before they are in use.
    for (pair, peer) in peers.iter_mut().enumerate() {
        h.add(2 * pair + 1, &[&[0; HEADER], &frame(60, pair as u8)], &[]);
        h.add(2 * pair, &[], &[2000]);
        h.kick(2 * pair).unwrap();
        h.kick(2 * pair + 1).unwrap();
        put(peer, &frame(70, pair as u8));
    }
    until(&mut h, "a frame", |h| h.driver(0).has_used());
    assert!(get(&mut peers[0]) == frame(60, 0));
    assert!(received_on(&mut h, 0).unwrap() == frame(70, 0));
    for (rx, tx) in [(2, 3), (4, 5)] {
        assert!(!h.driver(rx).has_used(), "queue {rx} is in use");
        assert!(h.collect(tx).is_some(), "a frame stays in queue {tx}, of which nobody takes it");
    }
    // Before the device hears of it.
    h.add(3, &[&[0; HEADER], &frame(61, 1)], &[]);
    assert_eq!(set(&mut h, 2), 0);
    assert!(get(&mut peers[1]) == frame(61, 1), "the first frame is not the one from while it is in use");
    until(&mut h, "a frame", |h| h.driver(2).has_used());
    assert!(received_on(&mut h, 2).unwrap() == frame(70, 1));
    assert!(!h.driver(4).has_used());
    // Back to one: what lies in the other's queue is sent, what comes later is not, and its frames wait with the peer.
    h.add(3, &[&[0; HEADER], &frame(63, 1)], &[]);
    assert_eq!(set(&mut h, 1), 0);
    assert!(get(&mut peers[1]) == frame(63, 1));
    h.add(3, &[&[0; HEADER], &frame(64, 1)], &[]);
    h.kick(3).unwrap();
    while h.collect(3).is_some() {}
    assert_eq!(h.driver(3).in_flight(), 0);
    h.add(2, &[], &[2000]);
    h.kick(2).unwrap();
    put(&mut peers[1], &frame(80, 9));
    assert_eq!(h.poll(Duration::from_millis(20)).unwrap(), 0, "a pair that is not in use is listened to");
    assert_eq!(set(&mut h, 3), 0);
    until(&mut h, "a frame", |h| h.driver(2).has_used() && h.driver(4).has_used());
    assert!(received_on(&mut h, 2).unwrap() == frame(80, 9));
    h.request(5, &[&[0; HEADER], &frame(65, 2)], &[]).unwrap();
    assert!(get(&mut peers[2]) == frame(65, 2));
    // A reset leaves one.
    h.restart().unwrap();
    h.request(1, &[&[0; HEADER], &frame(61, 1)], &[]).unwrap();
    assert!(get(&mut peers[0]) == frame(61, 1));
    h.request(3, &[&[0; HEADER], &frame(62, 1)], &[]).unwrap();
    peers[1].set_nonblocking(true).unwrap();
    assert!(peers[1].read(&mut [0]).is_err(), "a pair sends that is not in use");
}

#[test]
fn a_slow_peer_keeps_nothing_of_a_pair_that_is_switched_off() {
    let (net, _peers) = three();
    let mut h = Harness::new(net);
    assert_eq!(set(&mut h, 2), 0);
    fill(&mut h, 3);
    assert_eq!(set(&mut h, 1), 0);
    while h.collect(3).is_some() {}
    assert_eq!(h.driver(3).in_flight(), 0);
}

#[test]
fn a_peer_that_refuses_a_queue_keeps_what_it_had() {
    let (streams, mut peers) = streams();
    let refuses: [Arc<AtomicBool>; 3] = Default::default();
    let wrapped = streams.zip(&refuses).map(|(stream, refuses)| {
        Box::new(Reluctant { stream, active: false, refuses: Arc::clone(refuses) }) as _
    });
    let mut h = Harness::new(Net::with_peers(MAC, wrapped.collect(), Offloads::empty()));
    for queue in [0, 2, 4] {
        h.add(queue, &[], &[2000]);
        h.add(queue, &[], &[2000]);
    }
    h.kick(0).unwrap();
    // From one pair up to three, which stops at two.
    refuses[2].store(true, Ordering::Relaxed);
    assert_eq!(set(&mut h, 3), 1);
    peers.iter_mut().for_each(|peer| put(peer, &frame(70, 7)));
    until(&mut h, "a frame", |h| h.driver(0).has_used());
    assert!(received_on(&mut h, 0).unwrap() == frame(70, 7));
    assert_eq!(h.poll(Duration::from_millis(20)).unwrap(), 0, "the second pair stays in use");
    assert!(!h.driver(2).has_used());
    refuses[2].store(false, Ordering::Relaxed);
    assert_eq!(set(&mut h, 3), 0);
    for queue in [2, 4] {
        until(&mut h, "a frame", |h| h.driver(queue).has_used());
        assert!(received_on(&mut h, queue).unwrap() == frame(70, 7));
    }
    // And down again, which stops at two.
    refuses[1].store(true, Ordering::Relaxed);
    assert_eq!(set(&mut h, 1), 1);
    for (pair, peer) in peers.iter_mut().enumerate() {
        put(peer, &frame(71, 8));
        until(&mut h, "a frame", |h| h.driver(2 * pair).has_used());
        h.request(2 * pair + 1, &[&[0; HEADER], &frame(72, 9)], &[]).unwrap();
        assert!(get(peer) == frame(72, 9));
    }
}

#[test]
fn nonsense_is_refused() {
    let (net, mut peers) = three();
    let mut h = Harness::new(net);
    for pairs in [0, 4, u16::MAX] {
        assert_eq!(set(&mut h, pairs), 1);
    }
    let long = vec![4; 100_000];
    let bad: [&[&[u8]]; 6] =
        [&[&[4]], &[&[4, 0]], &[&[4, 0], &[2]], &[&[4, 0], &[2, 0, 0]], &[&[0, 0, 1]], &[&long]];
    for parts in bad {
        assert_eq!(command(&mut h, CONTROL, parts), 1);
    }
    // Nothing to read, and no room for the answer.
    assert_eq!(command(&mut h, CONTROL, &[]), 1);
    h.request(CONTROL, &[&[4, 0, 2, 0]], &[]).unwrap();
    assert_eq!(set(&mut h, 1), 0);
    h.request(1, &[&[0; HEADER], &frame(60, 1)], &[]).unwrap();
    assert!(get(&mut peers[0]) == frame(60, 1));
}

#[test]
fn without_the_feature_the_control_queue_follows_the_first_pair() {
    let (net, _peers) = three();
    let mut h = Harness::with_features(net, !(1 << feature::MQ)).unwrap();
    assert_eq!(command(&mut h, 2, &[&[4, 0, 1, 0]]), 1, "there is nothing to set");
    let (net, _peers) = three();
    let mut h = Harness::with_features(net, !(1 << feature::MQ | 1 << feature::CTRL_VQ)).unwrap();
    h.add(CONTROL, &[&[4, 0, 1, 0]], &[1]);
    h.kick(CONTROL).unwrap();
    assert_eq!(h.driver(CONTROL).in_flight(), 1, "a queue that is not there is served");
}

#[test]
fn one_that_is_lost_takes_all_with_it() {
    let (net, mut peers) = three();
    let mut h = Harness::new(net);
    h.add(2, &[], &[2000]);
    assert_eq!(set(&mut h, 2), 0);
    fill(&mut h, 1);
    drop(peers.remove(1));
    until(&mut h, "the link goes down", |h| !link(h));
    while h.collect(1).is_some() {}
    assert_eq!(h.driver(1).in_flight(), 0, "frames stay in another pair's queue");
    for queue in [1, 3] {
        h.request(queue, &[&[0; HEADER], &frame(60, 1)], &[]).unwrap();
    }
    assert_eq!(set(&mut h, 3), 0);
    h.request(5, &[&[0; HEADER], &frame(60, 1)], &[]).unwrap();
    h.restart().unwrap();
    assert!(!link(&h));
}
