//! Connections of a well-behaved guest.

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use super::guest::*;
use crate::vsock::packet::{Header, op};

/// Flags of SHUTDOWN.
const RECEIVE: u32 = 1;
const SEND: u32 = 2;

#[test]
fn facts() {
    let g = Guest::new();
    let mut cid = [1; 10];
    g.h.config().read(0, &mut cid);
    assert_eq!(cid, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    g.h.config().read(7, &mut cid);
    assert_eq!(cid, [0; 10]);
}

#[test]
fn bytes_go_both_ways_with_their_counts() {
    let mut g = Guest::new();
    let mut s = g.connect(5);
    g.send(data(TO_HOST, 5, 5), b"hello");
    assert_eq!(read(&mut s), (b"hello".to_vec(), false));
    g.nothing();
    s.write_all(b"world!").unwrap();
    let (header, bytes) = g.packet();
    assert_eq!((header.op, header.src_port, header.dst_port), (op::RW, TO_HOST, 5));
    assert_eq!((bytes.as_slice(), header.fwd_cnt, header.buf_alloc), (&b"world!"[..], 5, 256 << 10));
    g.send(guest(TO_HOST, 5, op::CREDIT_REQUEST), &[]);
    let (header, _) = g.packet();
    assert_eq!((header.op, header.fwd_cnt), (op::CREDIT_UPDATE, 5));
}

#[test]
fn the_host_connects_to_the_guest() {
    let mut g = Guest::new();
    let (port, mut s) = g.call();
    let (other, _t) = g.call();
    assert!(port >= 1 << 30 && port != other);
    s.write_all(b"ping").unwrap();
    assert_eq!(g.packet().1, b"ping");
    g.send(data(port, TO_GUEST, 4), b"pong");
    assert_eq!(read(&mut s), (b"pong".to_vec(), false));
}

#[test]
fn refusals() {
    let mut g = Guest::new();
    // Nobody listens at the path; no such port.
    for port in [NOBODY, 77] {
        g.send(guest(port, 5, op::REQUEST), &[]);
        let (header, _) = g.packet();
        assert_eq!((header.op, header.src_port, header.dst_port), (op::RST, port, 5));
    }
    let mut s = std::os::unix::net::UnixStream::connect(g.path("guest")).unwrap();
    let (request, _) = g.packet();
    g.send(guest(request.src_port, TO_GUEST, op::RST), &[]);
    assert_eq!(read(&mut s), (vec![], true));
    g.nothing();
}

#[test]
fn the_guest_ends_its_direction_and_the_host_answers() {
    let mut g = Guest::new();
    let mut s = g.connect(5);
    g.send(data(TO_HOST, 5, 3), b"abc");
    g.send(shutdown(TO_HOST, 5, SEND), &[]);
    assert_eq!(read(&mut s), (b"abc".to_vec(), true));
    s.write_all(b"answer").unwrap();
    assert_eq!(g.packet().1, b"answer");
    drop(s);
    let (header, _) = g.packet();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, RECEIVE | SEND));
    g.send(guest(TO_HOST, 5, op::RST), &[]);
    g.nothing();
}

#[test]
fn the_host_ends_its_direction_and_the_guest_answers() {
    let mut g = Guest::new();
    let mut s = g.connect(5);
    s.write_all(b"question").unwrap();
    s.shutdown(Shutdown::Write).unwrap();
    let packets = g.packets();
    assert_eq!(packets[0].1, b"question");
    assert_eq!((packets.len(), packets[1].0.op, packets[1].0.flags), (2, op::SHUTDOWN, SEND));
    g.send(data(TO_HOST, 5, 6), b"answer");
    g.send(shutdown(TO_HOST, 5, RECEIVE | SEND), &[]);
    assert_eq!(read(&mut s), (b"answer".to_vec(), true));
    assert_eq!(g.packet().0.op, op::RST);
    // The ports are free again.
    g.connect(5);
}

#[test]
fn who_receives_no_more_is_not_sent_to() {
    let mut g = Guest::new();
    let mut s = g.connect(5);
    g.send(shutdown(TO_HOST, 5, RECEIVE), &[]);
    assert_eq!(s.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    g.send(data(TO_HOST, 5, 1), b"y");
    assert_eq!(read(&mut s), (b"y".to_vec(), false));
    // The other way round: the program does not read, and the guest learns when it writes.
    s.shutdown(Shutdown::Read).unwrap();
    g.send(data(TO_HOST, 5, 1), b"z");
    let (header, _) = g.packet();
    assert_eq!((header.op, header.flags, header.fwd_cnt), (op::SHUTDOWN, RECEIVE, 2));
    g.send(data(TO_HOST, 5, 1), b"z");
    g.nothing();
}

#[test]
fn what_a_program_sent_before_it_died_arrives() {
    let mut g = Guest::new();
    let mut s = g.connect(5);
    g.send(data(TO_HOST, 5, 6), b"unread");
    s.write_all(b"last words").unwrap();
    // With unread data this is a reset for the other end.
    drop(s);
    let packets = g.packets();
    assert_eq!((packets[0].1.as_slice(), packets.len()), (&b"last words"[..], 2));
    assert_eq!((packets[1].0.op, packets[1].0.flags), (op::SHUTDOWN, RECEIVE | SEND));
    // Packets that were under way are nothing bad, and the guest may use its port again.
    g.send(data(TO_HOST, 5, 1), b"y");
    g.nothing();
    g.connect(5);
}

#[test]
fn a_guest_that_closes_is_free_at_once_and_what_it_sent_arrives() {
    let mut g = Guest::new();
    let mut s = g.connect(5);
    // More than the socket takes.
    let bytes: Vec<u8> = (0..400_000u32).map(|n| (n.wrapping_mul(n) / 7) as u8).collect();
    for chunk in bytes.chunks(50_000) {
        g.send(data(TO_HOST, 5, chunk.len()), chunk);
    }
    g.packets();
    g.send(shutdown(TO_HOST, 5, RECEIVE | SEND), &[]);
    assert_eq!(g.packet().0.op, op::RST);
    let _again = g.connect(5);
    let mut got = Vec::new();
    loop {
        let (part, end) = read(&mut s);
        got.extend(part);
        if end {
            break;
        }
        g.settle();
    }
    assert_eq!(got.len(), bytes.len());
    assert!(got == bytes);
}

#[test]
fn who_dies_while_the_rest_is_passed_on_leaves_nothing_behind() {
    let mut g = Guest::with(|spec| spec.max_connections = 1);
    for port in 5..8 {
        let s = g.connect(port);
        // Of the last one, neither direction of the program has ended before.
        if port < 7 {
            s.shutdown(Shutdown::Write).unwrap();
            assert_eq!(g.packet().0.flags, SEND);
        }
        // More than the socket takes.
        for _ in 0..8 {
            g.send(data(TO_HOST, port, 50_000), &[7; 50_000]);
        }
        g.packets();
        g.send(shutdown(TO_HOST, port, RECEIVE | SEND), &[]);
        assert_eq!(g.packet().0.op, op::RST);
        // There is no room for another while something is held.
        g.send(guest(TO_HOST, 9, op::REQUEST), &[]);
        assert_eq!(g.packet().0.op, op::RST);
        drop(s);
        g.nothing();
    }
    g.connect(9);
}

#[test]
fn a_reset_drops_the_connection() {
    let mut g = Guest::new();
    let mut s = g.connect(5);
    g.send(guest(TO_HOST, 5, op::RST), &[]);
    assert_eq!(read(&mut s), (vec![], true));
    g.nothing();
    g.send(data(TO_HOST, 5, 1), b"x");
    assert_eq!(g.packet().0.op, op::RST);
}

#[test]
fn a_restart_of_the_device_ends_connections_and_keeps_listening() {
    let mut g = Guest::new();
    let mut s = g.connect(5);
    let (_, mut t) = g.call();
    g.h.restart().unwrap();
    assert_eq!((read(&mut s), read(&mut t)), ((vec![], true), (vec![], true)));
    g.post(64);
    let _called = g.call();
    g.connect(5);
}

#[test]
fn the_end_waits_for_what_is_held_and_sockets_go() {
    let mut g = Guest::new();
    let mut s = g.connect(5);
    s.set_nonblocking(false).unwrap();
    for _ in 0..5 {
        g.send(data(TO_HOST, 5, 50_000), &[7; 50_000]);
    }
    // Not looked at by the device before the end.
    let header = data(TO_HOST, 5, 9);
    g.h.add(TX, &[&header.to_bytes(), b"last data"], &[]);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        std::io::Read::read_to_end(&mut s, &mut all).unwrap();
        all
    });
    g.h.drain().unwrap();
    let path = g.path("guest");
    assert!(path.exists());
    drop(g.h.into_device());
    assert!(!path.exists());
    let all = reader.join().unwrap();
    assert_eq!((all.len(), &all[250_000..]), (250_009, &b"last data"[..]));
}

#[test]
fn the_end_does_not_wait_for_ever_for_who_takes_a_little() {
    let mut g = Guest::with_patience(Duration::from_secs(60), Duration::from_millis(1500));
    let mut streams: Vec<_> = (0..20).map(|port| g.connect(port)).collect();
    for port in 0..20 {
        // What the socket takes, and then as much as is held.
        for _ in 0..8 {
            g.send(data(TO_HOST, port, 50_000), &[7; 50_000]);
            g.packets();
        }
    }
    // One of them takes something every now and then; all would have their turn after ten seconds.
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let reader = std::thread::spawn(move || {
        for stream in &mut streams {
            if ended.recv_timeout(Duration::from_millis(500)) != Err(RecvTimeoutError::Timeout) {
                break;
            }
            read(stream);
        }
    });
    let start = Instant::now();
    g.h.drain().unwrap();
    let took = start.elapsed();
    drop(end);
    assert!(took >= Duration::from_millis(1450) && took < Duration::from_secs(8), "{took:?}");
    drop(g.h.into_device());
    reader.join().unwrap();
}

#[test]
fn the_end_waits_less_for_who_takes_nothing() {
    let mut g = Guest::with_patience(Duration::from_millis(100), Duration::from_secs(60));
    let _s = g.connect(5);
    for _ in 0..5 {
        g.send(data(TO_HOST, 5, 50_000), &[7; 50_000]);
    }
    let start = Instant::now();
    g.h.drain().unwrap();
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(90) && took < Duration::from_secs(10), "{took:?}");
}

#[test]
fn the_end_waits_for_nobody_when_the_machine_is_killed() {
    let mut g = Guest::with_patience(Duration::from_secs(60), Duration::from_secs(60));
    let _s = g.connect(5);
    for _ in 0..5 {
        g.send(data(TO_HOST, 5, 50_000), &[7; 50_000]);
    }
    let handle = g.handle.clone();
    let start = Instant::now();
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        handle.abandon();
    });
    g.h.drain().unwrap();
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(100) && took < Duration::from_secs(30), "{took:?}");
    killer.join().unwrap();
}

#[test]
fn a_header_alone_or_in_pieces_is_the_same() {
    let mut g = Guest::new();
    let mut s = g.connect(5);
    let packet = [data(TO_HOST, 5, 4).to_bytes().as_slice(), b"data and more"].concat();
    let (a, rest) = packet.split_at(10);
    let (b, c) = rest.split_at(Header::SIZE - 9);
    g.h.request(TX, &[a, b, c], &[]).unwrap();
    // What is longer than it says is cut off.
    assert_eq!(read(&mut s), (b"data".to_vec(), false));
}
