//! The device with a driver and a peer, both of which the tests play.

mod several;

use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use krun_virtio::DeviceError;
use krun_virtio::mock::Harness;

use super::header::HEADER;
use super::{MAX_FRAME, Net, NetError, NetSpec, Offloads, PeerSpec, Socket, checksum, feature};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
/// The first pair's queues.
const RX: usize = 0;
const TX: usize = 1;
const PATIENCE: Duration = Duration::from_secs(20);

fn spec(peer: PeerSpec, offloads: Offloads) -> NetSpec {
    NetSpec { mac: MAC, peer, offloads, pairs: 1 }
}

fn stream(offloads: Offloads) -> (Net, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    (Net::new(spec(PeerSpec::Stream(Socket::Fd(ours.into())), offloads)).unwrap(), theirs)
}

fn plain() -> (Harness, UnixStream) {
    let (net, peer) = stream(Offloads::empty());
    (Harness::new(net), peer)
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn put(peer: &mut UnixStream, frame: &[u8]) {
    peer.write_all(&(frame.len() as u32).to_be_bytes()).unwrap();
    peer.write_all(frame).unwrap();
}

fn get(peer: &mut UnixStream) -> Vec<u8> {
    let mut len = [0; 4];
    peer.read_exact(&mut len).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(len) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}

fn link(h: &Harness) -> bool {
    let mut status = [0; 2];
    h.config().read(6, &mut status);
    status == [1, 0]
}

/// Lets the device work until `done`.
fn until(h: &mut Harness, what: &str, mut done: impl FnMut(&mut Harness) -> bool) {
    let start = Instant::now();
    while !done(h) {
        assert!(start.elapsed() < PATIENCE, "not in time: {what}");
        h.poll(Duration::from_millis(20)).unwrap();
    }
}

/// The frame in the next buffers that came back, without its header.
fn received(h: &mut Harness) -> Option<Vec<u8>> {
    received_on(h, RX)
}

fn received_on(h: &mut Harness, queue: usize) -> Option<Vec<u8>> {
    let first = h.collect(queue)?;
    let count = u16::from_le_bytes([first.data[10], first.data[11]]);
    let mut bytes = first.data[HEADER..].to_vec();
    for _ in 1..count {
        bytes.extend(h.collect(queue).expect("all buffers of a frame are there at once").data);
    }
    Some(bytes)
}

/// Sends until frames wait in the queue, as the peer reads none.
fn fill(h: &mut Harness, queue: usize) {
    let size = usize::from(h.driver(queue).size());
    while h.driver(queue).in_flight() < size {
        h.add(queue, &[&[0; HEADER], &frame(60_000, 1)], &[]);
    }
    h.kick(queue).unwrap();
    while h.collect(queue).is_some() {}
    assert!(h.driver(queue).in_flight() > 100, "frames do not wait in the queue");
}

#[test]
fn frames_go_both_ways() {
    let (mut h, mut peer) = plain();
    for (len, seed) in [(14, 1), (60, 2), (1514, 3), (MAX_FRAME, 4)] {
        let sent = frame(len, seed);
        let (front, back) = sent.split_at(len / 2);
        // However the driver cuts it.
        h.request(TX, &[&[0; HEADER], front, back], &[]).unwrap();
        assert!(get(&mut peer) == sent);
        h.request(TX, &[&[&[0; HEADER][..], &sent].concat()], &[]).unwrap();
        assert!(get(&mut peer) == sent);
    }
    assert!(h.take_interrupts() > 0);
    for len in [14, 1514, MAX_FRAME] {
        put(&mut peer, &frame(len, 9));
    }
    for _ in 0..80 {
        h.add(RX, &[], &[1526]);
    }
    h.kick(RX).unwrap();
    for len in [14, 1514, MAX_FRAME] {
        until(&mut h, "a frame", |h| h.driver(RX).has_used());
        assert!(received(&mut h).unwrap() == frame(len, 9));
    }
    assert!(link(&h));
}

#[test]
fn what_the_guest_has_no_room_for_waits_with_the_peer() {
    let (mut h, mut peer) = plain();
    put(&mut peer, &frame(3000, 1));
    put(&mut peer, &frame(100, 2));
    assert_eq!(h.poll(Duration::ZERO).unwrap(), 0, "the device listens though there is no room");
    h.add(RX, &[], &[1024]);
    h.kick(RX).unwrap();
    assert_eq!((h.held(RX), h.collect(RX).is_some()), (1, false));
    assert_eq!(h.poll(Duration::ZERO).unwrap(), 0);
    h.add(RX, &[], &[1024]);
    h.add(RX, &[], &[2048]);
    h.kick(RX).unwrap();
    assert!(received(&mut h).unwrap() == frame(3000, 1));
    h.add(RX, &[], &[1024]);
    h.kick(RX).unwrap();
    assert!(received(&mut h).unwrap() == frame(100, 2));
}

#[test]
fn a_frame_that_never_fits_is_dropped() {
    // One buffer for each frame.
    let (net, mut peer) = stream(Offloads::empty());
    let mut h = Harness::with_features(net, !(1 << feature::MRG_RXBUF)).unwrap();
    put(&mut peer, &frame(2000, 1));
    put(&mut peer, &frame(1514, 2));
    h.add(RX, &[], &[1526]);
    h.kick(RX).unwrap();
    assert!(received(&mut h).unwrap() == frame(1514, 2));
    // All buffers together are too small.
    let (mut h, mut peer) = plain();
    put(&mut peer, &frame(MAX_FRAME, 1));
    put(&mut peer, &frame(60, 2));
    let size = usize::from(h.driver(RX).size());
    while h.driver(RX).in_flight() < size {
        h.add(RX, &[], &[60]);
    }
    h.kick(RX).unwrap();
    until(&mut h, "the next frame", |h| h.driver(RX).has_used());
    assert!(received(&mut h).unwrap() == frame(60, 2));
}

#[test]
fn a_slow_peer_keeps_the_guests_frames_in_their_queue() {
    let (mut h, mut peer) = plain();
    let mut added = 0u32;
    let mut sent = 0u32;
    while h.held(TX) == 0 && added < 400 {
        if h.driver(TX).in_flight() == usize::from(h.driver(TX).size()) {
            break;
        }
        h.add(TX, &[&[0; HEADER], &frame(60_000, added as u8)], &[]);
        added += 1;
        h.kick(TX).unwrap();
        while h.collect(TX).is_some() {}
    }
    assert!(h.driver(TX).in_flight() > 200, "frames do not wait in the queue");
    assert_eq!(h.poll(Duration::ZERO).unwrap(), 0, "no event while the peer is full");
    while sent < added {
        while h.poll(Duration::ZERO).unwrap() > 0 {}
        assert!(get(&mut peer) == frame(60_000, sent as u8), "frame {sent}");
        sent += 1;
    }
    while h.collect(TX).is_some() {}
    assert_eq!(h.driver(TX).in_flight(), 0);
}

#[test]
fn open_checksums_are_filled() {
    let (net, mut peer) = stream(Offloads::CSUM | Offloads::HOST_TSO4);
    let mut h = Harness::new(net);
    let mut header = [0; HEADER];
    (header[0], header[1]) = (1, 1);
    (header[6], header[8]) = (34, 16);
    let sent = frame(40_000, 5);
    h.request(TX, &[&header, &sent], &[]).unwrap();
    let mut seen = get(&mut peer);
    // What the field held is part of the sum.
    let old = checksum::sum(&sent[34..]);
    assert_eq!(seen[50..52], (!old).to_be_bytes());
    seen[50..52].copy_from_slice(&sent[50..52]);
    assert!(seen == sent);
}

#[test]
fn offloads_without_what_they_need_are_not_offered() {
    let offered = |offloads| {
        let (net, _peer) = stream(offloads);
        krun_virtio::VirtioDevice::info(&net).features & u64::from(Offloads::all().bits())
    };
    assert_eq!(offered(Offloads::all()), u64::from(Offloads::all().bits()));
    assert_eq!(offered(Offloads::all() - Offloads::CSUM - Offloads::GUEST_CSUM), 0);
    assert_eq!(
        offered(Offloads::CSUM | Offloads::HOST_TSO6 | Offloads::GUEST_TSO4),
        1 | 1 << feature::HOST_TSO6
    );
}

#[test]
fn nonsense_of_the_guest_is_dropped() {
    let (mut h, mut peer) = plain();
    let mut lies = [0; HEADER];
    lies[1] = 1;
    let huge = vec![0; 400_000];
    let parts: [&[&[u8]]; 6] = [
        &[&[0; 3]],
        &[&[0; HEADER]],
        &[&[0; HEADER], &[0; 13]],
        &[&lies, &[0; 60]],
        &[&[0; HEADER], &huge],
        &[],
    ];
    for parts in parts {
        // A chain with nothing to read has something to write.
        h.request(TX, parts, if parts.is_empty() { &[10] } else { &[] }).unwrap();
    }
    h.request(TX, &[&[0; HEADER], &frame(60, 1)], &[]).unwrap();
    assert!(get(&mut peer) == frame(60, 1), "the frame after is not the next");
    h.add(RX, &[], &[11]);
    put(&mut peer, &frame(60, 1));
    let error = h.kick(RX).unwrap_err();
    assert!(matches!(&error, DeviceError::Driver(text) if text.contains("11 bytes")), "{error}");
}

#[test]
fn a_peer_that_ends_takes_the_link_down() {
    let (mut h, peer) = plain();
    h.add(RX, &[], &[2000]);
    h.kick(RX).unwrap();
    drop(peer);
    until(&mut h, "the link goes down", |h| !link(h));
    assert_eq!(h.take_config_changes(), 1);
    assert_eq!(h.poll(Duration::ZERO).unwrap(), 0, "nothing is waited for");
    h.request(TX, &[&[0; HEADER], &frame(60, 1)], &[]).unwrap();
    h.restart().unwrap();
    assert!(!link(&h));
    h.request(TX, &[&[0; HEADER], &frame(60, 1)], &[]).unwrap();
}

#[test]
fn a_stream_that_makes_no_sense_is_given_up() {
    let (mut h, mut peer) = plain();
    h.add(RX, &[], &[2000]);
    h.kick(RX).unwrap();
    // Frames of no length are left out.
    peer.write_all(&[0; 4]).unwrap();
    put(&mut peer, &frame(60, 3));
    peer.write_all(&[0xff; 4]).unwrap();
    until(&mut h, "the link goes down", |h| !link(h));
    assert!(received(&mut h).unwrap() == frame(60, 3));
}

#[test]
fn a_peer_that_comes_back_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peer");
    let listen = || UnixListener::bind(&path).unwrap();
    let first = listen();
    let socket = PeerSpec::Stream(Socket::Path(path.clone()));
    let mut h = Harness::new(Net::new(spec(socket, Offloads::empty())).unwrap());
    for _ in 0..4 {
        h.add(RX, &[], &[2000]);
    }
    h.kick(RX).unwrap();
    let (mut peer, _) = first.accept().unwrap();
    // It ends within a frame, of which nothing must be left.
    peer.write_all(&[0, 0, 0, 60, 1, 2, 3]).unwrap();
    drop((peer, first));
    until(&mut h, "the link goes down", |h| !link(h));
    std::fs::remove_file(&path).unwrap();
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(200) {
        h.poll(Duration::from_millis(20)).unwrap();
    }
    let again = listen();
    until(&mut h, "the link comes up", |h| link(h));
    let (mut peer, _) = again.accept().unwrap();
    assert_eq!(h.take_config_changes(), 2);
    put(&mut peer, &frame(60, 4));
    until(&mut h, "a frame", |h| h.driver(RX).has_used());
    assert!(received(&mut h).unwrap() == frame(60, 4), "buffers from before serve");
    h.request(TX, &[&[0; HEADER], &frame(61, 5)], &[]).unwrap();
    assert!(get(&mut peer) == frame(61, 5));
}

#[test]
fn a_peer_that_is_stuck_and_killed_and_comes_back_is_sent_to_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peer");
    let listener = UnixListener::bind(&path).unwrap();
    // With a buffer to receive into, so that its end is seen there first, and without, so that it is seen while sending.
    for buffer in [true, false] {
        let socket = PeerSpec::Stream(Socket::Path(path.clone()));
        let mut h = Harness::new(Net::new(spec(socket, Offloads::empty())).unwrap());
        if buffer {
            h.add(RX, &[], &[2000]);
            h.kick(RX).unwrap();
        }
        let (peer, _) = listener.accept().unwrap();
        fill(&mut h, TX);
        drop(peer);
        until(&mut h, "the link goes down", |h| !link(h));
        while h.collect(TX).is_some() {}
        assert_eq!(h.driver(TX).in_flight(), 0, "a driver that waits for its frames waits for ever");
        // What no notification comes for is found when the peer is back.
        h.add(TX, &[&[0; HEADER], &frame(61, 5)], &[]);
        until(&mut h, "the link comes up", |h| link(h));
        let (mut peer, _) = listener.accept().unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(get(&mut peer) == frame(61, 5));
    }
}

#[test]
fn a_datagram_peer_that_comes_back_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peer");
    let peer = UnixDatagram::bind(&path).unwrap();
    let socket = PeerSpec::Datagram { socket: Socket::Path(path.clone()), vfkit: true };
    let mut h = Harness::new(Net::new(spec(socket, Offloads::empty())).unwrap());
    h.add(RX, &[], &[2000]);
    h.kick(RX).unwrap();
    drop(peer);
    std::fs::remove_file(&path).unwrap();
    // Datagrams tell nothing of the other side's end before one is sent.
    h.request(TX, &[&[0; HEADER], &frame(60, 1)], &[]).unwrap();
    assert!(!link(&h));
    let peer = UnixDatagram::bind(&path).unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    until(&mut h, "the link comes up", |h| link(h));
    let mut bytes = [0; 2000];
    let (len, from) = peer.recv_from(&mut bytes).unwrap();
    assert_eq!(&bytes[..len], b"VFKT");
    peer.send_to(&frame(70, 2), from.as_pathname().unwrap()).unwrap();
    until(&mut h, "a frame", |h| h.driver(RX).has_used());
    assert!(received(&mut h).unwrap() == frame(70, 2));
}

#[test]
fn a_reset_keeps_the_connection_and_its_frames_apart() {
    let (mut h, mut peer) = plain();
    h.add(RX, &[], &[2000]);
    h.kick(RX).unwrap();
    peer.write_all(&[0, 0, 0, 20, 1, 2]).unwrap();
    until(&mut h, "half a frame is read", |h| h.poll(Duration::ZERO).unwrap() == 0);
    for n in 0..1000 {
        h.restart().unwrap();
        if n % 100 == 0 {
            h.request(TX, &[&[0; HEADER], &frame(60, 1)], &[]).unwrap();
            assert!(get(&mut peer) == frame(60, 1));
        }
    }
    h.add(RX, &[], &[2000]);
    h.kick(RX).unwrap();
    peer.write_all(&[3; 18]).unwrap();
    until(&mut h, "the other half", |h| h.driver(RX).has_used());
    assert_eq!(received(&mut h).unwrap(), [&[1, 2][..], &[3; 18]].concat());
}

#[test]
fn errors_say_what_is_wrong() {
    let try_one = |peer| Net::new(spec(peer, Offloads::empty())).unwrap_err().to_string();
    let missing = || Socket::Path("/no/such/socket".into());
    let text = try_one(PeerSpec::Stream(missing()));
    assert!(text.contains("stream socket /no/such/socket") && text.contains("has to listen"), "{text}");
    let text = try_one(PeerSpec::Datagram { socket: missing(), vfkit: false });
    assert!(text.contains("datagram socket /no/such/socket"), "{text}");
    let text = try_one(PeerSpec::Stream(Socket::Fd(std::fs::File::open("/").unwrap().into())));
    assert!(text.contains("no unix stream socket"), "{text}");
    let text = try_one(PeerSpec::Tap("a name that is too long".into()));
    assert!(text.contains("1 to 15 characters"), "{text}");
    for (mac, why) in [([1, 0, 0, 0, 0, 0], "multicast"), ([0; 6], "zero")] {
        let peer = PeerSpec::Tap("x".into());
        let error = Net::new(NetSpec { mac, peer, offloads: Offloads::empty(), pairs: 1 }).unwrap_err();
        assert!(matches!(error, NetError::Mac { .. }) && error.to_string().contains(why), "{error}");
    }
}
