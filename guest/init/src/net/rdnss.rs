//! Name servers that IPv6 routers tell of (RFC 8106). The kernel checks the routers' messages and passes on the options
//! that are for programs (Linux: `RTM_NEWNDUSEROPT`).

use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use super::MOST_AT_ONCE;

/// Kind of the message.
const NEW_OPTION: u16 = 68;
/// Group of listeners, the first bit being 1's.
const GROUP: u32 = 1 << (20 - 1);
/// Bytes of a netlink message's header, and of what is before the options.
const HEADER: usize = 16;
const FIXED: usize = 16;
/// The option.
const SERVERS: u8 = 25;
/// More than programs use, and a bound for what a router can make us keep.
const MOST: usize = 8;

/// A name server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    address: Ipv6Addr,
    /// Where a link-local address is to be found.
    interface: u32,
    /// Not to be used from then on.
    until: Option<Duration>,
}

/// Listens to the kernel.
pub struct Routers {
    socket: OwnedFd,
    /// Routers on others are not heard: those interfaces are not for init to configure.
    interfaces: Vec<u32>,
    servers: Vec<Server>,
}

impl Routers {
    /// For routers on those interfaces.
    pub fn open(interfaces: Vec<u32>) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUP))?;
        Ok(Self { socket, interfaces, servers: Vec::new() })
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// When the next server is not to be used any more.
    pub fn due(&self) -> Option<Duration> {
        self.servers.iter().filter_map(|s| s.until).min()
    }

    /// Takes in what the kernel has; true when there are other servers than before.
    pub fn turn(&mut self, now: Duration) -> bool {
        let before = self.names();
        let mut bytes = [0u8; 4096];
        for _ in 0..MOST_AT_ONCE {
            let Ok((len, _)) = recv(&self.socket, &mut bytes[..], RecvFlags::DONTWAIT) else { break };
            take(&mut self.servers, &self.interfaces, &bytes[..len], now);
        }
        self.servers.retain(|s| s.until.is_none_or(|until| now < until));
        self.names() != before
    }

    /// The servers as the resolver's file has them.
    pub fn names(&self) -> Vec<String> {
        self.servers.iter().map(Server::name).collect()
    }
}

impl Server {
    fn name(&self) -> String {
        match self.address.is_unicast_link_local() {
            true => format!("{}%{}", self.address, self.interface),
            false => self.address.to_string(),
        }
    }
}

/// Takes in messages of the kernel.
fn take(servers: &mut Vec<Server>, interfaces: &[u32], mut messages: &[u8], now: Duration) {
    while let Some((kind, body, rest)) = message(messages) {
        messages = rest;
        if kind == NEW_OPTION {
            // What is damaged says nothing.
            let _ = options(servers, interfaces, body, now);
        }
    }
}

/// Kind and body of the first message, and what follows it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(HEADER..len)?;
    Some((kind, body, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// Reads the options of a message: family, padding, length of options, interface, and fields that do not matter here.
fn options(servers: &mut Vec<Server>, interfaces: &[u32], body: &[u8], now: Duration) -> Option<()> {
    let len = u16::from_ne_bytes(*body.get(2..)?.first_chunk()?);
    let interface = u32::from_ne_bytes(*body.get(4..)?.first_chunk()?);
    if !interfaces.contains(&interface) {
        return None;
    }
    let mut rest = body.get(FIXED..)?;
    rest = rest.get(..usize::from(len))?;
    // Kind, length in 8 bytes, two bytes for later, lifetime in seconds, addresses.
    while let [kind, words, ..] = *rest {
        let (option, tail) = rest.split_at_checked(usize::from(words) * 8)?;
        if option.len() < 8 {
            return None;
        }
        rest = tail;
        if kind == SERVERS {
            let lifetime = u32::from_be_bytes(*option.get(4..)?.first_chunk()?);
            for address in option.get(8..)?.as_chunks::<16>().0 {
                put(servers, Ipv6Addr::from(*address), interface, lifetime, now);
            }
        }
    }
    Some(())
}

fn put(servers: &mut Vec<Server>, address: Ipv6Addr, interface: u32, lifetime: u32, now: Duration) {
    if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
        return;
    }
    // All ones: for ever. Nothing: no longer.
    let until = (lifetime != u32::MAX).then(|| now + Duration::from_secs(lifetime.into()));
    let known = servers.iter().position(|s| s.address == address && s.interface == interface);
    match known {
        Some(at) if lifetime == 0 => drop(servers.remove(at)),
        Some(at) => servers[at].until = until,
        None if lifetime == 0 || servers.len() >= MOST => {}
        None => servers.push(Server { address, interface, until }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kernel_says(option: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + FIXED + option.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(NEW_OPTION.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend([10, 0]);
        bytes.extend((option.len() as u16).to_ne_bytes());
        bytes.extend(2u32.to_ne_bytes());
        bytes.extend([134, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(option);
        bytes
    }

    fn servers_option(lifetime: u32, addresses: &[&str]) -> Vec<u8> {
        let mut option = vec![SERVERS, 1 + 2 * addresses.len() as u8, 0, 0];
        option.extend(lifetime.to_be_bytes());
        for address in addresses {
            option.extend(address.parse::<Ipv6Addr>().unwrap().octets());
        }
        option
    }

    #[test]
    fn servers_come_and_go() {
        let (mut servers, now) = (Vec::new(), Duration::from_secs(100));
        let names = |servers: &[Server]| servers.iter().map(Server::name).collect::<Vec<_>>();
        take(
            &mut servers,
            &[2],
            &kernel_says(&servers_option(10, &["2001:db8::1", "fe80::1", "ff02::1"])),
            now,
        );
        assert_eq!(names(&servers), ["2001:db8::1", "fe80::1%2"]);
        assert_eq!(servers[0].until, Some(Duration::from_secs(110)));
        let two = [
            kernel_says(&servers_option(u32::MAX, &["2001:db8::1"])),
            kernel_says(&servers_option(0, &["fe80::1"])),
        ];
        take(&mut servers, &[2], &two.concat(), now);
        assert_eq!((names(&servers), servers[0].until), (vec!["2001:db8::1".to_owned()], None));
        for n in 0..20 {
            take(&mut servers, &[2], &kernel_says(&servers_option(9, &[&format!("2001:db8::1:{n:x}")])), now);
        }
        assert_eq!(servers.len(), MOST);
    }

    #[test]
    fn routers_on_other_interfaces_are_not_heard() {
        let mut servers = Vec::new();
        let message = kernel_says(&servers_option(10, &["2001:db8::1"]));
        take(&mut servers, &[1, 3], &message, Duration::ZERO);
        assert_eq!(servers, []);
    }

    #[test]
    fn damaged_options_say_nothing() {
        for option in [vec![SERVERS, 0, 0, 0, 0, 0, 0, 9], vec![SERVERS, 9, 0, 0], vec![SERVERS]] {
            let mut servers = Vec::new();
            take(&mut servers, &[2], &kernel_says(&option), Duration::ZERO);
            assert_eq!(servers, []);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, option: Vec<u8>) {
            let mut servers = Vec::new();
            take(&mut servers, &[2], &bytes, Duration::ZERO);
            take(&mut servers, &[2], &kernel_says(&option), Duration::ZERO);
        }
    }
}
