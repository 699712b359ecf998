//! Interfaces, addresses and routes of the kernel (Linux: rtnetlink(7)).

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

use super::dhcp::{Lease, Route};

const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const NEW_ROUTE: u16 = 24;
const ERROR: u16 = 2;
/// A request that wants an answer.
const REQUEST: u16 = 1 | 4;
/// Made if it is not there, replaced if it is.
const CREATE: u16 = 0x400 | 0x100;
const HEADER: usize = 16;
const INET: u8 = 2;
const IFF_UP: u32 = 1;
/// The gateway is on the link, whatever the addresses say.
const ONLINK: u32 = 4;

/// A socket to the kernel.
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub fn open() -> io::Result<Self> {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a request and waits for the kernel's answer, which comes at once.
    fn request(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.sequence += 1;
        let mut message = Vec::with_capacity(HEADER + body.len());
        message.extend(((HEADER + body.len()) as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((REQUEST | flags).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(body);
        send(&self.socket, &message, SendFlags::empty())?;
        let mut answer = [0u8; 1024];
        let (len, _) = recv(&self.socket, &mut answer[..], RecvFlags::empty())?;
        let number = |at: usize| answer[..len].get(at..)?.first_chunk().copied().map(i32::from_ne_bytes);
        match (number(4).map(|n| n as u16), number(HEADER)) {
            (Some(ERROR), Some(0)) => Ok(()),
            (Some(ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Brings an interface up.
    pub fn up(&mut self, index: u32) -> io::Result<()> {
        self.request(NEW_LINK, 0, &link(index, IFF_UP))
    }

    fn mtu(&mut self, index: u32, mtu: u16) -> io::Result<()> {
        let mut body = link(index, 0);
        attribute(&mut body, 4, &u32::from(mtu).to_ne_bytes());
        self.request(NEW_LINK, 0, &body)
    }

    /// Gives an interface what it got. Of several interfaces' routes to one place, those with the lower `metric` count.
    pub fn configure(&mut self, index: u32, lease: &Lease, metric: u32) -> io::Result<()> {
        if let Some(mtu) = lease.mtu {
            self.mtu(index, mtu)?;
        }
        self.add(index, lease)?;
        lease.routes.iter().try_for_each(|route| self.route(index, route, lease, metric))
    }

    /// Gives an interface the address of a lease, if it does not have it.
    pub fn add(&mut self, index: u32, lease: &Lease) -> io::Result<()> {
        let mut body = address(index, lease);
        if lease.prefix < 31 {
            let host = u32::MAX.checked_shr(lease.prefix.into()).unwrap_or(0);
            attribute(&mut body, 4, &(u32::from_be_bytes(lease.address) | host).to_be_bytes());
        }
        self.request(NEW_ADDRESS, CREATE, &body)
    }

    /// Takes the address of a lease away, and the routes with it.
    pub fn remove(&mut self, index: u32, lease: &Lease) -> io::Result<()> {
        self.request(DELETE_ADDRESS, 0, &address(index, lease))
    }

    fn route(&mut self, index: u32, route: &Route, lease: &Lease, metric: u32) -> io::Result<()> {
        let direct = route.gateway == [0; 4];
        // Family, destination's and source's prefix, service; main table, by DHCP, scope, unicast.
        let mut body = vec![INET, route.prefix, 0, 0, 254, 16, if direct { 253 } else { 0 }, 1];
        body.extend(if direct { 0 } else { ONLINK }.to_ne_bytes());
        if route.prefix > 0 {
            let mask = u32::MAX.checked_shl(32 - u32::from(route.prefix)).unwrap_or(0);
            attribute(&mut body, 1, &(u32::from_be_bytes(route.to) & mask).to_be_bytes());
        }
        attribute(&mut body, 4, &index.to_ne_bytes());
        if !direct {
            attribute(&mut body, 5, &route.gateway);
        }
        attribute(&mut body, 6, &metric.to_ne_bytes());
        attribute(&mut body, 7, &lease.address);
        self.request(NEW_ROUTE, CREATE, &body)
    }
}

/// An interface: family, padding, type, index, flags and which of them to change.
fn link(index: u32, flags: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    for word in [index, flags, flags] {
        body.extend(word.to_ne_bytes());
    }
    body
}

/// An address: family, prefix, flags, scope, interface; the address as the own one and as the peer's.
fn address(index: u32, lease: &Lease) -> Vec<u8> {
    let mut body = vec![INET, lease.prefix, 0, 0];
    body.extend(index.to_ne_bytes());
    attribute(&mut body, 2, &lease.address);
    attribute(&mut body, 1, &lease.address);
    body
}

/// An attribute, whose value is four bytes long.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8; 4]) {
    body.extend(8u16.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
}
