//! Whatever both sides do in whatever order, messages arrive once, whole and in order, and nothing stalls.

use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;

use super::guest::*;
use crate::vsock::packet::{END_OF_MESSAGE, Header, SEQPACKET, op};

/// Contents of the message with this number and length.
fn message(number: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| ((at + 31 * number) * 7 / 3) as u8).collect()
}

struct World {
    g: Guest,
    s: Packets,
    /// Port of the host and of the guest.
    ports: (u32, u32),
    /// The device's room and what its user took, as the guest has heard.
    buf_alloc: usize,
    fwd_cnt: usize,
    /// Bytes that the guest has sent.
    sent: usize,
    /// The message that the guest is sending, and how much of it is gone.
    sending: Option<(Vec<u8>, usize)>,
    from_guest: Vec<Vec<u8>>,
    host_got: Vec<Vec<u8>>,
    from_host: Vec<Vec<u8>>,
    guest_got: Vec<Vec<u8>>,
    /// Whole messages that the guest's program has not taken.
    unread: VecDeque<Vec<u8>>,
    partial: Vec<u8>,
    got: usize,
    read: usize,
    told: usize,
    spare: usize,
}

impl World {
    fn new(host_calls: bool) -> Self {
        let mut g = Guest::new();
        let (ports, s, answer) = if host_calls {
            let s = g.dial_packets();
            let (request, _) = g.packet();
            let ports = (request.src_port, PACKETS_TO_GUEST);
            g.send(as_packets(guest(ports.0, ports.1, op::RESPONSE)), &[]);
            (ports, s, request)
        } else {
            g.send(as_packets(guest(PACKETS_TO_HOST, 7, op::REQUEST)), &[]);
            let (answer, _) = g.packet();
            let s = g.accept_packets();
            ((PACKETS_TO_HOST, 7), s, answer)
        };
        Self {
            g,
            s,
            ports,
            buf_alloc: answer.buf_alloc as usize,
            fwd_cnt: 0,
            sent: 0,
            sending: None,
            from_guest: Vec::new(),
            host_got: Vec::new(),
            from_host: Vec::new(),
            guest_got: Vec::new(),
            unread: VecDeque::new(),
            partial: Vec::new(),
            got: 0,
            read: 0,
            told: 0,
            spare: 0,
        }
    }

    fn header(&mut self, op: u16) -> Header {
        self.told = self.read;
        Header { fwd_cnt: self.read as u32, ..as_packets(guest(self.ports.0, self.ports.1, op)) }
    }

    /// The guest goes on with its message, or begins one of `len` bytes.
    fn guest_sends(&mut self, len: usize, most: usize) {
        let number = self.from_guest.len();
        let (bytes, at) = self.sending.take().unwrap_or_else(|| (message(number, len), 0));
        let credit = self.buf_alloc - (self.sent - self.fwd_cnt);
        let n = (bytes.len() - at).min(most).min(credit);
        let is_end = at + n == bytes.len();
        if n > 0 || is_end {
            let flags = if is_end { END_OF_MESSAGE } else { 0 };
            let header = Header { len: n as u32, flags, ..self.header(op::RW) };
            self.g.send(header, &bytes[at..at + n]);
            self.sent += n;
        }
        if is_end {
            self.from_guest.push(bytes);
        } else {
            self.sending = Some((bytes, at + n));
        }
    }

    fn host_sends(&mut self, len: usize) {
        let message = message(self.from_host.len() + 1000, len);
        if self.s.send(&message) {
            self.from_host.push(message);
        }
    }

    fn host_reads(&mut self) -> bool {
        let message = self.s.recv();
        let some = message.is_some();
        self.host_got.extend(message);
        some
    }

    /// Linux tells of room after each message.
    fn guest_reads(&mut self) -> bool {
        let Some(message) = self.unread.pop_front() else { return false };
        self.read += message.len();
        self.guest_got.push(message);
        if self.read > self.told {
            let header = self.header(op::CREDIT_UPDATE);
            self.g.send(header, &[]);
        }
        true
    }

    fn collect(&mut self) {
        while let Some(used) = self.g.h.collect(RX) {
            self.spare += 1;
            let (header, bytes) = Header::split(&used.data);
            assert_eq!(
                (header.src_port, header.dst_port, header.kind),
                (self.ports.0, self.ports.1, SEQPACKET)
            );
            self.fwd_cnt = header.fwd_cnt as usize;
            assert!(self.fwd_cnt <= self.sent);
            match header.op {
                op::RW => {
                    self.partial.extend(bytes);
                    self.got += bytes.len();
                    assert!(self.got - self.told <= ROOM as usize, "more than there is room for");
                    if header.flags & END_OF_MESSAGE != 0 {
                        self.unread.push_back(std::mem::take(&mut self.partial));
                    }
                }
                op::CREDIT_UPDATE => {}
                other => panic!("operation {other}"),
            }
        }
    }

    fn step(&mut self, what: u8, len: usize, most: usize) {
        match what {
            0..=3 => self.guest_sends(len, most),
            4..=6 => self.host_sends(len.min(ROOM as usize)),
            7 | 8 => drop(self.host_reads()),
            9 | 10 => drop(self.guest_reads()),
            11 => {
                let n = self.spare.min(most % 64);
                self.spare -= n;
                self.g.post(n);
            }
            _ => drop(self.g.h.poll(Duration::ZERO).unwrap()),
        }
        self.collect();
    }

    fn finish(&mut self) {
        for _ in 0..3000 {
            if self.sending.is_some() {
                self.guest_sends(0, usize::MAX);
            }
            let n = std::mem::take(&mut self.spare);
            self.g.post(n);
            let mut busy = self.g.h.poll(Duration::ZERO).unwrap() > 0;
            self.collect();
            busy |= self.host_reads();
            busy |= self.guest_reads();
            self.collect();
            if !busy
                && self.sending.is_none()
                && self.host_got.len() == self.from_guest.len()
                && self.guest_got.len() == self.from_host.len()
            {
                assert!(self.host_got == self.from_guest, "to the host");
                assert!(self.guest_got == self.from_host, "to the guest");
                return;
            }
        }
        panic!(
            "it stalls: {} of {} to the host (one begun: {}), {} of {} to the guest",
            self.host_got.len(),
            self.from_guest.len(),
            self.sending.is_some(),
            self.guest_got.len(),
            self.from_host.len()
        );
    }
}

/// Lengths of messages: some empty, many short, some as long as there is room for.
fn len() -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(0usize), 4 => 1..100usize, 4 => 100..20_000usize, 2 => 20_000..=262_144usize]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 2000, ..ProptestConfig::default() })]
    #[test]
    fn messages_arrive_once_whole_and_in_order(
        host_calls: bool,
        steps in prop::collection::vec((0..14u8, len(), 1..100_000usize), 1..200),
    ) {
        let mut world = World::new(host_calls);
        for (what, len, most) in steps {
            world.step(what, len, most);
        }
        world.finish();
    }
}
