//! Peers that do not take what the guest sends: for a while, for ever, or slowly; and many short connections.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use krun::{Net, NetPeer};

use super::peers::{PORT, SERVER_TEXT, reply, serve_dhcp};
use super::{Close, PATIENCE, arg, echo_servers, exchange, in_namespace, ip, ping};
use crate::harness::{Captured, Case, Env, Failure, TempDir, own_resources, same, start};

pub const SLOW: Case = Case { name: "net_slow", host: slow, guest: guest_slow };
pub const DOWN: Case = Case { name: "net_tap_down", host: down, guest: guest_down };
pub const SHORT: Case = Case { name: "net_short", host: short, guest: guest_short };

/// Bytes of a datagram that the guest sends, each with its number first; more than fit into sockets and queues.
const DATAGRAM: usize = 8000;
const DATAGRAMS: u32 = 3000;
/// Where they go. Nobody answers.
const SINK: u16 = 9;

/// What the peer does with the guest's frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Takes and answers them.
    Quick,
    /// The same, with a pause before each.
    Slow,
    /// Leaves them where they are.
    Stuck,
}

/// The peer's ends of a connection.
trait Wire: Send {
    /// The next frame; `None` when there is none for a moment.
    fn next(&mut self) -> Result<Option<Vec<u8>>, Failure>;
    fn put(&mut self, frame: &[u8]) -> Result<(), Failure>;
}

struct Datagrams(UnixDatagram);

impl Wire for Datagrams {
    fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        let mut bytes = vec![0; 70_000];
        let Ok((len, from)) = self.0.recv_from(&mut bytes) else { return Ok(None) };
        if let Some(path) = from.as_pathname() {
            self.0.connect(path)?;
        }
        bytes.truncate(len);
        Ok(Some(bytes))
    }

    fn put(&mut self, frame: &[u8]) -> Result<(), Failure> {
        Ok(self.0.send(frame).map(drop)?)
    }
}

struct Bytes(UnixStream);

impl Wire for Bytes {
    fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        let mut len = [0; 4];
        match self.0.read(&mut len[..1]) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(_) => return Ok(None),
        }
        // The rest of a frame that has begun comes.
        self.0.set_read_timeout(Some(PATIENCE))?;
        self.0.read_exact(&mut len[1..])?;
        let mut frame = vec![0; u32::from_be_bytes(len) as usize];
        self.0.read_exact(&mut frame)?;
        self.0.set_read_timeout(Some(MOMENT))?;
        Ok(Some(frame))
    }

    fn put(&mut self, frame: &[u8]) -> Result<(), Failure> {
        self.0.write_all(&(frame.len() as u32).to_be_bytes())?;
        Ok(self.0.write_all(frame)?)
    }
}

const MOMENT: Duration = Duration::from_millis(20);

struct Peer {
    mode: Mutex<Option<Mode>>,
    /// The number after that of the guest's last datagram for nobody, and how many there were.
    next: AtomicU32,
    count: AtomicU32,
}

impl Peer {
    fn mode(&self) -> Option<Mode> {
        *self.mode.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn set(&self, mode: Option<Mode>) {
        *self.mode.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = mode;
    }

    /// Serves until there is no mode. The guest's datagrams must come whole and in order.
    fn serve(&self, mut wire: impl Wire) -> Result<(), Failure> {
        while let Some(mode) = self.mode() {
            match mode {
                Mode::Stuck => {
                    thread::sleep(MOMENT);
                    continue;
                }
                Mode::Slow => thread::sleep(Duration::from_millis(1)),
                Mode::Quick => {}
            }
            let Some(frame) = wire.next()? else { continue };
            if let Some(answer) = reply(&frame) {
                wire.put(&answer)?;
            } else if frame.get(36..38) == Some(&SINK.to_be_bytes()) {
                let data = &frame[42..];
                let number = data.first_chunk().map_or(u32::MAX, |b| u32::from_be_bytes(*b));
                same("the frame's length", data.len(), DATAGRAM)?;
                same("the frame's end", data[4..].iter().all(|b| *b == number as u8), true)?;
                let next = self.next.swap(number + 1, Ordering::AcqRel);
                same("frames in order", number >= next, true)?;
                self.count.fetch_add(1, Ordering::AcqRel);
            }
        }
        Ok(())
    }
}

/// Sends many datagrams, then says so; then wants answers, or ends at once.
fn guest_slow(args: &[OsString]) -> Result<u8, String> {
    let text = |e: std::io::Error| e.to_string();
    ping((SERVER_TEXT, PORT), 100)?;
    println!("ready");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).map_err(text)?;
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(text)?;
    socket.set_nonblocking(true).map_err(text)?;
    socket.connect((SERVER_TEXT, SINK)).map_err(text)?;
    let mut refused = 0;
    for n in 0..DATAGRAMS {
        let mut bytes = vec![n as u8; DATAGRAM];
        bytes[..4].copy_from_slice(&n.to_be_bytes());
        refused += u32::from(socket.send(&bytes).is_err());
    }
    println!("refused {refused}\nsent");
    if arg::<String>(args, 0)? == "leaves" {
        return Ok(0);
    }
    line.clear();
    std::io::stdin().read_line(&mut line).map_err(text)?;
    for len in [1, 1400, 20_000] {
        ping((SERVER_TEXT, PORT), len)?;
    }
    Ok(0)
}

/// What the guest waits for.
fn go_on(captured: &mut Captured) -> Result<(), Failure> {
    match &mut captured.stdin {
        Some(stdin) => Ok(stdin.write_all(b"\n")?),
        None => Ok(()),
    }
}

/// One guest and its peer, with what they do.
fn one(
    env: &Env,
    net: NetPeer,
    ends: &str,
    wire: impl FnOnce() -> Result<Box<dyn Wire>, Failure> + Send,
) -> Result<(), Failure> {
    let mut config = env.guest_half("net_slow", [ends]);
    config.nets.push(Net::new(net, 1));
    let peer = Peer { mode: Mutex::new(Some(Mode::Quick)), next: 0.into(), count: 0.into() };
    thread::scope(|scope| {
        let server = scope.spawn(|| peer.serve(wire()?));
        let steps = || {
            let mut captured = start(config)?;
            let mut steps = || -> Result<(), Failure> {
                captured.wait_for_output("ready\n")?;
                peer.set(Some(Mode::Stuck));
                thread::sleep(MOMENT * 2);
                go_on(&mut captured)?;
                if ends == "leaves" {
                    // The machine ends though nobody takes its last words.
                    return Ok(());
                }
                captured.wait_for_output("sent\n")?;
                same(
                    "a sender is told that there is no room",
                    captured.output_so_far().contains("refused 0\n"),
                    false,
                )?;
                peer.set(Some(Mode::Slow));
                thread::sleep(Duration::from_secs(1));
                peer.set(Some(Mode::Quick));
                go_on(&mut captured)
            };
            let result = steps();
            let begin = Instant::now();
            captured.finish()?.success()?;
            same("the end comes soon", begin.elapsed() < PATIENCE, true)?;
            result
        };
        let result = steps();
        peer.set(None);
        server.join().map_err(|_| Failure::Wrong("the peer panicked".into()))??;
        result?;
        let count = peer.count.load(Ordering::Acquire);
        same(&format!("datagrams that arrived are some ({count})"), ends == "leaves" || count > 20, true)
    })
}

fn slow(env: &Env) -> Result<(), Failure> {
    for ends in ["leaves", "stays"] {
        let dir = TempDir::new("slow")?;
        let path = |name: &str| dir.path().join(name);
        let listener = UnixListener::bind(path("stream"))?;
        one(env, NetPeer::Stream(path("stream")), ends, || {
            let (stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(MOMENT))?;
            Ok(Box::new(Bytes(stream)))
        })?;
        let socket = UnixDatagram::bind(path("datagram"))?;
        socket.set_read_timeout(Some(MOMENT))?;
        let net = NetPeer::Datagram { path: path("datagram"), vfkit: false };
        one(env, net, ends, || Ok(Box::new(Datagrams(socket))))?;
    }
    Ok(())
}

impl Wire for Box<dyn Wire> {
    fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        (**self).next()
    }

    fn put(&mut self, frame: &[u8]) -> Result<(), Failure> {
        (**self).put(frame)
    }
}

fn tap() -> Result<(), Failure> {
    ip("tuntap add tap0 mode tap")?;
    ip(&format!("addr add {SERVER_TEXT}/24 dev tap0"))?;
    ip("link set tap0 up")?;
    serve_dhcp()
}

fn guest_down(args: &[OsString]) -> Result<u8, String> {
    let port = arg(args, 0)?;
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|e| e.to_string())?;
    socket.connect((SERVER_TEXT, port)).map_err(|e| e.to_string())?;
    for round in 0..3 {
        ping((SERVER_TEXT, port), 100)?;
        println!("round {round}");
        // Frames that the interface refuses meanwhile.
        for _ in 0..50 {
            let _ = socket.send(&[1; 1000]);
            thread::sleep(Duration::from_millis(10));
        }
    }
    let stream = TcpStream::connect((SERVER_TEXT, port)).map_err(|e| format!("connect: {e}"))?;
    exchange(&stream, 1 << 20, 1, Close::Early)?;
    Ok(0)
}

/// An interface that is set down and up again.
fn down(env: &Env) -> Result<(), Failure> {
    in_namespace(|| {
        tap()?;
        let port = echo_servers(SERVER_TEXT)?;
        let mut config = env.guest_half("net_tap_down", [port.to_string()]);
        config.nets.push(Net::new(NetPeer::Tap("tap0".into()), 1));
        let captured = start(config)?;
        let result = (0..3).try_for_each(|round| {
            captured.wait_for_output(&format!("round {round}\n"))?;
            ip("link set tap0 down")?;
            thread::sleep(Duration::from_millis(300));
            ip("link set tap0 up")
        });
        captured.finish()?.success()?;
        result
    })
}

/// Connections at the same time.
const AT_ONCE: u32 = 4;

fn guest_short(args: &[OsString]) -> Result<u8, String> {
    let (port, count): (u16, u32) = (arg(args, 0)?, arg(args, 1)?);
    let round = |count: u32| -> Result<(), String> {
        thread::scope(|scope| {
            let client = || {
                (0..count / AT_ONCE).try_for_each(|n| {
                    let text = |e: std::io::Error| format!("connection {n}: {e}");
                    let mut stream = TcpStream::connect((SERVER_TEXT, port)).map_err(text)?;
                    stream.set_read_timeout(Some(PATIENCE)).map_err(text)?;
                    let mut seen = Vec::new();
                    stream.write_all(b"hello").map_err(text)?;
                    // Its end comes first, so that no port of the guest stays taken.
                    stream.read_to_end(&mut seen).map_err(text)?;
                    if seen == b"hello" { Ok(()) } else { Err(format!("connection {n}: {seen:?}")) }
                })
            };
            let clients: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(client)).collect();
            clients.into_iter().try_for_each(|c| c.join().map_err(|_| "a client panicked".to_owned())?)
        })
    };
    for what in ["warm", "done"] {
        let start = Instant::now();
        round(count)?;
        println!("{what}");
        eprintln!("{count} connections in {} ms", start.elapsed().as_millis());
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).map_err(|e| e.to_string())?;
    }
    Ok(0)
}

/// Resident memory of this process but for guest RAM, which is the largest mapping.
fn resident_kib() -> Result<u64, Failure> {
    let text = std::fs::read_to_string("/proc/self/smaps")?;
    let field = |key: &str| {
        text.lines()
            .filter_map(|l| l.strip_prefix(key)?.trim().trim_end_matches(" kB").parse::<u64>().ok())
            .collect::<Vec<_>>()
    };
    let (sizes, resident) = (field("Size:"), field("Rss:"));
    let without_ram = sizes.iter().zip(&resident).filter(|(size, _)| **size < 32 << 10);
    Ok(without_ram.map(|(_, resident)| resident).sum())
}

/// Many short connections: none fails, and nothing of them is left in this process. `KRUN_TEST_CONNECTIONS` says how many.
fn short(env: &Env) -> Result<(), Failure> {
    let count = std::env::var("KRUN_TEST_CONNECTIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(1000u32);
    in_namespace(|| {
        tap()?;
        let listener = std::net::TcpListener::bind((SERVER_TEXT, 0))?;
        let port = listener.local_addr()?.port();
        for _ in 0..AT_ONCE {
            let listener = listener.try_clone()?;
            thread::spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    let mut bytes = [0; 5];
                    let _ = stream.read_exact(&mut bytes).and_then(|()| stream.write_all(&bytes));
                }
            });
        }
        let mut config = env.guest_half("net_short", [port.to_string(), count.to_string()]);
        config.nets.push(Net::new(NetPeer::Tap("tap0".into()), 1));
        let mut captured = start(config)?;
        let result = (|| {
            captured.wait_for_output("warm\n")?;
            let (before, memory) = (own_resources()?, resident_kib()?);
            go_on(&mut captured)?;
            captured.wait_for_output("done\n")?;
            // The server's last connection may be about to be closed.
            thread::sleep(Duration::from_millis(200));
            let grown = resident_kib()?.saturating_sub(memory);
            same("descriptors and threads", own_resources()?, before)?;
            same(&format!("{grown} KiB more are within the noise"), grown < 2048, true)?;
            go_on(&mut captured)
        })();
        let output = captured.finish()?.success()?;
        print!("{}", output.err());
        result
    })
}
