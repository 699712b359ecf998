//! The network: addresses by DHCP, name servers also from IPv6 routers. IPv6 addresses come from the kernel, which
//! listens to routers by itself.

mod dhcp;
mod keep;
mod netlink;
mod rdnss;
mod resolver;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};
use rustix::rand::{GetRandomFlags, getrandom};

use dhcp::{Answer, Ask, Lease};
use keep::Holder;
use netlink::Netlink;
use rdnss::Routers;

use crate::config::read_file;
use crate::failure::show;
use crate::log::{Log, uptime};
use crate::sys;

pub use keep::Network;

/// How long a server may take, for all interfaces together: the command waits.
const DEADLINE: Duration = Duration::from_secs(5);
/// When a question is asked again for the first time; each time it takes twice as long.
const AGAIN: Duration = Duration::from_millis(250);
/// The longest time between two questions.
const MOST_PAUSE: Duration = Duration::from_secs(64);
/// Routes of the first interface have this metric, those of others one more each.
const METRIC: u32 = 100;
/// Bytes of a packet; a longer one is no answer.
const PACKET: usize = 2048;
/// Messages that are taken from a socket before others have their turn: who sends without end must not keep init.
const MOST_AT_ONCE: usize = 64;

/// An interface that waits for an answer, or has it.
struct Client {
    name: Vec<u8>,
    index: u32,
    mac: [u8; 6],
    socket: OwnedFd,
    id: u32,
    ask: Ask,
    start: Duration,
    again: Duration,
    pause: Duration,
    /// When the last question was asked.
    asked: Duration,
    lease: Option<Lease>,
}

/// Configures interfaces. What does not work is told in the kernel's log: many commands do without a network.
/// Gives back the leases, which are to be kept.
pub fn configure(names: &[Vec<u8>], log: &mut Log) -> Network {
    let mut problems = Vec::new();
    // Before any interface is up, so that no router is missed.
    // One without an index cannot be used, which is told below.
    let interfaces = names.iter().filter_map(|name| index(name).ok()).collect();
    let routers = Routers::open(interfaces)
        .map_err(|e| problems.push(format!("IPv6 routers are not heard: {e}.")))
        .ok();
    let mut network = Network::new(routers);
    match run(names, &mut problems) {
        Ok(clients) => {
            let with_lease = clients.into_iter().enumerate().filter_map(|(n, mut client)| {
                let lease = client.lease.take()?;
                Some(Holder::new(client, lease, METRIC + n as u32))
            });
            network.holders = with_lease.collect();
            network.hear_routers(uptime());
            if let Err(e) = network.write() {
                problems.push(format!("/etc/resolv.conf cannot be written: {e}."));
            }
        }
        Err(e) => problems.push(format!("The network cannot be configured: {e}.")),
    }
    for problem in problems {
        log.say(&problem);
        log.warn(problem);
    }
    network
}

fn run(names: &[Vec<u8>], problems: &mut Vec<String>) -> io::Result<Vec<Client>> {
    let mut netlink = Netlink::open()?;
    let mut clients = Vec::new();
    for name in names {
        match Client::start(name, &mut netlink) {
            Ok(client) => clients.push(client),
            Err(e) => problems.push(format!("The interface {} cannot be used: {e}.", show(name))),
        }
    }
    let deadline = uptime() + DEADLINE;
    wait(&mut clients, deadline, &mut netlink, problems)?;
    for client in clients.iter().filter(|c| c.lease.is_none()) {
        problems.push(format!("No DHCP server has answered on {} in {DEADLINE:?}.", show(&client.name)));
    }
    Ok(clients)
}

/// Asks and listens until all have their answer.
fn wait(
    clients: &mut [Client],
    deadline: Duration,
    netlink: &mut Netlink,
    problems: &mut Vec<String>,
) -> io::Result<()> {
    loop {
        let now = uptime();
        if now >= deadline || clients.iter().all(|c| c.lease.is_some()) {
            return Ok(());
        }
        let mut next = deadline;
        for client in clients.iter_mut().filter(|c| c.lease.is_none()) {
            if now >= client.again {
                client.send(now)?;
            }
            next = next.min(client.again);
        }
        let waiting = clients.iter().filter(|c| c.lease.is_none());
        let mut fds: Vec<_> = waiting.map(|c| PollFd::new(&c.socket, PollFlags::IN)).collect();
        // A bit more than that, so as not to come too early.
        let left = next.saturating_sub(now) + Duration::from_millis(1);
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        for (n, client) in clients.iter_mut().enumerate() {
            if client.listen(uptime())
                && let Some(lease) = &client.lease
                && let Err(e) = netlink.configure(client.index, lease, METRIC + n as u32)
            {
                problems.push(format!("The interface {} cannot be configured: {e}.", show(&client.name)));
            }
        }
    }
}

impl Client {
    /// Brings the interface up.
    fn start(name: &[u8], netlink: &mut Netlink) -> io::Result<Self> {
        let index = index(name)?;
        let mac = parse_mac(&file(name, "/address")?).ok_or(io::ErrorKind::InvalidData)?;
        netlink.up(index)?;
        let socket = sys::packet_socket(index)?;
        let start = uptime();
        Ok(Self {
            name: name.to_vec(),
            index,
            mac,
            socket,
            id: random_id(),
            ask: Ask::Discover,
            start,
            again: start,
            pause: AGAIN,
            asked: start,
            lease: None,
        })
    }

    fn send(&mut self, now: Duration) -> io::Result<()> {
        let seconds = u16::try_from(now.saturating_sub(self.start).as_secs()).unwrap_or(u16::MAX);
        let packet = dhcp::ask(self.ask, self.mac, self.id, seconds);
        (self.asked, self.again) = (now, now + self.pause);
        self.pause = (self.pause * 2).min(MOST_PAUSE);
        match sys::broadcast(self.socket.as_fd(), self.index, &packet) {
            // The link is down, or full: asked again later.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENETDOWN | libc::ENOBUFS | libc::EAGAIN)) => {
                Ok(())
            }
            result => result,
        }
    }

    /// Takes the answers that came; true when the interface has a lease since.
    fn listen(&mut self, now: Duration) -> bool {
        let mut packet = [0u8; PACKET];
        if self.lease.is_some() {
            return false;
        }
        for _ in 0..MOST_AT_ONCE {
            let Ok((len, _)) = recv(&self.socket, &mut packet[..], RecvFlags::DONTWAIT) else { return false };
            let Some((answer, lease)) = dhcp::answer(&packet[..len], self.mac, self.id) else { continue };
            match (answer, self.ask) {
                (Answer::Offer, Ask::Discover) => {
                    self.ask = Ask::Request { address: lease.address, server: lease.server };
                }
                (Answer::Ack, Ask::Request { .. }) => {
                    self.lease = Some(lease);
                    return true;
                }
                (Answer::Nak, Ask::Request { .. }) => self.ask = Ask::Discover,
                _ => continue,
            }
            (self.again, self.pause) = (now, AGAIN);
        }
        false
    }
}

/// What the kernel says of an interface.
fn file(name: &[u8], what: &str) -> io::Result<String> {
    let path = [b"/sys/class/net/", name, what.as_bytes()].concat();
    let text = read_file(&path, 1 << 16)?;
    Ok(String::from_utf8_lossy(&text).trim().to_owned())
}

fn index(name: &[u8]) -> io::Result<u32> {
    file(name, "/ifindex")?.parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Of a question, so that who does not see it cannot answer.
fn random_id() -> u32 {
    let mut id = [0; 4];
    // The start of the guest does not wait for the kernel's generator to be ready.
    match getrandom(&mut id, GetRandomFlags::INSECURE) {
        Ok(4) => u32::from_ne_bytes(id),
        // Kernels before 5.6.
        _ => uptime().subsec_nanos().rotate_left(8),
    }
}

/// `52:54:00:12:34:56`
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_questions_differ() {
        assert_ne!([random_id(), random_id()], [random_id(), random_id()]);
    }

    #[test]
    fn a_look_at_a_socket_has_an_end() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let other = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        for n in 0..=MOST_AT_ONCE {
            other.send_to(&[n as u8], socket.local_addr().unwrap()).unwrap();
        }
        let mut client = Client {
            name: b"eth0".to_vec(),
            index: 1,
            mac: [2; 6],
            socket: socket.into(),
            id: 1,
            ask: Ask::Discover,
            start: Duration::ZERO,
            again: Duration::ZERO,
            pause: AGAIN,
            asked: Duration::ZERO,
            lease: None,
        };
        assert!(!client.listen(Duration::ZERO));
        let mut next = [0];
        recv(&client.socket, &mut next[..], RecvFlags::DONTWAIT).unwrap();
        assert_eq!(usize::from(next[0]), MOST_AT_ONCE);
    }

    #[test]
    fn hardware_addresses() {
        assert_eq!(parse_mac("52:54:00:0a:ff:01"), Some([0x52, 0x54, 0, 10, 255, 1]));
        for bad in ["", "1:2:3:4:5", "1:2:3:4:5:6:7", "1:2:3:4:5:x"] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
