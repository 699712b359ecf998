//! Networks through passt: address, route and name server by DHCP, TCP and UDP, connections from outside, and a passt
//! that dies and comes back.
//!
//! All of it is in a network namespace of the host: an interface with a default route, which passt takes as a model
//! for the guest's, and servers on the loopback interface, which the guest finds under the router's address.
//!
//! passt forgets what the guest has acknowledged once the guest has closed a connection for sending, and sends data
//! again, to guests of QEMU as well; so no side here does that before it has its answer.

use std::ffi::OsString;
use std::fs;
use std::net::{TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use krun::{Net, NetPeer, Offloads};

use super::{
    Close, PATIENCE, Program, arg, echo_servers, exchange, exchange_all, in_namespace, ip, ping, serve_once,
};
use crate::harness::{Case, Env, Failure, TempDir, contains, same, start};

pub const PASST: Case = Case { name: "net_passt", host: passt, guest };
pub const RESTART: Case = Case { name: "net_restart", host: restart, guest: guest_restart };

const ROUTER: &str = "192.168.77.1";
const ADDRESS: &str = "192.168.77.2";
const DNS: &str = "192.168.77.53";
/// Port of the guest that passt makes reachable.
const INBOUND: u16 = 7777;
/// Bytes each way.
const AMOUNT: usize = 4 << 20;

/// Starts passt; it listens before this returns.
fn start_passt(socket: &Path) -> Result<Program, Failure> {
    let mut command = Command::new("passt");
    command.args(["--foreground", "--quiet", "--runas", "0", "--dns", DNS, "-t", "7777", "-u", "none"]);
    Program::start(command.arg("--socket").arg(socket), socket)
}

/// An interface as passt's model.
fn uplink() -> Result<(), Failure> {
    ip("link add up0 type veth peer name up1")?;
    ip(&format!("addr add {ADDRESS}/24 dev up0"))?;
    ip("link set up0 up")?;
    ip("link set up1 up")?;
    ip(&format!("route add default via {ROUTER} dev up0"))
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
    exchange_all((ROUTER, port), AMOUNT)?;
    for len in [1, 1000, 9000] {
        ping((ROUTER, port), len)?;
    }
    serve_once(INBOUND, "listening")?;
    Ok(0)
}

fn passt(env: &Env) -> Result<(), Failure> {
    in_namespace(|| {
        uplink()?;
        let before = fs::read(env.root.join("etc/resolv.conf")).ok();
        let port = echo_servers("127.0.0.1")?;
        for offloads in [Offloads::empty(), Offloads::all()] {
            exchanges(env, offloads, port).map_err(|e| match e {
                Failure::Wrong(why) => Failure::Wrong(format!("{offloads:?}: {why}")),
                skip => skip,
            })?;
        }
        same("the root's own resolv.conf", fs::read(env.root.join("etc/resolv.conf")).ok() == before, true)?;
        command(env, port)
    })
}

/// One guest, and a connection to it.
fn exchanges(env: &Env, offloads: Offloads, port: u16) -> Result<(), Failure> {
    let dir = TempDir::new("passt")?;
    let socket = dir.path().join("socket");
    let _passt = start_passt(&socket)?;
    let mut config = env.guest_half("net_passt", [port.to_string()]);
    config.nets.push(Net { offloads, ..Net::new(NetPeer::Stream(socket.clone()), 5) });
    let captured = start(config)?;
    // What is wrong, if anything, is on the guest's standard error.
    let inbound = captured.wait_for_output("listening").and_then(|()| {
        let stream = TcpStream::connect(("127.0.0.1", INBOUND))?;
        Ok(exchange(&stream, AMOUNT / 4, 9, Close::Late)?)
    });
    captured.finish()?.success()?;
    inbound
}

/// `krun run --net passt`, which starts and ends one.
fn command(env: &Env, port: u16) -> Result<(), Failure> {
    let script = format!(
        "import socket; s = socket.create_connection(('{ROUTER}', {port})); s.sendall(b'hello'); \
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
        let stream = TcpStream::connect((ROUTER, port)).map_err(|e| e.to_string())?;
        exchange(&stream, 1 << 20, round, Close::Late)?;
        println!("round {round}");
        carrier(false)?;
        println!("down {round}");
        carrier(true)?;
    }
    Ok(0)
}

fn restart(env: &Env) -> Result<(), Failure> {
    in_namespace(|| {
        uplink()?;
        let dir = TempDir::new("passt-restart")?;
        let socket = dir.path().join("socket");
        let port = echo_servers("127.0.0.1")?;
        let mut passt = start_passt(&socket)?;
        let mut config = env.guest_half("net_restart", [port.to_string()]);
        config.nets.push(Net::new(NetPeer::Stream(socket.clone()), 5));
        let captured = start(config)?;
        let result = (0..3).try_for_each(|round| {
            captured.wait_for_output(&format!("round {round}\n"))?;
            passt.end();
            captured.wait_for_output(&format!("down {round}\n"))?;
            passt = start_passt(&socket)?;
            Ok(())
        });
        captured.finish()?.success()?;
        result
    })
}
