//! Body of the fuzz target: a driver and a host that do whatever the input says. Panics when a promise
//! is broken.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Write, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use krun_virtio::DeviceError;
use krun_virtio::mock::{BASE, Buffer, Harness};

use super::control::HEADER;
use super::port::queues;
use super::{Console, ConsoleHandle, ConsoleSpec, PortSpec};

const PORTS: usize = 5;
const QUEUES: usize = 2 * PORTS + 2;
const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(len.min(self.0.len()));
        self.0 = tail;
        head
    }

    fn u8(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    fn queue(&mut self) -> usize {
        usize::from(self.u8()) % QUEUES
    }
}

/// The host's ends of the ports.
struct Host {
    stdin: Option<PipeWriter>,
    stdout: Option<PipeReader>,
    socket: Option<UnixStream>,
    handle: ConsoleHandle,
}

fn set_up() -> (Harness, Host) {
    let (r, w) = pipe().unwrap();
    let (r2, w2) = pipe().unwrap();
    let (mine, theirs) = UnixStream::pair().unwrap();
    let null = || Some(OwnedFd::from(File::options().read(true).write(true).open("/dev/null").unwrap()));
    let ports = vec![
        PortSpec::console(null(), null(), None),
        PortSpec::stream("stdin", Some(r.into()), None),
        PortSpec::stream("stdout", None, Some(w2.into())),
        PortSpec::duplex("socket", mine.into()).unwrap(),
        PortSpec::stream("zero", Some(File::open("/dev/zero").unwrap().into()), None),
    ];
    assert_eq!(ports.len(), PORTS);
    let console = Console::new(ConsoleSpec { ports }).unwrap();
    let host = Host { stdin: Some(w), stdout: Some(r2), socket: Some(theirs), handle: console.handle() };
    (Harness::new(console), host)
}

/// A driver and a host at work as `data` says.
#[doc(hidden)]
pub fn fuzz_one(data: &[u8]) {
    let mut input = Input(data);
    let (mut h, mut host) = set_up();
    // Output that nobody reads must not keep a drain waiting.
    host.handle.abandon();
    let mut steps = 0;
    while !input.0.is_empty() && steps < 400 {
        steps += 1;
        if step(&mut input, &mut h, &mut host).is_err() {
            // The driver sees that the device needs a reset, and resets it.
            h.restart().unwrap();
        }
        for queue in 0..QUEUES {
            collect(&mut h, queue);
        }
    }
    let _ = h.drain();
}

/// Checks what came back: the harness itself checks that it fits the buffers.
fn collect(h: &mut Harness, queue: usize) {
    while let Some(used) = h.collect(queue) {
        if queue == CONTROL_RX && used.data.len() >= HEADER {
            assert!(usize::from(used.data[0]) < PORTS && used.data[1..4] == [0; 3], "{used:?}");
            assert!((1..8).contains(&used.data[4]) && used.data[5] == 0, "{used:?}");
        }
        if queue == CONTROL_TX || (0..PORTS).any(|p| queues(p).1 == queue) {
            assert_eq!(used.written, 0);
        }
    }
}

fn step(input: &mut Input<'_>, h: &mut Harness, host: &mut Host) -> Result<(), DeviceError> {
    match input.u8() % 14 {
        0 => {
            // Room of any shape.
            let queue = input.queue();
            let room = [u32::from(input.u16()), u32::from(input.u8())];
            let n = 1 + usize::from(input.u8() & 1);
            if h.driver(queue).add(&[], &room[..n]).is_some() {
                h.kick(queue)?;
            }
        }
        1 => {
            let queue = input.queue();
            let len = usize::from(input.u8());
            if h.driver(queue).add(&[input.bytes(len)], &[]).is_some() {
                h.kick(queue)?;
            }
        }
        2 => {
            // More output than a pipe holds.
            let (port, len) = (usize::from(input.u8()) % PORTS, input.u16());
            let big = vec![7; usize::from(len)];
            if h.driver(queues(port).1).add(&[&big, &big], &[]).is_some() {
                h.kick(queues(port).1)?;
            }
        }
        3 | 4 => {
            // A control message that is likely to mean something.
            let m = [input.u8() % 6, 0, 0, 0, input.u8() % 9, 0, input.u8() & 1, 0];
            if h.driver(CONTROL_TX).add(&[&m], &[]).is_some() {
                h.kick(CONTROL_TX)?;
            }
        }
        5 => {
            // A chain that may break the rules of the ring or lie outside of memory.
            let queue = input.queue();
            let buffers = [(); 2].map(|()| Buffer {
                at: BASE + (u64::from(input.u16()) << 12),
                len: u32::from(input.u16()),
                writable: input.u8() & 1 == 0,
            });
            if h.driver(queue).add_buffers(&buffers).is_some() {
                h.kick(queue)?;
            }
        }
        6 => h.kick(input.queue())?,
        7 => {
            h.poll(Duration::ZERO)?;
        }
        8 => {
            let len = usize::from(input.u8());
            let bytes = input.bytes(len);
            // A full pipe would wait for a device that does not read.
            if let Some(w) = &mut host.stdin
                && rustix::io::ioctl_fionread(&*w).unwrap_or(0) < 10_000
            {
                w.write_all(bytes).unwrap();
            }
        }
        9 => {
            let mut got = [0; 4096];
            if let Some(r) = &host.stdout
                && rustix::io::ioctl_fionread(r).is_ok_and(|n| n > 0)
            {
                rustix::io::read(r, &mut got).unwrap();
            }
        }
        10 => {
            let bytes = input.bytes(16);
            if let Some(s) = &host.socket {
                let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
                let _ = rustix::net::send(s, bytes, flags);
            }
        }
        11 => match input.u8() % 8 {
            0 => host.stdin = None,
            1 => host.stdout = None,
            2 => host.socket = None,
            3 => h.restart()?,
            4 => h.drain()?,
            _ => host.handle.refresh(),
        },
        12 => {
            let (port, cols, rows) = (input.u8(), input.u16(), input.u16());
            assert_eq!(host.handle.resize(port.into(), cols, rows), port == 0);
        }
        _ => {
            // The handshake, so that the input need not find it by chance.
            let port = input.u8() % PORTS as u8;
            for (id, event) in [(0, 0u8), (port, 3), (port, 6)] {
                for queue in [CONTROL_RX, queues(port.into()).0] {
                    if h.driver(queue).add(&[], &[512]).is_some() {
                        h.kick(queue)?;
                    }
                }
                if h.driver(CONTROL_TX).add(&[&[id, 0, 0, 0, event, 0, 1, 0]], &[]).is_some() {
                    h.kick(CONTROL_TX)?;
                    collect(h, CONTROL_TX);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn whatever_the_driver_does(data in proptest::collection::vec(any::<u8>(), 0..1500)) {
            super::fuzz_one(&data);
        }
    }
}
