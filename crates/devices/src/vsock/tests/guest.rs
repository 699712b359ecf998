//! The guest and the host around a device.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use krun_virtio::DeviceError;
use krun_virtio::mock::Harness;
use tempfile::TempDir;

use crate::vsock::packet::{HOST_CID, Header, STREAM, op};
use crate::vsock::{Direction, PortSpec, Vsock, VsockSpec};

pub const RX: usize = 0;
pub const TX: usize = 1;
/// Port of the host that leads to the program's listener, and port of the guest to which programs connect.
pub const TO_HOST: u32 = 1000;
pub const TO_GUEST: u32 = 2000;
/// Room that the guest says it has.
pub const ROOM: u32 = 16 << 10;
/// The guest's buffers.
pub const BUFFER: u32 = 1024;

/// A device, a guest's driver, and the paths of two sockets.
pub struct Guest {
    pub h: Harness,
    /// Buffers that the device has.
    pub posted: usize,
    /// The program's listener.
    pub listener: UnixListener,
    dir: TempDir,
}

pub fn spec(dir: &TempDir) -> VsockSpec {
    let port = |port, name: &str, direction| PortSpec { port, path: dir.path().join(name), direction };
    let ports = vec![
        port(TO_HOST, "host", Direction::FromGuest),
        port(TO_HOST + 1, "nobody", Direction::FromGuest),
        port(TO_GUEST, "guest", Direction::FromHost),
    ];
    VsockSpec { ports, ..VsockSpec::default() }
}

impl Guest {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut VsockSpec)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec(&dir);
        change(&mut spec);
        let listener = UnixListener::bind(dir.path().join("host")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut this = Self { h: Harness::new(Vsock::new(spec).unwrap()), posted: 0, listener, dir };
        this.post(64);
        this
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Gives the device `n` buffers.
    pub fn post(&mut self, n: usize) {
        for _ in 0..n {
            self.h.add(RX, &[], &[BUFFER]);
        }
        self.posted += n;
        self.h.kick(RX).unwrap();
    }

    /// Sends a packet, whatever it says.
    pub fn try_send(&mut self, header: Header, data: &[u8]) -> Result<(), DeviceError> {
        let bytes = header.to_bytes();
        let out: &[&[u8]] = if data.is_empty() { &[&bytes] } else { &[&bytes, data] };
        self.h.request(TX, out, &[]).map(|_| ())
    }

    pub fn send(&mut self, header: Header, data: &[u8]) {
        self.try_send(header, data).unwrap();
    }

    /// Lets the device work until it waits.
    pub fn settle(&mut self) {
        let rounds = (0..1000).take_while(|_| self.h.poll(Duration::ZERO).unwrap() > 0).count();
        assert!(rounds < 1000, "the device is busy without an end");
    }

    /// Packets that came, in order; their buffers are given back.
    pub fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut out = Vec::new();
        loop {
            self.settle();
            let before = out.len();
            while let Some(used) = self.h.collect(RX) {
                let (header, data) = Header::split(&used.data);
                assert_eq!((header.dst_cid, header.len as usize), (3, data.len()));
                out.push((header, data.to_vec()));
            }
            if out.len() == before {
                return out;
            }
            self.post(out.len() - before);
            self.posted -= out.len() - before;
        }
    }

    /// The one packet that came.
    pub fn packet(&mut self) -> (Header, Vec<u8>) {
        let mut packets = self.packets();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    pub fn nothing(&mut self) {
        assert_eq!(self.packets(), []);
    }

    /// Connects from the guest: its port, and the program's end.
    pub fn connect(&mut self, port: u32) -> UnixStream {
        self.send(guest(TO_HOST, port, op::REQUEST), &[]);
        let (header, _) = self.packet();
        assert_eq!((header.op, header.src_port, header.dst_port), (op::RESPONSE, TO_HOST, port));
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// Connects from the host: the device's port, and the program's end.
    pub fn call(&mut self) -> (u32, UnixStream) {
        let stream = UnixStream::connect(self.path("guest")).unwrap();
        stream.set_nonblocking(true).unwrap();
        let (header, _) = self.packet();
        assert_eq!((header.op, header.dst_port), (op::REQUEST, TO_GUEST));
        self.send(guest(header.src_port, TO_GUEST, op::RESPONSE), &[]);
        (header.src_port, stream)
    }
}

/// A packet of the guest's, with [`ROOM`].
pub fn guest(host_port: u32, guest_port: u32, op: u16) -> Header {
    Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: STREAM,
        op,
        buf_alloc: ROOM,
        ..Header::default()
    }
}

pub fn data(host_port: u32, guest_port: u32, len: usize) -> Header {
    Header { len: len as u32, ..guest(host_port, guest_port, op::RW) }
}

pub fn shutdown(host_port: u32, guest_port: u32, flags: u32) -> Header {
    Header { flags, ..guest(host_port, guest_port, op::SHUTDOWN) }
}

/// What a program can read now; `None` behind it at the end of the stream.
pub fn read(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    let (mut out, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return (out, true),
            Ok(n) => out.extend(&chunk[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return (out, false),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
            Err(e) => panic!("{e}"),
        }
    }
}

/// Writes until the socket is full; how many bytes that took.
pub fn fill(stream: &mut UnixStream) -> usize {
    let mut total = 0;
    loop {
        match stream.write(&[7; 4096]) {
            Ok(n) => total += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return total,
            Err(e) => panic!("{e}"),
        }
    }
}
