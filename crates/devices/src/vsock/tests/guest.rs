//! The guest and the host around a device.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use krun_virtio::DeviceError;
use krun_virtio::mock::Harness;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, accept_with, socket_with,
};
use tempfile::TempDir;

use crate::vsock::device::Patience;
use crate::vsock::packet::{END_OF_MESSAGE, HOST_CID, Header, SEQPACKET, STREAM, op};
use crate::vsock::{Direction, PortSpec, SocketType, Vsock, VsockHandle, VsockSpec};

pub const RX: usize = 0;
pub const TX: usize = 1;
/// Port of the host that leads to the program's listener, and port of the guest to which programs connect.
pub const TO_HOST: u32 = 1000;
pub const TO_GUEST: u32 = 2000;
/// Port of the host that leads nowhere.
pub const NOBODY: u32 = 1009;
/// The same for sockets that keep messages apart.
pub const PACKETS_TO_HOST: u32 = 1001;
pub const PACKETS_TO_GUEST: u32 = 2001;
/// Room that the guest says it has.
pub const ROOM: u32 = 16 << 10;
/// The guest's buffers.
pub const BUFFER: u32 = 1024;

/// A device, a guest's driver, and the paths of two sockets.
pub struct Guest {
    pub h: Harness,
    pub handle: VsockHandle,
    /// Buffers that the device has.
    pub posted: usize,
    /// The program's listener.
    pub listener: UnixListener,
    /// Another's, for messages.
    packets: OwnedFd,
    dir: TempDir,
}

pub fn spec(dir: &TempDir) -> VsockSpec {
    let port = |port, name: &str, direction| PortSpec {
        port,
        path: dir.path().join(name),
        direction,
        socket: SocketType::Stream,
    };
    let packets = |spec| PortSpec { socket: SocketType::SeqPacket, ..spec };
    let ports = vec![
        port(TO_HOST, "host", Direction::FromGuest),
        port(PACKETS_TO_HOST, "packets", Direction::FromGuest),
        port(NOBODY, "nobody", Direction::FromGuest),
        port(TO_GUEST, "guest", Direction::FromHost),
        packets(port(PACKETS_TO_GUEST, "guest-packets", Direction::FromHost)),
    ];
    VsockSpec { ports, ..VsockSpec::default() }
}

impl Guest {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut VsockSpec)) -> Self {
        Self::build(change, |_| {}, u64::MAX)
    }

    /// Whose driver knows only the features in `wanted`.
    pub fn with_features(wanted: u64) -> Self {
        Self::build(|_| {}, |_| {}, wanted)
    }

    /// Whose end does not take as long as that of others.
    pub fn with_patience(idle: Duration, all: Duration) -> Self {
        Self::build(|_| {}, |device| device.patience = Patience { idle, all }, u64::MAX)
    }

    fn build(change: impl FnOnce(&mut VsockSpec), adjust: impl FnOnce(&mut Vsock), wanted: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec(&dir);
        change(&mut spec);
        let listener = UnixListener::bind(dir.path().join("host")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let packets = packet_socket();
        let address = SocketAddrUnix::new(dir.path().join("packets")).unwrap();
        rustix::net::bind(&packets, &address).unwrap();
        rustix::net::listen(&packets, 64).unwrap();
        let mut device = Vsock::new(spec).unwrap();
        adjust(&mut device);
        let handle = device.handle();
        let h = Harness::with_features(device, wanted).unwrap();
        let mut this = Self { h, handle, posted: 0, listener, packets, dir };
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

fn packet_socket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, rustix::net::SocketType::SEQPACKET, flags, None).unwrap()
}

/// A program's end of a connection that keeps messages apart.
pub struct Packets(pub OwnedFd);

impl Packets {
    /// Whether there was room for it.
    pub fn send(&self, message: &[u8]) -> bool {
        match rustix::net::send(&self.0, message, SendFlags::NOSIGNAL) {
            Ok(n) => {
                assert_eq!(n, message.len());
                true
            }
            Err(Errno::AGAIN) => false,
            Err(e) => panic!("{e}"),
        }
    }

    /// The next message, which is empty at the end too; `None` when there is none.
    pub fn recv(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 1 << 20];
        match rustix::net::recv(&self.0, &mut buffer[..], RecvFlags::empty()) {
            Ok((n, _)) => {
                buffer.truncate(n);
                Some(buffer)
            }
            Err(Errno::AGAIN) => None,
            Err(Errno::CONNRESET) => self.recv(),
            Err(e) => panic!("{e}"),
        }
    }
}

impl Guest {
    /// As [`Guest::connect`], to the listener for messages.
    pub fn connect_packets(&mut self, port: u32) -> Packets {
        self.send(as_packets(guest(PACKETS_TO_HOST, port, op::REQUEST)), &[]);
        let (header, _) = self.packet();
        assert_eq!((header.op, header.kind, header.dst_port), (op::RESPONSE, SEQPACKET, port));
        self.accept_packets()
    }

    pub fn accept_packets(&mut self) -> Packets {
        Packets(accept_with(&self.packets, SocketFlags::NONBLOCK).unwrap())
    }

    /// As [`Guest::call`].
    pub fn call_packets(&mut self) -> (u32, Packets) {
        let socket = self.dial_packets();
        let (header, _) = self.packet();
        assert_eq!((header.op, header.kind, header.dst_port), (op::REQUEST, SEQPACKET, PACKETS_TO_GUEST));
        self.send(as_packets(guest(header.src_port, PACKETS_TO_GUEST, op::RESPONSE)), &[]);
        (header.src_port, socket)
    }

    pub fn dial_packets(&self) -> Packets {
        let socket = packet_socket();
        let address = SocketAddrUnix::new(self.path("guest-packets")).unwrap();
        rustix::net::connect(&socket, &address).unwrap();
        Packets(socket)
    }
}

/// The same packet of a connection that keeps messages apart.
pub fn as_packets(header: Header) -> Header {
    Header { kind: SEQPACKET, ..header }
}

/// A part of a message, its last one or not.
pub fn part(host_port: u32, guest_port: u32, len: usize, is_end: bool) -> Header {
    let flags = if is_end { END_OF_MESSAGE } else { 0 };
    Header { flags, ..as_packets(data(host_port, guest_port, len)) }
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
