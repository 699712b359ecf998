//! Body of the fuzz target: a guest and programs of the host that do whatever the input says. Panics when a promise is
//! broken.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use krun_virtio::DeviceError;
use krun_virtio::mock::Harness;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, accept_with, socket_with};

use super::packet::{Header, SEQPACKET, STREAM, op};
use super::{Direction, PortSpec, SocketType, Vsock, VsockSpec};

const RX: usize = 0;
const TX: usize = 1;
const TO_HOST: u32 = 1;
const TO_GUEST: u32 = 2;

fn packet_socket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, rustix::net::SocketType::SEQPACKET, flags, None).unwrap()
}

fn dial_packets(path: &Path) -> Option<OwnedFd> {
    let socket = packet_socket();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).ok()?).ok().map(|()| socket)
}

/// A directory that goes away with the value.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("krun-vsock-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Takes values off the front of the input; zero when it is used up.
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

    /// One of a few likely values, or a small one.
    fn value(&mut self, likely: [u32; 4]) -> u32 {
        let b = self.u8();
        likely.get(usize::from(b)).copied().unwrap_or(u32::from(b))
    }
}

struct World {
    h: Harness,
    listener: UnixListener,
    packets: OwnedFd,
    /// Of both types: what is done with them is the same.
    streams: Vec<UnixStream>,
    /// Port of the device's last connection to the guest.
    called: u32,
    dir: Dir,
}

impl World {
    fn new() -> Self {
        let dir = Dir::new();
        let port = |port, name: &str, direction| PortSpec {
            port,
            path: dir.0.join(name),
            direction,
            socket: SocketType::Stream,
        };
        let ports = vec![
            port(TO_HOST, "host", Direction::FromGuest),
            port(TO_HOST + 9, "nobody", Direction::FromGuest),
            port(TO_HOST + 1, "packets", Direction::FromGuest),
            port(TO_GUEST, "guest", Direction::FromHost),
            PortSpec {
                socket: SocketType::SeqPacket,
                ..port(TO_GUEST + 1, "guest-packets", Direction::FromHost)
            },
        ];
        let packets = packet_socket();
        rustix::net::bind(&packets, &SocketAddrUnix::new(dir.0.join("packets")).unwrap()).unwrap();
        rustix::net::listen(&packets, 64).unwrap();
        let listener = UnixListener::bind(dir.0.join("host")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let device = Vsock::new(VsockSpec { ports, max_connections: 5, ..VsockSpec::default() }).unwrap();
        Self { h: Harness::new(device), listener, packets, streams: Vec::new(), called: 0, dir }
    }

    /// A packet that is nearly right.
    fn packet(&mut self, input: &mut Input<'_>) -> Result<(), DeviceError> {
        let data = input.u8();
        let header = Header {
            src_cid: u64::from(input.value([3, 3, 3, 4])),
            dst_cid: u64::from(input.value([2, 2, 2, 3])),
            src_port: input.value([5, 6, TO_GUEST, TO_GUEST + 1]),
            dst_port: input.value([TO_HOST, TO_HOST + 1, self.called, u32::MAX]),
            len: match input.value([0, 0, 1, u32::MAX]) {
                0 => u32::from(data),
                other => other,
            },
            kind: input.value([1, 2, 2, 3]) as u16,
            op: u16::from(input.u8() % 10),
            flags: input.value([0, 1, 2, 3]),
            buf_alloc: input.value([1 << 18, 0, 100, u32::MAX]),
            fwd_cnt: input.value([0, 0, 1, u32::MAX]),
        };
        // Now and then so much that the socket does not take it.
        let data = vec![data; usize::from(data) * if data & 1 == 0 { 1 } else { 400 }];
        let header = if header.len == u32::from(input.u8()) || data.len() < 256 {
            header
        } else {
            Header { len: data.len() as u32, ..header }
        };
        let bytes = header.to_bytes();
        let out: &[&[u8]] = if data.is_empty() { &[&bytes] } else { &[&bytes, &data] };
        self.h.add(TX, out, &[]);
        self.h.kick(TX)
    }

    fn host(&mut self, what: u8, which: u8) {
        if what < 2 {
            let new = match (what, which & 1) {
                (0, 0) => self.listener.accept().ok().map(|a| a.0),
                (0, _) => accept_with(&self.packets, SocketFlags::CLOEXEC).ok().map(UnixStream::from),
                (_, 0) => UnixStream::connect(self.dir.0.join("guest")).ok(),
                _ => dial_packets(&self.dir.0.join("guest-packets")).map(UnixStream::from),
            };
            self.streams.extend(new.inspect(|s| s.set_nonblocking(true).unwrap()));
            return;
        }
        if self.streams.is_empty() {
            return;
        }
        let at = usize::from(which) % self.streams.len();
        let stream = &mut self.streams[at];
        // Whatever comes of it.
        match what {
            2 => drop(stream.write(&vec![which; usize::from(which) * 100])),
            3 => drop(stream.read(&mut vec![0; usize::from(which) * 1000])),
            4 => drop(stream.shutdown(if which & 1 == 0 { Shutdown::Read } else { Shutdown::Write })),
            _ => drop(self.streams.swap_remove(at)),
        }
    }

    fn step(&mut self, input: &mut Input<'_>) -> Result<(), DeviceError> {
        match input.u8() % 16 {
            0..=6 => self.packet(input),
            7 => {
                let len = usize::from(input.u8() % 60) + 1;
                let mut bytes = input.bytes(len).to_vec();
                bytes.push(0);
                self.h.add(TX, &[&bytes], &[]);
                self.h.kick(TX)
            }
            8 | 9 => {
                let (count, room) = (input.u8() % 8, u32::from(input.u8()));
                for _ in 0..count {
                    // Too small only on request.
                    let room = if room < 8 { room + 40 } else { room + 60 };
                    if self.h.driver(RX).add(&[], &[room]).is_none() {
                        break;
                    }
                }
                self.h.kick(RX)
            }
            10 => self.h.restart(),
            what => {
                self.host(what - 11 + input.u8() % 2, input.u8());
                Ok(())
            }
        }
    }

    /// Lets the device work until it waits for somebody.
    fn settle(&mut self) -> Result<(), DeviceError> {
        for _ in 0..10_000 {
            let events = self.h.poll(Duration::ZERO)?;
            while let Some(used) = self.h.collect(RX) {
                let (header, data) = Header::split(&used.data);
                assert_eq!(header.len as usize, data.len());
                assert!((op::REQUEST..=op::CREDIT_UPDATE).contains(&header.op));
                assert!([STREAM, SEQPACKET].contains(&header.kind) || header.op == op::RST);
                assert!(header.flags == 0 || [op::SHUTDOWN, op::RW].contains(&header.op));
                if header.op == op::REQUEST {
                    self.called = header.src_port;
                }
            }
            while self.h.collect(TX).is_some() {}
            assert_eq!(self.h.held(TX), 0, "a packet of the guest is kept");
            if events == 0 {
                return Ok(());
            }
        }
        panic!("the device is busy without an end");
    }
}

/// One input.
pub fn fuzz_one(data: &[u8]) {
    let (mut world, mut input) = (World::new(), Input(data));
    for _ in 0..100 {
        if input.0.is_empty() {
            break;
        }
        match world.step(&mut input).and_then(|()| world.settle()) {
            Ok(()) => {}
            Err(DeviceError::Driver(_)) => return,
            Err(e) => panic!("a valid ring and a sound host, but {e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn promises_hold(data in prop::collection::vec(any::<u8>(), 0..600)) {
            super::fuzz_one(&data);
        }
    }
}
