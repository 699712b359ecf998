//! Flow control, back-pressure, and what there can be no more of.

use std::io::Write;
use std::os::unix::net::UnixStream;

use super::guest::*;
use crate::vsock::packet::{Header, op};

const ALLOWED: usize = 256 << 10;

#[test]
fn no_more_is_read_than_the_guest_has_room_for() {
    let mut g = Guest::new();
    let mut s = g.connect(5);
    let written = fill(&mut s);
    let first: usize = g.packets().iter().map(|p| p.1.len()).sum();
    assert_eq!(first, ROOM as usize);
    // Neither does the device spin while it may not read; `packets` says so.
    s.write_all(&[1; 100]).unwrap();
    g.nothing();
    let mut total = first;
    while total < written + 100 {
        g.send(Header { fwd_cnt: total as u32, ..guest(TO_HOST, 5, op::CREDIT_UPDATE) }, &[]);
        let more: usize = g.packets().iter().map(|p| p.1.len()).sum();
        assert!(more > 0 && more <= ROOM as usize);
        total += more;
    }
    assert_eq!(total, written + 100);
}

#[test]
fn a_peer_that_does_not_read_stops_the_guest_and_nobody_else() {
    let mut g = Guest::new();
    let (mut slow, mut other) = (g.connect(5), g.connect(6));
    let mut sent = 0;
    let mut told = 0;
    // As much as a guest that plays fair may send.
    while sent < told + ALLOWED {
        let n = (told + ALLOWED - sent).min(20_000);
        g.send(data(TO_HOST, 5, n), &vec![3; n]);
        sent += n;
        told = g.packets().last().map_or(told, |p| p.0.fwd_cnt as usize);
    }
    // The socket has taken some of it, the rest is held.
    assert!(sent > ALLOWED && sent < 4 * ALLOWED, "{sent}");
    g.send(data(TO_HOST, 6, 2), b"ok");
    assert_eq!(read(&mut other), (b"ok".to_vec(), false));
    let mut got = 0;
    while got < sent {
        let (bytes, end) = read(&mut slow);
        assert!(!bytes.is_empty() && !end);
        got += bytes.len();
        g.settle();
    }
    // There is room again, and the guest is told.
    let update = g.packets().pop().unwrap().0;
    assert_eq!((update.op, update.dst_port), (op::CREDIT_UPDATE, 5));
    assert!(update.fwd_cnt as usize >= sent - ALLOWED / 2);
    g.send(data(TO_HOST, 5, 1), b"x");
    assert_eq!(read(&mut slow), (b"x".to_vec(), false));
}

#[test]
fn more_than_there_is_room_for_is_refused() {
    let mut g = Guest::new();
    let mut s = g.connect(5);
    let mut refused = None;
    for _ in 0..20 {
        g.send(data(TO_HOST, 5, 60_000), &[3; 60_000]);
        // Nothing is read by the program, and the guest does not care.
        refused = g.packets().pop().filter(|p| p.0.op == op::RST);
        if refused.is_some() {
            break;
        }
    }
    assert!(refused.is_some());
    assert!(read(&mut s).1, "the connection has ended");
}

#[test]
fn without_buffers_of_the_guest_nothing_is_lost() {
    let mut g = Guest::with(|_| {});
    // Connections enough to use up all buffers twice.
    let mut streams: Vec<_> = (0..128).map(|n| g.connect(100 + n)).collect();
    let posted = g.posted;
    for (n, s) in streams.iter_mut().enumerate() {
        s.write_all(&[n as u8; 3]).unwrap();
    }
    g.settle();
    for n in 0..300 {
        // Refused while there is no buffer to say so.
        g.send(guest(77, n, op::REQUEST), &[]);
    }
    g.settle();
    let mut data = 0;
    let mut resets = Vec::new();
    for (header, bytes) in g.packets() {
        match header.op {
            op::RW => {
                assert_eq!(bytes, [(header.dst_port - 100) as u8; 3]);
                data += 1;
            }
            op::RST => resets.push(header.dst_port),
            other => panic!("{other}"),
        }
    }
    assert_eq!((data, posted), (128, 64));
    assert!(resets.iter().copied().eq(0..300));
}

#[test]
fn there_is_a_limit_of_connections() {
    let mut g = Guest::with(|spec| spec.max_connections = 3);
    let s: Vec<_> = (0..2).map(|n| g.connect(n)).collect();
    let (port, t) = g.call();
    g.send(guest(TO_HOST, 9, op::REQUEST), &[]);
    assert_eq!(g.packet().0.op, op::RST);
    // Not accepted, and not spinning; accepted when there is room.
    let mut waiting = UnixStream::connect(g.path("guest")).unwrap();
    waiting.write_all(b"x").unwrap();
    g.nothing();
    drop((s, t));
    assert_eq!(g.packets().len(), 3);
    g.send(guest(port, TO_GUEST, op::RST), &[]);
    while g.h.poll(std::time::Duration::from_secs(5)).unwrap() == 0 {}
    assert_eq!(g.packet().0.op, op::REQUEST);
}

#[test]
fn a_full_backlog_is_waited_for() {
    let mut g = Guest::new();
    // The smallest backlog there is.
    rustix::net::listen(&g.listener, 0).unwrap();
    for n in 0..10 {
        g.send(guest(TO_HOST, n, op::REQUEST), &[]);
    }
    let mut answered: Vec<_> = g.packets().iter().map(|p| (p.0.op, p.0.dst_port)).collect();
    assert!(answered.len() < 10, "the backlog was never full");
    // One is given up meanwhile.
    g.send(guest(TO_HOST, 9, op::RST), &[]);
    let mut accepted = Vec::new();
    while answered.len() < 9 {
        while let Ok((stream, _)) = g.listener.accept() {
            accepted.push(stream);
        }
        g.h.poll(std::time::Duration::from_secs(5)).unwrap();
        answered.extend(g.packets().iter().map(|p| (p.0.op, p.0.dst_port)));
    }
    assert!(answered.iter().copied().eq((0..9).map(|n| (op::RESPONSE, n))));
}

#[test]
fn thousands_of_connections() {
    const COUNT: u32 = 3000;
    let mut g = Guest::new();
    let Ok(_) = crate::fs::raise_nofile() else { panic!("no limit of open files") };
    let mut streams = Vec::new();
    for n in 0..COUNT {
        streams.push(g.connect(n));
    }
    for (n, s) in (0..COUNT).zip(&mut streams) {
        g.send(data(TO_HOST, n, 4), &n.to_le_bytes());
        assert_eq!(read(s).0, n.to_le_bytes());
        s.write_all(&n.to_be_bytes()).unwrap();
    }
    let mut seen = std::collections::BTreeMap::new();
    for (header, bytes) in g.packets() {
        assert_eq!(bytes, header.dst_port.to_be_bytes());
        seen.insert(header.dst_port, ());
    }
    assert_eq!(seen.len(), COUNT as usize);
    drop(streams);
    assert_eq!(g.packets().len(), COUNT as usize);
}

/// In a process of its own, for the limit is the process's.
#[test]
fn without_descriptors_connections_wait_or_are_refused() {
    const MARK: &str = "KRUN_VSOCK_TEST_LIMIT";
    if std::env::var_os(MARK).is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("{}::without_descriptors_connections_wait_or_are_refused", module())])
            .arg("--test-threads=1")
            .env(MARK, "1")
            .status()
            .unwrap();
        return assert!(status.success());
    }
    let mut g = Guest::new();
    let clients: Vec<_> = (0..20).map(|_| UnixStream::connect(g.path("guest")).unwrap()).collect();
    let limit = rustix::process::Rlimit { current: Some(128), maximum: Some(128) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    let mut fillers = Vec::new();
    while let Ok(fd) = clients[0].try_clone() {
        fillers.push(fd);
    }
    g.nothing();
    g.send(guest(TO_HOST, 5, op::REQUEST), &[]);
    assert_eq!(g.packet().0.op, op::RST);
    drop(fillers);
    let mut requests = 0;
    while requests < clients.len() {
        g.h.poll(std::time::Duration::from_secs(5)).unwrap();
        requests += g.packets().iter().filter(|p| p.0.op == op::REQUEST).count();
    }
    // A new start learns of the limit: some are left to the rest of the process.
    g.h.restart().unwrap();
    g.post(64);
    let mut s = Vec::new();
    for n in 0.. {
        g.send(guest(TO_HOST, n, op::REQUEST), &[]);
        if g.packet().0.op == op::RST {
            break;
        }
        s.extend(g.listener.accept());
    }
    assert!(std::fs::File::open("/dev/null").is_ok());
    assert!(s.len() > 10);
}

fn module() -> &'static str {
    module_path!().split_once("::").unwrap().1
}
