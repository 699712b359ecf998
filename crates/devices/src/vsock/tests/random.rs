//! Whatever both sides do in whatever order, bytes arrive once and in order, no side exceeds its credit, and nothing
//! stalls.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;

use super::guest::*;
use crate::vsock::packet::{Header, op};

/// The bytes of one direction of one connection, by their place.
fn byte(seed: u32, at: usize) -> u8 {
    ((at as u32).wrapping_mul(2_654_435_761) >> 13) as u8 ^ seed as u8
}

/// Bytes that go each way at least, unless the direction was ended before.
const LEAST: usize = 600_000;

/// One connection, as both of its users see it.
struct Pair {
    /// Ports of the host and of the guest.
    ports: (u32, u32),
    seed: u32,
    stream: Option<UnixStream>,
    /// What the guest knows of the device's room.
    buf_alloc: u32,
    fwd_cnt: u32,
    guest_sent: usize,
    host_got: usize,
    host_sent: usize,
    /// Received by the guest's kernel, and read by its program.
    guest_got: usize,
    guest_read: usize,
    guest_told: usize,
    guest_ended: bool,
    host_ended: bool,
    guest_saw_end: bool,
    host_saw_end: bool,
}

impl Pair {
    fn new(ports: (u32, u32), stream: UnixStream, answer: &Header) -> Self {
        Self {
            ports,
            seed: ports.1,
            stream: Some(stream),
            buf_alloc: answer.buf_alloc,
            fwd_cnt: answer.fwd_cnt,
            guest_sent: 0,
            host_got: 0,
            host_sent: 0,
            guest_got: 0,
            guest_read: 0,
            guest_told: 0,
            guest_ended: false,
            host_ended: false,
            guest_saw_end: false,
            host_saw_end: false,
        }
    }

    fn header(&mut self, op: u16) -> Header {
        self.guest_told = self.guest_read;
        Header { fwd_cnt: self.guest_read as u32, ..guest(self.ports.0, self.ports.1, op) }
    }

    fn guest_send(&mut self, g: &mut Guest, want: usize) {
        let credit = self.buf_alloc as usize - (self.guest_sent - self.fwd_cnt as usize);
        let n = want.min(credit);
        if n == 0 || self.guest_ended {
            return;
        }
        let bytes: Vec<u8> = (self.guest_sent..self.guest_sent + n).map(|at| byte(self.seed, at)).collect();
        let header = self.header(op::RW);
        g.send(Header { len: n as u32, ..header }, &bytes);
        self.guest_sent += n;
    }

    fn guest_receives(&mut self, header: &Header, bytes: &[u8]) {
        (self.buf_alloc, self.fwd_cnt) = (header.buf_alloc, header.fwd_cnt);
        assert!(self.fwd_cnt as usize <= self.guest_sent);
        match header.op {
            op::RW => {
                for b in bytes {
                    assert_eq!(*b, byte(!self.seed, self.guest_got), "byte {} to the guest", self.guest_got);
                    self.guest_got += 1;
                }
                assert!(self.guest_got - self.guest_told <= ROOM as usize, "more than there is room for");
                assert!(!self.guest_saw_end);
            }
            op::SHUTDOWN => {
                assert_eq!(header.flags & 2, 2, "the host's program reads to the end");
                self.guest_saw_end = true;
            }
            op::CREDIT_UPDATE => {}
            other => panic!("operation {other}"),
        }
    }

    /// As Linux does: the device is told when its view of the room is far off.
    fn guest_reads(&mut self, g: &mut Guest, want: usize) {
        self.guest_read = self.guest_got.min(self.guest_read + want);
        let unheard = self.guest_read - self.guest_told;
        if unheard > 0 && (unheard > ROOM as usize / 2 || self.guest_read == self.guest_got) {
            let header = self.header(op::CREDIT_UPDATE);
            g.send(header, &[]);
        }
    }

    fn host_writes(&mut self, want: usize) {
        let Some(stream) = self.stream.as_mut().filter(|_| !self.host_ended) else { return };
        let bytes: Vec<u8> = (self.host_sent..self.host_sent + want).map(|at| byte(!self.seed, at)).collect();
        match stream.write(&bytes) {
            Ok(n) => self.host_sent += n,
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
    }

    fn host_reads(&mut self, want: usize) {
        let Some(stream) = self.stream.as_mut() else { return };
        let mut bytes = vec![0; want];
        match stream.read(&mut bytes) {
            Ok(0) => self.host_saw_end |= want > 0,
            Ok(n) => {
                for b in &bytes[..n] {
                    assert_eq!(*b, byte(self.seed, self.host_got), "byte {} to the host", self.host_got);
                    self.host_got += 1;
                }
            }
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
    }

    fn guest_ends(&mut self, g: &mut Guest) {
        if !std::mem::replace(&mut self.guest_ended, true) {
            let header = self.header(op::SHUTDOWN);
            g.send(Header { flags: 2, ..header }, &[]);
        }
    }

    fn host_ends(&mut self) {
        if !std::mem::replace(&mut self.host_ended, true) {
            self.stream.as_ref().unwrap().shutdown(Shutdown::Write).unwrap();
        }
    }

    fn is_complete(&self) -> bool {
        (self.host_got, self.guest_got) == (self.guest_sent, self.host_sent)
            && self.guest_saw_end
            && self.host_saw_end
    }
}

struct World {
    g: Guest,
    pairs: Vec<Pair>,
    /// Buffers that came back and are not posted again.
    spare: usize,
}

impl World {
    fn new() -> Self {
        let mut g = Guest::new();
        let mut pairs = Vec::new();
        for n in 0..2 {
            g.send(guest(TO_HOST, n, op::REQUEST), &[]);
            let (answer, _) = g.packet();
            let (stream, _) = g.listener.accept().unwrap();
            stream.set_nonblocking(true).unwrap();
            pairs.push(Pair::new((TO_HOST, n), stream, &answer));
        }
        let stream = UnixStream::connect(g.path("guest")).unwrap();
        stream.set_nonblocking(true).unwrap();
        let (request, _) = g.packet();
        g.send(guest(request.src_port, TO_GUEST, op::RESPONSE), &[]);
        pairs.push(Pair::new((request.src_port, TO_GUEST), stream, &request));
        Self { g, pairs, spare: 0 }
    }

    fn collect(&mut self) {
        while let Some(used) = self.g.h.collect(RX) {
            self.spare += 1;
            let (header, bytes) = Header::split(&used.data);
            let pair = self.pairs.iter_mut().find(|p| p.ports == (header.src_port, header.dst_port));
            pair.expect("a packet of a connection").guest_receives(&header, bytes);
        }
    }

    fn post(&mut self, n: usize) {
        let n = n.min(self.spare);
        self.spare -= n;
        if n > 0 {
            self.g.post(n);
        }
    }

    fn step(&mut self, what: u8, which: usize, amount: usize) {
        let Self { g, pairs, .. } = self;
        let count = pairs.len();
        let pair = &mut pairs[which % count];
        match what {
            0..=2 => pair.guest_send(g, amount),
            3..=5 => pair.host_writes(amount),
            6 | 7 => pair.host_reads(amount),
            8 | 9 => pair.guest_reads(g, amount),
            10 | 11 => self.post(amount % 64),
            12 => pair.guest_ends(g),
            13 => pair.host_ends(),
            _ => {
                g.h.poll(Duration::ZERO).unwrap();
            }
        }
        self.collect();
    }

    /// Both sides send more than there is room for anywhere, end and do their part: everything arrives.
    fn finish(&mut self) {
        let unposted = self.spare;
        self.post(unposted);
        for _ in 0..5000 {
            for pair in &mut self.pairs {
                if pair.guest_sent < LEAST && !pair.guest_ended {
                    pair.guest_send(&mut self.g, LEAST - pair.guest_sent);
                } else {
                    pair.guest_ends(&mut self.g);
                }
                // Not at the same time: a packet of data tells of room as well.
                if !pair.guest_ended {
                    continue;
                }
                if pair.host_sent < LEAST && !pair.host_ended {
                    pair.host_writes(LEAST - pair.host_sent);
                } else {
                    pair.host_ends();
                }
            }
            self.g.h.poll(Duration::ZERO).unwrap();
            self.collect();
            let all = self.spare;
            self.post(all);
            for pair in &mut self.pairs {
                pair.guest_reads(&mut self.g, usize::MAX / 2);
                pair.host_reads(1 << 16);
            }
            self.collect();
            if self.pairs.iter().all(Pair::is_complete) {
                self.g.settle();
                return;
            }
        }
        for p in &self.pairs {
            eprintln!(
                "guest sent {}, host got {} (end {}); host sent {}, guest got {} (end {})",
                p.guest_sent, p.host_got, p.host_saw_end, p.host_sent, p.guest_got, p.guest_saw_end
            );
        }
        panic!("it stalls");
    }
}

/// Many small steps, and some that fill everything.
fn amount() -> impl Strategy<Value = usize> {
    prop_oneof![2 => 0..100usize, 2 => 100..5000usize, 3 => 5000..200_000usize]
}

/// What to do, with which connection, and how much; a connection ends seldom.
fn step() -> impl Strategy<Value = (u8, usize, usize)> {
    (prop_oneof![60 => 0..12u8, 1 => 12..14u8, 10 => Just(14u8)], 0..3usize, amount())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, max_shrink_iters: 2000, ..ProptestConfig::default() })]
    #[test]
    fn bytes_arrive_once_and_in_order(steps in prop::collection::vec(step(), 1..200)) {
        let mut world = World::new();
        for (what, which, amount) in steps {
            world.step(what, which, amount);
        }
        world.finish();
    }
}
