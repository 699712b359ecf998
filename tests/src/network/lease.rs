//! Leases while the guest runs: renewed with the server that gave them, taken away, and had again.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use krun::{Net, NetPeer};

use super::{Offer, PATIENCE, in_namespace, ip};
use crate::harness::{Case, Env, Failure, same, start};

pub const LEASE: Case = Case { name: "net_lease", host, guest };

const SERVER: [u8; 4] = [10, 99, 0, 1];
const FIRST: [u8; 4] = [10, 99, 0, 2];
const SECOND: [u8; 4] = [10, 99, 0, 3];
/// Renewed after half of them.
const SECONDS: u32 = 4;
/// How often the first address is renewed.
const RENEWALS: u32 = 2;

/// The address that the guest's kernel sends from.
fn own_address() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect((Ipv4Addr::from(SERVER), 9)).ok()?;
    match socket.local_addr().ok()? {
        SocketAddr::V4(address) => Some(*address.ip()),
        SocketAddr::V6(_) => None,
    }
}

fn guest(_: &[OsString]) -> Result<u8, String> {
    let mut seen = Vec::new();
    let start = Instant::now();
    loop {
        let address = own_address();
        if seen.last() != Some(&address) {
            println!("{address:?}");
            seen.push(address);
        }
        let resolver = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        if address == Some(SECOND.into()) && resolver == "nameserver 10.99.0.3\n" {
            break;
        }
        if start.elapsed() > PATIENCE * 2 {
            return Err(format!("addresses: {seen:?}; {resolver:?}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    if seen.first() == Some(&Some(FIRST.into())) { Ok(0) } else { Err(format!("addresses: {seen:?}")) }
}

/// What the server saw.
#[derive(Default)]
struct Seen {
    renewals: AtomicU32,
    /// Questions for the first address after it was refused.
    refused: AtomicU32,
}

/// Gives the first address and renews it some times, then refuses it and gives the second one.
fn serve(socket: &UdpSocket, seen: &Seen, stop: &AtomicBool) {
    let mut bytes = [0; 2000];
    let offer = |address| Offer { address, server: SERVER, mtu: 1500, seconds: SECONDS };
    while !stop.load(Ordering::Acquire) {
        let Ok((len, from)) = socket.recv_from(&mut bytes) else { continue };
        let message = &bytes[..len];
        let renews = message.get(12..16) == Some(&FIRST);
        let refuse = seen.renewals.load(Ordering::Acquire) >= RENEWALS;
        if renews && !refuse {
            seen.renewals.fetch_add(1, Ordering::AcqRel);
        }
        let mut answer = offer(if refuse { SECOND } else { FIRST }).answer(message);
        if refuse && let Some(answer) = &mut answer {
            if renews {
                seen.refused.fetch_add(1, Ordering::AcqRel);
                // No, without an address.
                answer[16..20].fill(0);
                answer[242] = 6;
            }
            // Another name server, before the option of the server's own address.
            let at = answer.len() - 13;
            answer[at + 2..at + 6].copy_from_slice(&SECOND);
        }
        let to = if from.ip().is_unspecified() { ([255; 4], 68).into() } else { from };
        if let Some(answer) = answer {
            let _ = socket.send_to(&answer, to);
        }
    }
}

fn host(env: &Env) -> Result<(), Failure> {
    in_namespace(|| {
        ip("tuntap add tap0 mode tap")?;
        ip("addr add 10.99.0.1/24 dev tap0")?;
        ip("link set tap0 up")?;
        ip("route add 255.255.255.255 dev tap0")?;
        let socket = UdpSocket::bind("0.0.0.0:67")?;
        socket.set_broadcast(true)?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let (seen, stop) = (Seen::default(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| serve(&socket, &seen, &stop));
            let mut config = env.guest_half("net_lease", [""; 0]);
            config.nets.push(Net::new(NetPeer::Tap("tap0".into()), 1));
            let output = start(config).and_then(|captured| captured.finish());
            stop.store(true, Ordering::Release);
            output?.success()
        })?;
        same("renewals", seen.renewals.load(Ordering::Acquire), RENEWALS)?;
        same("renewals that were refused", seen.refused.load(Ordering::Acquire), 1)
    })
}
