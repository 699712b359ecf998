//! Networks through passt: address, route and name server by DHCP, TCP and UDP, connections from outside, and a passt
//! that dies and comes back.
//!
//! All of it is in a network namespace of the host: an interface with a default route, which passt takes as a model
//! for the guest's, and servers on the loopback interface, which the guest finds under the router's address.

use std::ffi::OsString;
use std::fs;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use krun::{Net, NetPeer, Offloads};

use super::{PATIENCE, echo_servers, exchange, in_namespace, ip, ping};
use crate::harness::{Case, Env, Failure, TempDir, contains, same, start};

pub const PASST: Case = Case { name: "net_passt", host: passt, guest };
pub const RESTART: Case = Case { name: "net_restart", host: restart, guest: guest_restart };

const ROUTER: &str = "192.168.77.1";
const ADDRESS: &str = "192.168.77.2";
const DNS: &str = "192.168.77.53";
/// Port of the guest that passt makes reachable.
const INBOUND: u16 = 7777;
/// Bytes each way.
const AMOUNT: usize = 8 << 20;

/// A passt that ends with the value.
struct Passt(Child);

impl Passt {
    /// Starts it; it listens before this returns.
    fn start(socket: &Path) -> Result<Self, Failure> {
        let _ = fs::remove_file(socket);
        let mut command = Command::new("passt");
        command.args(["--foreground", "--quiet", "--runas", "0", "--dns", DNS, "-t", "7777", "-u", "none"]);
        // Some versions say more than they are asked to.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let child = match command.arg("--socket").arg(socket).spawn() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Failure::Skip("no passt on this host".into()));
            }
            other => other?,
        };
        let mut passt = Self(child);
        let start = Instant::now();
        while !socket.exists() {
            if let Some(status) = passt.0.try_wait()? {
                return Err(Failure::Wrong(format!("passt has ended: {status}")));
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure::Wrong("passt does not listen".into()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(passt)
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An interface as passt's model.
fn uplink() -> Result<(), Failure> {
    ip("link add up0 type veth peer name up1")?;
    ip(&format!("addr add {ADDRESS}/24 dev up0"))?;
    ip("link set up0 up")?;
    ip("link set up1 up")?;
    ip(&format!("route add default via {ROUTER} dev up0"))
}

fn arg<T: std::str::FromStr>(args: &[OsString], n: usize) -> Result<T, String> {
    let word = args.get(n).and_then(|w| w.to_str()).ok_or("an argument is missing")?;
    word.parse().map_err(|_| format!("{word:?} makes no sense"))
}

/// What init has set up.
fn check_configuration() -> Result<(), String> {
    let read = |path: &str| fs::read_to_string(path).map_err(|e| format!("{path}: {e}"));
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|e| e.to_string())?;
    socket.connect((ROUTER, 9)).map_err(|e| format!("no route: {e}"))?;
    let own = socket.local_addr().map_err(|e| e.to_string())?.ip().to_string();
    let resolver = read("/etc/resolv.conf")?;
    let mtu = read("/sys/class/net/eth0/mtu")?;
    let mac = read("/sys/class/net/eth0/address")?;
    let seen = (own.as_str(), mtu.trim(), mac.trim(), resolver.contains(&format!("nameserver {DNS}\n")));
    if seen != (ADDRESS, "65520", "52:54:00:6b:72:05", true) {
        return Err(format!("the interface: {seen:?}; {resolver:?}"));
    }
    Ok(())
}

fn guest(args: &[OsString]) -> Result<u8, String> {
    let port = arg(args, 0)?;
    check_configuration()?;
    let connect = || TcpStream::connect((ROUTER, port)).map_err(|e| format!("connect: {e}"));
    exchange(&connect()?, AMOUNT, 1)?;
    std::thread::scope(|scope| {
        let each = |seed| scope.spawn(move || exchange(&connect()?, AMOUNT / 8, seed));
        let all: Vec<_> = (0..8).map(each).collect();
        all.into_iter().try_for_each(|t| t.join().map_err(|_| "a connection panicked".to_owned())?)
    })?;
    for len in [1, 1000, 9000] {
        ping((ROUTER, port), len)?;
    }
    let listener = TcpListener::bind(("0.0.0.0", INBOUND)).map_err(|e| e.to_string())?;
    println!("listening");
    let (stream, _) = listener.accept().map_err(|e| e.to_string())?;
    super::echo(stream).map_err(|e| format!("inbound: {e}"))?;
    Ok(0)
}

/// A TCP stream through passt 2023-03 does not arrive as it was sent; `KRUN_TEST_PASST` runs the cases all the same.
fn known_fault() -> Result<(), Failure> {
    match std::env::var_os("KRUN_TEST_PASST") {
        Some(_) => Ok(()),
        None => Err(Failure::Skip(
            "known fault: TCP streams through passt arrive changed (KRUN_TEST_PASST=1 runs it)".into(),
        )),
    }
}

fn passt(env: &Env) -> Result<(), Failure> {
    known_fault()?;
    in_namespace(|| {
        uplink()?;
        let dir = TempDir::new("passt")?;
        let socket = dir.path().join("socket");
        let before = fs::read(env.root.join("etc/resolv.conf")).ok();
        let port = echo_servers("127.0.0.1")?;
        for offloads in [Offloads::empty(), Offloads::all()] {
            let _passt = Passt::start(&socket)?;
            let mut config = env.guest_half("net_passt", [port.to_string()]);
            config.nets.push(Net { offloads, ..Net::new(NetPeer::Stream(socket.clone()), 5) });
            let captured = start(config)?;
            // What is wrong, if anything, is on the guest's standard error.
            let listening = captured.wait_for_output("listening");
            if listening.is_ok() {
                exchange(&TcpStream::connect(("127.0.0.1", INBOUND))?, AMOUNT / 4, 9)?;
            }
            captured.finish()?.success()?;
            listening?;
        }
        same("the root's own resolv.conf", fs::read(env.root.join("etc/resolv.conf")).ok() == before, true)?;
        command(env, port)
    })
}

/// `krun run --net passt`, which starts and ends one.
fn command(env: &Env, port: u16) -> Result<(), Failure> {
    let script = format!(
        "import socket; s = socket.create_connection(('{ROUTER}', {port})); s.sendall(b'hello'); s.shutdown(1); \
         print(s.recv(100).decode(), open('/sys/class/net/eth0/address').read().strip())"
    );
    let words = ["--net", "passt,mac=52:54:00:00:00:77", "--", "python3", "-c", &script];
    let output = env.krun()?.args(words).output()?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    contains(&format!("krun run --net passt; it says {err:?}"), &out, "hello 52:54:00:00:00:77\n")
}

fn carrier(up: bool) -> Result<(), String> {
    let wanted = if up { "1" } else { "0" };
    let start = Instant::now();
    loop {
        let seen = fs::read_to_string("/sys/class/net/eth0/carrier").map_err(|e| e.to_string())?;
        if seen.trim() == wanted {
            return Ok(());
        }
        if start.elapsed() > PATIENCE {
            return Err(format!("the carrier stays {}", seen.trim()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn guest_restart(args: &[OsString]) -> Result<u8, String> {
    let port = arg(args, 0)?;
    check_configuration()?;
    for round in 0..3 {
        ping((ROUTER, port), 100)?;
        exchange(&TcpStream::connect((ROUTER, port)).map_err(|e| e.to_string())?, 1 << 20, round)?;
        println!("round {round}");
        carrier(false)?;
        println!("down {round}");
        carrier(true)?;
    }
    Ok(0)
}

fn restart(env: &Env) -> Result<(), Failure> {
    known_fault()?;
    in_namespace(|| {
        uplink()?;
        let dir = TempDir::new("passt-restart")?;
        let socket = dir.path().join("socket");
        let port = echo_servers("127.0.0.1")?;
        let mut passt = Passt::start(&socket)?;
        let mut config = env.guest_half("net_restart", [port.to_string()]);
        config.nets.push(Net::new(NetPeer::Stream(socket.clone()), 5));
        let captured = start(config)?;
        let run = || -> Result<(), Failure> {
            for round in 0..3 {
                captured.wait_for_output(&format!("round {round}\n"))?;
                drop(passt);
                captured.wait_for_output(&format!("down {round}\n"))?;
                passt = Passt::start(&socket)?;
            }
            Ok(())
        };
        let result = run();
        captured.finish()?.success()?;
        result
    })
}
