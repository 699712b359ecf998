//! Networks through a tap interface of the host, and through datagrams.
//!
//! For datagrams the peer is a small one of our own, which speaks as gvproxy does with `-listen-vfkit`: it wants the
//! magic first, answers ARP and DHCP, and echoes UDP. A gvproxy that has this listener was not to be had.

use std::ffi::OsString;
use std::io::Write;
use std::net::{TcpStream, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use krun::{Net, NetPeer, Offloads};

use super::{Close, Offer, echo_servers, exchange, in_namespace, ip, ping};
use crate::harness::{Case, Env, Failure, TempDir, run, same, start};

pub const TAP: Case = Case { name: "net_tap", host: tap, guest: guest_tap };
pub const DATAGRAM: Case = Case { name: "net_datagram", host: datagram, guest: guest_datagram };

const SERVER: [u8; 4] = [10, 99, 0, 1];
pub const SERVER_TEXT: &str = "10.99.0.1";
const ADDRESS: [u8; 4] = [10, 99, 0, 2];
/// As the tap interface has it.
const TAP_OFFER: Offer = Offer { address: ADDRESS, server: SERVER, mtu: 1500, seconds: 65535 };
/// Room for a datagram of 20,000 bytes in one frame.
const OFFER: Offer = Offer { address: ADDRESS, server: SERVER, mtu: 30_000, seconds: 65535 };
/// Where UDP is echoed.
pub const PORT: u16 = 7;

fn guest_tap(args: &[OsString]) -> Result<u8, String> {
    let port = args.first().and_then(|w| w.to_str()?.parse().ok()).ok_or("no port")?;
    for seed in 0..2 {
        let stream = TcpStream::connect((SERVER_TEXT, port)).map_err(|e| format!("connect: {e}"))?;
        exchange(&stream, 16 << 20, seed, Close::Early)?;
    }
    for len in [1, 1400, 20_000] {
        ping((SERVER_TEXT, port), len)?;
    }
    Ok(0)
}

/// Answers DHCP clients on the tap interface for ever.
pub fn serve_dhcp() -> Result<(), Failure> {
    // Where broadcasts go.
    ip("route add 255.255.255.255 dev tap0")?;
    let socket = UdpSocket::bind("0.0.0.0:67")?;
    socket.set_broadcast(true)?;
    std::thread::spawn(move || {
        let mut bytes = [0; 2000];
        while let Ok((len, _)) = socket.recv_from(&mut bytes) {
            if let Some(answer) = TAP_OFFER.answer(&bytes[..len]) {
                let _ = socket.send_to(&answer, "255.255.255.255:68");
            }
        }
    });
    Ok(())
}

fn tap(env: &Env) -> Result<(), Failure> {
    in_namespace(|| {
        ip("tuntap add tap0 mode tap")?;
        ip(&format!("addr add {SERVER_TEXT}/24 dev tap0"))?;
        ip("link set tap0 up")?;
        serve_dhcp()?;
        let port = echo_servers(SERVER_TEXT)?;
        for offloads in [Offloads::all(), Offloads::empty()] {
            let mut config = env.guest_half("net_tap", [port.to_string()]);
            config.nets.push(Net { offloads, ..Net::new(NetPeer::Tap("tap0".into()), 1) });
            run(config)?.success()?;
        }
        // An interface that is taken away takes the link down, and nothing else.
        let mut config = env.shell(
            "cat /sys/class/net/eth0/carrier; read x; while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.05; done
            echo down",
        );
        config.nets.push(Net::new(NetPeer::Tap("tap0".into()), 1));
        let mut captured = start(config)?;
        captured.wait_for_output("1\n")?;
        ip("link del tap0")?;
        captured.stdin.take();
        same("output", captured.finish()?.success()?.out(), "1\ndown\n".into())
    })
}

fn guest_datagram(_: &[OsString]) -> Result<u8, String> {
    for len in [1, 1400, 20_000] {
        ping((SERVER_TEXT, PORT), len)?;
    }
    println!("first");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).map_err(|e| e.to_string())?;
    ping((SERVER_TEXT, PORT), 1400)?;
    let resolver = std::fs::read_to_string("/etc/resolv.conf").map_err(|e| e.to_string())?;
    if resolver == format!("nameserver {SERVER_TEXT}\n") {
        Ok(0)
    } else {
        Err(format!("resolv.conf: {resolver:?}"))
    }
}

const OWN_MAC: [u8; 6] = [0x5a, 0x94, 0xef, 0, 0, 1];

/// The answer to a frame, if it is one that this peer knows.
pub fn reply(frame: &[u8]) -> Option<Vec<u8>> {
    let mut out = [frame.get(6..12)?, &OWN_MAC, frame.get(12..14)?].concat();
    match frame[12..14] {
        [8, 6] if frame.get(38..42)? == SERVER && frame[21] == 1 => {
            // ARP: who has our address?
            out.extend([0, 1, 8, 0, 6, 4, 0, 2]);
            out.extend(OWN_MAC);
            out.extend(SERVER);
            out.extend(&frame[22..32]);
            Some(out)
        }
        [8, 0] if frame.get(23)? == &17 => {
            let (ports, data) = (frame.get(34..38)?, frame.get(42..)?);
            match ports {
                [0, 68, 0, 67] => {
                    Some([out, udp(SERVER, [255; 4], [0, 67, 0, 68], &OFFER.answer(data)?)].concat())
                }
                [a, b, 0, 7] => Some([out, udp(SERVER, ADDRESS, [0, 7, *a, *b], data)].concat()),
                _ => None,
            }
        }
        _ => None,
    }
}

/// An IP packet with a datagram; without its checksum, which IPv4 permits.
fn udp(from: [u8; 4], to: [u8; 4], ports: [u8; 4], data: &[u8]) -> Vec<u8> {
    let len = (28 + data.len() as u16).to_be_bytes();
    let mut ip = [&[0x45, 0, len[0], len[1], 0, 0, 0, 0, 64, 17, 0, 0][..], &from, &to].concat();
    let mut sum: u32 = ip.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    sum = (sum & 0xffff) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    [&ip[..], &ports, &(8 + data.len() as u16).to_be_bytes(), &[0, 0], data].concat()
}

/// Is the peer until told to stop.
fn serve(socket: &UnixDatagram, stop: &AtomicBool) -> Result<(), Failure> {
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let (mut bytes, mut guest) = (vec![0; 70_000], None);
    while !stop.load(Ordering::Acquire) {
        let Ok((len, from)) = socket.recv_from(&mut bytes) else { continue };
        let frame = &bytes[..len];
        match &guest {
            None => {
                same("the first datagram", frame, b"VFKT".as_slice())?;
                guest = from.as_pathname().map(Path::to_owned);
            }
            Some(path) => {
                if let Some(answer) = reply(frame) {
                    socket.send_to(&answer, path)?;
                }
            }
        }
    }
    Ok(())
}

fn datagram(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("datagram")?;
    let path = dir.path().join("peer");
    let first = UnixDatagram::bind(&path)?;
    let mut config = env.guest_half("net_datagram", [""; 0]);
    let peer = NetPeer::Datagram { path: path.clone(), vfkit: true };
    config.nets.push(Net { offloads: Offloads::CSUM, ..Net::new(peer, 1) });
    let mut captured = start(config)?;
    let seen = with_peer(&first, || captured.wait_for_output("first\n"));
    drop(first);
    std::fs::remove_file(&path)?;
    // The guest finds out when it sends the next frame, and is connected again.
    let second = UnixDatagram::bind(&path)?;
    let output = with_peer(&second, || {
        if let Some(stdin) = &mut captured.stdin {
            stdin.write_all(b"\n")?;
        }
        captured.finish()
    });
    output?.success()?;
    seen?;
    std::fs::remove_file(&path)?;
    same("sockets left behind", std::fs::read_dir(dir.path())?.count(), 0)
}

/// Runs `case` beside the peer.
fn with_peer<T>(socket: &UnixDatagram, case: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(socket, &stop));
        let result = case();
        stop.store(true, Ordering::Release);
        server.join().map_err(|_| Failure::Wrong("the peer panicked".into()))??;
        result
    })
}
