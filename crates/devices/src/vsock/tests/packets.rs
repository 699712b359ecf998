//! Connections that keep messages apart.

use std::time::Duration;

use rustix::net::Shutdown;

use super::guest::*;
use crate::vsock::packet::{END_OF_MESSAGE, END_OF_RECORD, Header, SEQPACKET, STREAM, op};

const ALLOWED: usize = 256 << 10;

fn noise(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// The guest sends one message, in parts of at most `most` bytes.
fn send(g: &mut Guest, port: u32, message: &[u8], most: usize) {
    let mut parts = message.chunks(most).peekable();
    if parts.peek().is_none() {
        return g.send(part(PACKETS_TO_HOST, port, 0, true), &[]);
    }
    while let Some(bytes) = parts.next() {
        g.send(part(PACKETS_TO_HOST, port, bytes.len(), parts.peek().is_none()), bytes);
    }
}

/// Whole messages of the guest's, put together from packets.
fn messages(packets: Vec<(Header, Vec<u8>)>) -> Vec<Vec<u8>> {
    let (mut whole, mut now) = (Vec::new(), Vec::new());
    for (header, bytes) in packets {
        assert_eq!((header.op, header.kind), (op::RW, SEQPACKET), "{header:?}");
        now.extend(bytes);
        if header.flags & END_OF_MESSAGE != 0 {
            whole.push(std::mem::take(&mut now));
        }
    }
    assert!(now.is_empty(), "a message has no end");
    whole
}

#[test]
fn messages_go_both_ways_as_they_were_sent() {
    let mut g = Guest::new();
    let s = g.connect_packets(5);
    for (message, most) in [("one", 3), ("", 1), ("in parts", 3), ("", 1), ("two", 9)] {
        send(&mut g, 5, message.as_bytes(), most);
    }
    for message in ["one", "", "in parts", "", "two"] {
        assert_eq!(s.recv().unwrap(), message.as_bytes());
    }
    assert_eq!(s.recv(), None);
    for message in ["a", "", "", "bc", "def"] {
        assert!(s.send(message.as_bytes()));
    }
    assert_eq!(messages(g.packets()), [&b"a"[..], b"", b"", b"bc", b"def"]);
}

#[test]
fn the_host_connects_to_the_guest() {
    let mut g = Guest::new();
    let (port, s) = g.call_packets();
    assert!(s.send(b"ping") && s.send(b"again"));
    assert_eq!(messages(g.packets()), [&b"ping"[..], b"again"]);
    g.send(part(port, PACKETS_TO_GUEST, 4, true), b"pong");
    assert_eq!(s.recv().unwrap(), b"pong");
}

#[test]
fn the_end_of_a_record_is_passed_on() {
    let mut g = Guest::new();
    let s = g.connect_packets(5);
    let header = part(PACKETS_TO_HOST, 5, 1, true);
    g.send(Header { flags: END_OF_MESSAGE | END_OF_RECORD, ..header }, b"x");
    // Linux's unix sockets take the flag and forget it, so no more can be seen here.
    assert_eq!(s.recv().unwrap(), b"x");
    rustix::net::send(&s.0, b"y", rustix::net::SendFlags::EOR).unwrap();
    assert_eq!(messages(g.packets()), [b"y"]);
}

#[test]
fn a_large_message_takes_many_buffers_and_stays_one() {
    let mut g = Guest::new();
    let s = g.connect_packets(5);
    let message = noise(ROOM as usize);
    assert!(s.send(&message) && s.send(b"next"));
    let packets = g.packets();
    assert!(packets.len() > 10);
    assert_eq!(messages(packets), [message.as_slice()]);
    // The next one waits for the guest's program to take the first.
    g.nothing();
    let update = guest(PACKETS_TO_HOST, 5, op::CREDIT_UPDATE);
    g.send(as_packets(Header { fwd_cnt: ROOM, ..update }), &[]);
    assert_eq!(messages(g.packets()), [b"next"]);
    // And as much the other way as the device has room for.
    let message = noise(ALLOWED);
    send(&mut g, 5, &message, 50_000);
    assert!(s.recv().unwrap() == message);
    send(&mut g, 5, &message, 64_000);
    assert!(s.recv().unwrap() == message);
}

#[test]
fn a_message_that_the_guest_has_no_room_for_ends_the_connection() {
    let mut g = Guest::new();
    let s = g.connect_packets(5);
    assert!(s.send(&noise(ROOM as usize + 1)));
    let (rst, _) = g.packet();
    assert_eq!((rst.op, rst.kind, rst.dst_port), (op::RST, SEQPACKET, 5));
    assert_eq!(s.recv().unwrap(), b"");
    g.nothing();
}

#[test]
fn a_message_that_comes_while_there_is_no_buffer_is_not_lost() {
    let mut g = Guest::new();
    let s = g.connect_packets(5);
    g.h.restart().unwrap();
    drop(s);
    // One buffer at a time.
    g.posted = 0;
    g.send(as_packets(guest(PACKETS_TO_HOST, 6, op::REQUEST)), &[]);
    g.post(1);
    assert_eq!(g.packet().0.op, op::RESPONSE);
    let s = g.accept_packets();
    let message = noise(5 * BUFFER as usize);
    assert!(s.send(&message));
    drop(s);
    let mut packets = g.packets();
    let last = packets.pop().unwrap().0;
    assert_eq!((last.op, last.flags), (op::SHUTDOWN, 3));
    assert_eq!(messages(packets), [message]);
}

#[test]
fn a_program_that_does_not_read_stops_the_guest_and_nothing_is_lost() {
    let mut g = Guest::new();
    let s = g.connect_packets(5);
    let (mut sent, mut told) = (Vec::new(), 0);
    let mut total = 0;
    for n in 0.. {
        let message = noise(1 + n * 37 % 3000);
        if total + message.len() > told + ALLOWED {
            break;
        }
        send(&mut g, 5, &message, 1000);
        total += message.len();
        sent.push(message);
        told = g.packets().last().map_or(told, |p| p.0.fwd_cnt as usize);
    }
    assert!(total > ALLOWED, "the socket has taken some, and the device holds the rest: {total}");
    for (n, message) in sent.iter().enumerate() {
        if n % 20 == 0 {
            g.settle();
        }
        g.settle();
        assert!(s.recv().as_ref() == Some(message), "message {n}");
    }
    assert_eq!(s.recv(), None);
    let update = g.packets().pop().unwrap().0;
    assert!(update.op == op::CREDIT_UPDATE && update.fwd_cnt as usize >= total - ALLOWED / 2);
}

#[test]
fn a_slow_program_gets_every_small_message() {
    let mut g = Guest::new();
    let s = g.connect_packets(5);
    let mut sent = 0;
    // As many as a guest that plays fair may send: one for each byte of credit.
    while sent < ALLOWED {
        send(&mut g, 5, &[sent as u8], 1);
        sent += 1;
    }
    g.packets();
    for n in 0..sent {
        let message = s.recv().or_else(|| {
            g.settle();
            s.recv()
        });
        assert_eq!(message, Some(vec![n as u8]), "message {n}");
    }
    assert_eq!(s.recv(), None);
    assert!(g.packets().iter().all(|(header, _)| header.op == op::CREDIT_UPDATE));
}

#[test]
fn a_message_without_an_end_is_bounded_and_never_sent() {
    let mut g = Guest::new();
    let s = g.connect_packets(5);
    for _ in 0..4 {
        g.send(part(PACKETS_TO_HOST, 5, ALLOWED / 4, false), &noise(ALLOWED / 4));
    }
    g.nothing();
    g.send(part(PACKETS_TO_HOST, 5, 1, false), b"x");
    assert_eq!(g.packet().0.op, op::RST);
    assert_eq!(s.recv().unwrap(), b"", "the end, and nothing before it");
}

#[test]
fn messages_without_contents_are_bounded() {
    let mut g = Guest::new();
    let s = g.connect_packets(5);
    let mut sent = 0;
    while g.h.collect(RX).is_none() {
        g.send(part(PACKETS_TO_HOST, 5, 0, true), &[]);
        sent += 1;
        assert!(sent < 10_000);
    }
    assert!(sent > 1024, "{sent}");
    assert_eq!(s.recv().unwrap(), b"");
}

#[test]
fn each_direction_ends_for_itself() {
    let mut g = Guest::new();
    let s = g.connect_packets(5);
    send(&mut g, 5, b"question", 9);
    // A message that never gets its end is none.
    g.send(part(PACKETS_TO_HOST, 5, 4, false), b"lost");
    g.send(as_packets(shutdown(PACKETS_TO_HOST, 5, 2)), &[]);
    assert_eq!((s.recv().unwrap(), s.recv().unwrap()), (b"question".to_vec(), vec![]));
    // The last message may be empty.
    assert!(s.send(b"answer") && s.send(b""));
    rustix::net::shutdown(&s.0, Shutdown::Write).unwrap();
    let mut packets = g.packets();
    let (end, _) = packets.pop().unwrap();
    assert_eq!((end.op, end.flags & 2), (op::SHUTDOWN, 2));
    assert_eq!(messages(packets), [&b"answer"[..], b""]);
    g.send(as_packets(shutdown(PACKETS_TO_HOST, 5, 3)), &[]);
    assert_eq!(g.packet().0.op, op::RST);
    g.connect_packets(5);
}

#[test]
fn a_socket_of_the_other_type_refuses() {
    let mut g = Guest::new();
    g.send(as_packets(guest(TO_HOST, 5, op::REQUEST)), &[]);
    let (rst, _) = g.packet();
    assert_eq!((rst.op, rst.kind, rst.src_port), (op::RST, SEQPACKET, TO_HOST));
    g.send(guest(PACKETS_TO_HOST, 5, op::REQUEST), &[]);
    let (rst, _) = g.packet();
    assert_eq!((rst.op, rst.kind, rst.src_port), (op::RST, STREAM, PACKETS_TO_HOST));
}

#[test]
fn packets_of_the_other_type_are_refused_and_change_nothing() {
    let mut g = Guest::new();
    let (mut stream, packets) = (g.connect(5), g.connect_packets(5));
    for header in [
        as_packets(data(TO_HOST, 5, 1)),
        data(PACKETS_TO_HOST, 5, 1),
        as_packets(shutdown(TO_HOST, 5, 3)),
        guest(PACKETS_TO_HOST, 5, op::REQUEST),
    ] {
        g.send(header, b"x");
        let (rst, _) = g.packet();
        assert_eq!((rst.op, rst.kind, rst.src_port), (op::RST, header.kind, header.dst_port));
    }
    g.send(data(TO_HOST, 5, 1), b"s");
    send(&mut g, 5, b"p", 1);
    assert_eq!((read(&mut stream), packets.recv()), ((b"s".to_vec(), false), Some(b"p".to_vec())));
}

#[test]
fn a_driver_without_the_feature_has_streams_only() {
    let mut g = Guest::with_features(!(1 << 1));
    g.send(as_packets(guest(PACKETS_TO_HOST, 5, op::REQUEST)), &[]);
    assert_eq!(g.packet().0.op, op::RST);
    let _stream = g.connect(6);
    let s = g.dial_packets();
    g.nothing();
    assert_eq!(s.recv().unwrap(), b"");
    let _called = g.call();
}

#[test]
fn the_end_waits_for_messages_that_are_held() {
    let mut g = Guest::new();
    let s = g.connect_packets(5);
    for n in 0..10u8 {
        let header = part(PACKETS_TO_HOST, 5, 20_000, true);
        g.send(header, &[n; 20_000]);
    }
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        loop {
            match s.recv() {
                Some(message) if message.is_empty() => return got,
                Some(message) => got.push((message.len(), message[0])),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    });
    g.h.drain().unwrap();
    drop(g.h.into_device());
    let got = reader.join().unwrap();
    assert!(got.into_iter().eq((0..10).map(|n| (20_000, n))));
}
