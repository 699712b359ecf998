//! Several pairs of queues: as for a tap interface, but with a stream behind each.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use krun_virtio::VirtioDevice;
use krun_virtio::mock::Harness;

use super::{HEADER, MAC, PATIENCE, fill, frame, get, link, put, received_on, until};
use crate::net::peer::Stream;
use crate::net::{Net, Offloads, Socket, feature};

/// Of three pairs.
const CONTROL: usize = 6;

fn three() -> (Net, Vec<UnixStream>) {
    let (ours, theirs): (Vec<_>, Vec<_>) = (0..3).map(|_| UnixStream::pair().unwrap()).unzip();
    let peers = ours.into_iter().map(|fd| Box::new(Stream::open(Socket::Fd(fd.into())).unwrap()) as _);
    theirs.iter().for_each(|t| t.set_read_timeout(Some(PATIENCE)).unwrap());
    (Net::with_peers(MAC, peers.collect(), Offloads::empty()), theirs)
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
    for queue in 2..6 {
        assert!(!h.driver(queue).has_used(), "queue {queue} is in use");
    }
    assert_eq!(set(&mut h, 2), 0);
    assert!(get(&mut peers[1]) == frame(60, 1));
    until(&mut h, "a frame", |h| h.driver(2).has_used());
    assert!(received_on(&mut h, 2).unwrap() == frame(70, 1));
    assert!(!h.driver(4).has_used() && !h.driver(5).has_used());
    // Back to one, and its frames wait with the peer.
    assert_eq!(set(&mut h, 1), 0);
    h.add(2, &[], &[2000]);
    h.kick(2).unwrap();
    put(&mut peers[1], &frame(80, 9));
    assert_eq!(h.poll(Duration::from_millis(20)).unwrap(), 0, "a pair that is not in use is listened to");
    assert_eq!(set(&mut h, 3), 0);
    until(&mut h, "a frame", |h| h.driver(2).has_used() && h.driver(4).has_used());
    assert!(received_on(&mut h, 2).unwrap() == frame(80, 9));
    assert!(get(&mut peers[2]) == frame(60, 2));
    // A reset leaves one.
    h.restart().unwrap();
    h.request(1, &[&[0; HEADER], &frame(61, 1)], &[]).unwrap();
    assert!(get(&mut peers[0]) == frame(61, 1));
    h.add(3, &[&[0; HEADER], &frame(62, 1)], &[]);
    h.kick(3).unwrap();
    assert_eq!(h.driver(3).in_flight(), 1);
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
