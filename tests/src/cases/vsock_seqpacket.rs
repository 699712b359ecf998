//! Sockets that keep messages apart (`SOCK_SEQPACKET`) between the guest and the host, with the guest kernel's own vsock.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::Duration;

use krun::Vsock;
use rustix::net::sockopt::{Timeout, set_socket_send_buffer_size, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept, bind,
    connect, listen, recv, send, shutdown, socket_with,
};

use crate::harness::{Case, Env, Failure, TempDir, no_guest, same, start};

pub const CASE: Case = Case { name: "vsock_seqpacket", host, guest: no_guest };

const PACKETS: u32 = 5000;
const STREAM: u32 = 5001;
const TO_GUEST: u32 = 6000;
/// Longest message that a connection takes when there are few.
const LONGEST: usize = 256 << 10;

const SCRIPT: &str = r#"
import errno, socket, sys, threading
def dial(port, kind=socket.SOCK_SEQPACKET):
    s = socket.socket(socket.AF_VSOCK, kind)
    s.connect((2, port))
    return s
for port, kind in (5001, socket.SOCK_SEQPACKET), (5000, socket.SOCK_STREAM):
    try:
        dial(port, kind)
        sys.exit(f"port {port} was not refused")
    except ConnectionResetError:
        pass
s = dial(5000)
for size in 1, 100, 5000, 65536, 200000, 262144:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert s.send(data) == size, size
    answer = s.recv(1 << 20)
    assert answer == data[::-1], (size, len(answer))
try:
    s.send(bytes(262145))
    sys.exit("a message was too long, and was sent")
except OSError as e:
    assert e.errno == errno.EMSGSIZE, e
sizes = [1 + n * 7919 % 3000 for n in range(2000)]
def talk():
    for n, size in enumerate(sizes):
        s.send(bytes([n % 251]) * size)
talker = threading.Thread(target=talk)
talker.start()
for n, size in enumerate(sizes):
    answer = s.recv(1 << 16)
    assert answer == bytes([n % 251]) * size, (n, size, len(answer))
talker.join()
s.sendmsg([b"end", b" of record"], [], socket.MSG_EOR)
# What does not fit is lost, and no more than that.
answer, _, flags, _ = s.recvmsg(3)
assert answer == b"dro" and flags & socket.MSG_TRUNC, (answer, flags)
s.send(b"x")
assert s.recv(9) == b"x"
s.shutdown(socket.SHUT_WR)
assert s.recv(9) == b"bye"
assert s.recv(9) == b""
s.close()
listener = socket.socket(socket.AF_VSOCK, socket.SOCK_SEQPACKET)
listener.bind((socket.VMADDR_CID_ANY, 6000))
listener.listen()
print("listening", flush=True)
s, peer = listener.accept()
assert peer[0] == 2, peer
while question := s.recv(1 << 16):
    s.send(question + b" yourself")
s.close()
s = dial(5000)
s.send(b"last")
s.send(b"words")
"#;

/// A program's end. Messages may be as long as the device takes them, and nothing waits for ever.
struct Packets(OwnedFd);

impl Packets {
    fn new(socket: OwnedFd) -> Result<Self, Failure> {
        set_socket_send_buffer_size(&socket, LONGEST)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(120)))?;
        Ok(Self(socket))
    }

    fn dial(path: &Path) -> Result<Self, Failure> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Self::new(socket)
    }

    fn send(&self, message: &[u8]) -> Result<(), Failure> {
        let sent = send(&self.0, message, SendFlags::NOSIGNAL)?;
        same("bytes of a message that were sent", sent, message.len())
    }

    /// Empty at the end.
    fn recv(&self) -> Result<Vec<u8>, Failure> {
        let mut buffer = vec![0; 1 << 20];
        let (len, _) = recv(&self.0, &mut buffer[..], RecvFlags::empty())?;
        buffer.truncate(len);
        Ok(buffer)
    }
}

/// Messages of many lengths there and back, boundaries kept; refusals of the other type; half-close; both directions of
/// connecting.
fn host(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("vsock-seqpacket")?;
    let at = |name: &str| dir.path().join(name);
    let mut config = env.program("python3", ["-c", SCRIPT]);
    let ports = Vsock::default().connect(PACKETS, at("packets")).connect(STREAM, at("stream"));
    config.vsock = Some(ports.listen_seqpacket(TO_GUEST, at("guest")));
    let _stream = UnixListener::bind(at("stream"))?;
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    bind(&listener, &SocketAddrUnix::new(at("packets"))?)?;
    listen(&listener, 8)?;
    let captured = start(config)?;
    let s = Packets::new(accept(&listener)?)?;
    for _ in 0..6 {
        let mut message = s.recv()?;
        message.reverse();
        s.send(&message)?;
    }
    for _ in 0..2000 {
        s.send(&s.recv()?)?;
    }
    let mut message = s.recv()?;
    same("a record's end", message.as_slice(), b"end of record")?;
    message.reverse();
    s.send(&message)?;
    s.send(&s.recv()?)?;
    same("the guest ended", s.recv()?, vec![])?;
    s.send(b"bye")?;
    shutdown(&s.0, Shutdown::Write)?;
    drop(s);
    captured.wait_for_output("listening")?;
    same("a stream is refused here", std::os::unix::net::UnixStream::connect(at("guest")).is_err(), true)?;
    let s = Packets::dial(&at("guest"))?;
    // Two at once, which stay two.
    s.send(b"one")?;
    s.send(b"two")?;
    same("an answer", s.recv()?.as_slice(), b"one yourself")?;
    same("another", s.recv()?.as_slice(), b"two yourself")?;
    shutdown(&s.0, Shutdown::Write)?;
    same("the end", s.recv()?, vec![])?;
    // Written just before the end of the machine.
    let s = Packets::new(accept(&listener)?)?;
    let reader = thread::spawn(move || (s.recv().ok(), s.recv().ok(), s.recv().ok()));
    captured.finish()?.success()?;
    let got = reader.join().map_err(|_| Failure::Wrong("the reader panicked".into()))?;
    let wanted = [&b"last"[..], b"words", b""].map(|m| Some(m.to_vec()));
    same("what the guest sent at its end", [got.0, got.1, got.2], wanted)?;
    same("the socket is left", at("guest").exists(), false)
}
