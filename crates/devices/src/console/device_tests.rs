use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read as _, Write as _, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use krun_virtio::mock::Harness;

use super::super::spec::PortSpec;
use super::super::test_util::{noise, pty};
use super::*;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_REMOVE: u16 = 2;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

const NOW: Duration = Duration::ZERO;
/// A terminal passes keys on in its own time.
const SOON: Duration = Duration::from_secs(5);
const PAGE: u32 = 4096;

/// A driver that does what Linux does, step by step.
struct Guest {
    h: Harness,
    sizes: Vec<u16>,
}

impl Guest {
    fn new(ports: Vec<PortSpec>) -> Self {
        let console = Console::new(ConsoleSpec { ports }).unwrap();
        Self::of(console)
    }

    fn of(console: Console) -> Self {
        let sizes = console.info().queue_sizes;
        let mut guest = Self { h: Harness::new(console), sizes };
        guest.fill(CONTROL_RX);
        guest
    }

    fn fill(&mut self, queue: usize) {
        for _ in 0..self.sizes[queue] {
            self.h.add(queue, &[], &[PAGE]);
        }
        self.h.kick(queue).unwrap();
    }

    fn control(&mut self, id: u32, event: u16, value: u16) {
        let mut m = id.to_le_bytes().to_vec();
        m.extend(event.to_le_bytes());
        m.extend(value.to_le_bytes());
        let used = self.h.request(CONTROL_TX, &[&m], &[]).unwrap();
        assert_eq!(used.written, 0);
    }

    /// What the device has said: id, event, value, payload. The buffers are put out again.
    fn told(&mut self) -> Vec<(u32, u16, u16, Vec<u8>)> {
        let mut all = Vec::new();
        while let Some(used) = self.h.collect(CONTROL_RX) {
            let m = used.data;
            let word = |at: usize| u16::from_le_bytes([m[at], m[at + 1]]);
            all.push((u32::from_le_bytes([m[0], m[1], m[2], m[3]]), word(4), word(6), m[HEADER..].to_vec()));
            self.h.add(CONTROL_RX, &[], &[PAGE]);
        }
        self.h.kick(CONTROL_RX).unwrap();
        all
    }

    fn events(&mut self) -> Vec<(u32, u16, u16)> {
        self.told().into_iter().map(|m| (m.0, m.1, m.2)).collect()
    }

    /// The whole handshake; all ports are open after it.
    fn boot(&mut self) {
        self.control(u32::MAX, DEVICE_READY, 1);
        for (id, event, _) in self.events() {
            assert_eq!(event, PORT_ADD);
            self.fill(queues(id as usize).0);
            self.control(id, PORT_READY, 1);
        }
        for id in 0..self.sizes.len() / 2 - 1 {
            self.control(id as u32, PORT_OPEN, 1);
        }
        self.told();
    }

    /// Sends one chain without looking whether it comes back.
    fn send(&mut self, port: usize, data: &[u8]) {
        let queue = queues(port).1;
        let middle = data.len() / 3;
        self.h.add(queue, &[&data[..middle], &data[middle..]], &[]);
        self.h.kick(queue).unwrap();
    }

    fn sent(&mut self, port: usize) -> bool {
        self.h.collect(queues(port).1).is_some()
    }

    /// Reads what has come in; the buffers are put out again if `recycle`.
    fn receive(&mut self, port: usize, recycle: bool) -> Vec<u8> {
        let queue = queues(port).0;
        let mut all = Vec::new();
        while let Some(used) = self.h.collect(queue) {
            all.extend(used.data);
            if recycle {
                self.h.add(queue, &[], &[PAGE]);
            }
        }
        if recycle {
            self.h.kick(queue).unwrap();
        }
        all
    }

    fn poll(&mut self) -> usize {
        self.h.poll(NOW).unwrap()
    }
}

fn input(name: &str) -> (PortSpec, PipeWriter) {
    let (r, w) = pipe().unwrap();
    (PortSpec::stream(name, Some(r.into()), None), w)
}

fn output(name: &str) -> (PortSpec, PipeReader) {
    let (r, w) = pipe().unwrap();
    (PortSpec::stream(name, None, Some(w.into())), r)
}

fn console() -> PortSpec {
    PortSpec::console(None, None, Some(TerminalSize { cols: 90, rows: 20 }))
}

fn available(r: &PipeReader) -> u64 {
    rustix::io::ioctl_fionread(r).unwrap()
}

#[path = "output_tests.rs"]
mod output;

#[path = "terminal_tests.rs"]
mod terminal;

#[path = "turn_tests.rs"]
mod turn;

#[test]
fn facts_and_configuration() {
    let (stdin, _w) = input("in");
    let (stdout, _r) = output("out");
    let c = Console::new(ConsoleSpec { ports: vec![console(), stdin, stdout] }).unwrap();
    let info = c.info();
    assert_eq!((info.id, info.features), (3, 3));
    assert_eq!(info.queue_sizes, [1, 1, 16, 16, 32, 1, 1, 16]);
    let config = c.config();
    let read = |at, n| {
        let mut data = vec![0xaa; n];
        config.read(at, &mut data);
        data
    };
    assert_eq!(read(0, 13), [90, 0, 20, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(read(4, 4), [3, 0, 0, 0]);
    assert_eq!(read(u64::MAX, 4), [0; 4]);
    assert!(c.handle().resize(0, 91, 21));
    assert_eq!(read(0, 4), [91, 0, 21, 0]);
    assert!(!c.handle().resize(1, 1, 1) && !c.handle().resize(3, 1, 1));
}

#[test]
fn ports_are_introduced_and_named() {
    let (stdin, _w) = input("krun-stdin");
    let mut g = Guest::new(vec![console(), stdin]);
    assert!(g.told().is_empty(), "nothing is said before the driver is ready");
    g.control(u32::MAX, DEVICE_READY, 1);
    assert_eq!(g.events(), [(0, PORT_ADD, 0), (1, PORT_ADD, 0)]);
    g.control(0, PORT_READY, 1);
    assert_eq!(
        g.told(),
        [(0, CONSOLE_PORT, 1, vec![]), (0, RESIZE, 0, vec![90, 0, 20, 0]), (0, PORT_OPEN, 1, vec![])]
    );
    g.control(1, PORT_READY, 1);
    assert_eq!(g.told(), [(1, PORT_OPEN, 1, vec![]), (1, PORT_NAME, 1, b"krun-stdin".to_vec())]);
}

#[test]
fn few_buffers_for_control_messages_only_delay_them() {
    let names: Vec<String> = (0..32).map(|n| format!("port-{n}")).collect();
    let ports = names.iter().map(|n| PortSpec::stream(n, None, None)).collect();
    let mut g = Guest::new(ports);
    g.control(u32::MAX, DEVICE_READY, 1);
    let mut added = Vec::new();
    while let events @ [_, ..] = &g.events()[..] {
        assert!(events.len() <= CONTROL_QUEUE.into());
        added.extend(events.iter().map(|e| e.0));
    }
    assert_eq!(added, (0..32).collect::<Vec<_>>());
}

#[test]
fn input_waits_until_the_port_is_open() {
    let (stdin, mut w) = input("in");
    let mut g = Guest::new(vec![stdin]);
    w.write_all(b"early").unwrap();
    g.control(u32::MAX, DEVICE_READY, 1);
    g.fill(0);
    g.control(0, PORT_READY, 1);
    assert_eq!(g.poll(), 0);
    assert!(g.receive(0, true).is_empty(), "a closed port would throw it away");
    g.control(0, PORT_OPEN, 1);
    assert_eq!(g.receive(0, true), b"early");
    w.write_all(b"later").unwrap();
    assert_eq!(g.poll(), 1);
    assert_eq!(g.receive(0, true), b"later");
    g.control(0, PORT_OPEN, 0);
    w.write_all(b"for the next one").unwrap();
    assert_eq!(g.poll(), 0);
    g.control(0, PORT_OPEN, 1);
    assert_eq!(g.receive(0, true), b"for the next one");
}

#[test]
fn the_end_of_input_follows_the_last_byte_read() {
    let (stdin, mut w) = input("in");
    let mut g = Guest::new(vec![stdin]);
    g.boot();
    w.write_all(b"the end").unwrap();
    drop(w);
    g.poll();
    assert_eq!(g.receive(0, false), b"the end");
    for _ in 0..3 {
        g.poll();
    }
    assert!(g.told().is_empty(), "the data has been fetched but not read");
    // The driver puts the buffer out again when it has been read.
    g.h.add(0, &[], &[PAGE]);
    g.h.kick(0).unwrap();
    assert_eq!(g.events(), [(0, PORT_OPEN, 0)]);
    assert_eq!(g.poll(), 0, "a closed pipe is not polled for ever");
}

#[test]
fn the_end_of_input_with_a_full_ring() {
    let (stdin, mut w) = input("in");
    let mut g = Guest::new(vec![stdin]);
    g.boot();
    // 40,000 bytes in reads of one pipe's content: more buffers than a batch.
    let data = noise(40_000, 1);
    w.write_all(&data).unwrap();
    drop(w);
    g.poll();
    g.poll();
    let mut got: Vec<u8> = Vec::new();
    loop {
        assert!(g.told().is_empty());
        let part = g.receive(0, false);
        got.extend(&part);
        if got.len() == data.len() {
            break;
        }
        assert!(!part.is_empty());
    }
    assert_eq!(got, data);
    for n in 1.. {
        g.h.add(0, &[], &[PAGE]);
        g.h.kick(0).unwrap();
        if g.h.driver(0).in_flight() == 32 {
            assert_eq!(g.events(), [(0, PORT_OPEN, 0)], "after {n} buffers");
            break;
        }
        assert!(g.told().is_empty());
    }
}

#[test]
fn an_empty_input_ends_when_the_port_is_opened() {
    let null = File::open("/dev/null").unwrap();
    let mut g = Guest::new(vec![PortSpec::stream("in", Some(null.into()), None)]);
    g.control(u32::MAX, DEVICE_READY, 1);
    g.fill(0);
    g.control(0, PORT_READY, 1);
    assert_eq!(g.events()[1], (0, PORT_OPEN, 1));
    g.control(0, PORT_OPEN, 1);
    assert_eq!(g.events(), [(0, PORT_OPEN, 0)]);
    // The next one who opens the port finds it closed; nobody is told again.
    g.control(0, PORT_OPEN, 0);
    g.control(0, PORT_OPEN, 1);
    assert!(g.told().is_empty());
}

#[test]
fn no_more_input_is_read_than_the_guest_has_room_for() {
    let (stdin, mut w) = input("in");
    let mut g = Guest::new(vec![stdin]);
    g.control(u32::MAX, DEVICE_READY, 1);
    g.control(0, PORT_READY, 1);
    g.h.add(0, &[], &[10, 6]);
    g.h.kick(0).unwrap();
    g.control(0, PORT_OPEN, 1);
    w.write_all(&noise(100, 2)).unwrap();
    g.poll();
    assert_eq!(g.h.collect(0).unwrap().data, noise(100, 2)[..16]);
    assert_eq!(g.poll(), 0, "not watched while there is no room");
    g.h.add(0, &[], &[84]);
    g.h.kick(0).unwrap();
    assert_eq!(g.h.collect(0).unwrap().data, noise(100, 2)[16..]);
}

#[test]
fn a_socket_carries_both_directions_and_ends_as_a_whole() {
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    let mut g = Guest::new(vec![PortSpec::duplex("control", mine.into()).unwrap()]);
    g.boot();
    theirs.write_all(b"to guest").unwrap();
    g.poll();
    assert_eq!(g.receive(0, true), b"to guest");
    g.send(0, b"to host");
    let mut got = [0; 7];
    theirs.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"to host");
    drop(theirs);
    g.poll();
    assert_eq!(g.events(), [(0, PORT_OPEN, 0)]);
    g.send(0, b"too late");
    assert_eq!(g.events(), [(0, PORT_REMOVE, 0)]);
    assert_eq!(g.poll(), 0);
}

#[test]
fn sizes_follow_the_host() {
    let (stdin, _w) = input("in");
    let c = Console::new(ConsoleSpec { ports: vec![console(), stdin] }).unwrap();
    let handle = c.handle();
    let mut g = Guest::of(c);
    g.boot();
    assert_eq!(g.poll(), 0);
    handle.clone().resize(0, 100, 30);
    handle.resize(0, 132, 50);
    handle.resize(1, 7, 7);
    assert_eq!(g.poll(), 1);
    assert_eq!(g.told(), [(0, RESIZE, 0, vec![132, 0, 50, 0])]);
    assert_eq!(g.h.take_config_changes(), 0, "with the control protocol the message is enough");
}

#[test]
fn a_driver_without_the_control_protocol_has_port_0() {
    let (theirs, mine) = pty();
    let spec = PortSpec::console(Some(mine.try_clone().unwrap()), Some(mine), None);
    let c = Console::new(ConsoleSpec { ports: vec![spec] }).unwrap();
    let handle = c.handle();
    let mut h = Harness::with_features(c, 1 << F_SIZE).unwrap();
    let mut keys = File::from(theirs);
    h.add(0, &[], &[64]);
    h.kick(0).unwrap();
    keys.write_all(b"ls\n").unwrap();
    h.poll(SOON).unwrap();
    assert_eq!(h.collect(0).unwrap().data, b"ls\n");
    h.request(1, &[b"file"], &[]).unwrap();
    let mut echo = [0; 8];
    keys.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"ls\r\nfile");
    handle.resize(0, 70, 7);
    h.poll(NOW).unwrap();
    assert_eq!(h.take_config_changes(), 1);
    handle.refresh();
    h.poll(NOW).unwrap();
    assert_eq!(h.take_config_changes(), 0);
}

#[test]
fn a_terminal_gives_its_size_and_hangs_up() {
    let (theirs, mine) = pty();
    let winsize = rustix::termios::Winsize { ws_row: 33, ws_col: 44, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&theirs, winsize).unwrap();
    let mut g = Guest::new(vec![PortSpec::console(Some(mine.try_clone().unwrap()), Some(mine), None)]);
    g.control(u32::MAX, DEVICE_READY, 1);
    g.told();
    g.fill(0);
    g.control(0, PORT_READY, 1);
    assert_eq!(g.told()[1], (0, RESIZE, 0, vec![44, 0, 33, 0]));
    g.control(0, PORT_OPEN, 1);
    let mut keys = File::from(theirs);
    // The end-of-file character of a terminal that is not raw ends nothing.
    keys.write_all(b"\x04").unwrap();
    g.h.poll(SOON).unwrap();
    keys.write_all(b"on\n").unwrap();
    g.h.poll(SOON).unwrap();
    assert_eq!(g.receive(0, true), b"on\n");
    assert!(g.told().is_empty());
    drop(keys);
    assert_eq!(g.h.poll(SOON).unwrap(), 1);
    assert_eq!(g.events(), [(0, PORT_REMOVE, 0)]);
    assert_eq!(g.poll(), 0);
    g.send(0, b"bye");
    assert!(g.sent(0));
}

#[test]
fn an_ended_input_leaves_a_console_open() {
    let (r, w) = pipe().unwrap();
    drop(w);
    let mut g = Guest::new(vec![PortSpec::console(Some(r.into()), None, None)]);
    g.boot();
    assert!(g.told().is_empty());
    assert_eq!(g.poll(), 0);
}

#[test]
fn after_a_reset_all_is_as_new() {
    let (stdin, mut w) = input("in");
    let (out, mut r) = output("out");
    let mut g = Guest::new(vec![console(), stdin, out]);
    g.boot();
    for _ in 0..4 {
        g.send(2, &[1; 30_000]);
    }
    w.write_all(b"one").unwrap();
    g.poll();
    assert_eq!(g.receive(1, true), b"one");
    w.write_all(b"two").unwrap();
    g.h.restart().unwrap();
    let mut old = vec![0; available(&r) as usize];
    r.read_exact(&mut old).unwrap();
    assert_eq!(g.poll(), 0, "nothing is watched for the driver that is gone");
    g.fill(CONTROL_RX);
    g.boot();
    assert_eq!(g.receive(1, true), b"two");
    g.send(2, b"fresh");
    assert!(g.sent(2));
    let mut new = vec![0; available(&r) as usize];
    r.read_exact(&mut new).unwrap();
    assert_eq!(new, b"fresh", "half a chain of the old driver is not continued");
}

#[test]
fn much_at_once_lets_others_have_their_turn() {
    // A file is always ready: no event of the host paces it.
    let zero = File::open("/dev/zero").unwrap();
    let mut g = Guest::new(vec![PortSpec::stream("zero", Some(zero.into()), None)]);
    g.control(u32::MAX, DEVICE_READY, 1);
    g.control(0, PORT_READY, 1);
    for _ in 0..INPUT_QUEUE {
        g.h.add(0, &[], &[256 << 10]);
    }
    g.control(0, PORT_OPEN, 1);
    let mut all = g.receive(0, false).len();
    assert!((1 << 20..2 << 20).contains(&all), "{all} in one go");
    while g.poll() > 0 {
        all += g.receive(0, false).len();
    }
    assert_eq!(all, 8 << 20);
}

#[test]
fn hostile_control_messages_are_ignored() {
    let (stdin, _w) = input("in");
    let mut g = Guest::new(vec![stdin]);
    g.h.request(CONTROL_TX, &[b"short"], &[]).unwrap();
    g.h.request(CONTROL_TX, &[], &[64]).unwrap();
    g.control(77, PORT_OPEN, 1);
    g.control(u32::MAX, 0xffff, 0xffff);
    assert!(g.told().is_empty());
    g.boot();
    // A longer one counts by its first eight bytes.
    let mut long = vec![0; 5000];
    long[4] = PORT_READY as u8;
    long[6] = 1;
    g.h.request(CONTROL_TX, &[&long], &[]).unwrap();
    assert_eq!(g.events(), [(0, PORT_OPEN, 1), (0, PORT_NAME, 1)]);
}

#[test]
fn empty_and_tiny_buffers_do_no_harm() {
    let (stdin, mut w) = input("in");
    let mut g = Guest::new(vec![stdin]);
    g.control(u32::MAX, DEVICE_READY, 1);
    g.control(0, PORT_READY, 1);
    g.h.add(0, &[b"readable"], &[]);
    g.h.add(0, &[], &[0]);
    g.h.add(0, &[], &[1, 0, 1]);
    g.h.kick(0).unwrap();
    w.write_all(b"abc").unwrap();
    g.control(0, PORT_OPEN, 1);
    g.poll();
    let all: Vec<u32> = std::iter::from_fn(|| g.h.collect(0)).map(|u| u.written).collect();
    assert_eq!(all, [0, 0, 2]);
}

#[test]
fn the_driver_notifies_for_half_a_ring_not_for_each_buffer() {
    let (stdin, mut w) = input("in");
    let mut g = Guest::new(vec![stdin]);
    g.boot();
    let data = noise(60_000, 6);
    // More than the guest has room for, in two parts since a pipe holds 64 KiB.
    for part in [&data[..], &data[..], &data[..]] {
        while rustix::io::ioctl_fionread(&w).unwrap() > 0 && g.poll() > 0 {}
        w.write_all(part).unwrap();
        g.poll();
    }
    assert_eq!(g.h.driver(0).in_flight(), 32);
    assert_eq!(g.h.held(0), 0, "all buffers are with the driver");
    g.h.driver(0).needs_kick();
    let mut got = Vec::new();
    for n in 1..=16 {
        got.extend(g.h.collect(0).unwrap().data);
        g.h.add(0, &[], &[PAGE]);
        assert_eq!(g.h.driver(0).needs_kick(), n == 16, "buffer {n}");
    }
    g.h.kick(0).unwrap();
    // The rest comes, and at its end the driver notifies when the last buffer is back.
    drop(w);
    while got.len() < 3 * data.len() {
        while let Some(used) = g.h.collect(0) {
            got.extend(used.data);
            g.h.add(0, &[], &[PAGE]);
            if g.h.driver(0).needs_kick() {
                g.h.kick(0).unwrap();
            }
        }
        g.poll();
    }
    assert!(got.chunks(data.len()).all(|part| part == data));
    g.poll();
    assert_eq!(g.events(), [(0, PORT_OPEN, 0)]);
}
