//! Cases of networks, and what they share: a network namespace of their own, programs of the host, servers that echo, and a small
//! DHCP server.

pub mod gvproxy;
pub mod lease;
pub mod passt;
pub mod peers;
pub mod queues;
pub mod routers;
pub mod slow;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{Failure, noise};

/// How long a peer may be silent.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Runs `case` in a network namespace that goes away with it. What it starts, threads and programs, is in it too.
pub fn in_namespace(case: impl FnOnce() -> Result<(), Failure> + Send) -> Result<(), Failure> {
    thread::scope(|scope| {
        let run = || {
            // Deprecated for other flags, with which descriptors may change under a thread.
            #[allow(deprecated)]
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET)?;
            ip("link set lo up")?;
            case()
        };
        scope.spawn(run).join().map_err(|_| Failure::Wrong("the case panicked".into()))?
    })
}

/// Runs `ip` with these words.
pub fn ip(words: &str) -> Result<(), Failure> {
    let output = match Command::new("ip").args(words.split(' ')).output() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Failure::Skip("no ip (iproute2) on this host".into()));
        }
        other => other?,
    };
    if output.status.success() {
        return Ok(());
    }
    Err(Failure::Wrong(format!("ip {words}: {}", String::from_utf8_lossy(&output.stderr))))
}

/// When the side that sends first says that it has no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Close {
    /// Once it has sent everything: the connection is half closed while the answer is under way.
    Early,
    /// Once it has the answer.
    Late,
}

/// A peer that ends with the value.
pub struct Program(Child);

impl Program {
    /// Starts it; it listens on `socket` before this returns.
    pub fn start(command: &mut Command, socket: &Path) -> Result<Self, Failure> {
        let _ = std::fs::remove_file(socket);
        // Some say more than they are asked to.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let name = command.get_program().to_string_lossy().into_owned();
        let child = match command.spawn() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Failure::Skip(format!("no {name} on this host")));
            }
            other => other?,
        };
        let mut program = Self(child);
        let start = Instant::now();
        while !listens(socket)? {
            if let Some(status) = program.0.try_wait()? {
                return Err(Failure::Wrong(format!("{name} has ended: {status}")));
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure::Wrong(format!("{name} does not listen")));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(program)
    }

    /// Ends it; that is no error when it has ended already.
    pub fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether somebody listens there; a socket has its name before it does.
pub fn listens(socket: &Path) -> Result<bool, Failure> {
    /// `SO_ACCEPTCON` in the fourth field.
    const LISTENS: &str = "00010000";
    let path = socket.to_string_lossy();
    let sockets = std::fs::read_to_string("/proc/thread-self/net/unix")?;
    let fields = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    Ok(sockets
        .lines()
        .map(fields)
        .any(|f| f.get(3).is_some_and(|f| f == LISTENS) && f.get(7) == Some(&path.to_string())))
}

impl Drop for Program {
    fn drop(&mut self) {
        self.end();
    }
}

/// The argument of a guest half with this number.
pub fn arg<T: std::str::FromStr>(args: &[OsString], n: usize) -> Result<T, String> {
    let word = args.get(n).and_then(|w| w.to_str()).ok_or("an argument is missing")?;
    word.parse().map_err(|_| format!("{word:?} makes no sense"))
}

/// [`exchange`] on one connection, then on eight at once; each closes after its answer.
pub fn exchange_all(address: (&str, u16), amount: usize) -> Result<(), String> {
    let connect = || TcpStream::connect(address).map_err(|e| format!("connect: {e}"));
    exchange(&connect()?, amount, 1, Close::Late)?;
    std::thread::scope(|scope| {
        let each = |seed| scope.spawn(move || exchange(&connect()?, amount / 8, seed, Close::Late));
        let all: Vec<_> = (0..8).map(each).collect();
        all.into_iter().try_for_each(|t| t.join().map_err(|_| "a connection panicked".to_owned())?)
    })
}

/// Sends noise over a connection and expects it back, both at once.
pub fn exchange(stream: &TcpStream, len: usize, seed: u64, close: Close) -> Result<(), String> {
    let text = |e: std::io::Error| format!("exchange of {len} bytes: {e}");
    stream.set_read_timeout(Some(PATIENCE)).map_err(text)?;
    let bytes = noise(len, seed);
    let end = || stream.shutdown(Shutdown::Write);
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut stream = stream;
            stream.write_all(&bytes)?;
            if close == Close::Early { end() } else { Ok(()) }
        });
        let mut seen = Vec::with_capacity(len);
        let mut reader = stream;
        let received = match close {
            Close::Early => reader.read_to_end(&mut seen),
            Close::Late => reader
                .take(len as u64)
                .read_to_end(&mut seen)
                .and_then(|_| end())
                .and_then(|()| reader.read_to_end(&mut seen)),
        };
        if received.is_err() {
            // So that the sender does not wait for a peer that has stopped.
            let _ = stream.shutdown(Shutdown::Both);
        }
        let sent = sender.join().map_err(|_| "the sender panicked".to_owned())?;
        if let Err(e) = received {
            return Err(format!("after {} of {len} bytes: {e}", seen.len()));
        }
        sent.map_err(text)?;
        if seen == bytes {
            Ok(())
        } else {
            Err(format!("{} of {len} bytes came back, or other ones", seen.len()))
        }
    })
}

/// Gives back what comes until its end.
pub fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let mut chunk = vec![0; 64 << 10];
    loop {
        match stream.read(&mut chunk)? {
            0 => return stream.shutdown(Shutdown::Write),
            len => stream.write_all(&chunk[..len])?,
        }
    }
}

/// The guest's part of an exchange that begins at the host: takes one connection and gives back what comes. It goes on
/// until the end of the input, as what is on its way would be lost with the guest.
pub fn serve_once(port: u16, ready: &str) -> Result<(), String> {
    let text = |e: std::io::Error| format!("inbound: {e}");
    let listener = TcpListener::bind(("0.0.0.0", port)).map_err(text)?;
    println!("{ready}");
    let (stream, _) = listener.accept().map_err(text)?;
    echo(stream).map_err(text)?;
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).map_err(text)?;
    Ok(())
}

/// Echoes TCP and UDP on one port until the process ends; returns the port.
pub fn echo_servers(address: &str) -> Result<u16, Failure> {
    let listener = TcpListener::bind((address, 0))?;
    let port = listener.local_addr()?.port();
    let socket = UdpSocket::bind((address, port))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || echo(stream));
        }
    });
    thread::spawn(move || {
        let mut bytes = vec![0; 65536];
        while let Ok((len, from)) = socket.recv_from(&mut bytes) {
            let _ = socket.send_to(&bytes[..len], from);
        }
    });
    Ok(port)
}

/// Sends a datagram, again if it is lost, and expects it back.
pub fn ping(to: (&str, u16), len: usize) -> Result<(), String> {
    let text = |e: std::io::Error| format!("datagram of {len} bytes: {e}");
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(text)?;
    socket.connect(to).map_err(text)?;
    socket.set_read_timeout(Some(Duration::from_secs(2))).map_err(text)?;
    let (bytes, mut seen) = (noise(len, 3), vec![0; 65536]);
    for _ in 0..30 {
        // The link may be down for a moment.
        let received = socket.send(&bytes).and_then(|_| socket.recv(&mut seen));
        match received {
            Ok(n) if seen[..n] == bytes => return Ok(()),
            Ok(n) => return Err(format!("{n} bytes instead of {len}, or other ones")),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
    Err(format!("a datagram of {len} bytes never came back"))
}

/// What a small DHCP server gives.
pub struct Offer {
    /// The guest's address in a network of 24 bits.
    pub address: [u8; 4],
    /// Router, name server and server.
    pub server: [u8; 4],
    /// The network's MTU.
    pub mtu: u16,
    /// How long the address may be used.
    pub seconds: u32,
}

impl Offer {
    /// The answer to a client's message, both without their IP and UDP headers.
    pub fn answer(&self, message: &[u8]) -> Option<Vec<u8>> {
        let kind = match *message.get(242)? {
            1 => 2,
            3 => 5,
            _ => return None,
        };
        let mut answer = message.get(..240)?.to_vec();
        answer[0] = 2;
        answer[16..20].copy_from_slice(&self.address);
        answer.extend([53, 1, kind, 1, 4, 255, 255, 255, 0, 51, 4]);
        answer.extend(self.seconds.to_be_bytes());
        answer.extend([26, 2]);
        answer.extend(self.mtu.to_be_bytes());
        for code in [3, 6, 54] {
            answer.extend([code, 4]);
            answer.extend(self.server);
        }
        answer.push(255);
        Some(answer)
    }
}
