//! Sockets between the guest and the host, with the guest kernel's own vsock and Python's sockets on it.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use krun::{VmConfig, Vsock};

use crate::harness::{Captured, Case, Env, Failure, TempDir, no_guest, noise, same, start};

pub const CASE: Case = Case { name: "vsock", host, guest: no_guest };
pub const MANY: Case = Case { name: "vsock_many", host: many, guest: no_guest };
pub const BULK: Case = Case { name: "vsock_bulk", host: bulk, guest: no_guest };
pub const STUCK: Case = Case { name: "vsock_stuck", host: stuck, guest: no_guest };
pub const KILLED: Case = Case { name: "vsock_killed", host: killed, guest: no_guest };

/// Ports: of the host with a program, of the host without one, of the guest with a program, of the guest without one.
const TO_HOST: u32 = 5000;
const NOBODY: u32 = 5001;
const TO_GUEST: u32 = 6000;
const DEAF: u32 = 6001;

/// What all guest halves begin with.
const COMMON: &str = r#"
import errno, os, resource, select, socket, sys, threading
def dial(port):
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.connect((2, port))
    return s
def serve(port):
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.bind((socket.VMADDR_CID_ANY, port))
    s.listen(4096)
    return s
def everything(s):
    parts = []
    while part := s.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)
def say(text):
    print(text, flush=True)
"#;

/// A guest with a script, and a directory with its sockets.
struct Setup {
    dir: TempDir,
    config: VmConfig,
}

impl Setup {
    fn new(env: &Env, name: &str, script: &str) -> Result<Self, Failure> {
        let dir = TempDir::new(name)?;
        let mut config = env.program("python3", ["-c".to_owned(), format!("{COMMON}{script}")]);
        let at = |name: &str| dir.path().join(name);
        let ports = Vsock::default().connect(TO_HOST, at("host")).connect(NOBODY, at("nobody"));
        config.vsock = Some(ports.listen(TO_GUEST, at("guest")).listen(DEAF, at("deaf")));
        Ok(Self { dir, config })
    }

    fn listen(&self) -> Result<UnixListener, Failure> {
        Ok(UnixListener::bind(self.dir.path().join("host"))?)
    }

    /// Starts the guest; its sockets stay where the directory is.
    fn start(self) -> Result<(TempDir, Captured), Failure> {
        Ok((self.dir, start(self.config)?))
    }
}

fn dial(dir: &TempDir, name: &str) -> Result<UnixStream, Failure> {
    let stream = UnixStream::connect(dir.path().join(name))?;
    // A test that hangs says nothing.
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    Ok(stream)
}

fn everything(mut stream: &UnixStream) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Lets the guest go on.
fn tell(captured: &mut Captured, line: &str) -> Result<(), Failure> {
    let stdin = captured.stdin.as_mut().ok_or_else(|| Failure::Wrong("no standard input".into()))?;
    Ok(writeln!(stdin, "{line}")?)
}

const ECHO: &str = r#"
for port in 5001, 5999:
    try:
        dial(port)
        sys.exit(f"port {port} was not refused")
    except ConnectionResetError:
        pass
s = dial(5000)
data = bytes(range(256)) * 2000
s.sendall(data)
s.shutdown(socket.SHUT_WR)
answer = everything(s)
assert answer == data[::-1], len(answer)
s.close()
listener = serve(6000)
say("listening")
s, peer = listener.accept()
assert peer[0] == 2, peer
question = everything(s)
s.sendall(question + b" yourself")
s.close()
s, _ = listener.accept()
s.shutdown(socket.SHUT_RD)
say("deaf")
s.sendall(b"I can only talk")
s.close()
s = dial(5000)
s.sendall(b"last words")
"#;

/// Echoes both ways, each with one direction ending before the other; refusals both ways.
fn host(env: &Env) -> Result<(), Failure> {
    let setup = Setup::new(env, "vsock", ECHO)?;
    let listener = setup.listen()?;
    // A socket that a program left behind gives way.
    drop(UnixListener::bind(setup.dir.path().join("guest"))?);
    let (dir, captured) = setup.start()?;
    let (stream, _) = listener.accept()?;
    let mut data = everything(&stream)?;
    data.reverse();
    (&stream).write_all(&data)?;
    drop(stream);
    captured.wait_for_output("listening")?;
    same("nobody listens in the guest", everything(&dial(&dir, "deaf")?)?, vec![])?;
    let mut stream = dial(&dir, "guest")?;
    stream.write_all(b"hello")?;
    stream.shutdown(Shutdown::Write)?;
    same("the guest's echo", everything(&stream)?.as_slice(), b"hello yourself")?;
    let mut stream = dial(&dir, "guest")?;
    captured.wait_for_output("deaf")?;
    same("what a deaf guest says", everything(&stream)?.as_slice(), b"I can only talk")?;
    same("writing to it fails", stream.write_all(b"x").is_err(), true)?;
    // Written just before the end of the machine.
    let (stream, _) = listener.accept()?;
    captured.finish()?.success()?;
    same("what the guest sent at its end", everything(&stream)?.as_slice(), b"last words")?;
    let left = ["guest", "deaf"].iter().any(|name| dir.path().join(name).exists());
    same("sockets are left", left, false)
}

const CONNECTIONS: u32 = 1500;

const MANY_SCRIPT: &str = r#"
resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
count = int(input())
listener = serve(6000)
out = [dial(5000) for n in range(count)]
for n, s in enumerate(out):
    s.sendall(n.to_bytes(4, "little"))
for n, s in enumerate(out):
    got = s.recv(4, socket.MSG_WAITALL)
    assert got == (n ^ 0xffffffff).to_bytes(4, "little"), (n, got)
say("connected")
back = [listener.accept()[0] for n in range(count)]
for s in back:
    s.sendall(s.recv(4, socket.MSG_WAITALL)[::-1])
say("answered")
sys.stdin.readline()
"#;

/// Many connections at once, both ways.
fn many(env: &Env) -> Result<(), Failure> {
    let setup = Setup::new(env, "vsock-many", MANY_SCRIPT)?;
    let listener = setup.listen()?;
    let (dir, mut captured) = setup.start()?;
    tell(&mut captured, &CONNECTIONS.to_string())?;
    let mut streams = Vec::new();
    for _ in 0..CONNECTIONS {
        streams.push(listener.accept()?.0);
    }
    for mut stream in &streams {
        let mut number = [0; 4];
        stream.read_exact(&mut number)?;
        stream.write_all(&number.map(|b| !b))?;
    }
    captured.wait_for_output("connected")?;
    let mut calls = Vec::new();
    for n in 0..CONNECTIONS {
        let mut stream = dial(&dir, "guest")?;
        stream.write_all(&n.to_le_bytes())?;
        calls.push((n, stream));
    }
    for (n, stream) in &mut calls {
        let mut number = [0; 4];
        stream.read_exact(&mut number)?;
        same("number", u32::from_be_bytes(number), *n)?;
    }
    captured.wait_for_output("answered")?;
    captured.finish()?.success().map(|_| ())
}

/// MiB that go through the guest; `KRUN_TEST_BULK_MIB` makes it more.
fn bulk_mib() -> usize {
    std::env::var("KRUN_TEST_BULK_MIB").ok().and_then(|v| v.parse().ok()).unwrap_or(64)
}

const BULK_SCRIPT: &str = r#"
s, t = dial(5000), dial(5000)
def copy(a, b):
    buffer = memoryview(bytearray(1 << 18))
    while n := a.recv_into(buffer):
        b.sendall(buffer[:n])
    b.shutdown(socket.SHUT_WR)
other = threading.Thread(target=copy, args=(t, t))
other.start()
copy(s, s)
other.join()
"#;

/// Two connections full in both directions at once, compared.
fn bulk(env: &Env) -> Result<(), Failure> {
    let setup = Setup::new(env, "vsock-bulk", BULK_SCRIPT)?;
    let listener = setup.listen()?;
    let (_dir, captured) = setup.start()?;
    let echo = |stream: UnixStream, seed: u64| {
        move || -> Result<(usize, bool), String> {
            let data = noise(bulk_mib() << 19, seed);
            let (mut writer, input) = (stream.try_clone().map_err(|e| e.to_string())?, data.clone());
            let feeder = thread::spawn(move || {
                writer.write_all(&input).and_then(|()| writer.shutdown(Shutdown::Write))
            });
            let mut back = Vec::new();
            (&stream).read_to_end(&mut back).map_err(|e| e.to_string())?;
            feeder.join().map_err(|_| "the writer panicked")?.map_err(|e| e.to_string())?;
            Ok((back.len(), back == data))
        }
    };
    let threads = [3, 4].map(|seed| listener.accept().map(|(s, _)| thread::spawn(echo(s, seed))));
    for thread in threads {
        let result = thread?.join().map_err(|_| Failure::Wrong("a thread panicked".into()))?;
        same("length, and whether it is identical", result?, (bulk_mib() << 19, true))?;
    }
    captured.finish()?.success().map(|_| ())
}

const STUCK_SCRIPT: &str = r#"
stuck, other = dial(5000), dial(5000)
stuck.setblocking(False)
sent = 0
# Full when nothing was taken for a while.
while select.select([], [stuck], [], 2)[1]:
    try:
        sent += stuck.send(b"x" * 65536)
    except BlockingIOError:
        pass
    assert sent < 8 << 20, "there is no end to it"
other.sendall(b"ping")
assert other.recv(4) == b"pong"
say(f"full {sent}.")
stuck.setblocking(True)
stuck.sendall(b"y" * 1000000)
stuck.close()
other.close()
"#;

/// A program of the host that does not read stops its own connection and no other; then everything arrives.
fn stuck(env: &Env) -> Result<(), Failure> {
    let setup = Setup::new(env, "vsock-stuck", STUCK_SCRIPT)?;
    let listener = setup.listen()?;
    let (_dir, captured) = setup.start()?;
    let ((stuck, _), (mut other, _)) = (listener.accept()?, listener.accept()?);
    let mut word = [0; 4];
    other.read_exact(&mut word)?;
    other.write_all(b"pong")?;
    captured.wait_for_output(".")?;
    let all = everything(&stuck)?;
    let output = captured.finish()?.success()?.out();
    let sent: usize = output.trim().trim_start_matches("full ").trim_end_matches('.').parse()?;
    let first = all.iter().take_while(|b| **b == b'x').count();
    same("bytes before it was stuck", first, sent)?;
    same("bytes after", all[first..].iter().filter(|b| **b == b'y').count(), 1_000_000)?;
    same("all bytes", all.len(), sent + 1_000_000)
}

const FULL_SCRIPT: &str = r#"
all = [dial(5000) for _ in range(20)]
for s in all:
    s.setblocking(False)
while ready := select.select([], all, [], 2)[1]:
    for s in ready:
        try:
            s.send(b"x" * 65536)
        except BlockingIOError:
            pass
drivers = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport/"
name = [n for n in os.listdir(drivers) if n.startswith("virtio")][0]
say("full")
with open(drivers + "unbind", "w") as f:
    f.write(name)
say("unbound")
"#;

/// A reset of the device waits ten seconds for programs that take something now and then, but not when the machine is killed
/// meanwhile.
fn killed(env: &Env) -> Result<(), Failure> {
    let setup = Setup::new(env, "vsock-killed", FULL_SCRIPT)?;
    let listener = setup.listen()?;
    let (_dir, captured) = setup.start()?;
    let streams: Vec<_> = (0..20).map(|_| listener.accept()).collect::<Result<_, _>>()?;
    captured.wait_for_output("full")?;
    let (end, ended) = channel::<()>();
    let reader = thread::spawn(move || -> std::io::Result<()> {
        for (mut stream, _) in streams {
            if ended.recv_timeout(Duration::from_millis(500)) != Err(RecvTimeoutError::Timeout) {
                break;
            }
            // All there is, so that there is room for what is held.
            stream.set_nonblocking(true)?;
            match std::io::copy(&mut stream, &mut std::io::sink()) {
                Err(e) if e.kind() != ErrorKind::WouldBlock => return Err(e),
                _ => {}
            }
        }
        Ok(())
    });
    thread::sleep(Duration::from_secs(2));
    same("whether the driver waits", captured.output_so_far().contains("unbound"), false)?;
    let start = Instant::now();
    captured.vm.kill();
    let result = captured.vm.wait();
    let took = start.elapsed();
    drop(end);
    reader.join().map_err(|_| Failure::Wrong("the reader panicked".into()))??;
    if took > Duration::from_secs(5) {
        return Err(Failure::Wrong(format!("the end took {took:?} after the kill: {result:?}")));
    }
    Ok(())
}
