//! A guest that does what it must not.

use krun_virtio::DeviceError;

use super::guest::*;
use crate::vsock::packet::{Header, op};

fn refused(g: &mut Guest, header: Header, bytes: &[u8]) {
    g.send(header, bytes);
    let (rst, _) = g.packet();
    assert_eq!(
        (rst.op, rst.src_port, rst.dst_port),
        (op::RST, header.dst_port, header.src_port),
        "{header:?}"
    );
    assert_eq!((rst.src_cid, rst.kind), (header.dst_cid, header.kind));
}

#[test]
fn packets_without_a_connection_are_refused_and_rsts_ignored() {
    let mut g = Guest::new();
    for op in [0, op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 8, u16::MAX] {
        refused(&mut g, guest(TO_HOST, 5, op), &[]);
    }
    g.send(guest(TO_HOST, 5, op::RST), &[]);
    g.nothing();
}

#[test]
fn other_addresses_and_kinds_are_refused() {
    let mut g = Guest::new();
    let _s = g.connect(5);
    let request = guest(TO_HOST, 6, op::REQUEST);
    refused(&mut g, Header { dst_cid: 9, ..request }, &[]);
    for kind in [0, 3] {
        refused(&mut g, Header { kind, ..request }, &[]);
        refused(&mut g, Header { kind, ..data(TO_HOST, 5, 1) }, b"x");
    }
    // From nobody that could be answered.
    g.send(Header { src_cid: 4, ..request }, &[]);
    g.nothing();
    // The connection has not suffered.
    g.send(guest(TO_HOST, 5, op::CREDIT_REQUEST), &[]);
    assert_eq!(g.packet().0.op, op::CREDIT_UPDATE);
}

#[test]
fn broken_rules_end_the_connection() {
    let wrong: [(Header, &[u8]); 6] = [
        (guest(TO_HOST, 5, op::REQUEST), &[]),
        (guest(TO_HOST, 5, op::RESPONSE), &[]),
        (guest(TO_HOST, 5, 99), &[]),
        // Shorter than it says; longer than there is room for; credit for what was never sent.
        (data(TO_HOST, 5, 10), b"short"),
        (Header { len: u32::MAX, ..data(TO_HOST, 5, 10) }, b"short"),
        (Header { fwd_cnt: 1, ..guest(TO_HOST, 5, op::CREDIT_UPDATE) }, &[]),
    ];
    let mut g = Guest::new();
    for (header, bytes) in wrong {
        let mut s = g.connect(5);
        refused(&mut g, header, bytes);
        assert_eq!(read(&mut s), (vec![], true));
    }
    let mut s = g.connect(5);
    g.send(shutdown(TO_HOST, 5, 2), &[]);
    refused(&mut g, data(TO_HOST, 5, 1), b"x");
    assert_eq!(read(&mut s), (vec![], true));
}

#[test]
fn data_before_the_answer_is_refused() {
    let mut g = Guest::new();
    let _s = std::os::unix::net::UnixStream::connect(g.path("guest")).unwrap();
    let (request, _) = g.packet();
    refused(&mut g, data(request.src_port, TO_GUEST, 1), b"x");
}

#[test]
fn what_is_no_packet_is_ignored() {
    let mut g = Guest::new();
    let header = guest(77, 5, op::REQUEST).to_bytes();
    g.h.request(1, &[&header[..43]], &[]).unwrap();
    g.h.request(1, &[], &[100]).unwrap();
    g.nothing();
    g.h.request(1, &[&header[..43], &header[43..]], &[]).unwrap();
    assert_eq!(g.packet().0.op, op::RST);
}

#[test]
fn a_buffer_without_room_for_data_is_the_drivers_fault() {
    let mut g = Guest::with(|_| {});
    let _s = g.connect(5);
    g.h.restart().unwrap();
    g.h.add(RX, &[], &[Header::SIZE as u32]);
    g.h.kick(RX).unwrap();
    let error = g.try_send(guest(77, 5, op::REQUEST), &[]);
    assert!(matches!(error, Err(DeviceError::Driver(_))), "{error:?}");
}

#[test]
fn rsts_that_nobody_takes_are_bounded() {
    let mut g = Guest::new();
    g.h.restart().unwrap();
    let header = |n| guest(77, n, op::REQUEST).to_bytes();
    let mut sent = 0;
    // No buffers: at some point the device takes no more packets, and none is lost.
    while g.h.held(1) == 0 && sent < 100_000 {
        if g.h.driver(1).add(&[&header(sent)], &[]).is_none() {
            break;
        }
        sent += 1;
        g.h.kick(1).unwrap();
        while g.h.collect(1).is_some() {}
    }
    assert!(sent > 60_000 && sent < 100_000, "{sent}");
    g.post(64);
    let resets: Vec<_> = g.packets().iter().map(|p| p.0.dst_port).collect();
    assert!(resets.iter().copied().eq(0..sent));
}
