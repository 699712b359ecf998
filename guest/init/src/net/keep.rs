//! What was configured, while the command runs: leases are renewed in time, and asked for anew when they are lost
//! (RFC 2131, section 4.4.5); routers are listened to.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recvfrom, sendto, socket_with,
    sockopt,
};

use super::dhcp::{self, Address, Answer, Ask, Lease};
use super::netlink::Netlink;
use super::rdnss::Routers;
use super::{Client, MOST_AT_ONCE, PACKET, random_id, resolver};
use crate::failure::show;
use crate::log::{Log, uptime};
use crate::sys;

/// A question is not asked again before this, unless the lease comes to another stage.
const LEAST_PAUSE: Duration = Duration::from_secs(60);

/// All interfaces that got a lease, the routers, and the name servers' file.
#[derive(Default)]
pub struct Network {
    pub(super) holders: Vec<Holder>,
    routers: Option<Routers>,
    file: Option<OwnedFd>,
}

/// An interface and its lease.
pub(super) struct Holder {
    name: Vec<u8>,
    index: u32,
    mac: [u8; 6],
    metric: u32,
    lease: Lease,
    times: Option<Times>,
    stage: Stage,
}

enum Stage {
    /// Nothing is to be done until then; never without a time.
    Bound(Option<Duration>),
    /// The server was asked at `asked`, and is again at `again`.
    Asking { socket: OwnedFd, id: u32, asked: Duration, again: Duration },
    /// The lease is gone. A server is looked for as at the start, for as long as it takes.
    Lost(Client),
}

/// The stages of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Times {
    /// Its server is asked from here on.
    renew: Duration,
    /// Any server is asked from here on.
    rebind: Duration,
    /// It is over.
    end: Duration,
}

impl Times {
    /// Of a lease that was asked for at `since`; `None` for one without an end.
    fn new(since: Duration, lease: &Lease) -> Option<Self> {
        let seconds = lease.seconds.filter(|s| *s != u32::MAX)?;
        // One that is over at once would be asked for without a pause.
        let length = Duration::from_secs(seconds.max(2).into());
        Some(Self { renew: since + length / 2, rebind: since + length * 7 / 8, end: since + length })
    }

    /// When to ask again if there is no answer: half of what is left of the stage, but not too soon.
    fn again(&self, now: Duration) -> Duration {
        let stage_end = if now < self.rebind { self.rebind } else { self.end };
        let left = stage_end.saturating_sub(now);
        stage_end.min(now + (left / 2).max(LEAST_PAUSE))
    }
}

impl Network {
    /// Without leases yet.
    pub(super) fn new(routers: Option<Routers>) -> Self {
        Self { routers, ..Self::default() }
    }

    /// True when they tell of other name servers than before.
    pub(super) fn hear_routers(&mut self, now: Duration) -> bool {
        self.routers.as_mut().is_some_and(|routers| routers.turn(now))
    }

    /// Makes the name servers' file say what is known.
    pub(super) fn write(&mut self) -> Result<(), rustix::io::Errno> {
        let names = self.routers.as_ref().map(Routers::names).unwrap_or_default();
        let leases = self.holders.iter().map(|holder| &holder.lease);
        match &self.file {
            Some(file) => resolver::update(file, leases, &names),
            None => resolver::write(leases, &names).map(|file| self.file = file),
        }
    }

    /// When [`Network::turn`] has something to do.
    pub fn due(&self) -> Option<Duration> {
        let routers = self.routers.as_ref().and_then(Routers::due);
        self.holders.iter().filter_map(Holder::due).chain(routers).min()
    }

    /// Where answers come in.
    pub fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let asking = self.holders.iter().filter_map(|holder| match &holder.stage {
            Stage::Bound(_) => None,
            Stage::Asking { socket, .. } => Some(socket.as_fd()),
            Stage::Lost(client) => Some(client.socket.as_fd()),
        });
        asking.chain(self.routers.as_ref().map(Routers::socket))
    }

    /// Asks and listens; what goes wrong is told in the kernel's log.
    pub fn turn(&mut self, log: &mut Log) {
        let mut changed = self.hear_routers(uptime());
        for holder in &mut self.holders {
            match holder.turn(uptime(), log) {
                Ok(new) => changed |= new,
                Err(e) => {
                    log.say(&format!("The lease of {} cannot be kept: {e}.", show(&holder.name)));
                    // Tried again at a later stage, or with the next lease.
                    let now = uptime();
                    let times = holder.times.filter(|t| now < t.end);
                    holder.stage = Stage::Bound(Some(times.map_or(now + LEAST_PAUSE, |t| t.again(now))));
                }
            }
        }
        if changed && let Err(e) = self.write() {
            log.say(&format!("/etc/resolv.conf cannot be written: {e}."));
        }
    }
}

impl Holder {
    /// Of a client that has a lease.
    pub(super) fn new(client: Client, lease: Lease, metric: u32) -> Self {
        let times = Times::new(client.asked, &lease);
        let stage = Stage::Bound(times.map(|t| t.renew));
        Self { name: client.name, index: client.index, mac: client.mac, metric, lease, times, stage }
    }

    fn due(&self) -> Option<Duration> {
        match &self.stage {
            Stage::Bound(at) => *at,
            Stage::Asking { again, .. } => Some(*again),
            Stage::Lost(client) => Some(client.again),
        }
    }

    /// True when there is another lease than before.
    fn turn(&mut self, now: Duration, log: &mut Log) -> io::Result<bool> {
        match &mut self.stage {
            Stage::Bound(at) if at.is_none_or(|at| now < at) => return Ok(false),
            Stage::Bound(_) => {}
            Stage::Asking { socket, id, asked, again } => {
                let mut bytes = [0u8; PACKET];
                // Before it rebinds, only the lease's server was asked.
                let alone = self.times.is_some_and(|t| *asked < t.rebind);
                let server = alone.then_some(self.lease.server);
                for _ in 0..MOST_AT_ONCE {
                    let Ok((len, _, sender)) = recvfrom(&*socket, &mut bytes[..], RecvFlags::DONTWAIT) else {
                        break;
                    };
                    if !sender.and_then(|s| s.try_into().ok()).is_some_and(|s| may_answer(s, server)) {
                        continue;
                    }
                    match dhcp::read(&bytes[..len], self.mac, *id) {
                        Some((Answer::Ack, lease)) if lease.address == self.lease.address => {
                            let asked = *asked;
                            return Ok(self.renewed(lease, asked, log));
                        }
                        Some((Answer::Nak, _)) => return self.lost(log).map(|()| true),
                        _ => {}
                    }
                }
                if now < *again {
                    return Ok(false);
                }
            }
            Stage::Lost(client) => {
                if now >= client.again {
                    client.send(now)?;
                }
                if !client.listen(now) {
                    return Ok(false);
                }
                let (lease, asked) = (client.lease.take().unwrap_or_default(), client.asked);
                log.say(&format!("{} has a lease again.", show(&self.name)));
                return Ok(self.renewed(lease, asked, log));
            }
        }
        match self.times {
            Some(times) if now < times.end => self.ask(now, times).map(|()| false),
            _ => self.lost(log).map(|()| true),
        }
    }

    /// Asks the lease's server, or all of them.
    fn ask(&mut self, now: Duration, times: Times) -> io::Result<()> {
        let own = Ipv4Addr::from(self.lease.address);
        let server = if now < times.rebind { Ipv4Addr::from(self.lease.server) } else { Ipv4Addr::BROADCAST };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
        // A client of the workload's own may have the port.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        sockopt::set_socket_broadcast(&socket, true)?;
        // The address can be reached through other interfaces, too; and broadcasts are to leave by this one.
        sys::bind_to_device(socket.as_fd(), &self.name)?;
        bind(&socket, &SocketAddrV4::new(own, dhcp::CLIENT_PORT))?;
        let id = random_id();
        let message = dhcp::request(Ask::Renew { address: self.lease.address }, self.mac, id, 0);
        // What is not sent now is asked again like what is lost on the way.
        let _ = sendto(&socket, &message, SendFlags::empty(), &SocketAddrV4::new(server, dhcp::SERVER_PORT));
        self.stage = Stage::Asking { socket, id, asked: now, again: times.again(now) };
        Ok(())
    }

    /// True when it is another lease than before. It is kept whatever the kernel takes of it, like the first one.
    fn renewed(&mut self, lease: Lease, asked: Duration, log: &mut Log) -> bool {
        self.times = Times::new(asked, &lease);
        self.stage = Stage::Bound(self.times.map(|t| t.renew));
        let old = std::mem::replace(&mut self.lease, lease);
        if let Err(e) = self.configure(&old) {
            log.say(&format!("The interface {} cannot be configured: {e}.", show(&self.name)));
        }
        old != self.lease
    }

    /// Gives the interface what the lease has, in place of the old one.
    fn configure(&self, old: &Lease) -> io::Result<()> {
        let mut netlink = Netlink::open()?;
        let mut removed = Ok(());
        if other_prefix(old, &self.lease) {
            // In this order connections and routes stay.
            netlink.add(self.index, &self.lease)?;
            removed = netlink.remove(self.index, old);
        }
        netlink.configure(self.index, &self.lease, self.metric)?;
        removed
    }

    /// The address must not be used any more.
    fn lost(&mut self, log: &mut Log) -> io::Result<()> {
        log.say(&format!("The lease of {} is lost.", show(&self.name)));
        let mut netlink = Netlink::open()?;
        if self.lease != Lease::default()
            && let Err(e) = netlink.remove(self.index, &self.lease)
        {
            log.say(&format!("The address of {} stays: {e}.", show(&self.name)));
        }
        self.lease = Lease::default();
        self.times = None;
        self.stage = Stage::Lost(Client::start(&self.name, &mut netlink)?);
        Ok(())
    }
}

/// Whether to believe a message; `server` is the only one that was asked, if there is one.
fn may_answer(sender: SocketAddrV4, server: Option<Address>) -> bool {
    sender.port() == dhcp::SERVER_PORT && server.is_none_or(|s| sender.ip().octets() == s)
}

/// The kernel has one address twice if it comes with two prefixes.
fn other_prefix(old: &Lease, new: &Lease) -> bool {
    old.address == new.address && old.prefix != new.prefix
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(seconds: Option<u32>) -> Lease {
        Lease { seconds, ..Lease::default() }
    }

    #[test]
    fn a_lease_is_renewed_at_half_of_its_time() {
        let second = Duration::from_secs;
        let times = Times::new(second(1000), &lease(Some(800))).unwrap();
        assert_eq!(times, Times { renew: second(1400), rebind: second(1700), end: second(1800) });
        // Half of what is left, at least a minute, and at once when another stage begins.
        assert_eq!(times.again(second(1400)), second(1550));
        assert_eq!(times.again(second(1550)), second(1625));
        assert_eq!(times.again(second(1650)), second(1700));
        assert_eq!(times.again(second(1700)), second(1760));
        assert_eq!(times.again(second(1790)), second(1800));
        assert_eq!(times.again(second(9999)), second(1800));
    }

    #[test]
    fn only_servers_answer_and_only_the_own_one_before_rebinding() {
        let own = Some([10, 0, 0, 1]);
        let from = |last, port| SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, last), port);
        assert!(may_answer(from(1, 67), own));
        assert!(!may_answer(from(2, 67), own));
        assert!(!may_answer(from(1, 1067), own));
        assert!(may_answer(from(2, 67), None));
        assert!(!may_answer(from(2, 68), None));
    }

    #[test]
    fn a_question_is_asked_on_the_own_interface_only() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        sys::bind_to_device(socket.as_fd(), b"lo").unwrap();
        assert!(sys::bind_to_device(socket.as_fd(), b"no-such-device").is_err());
    }

    #[test]
    fn a_lease_is_kept_when_the_kernel_refuses_it() {
        let mut holder = Holder {
            name: b"none".to_vec(),
            // There is no such interface.
            index: i32::MAX.cast_unsigned(),
            mac: [2; 6],
            metric: 100,
            lease: Lease { address: [10, 0, 0, 2], prefix: 16, ..lease(Some(800)) },
            times: None,
            stage: Stage::Bound(None),
        };
        let new = Lease { prefix: 24, ..holder.lease.clone() };
        assert!(holder.configure(&new).is_err());
        assert!(holder.renewed(new.clone(), Duration::from_secs(1000), &mut Log::default()));
        assert_eq!((&holder.lease, holder.due()), (&new, Some(Duration::from_secs(1400))));
        assert!(!holder.renewed(new, Duration::from_secs(2000), &mut Log::default()));
        assert_eq!(holder.due(), Some(Duration::from_secs(2400)));
    }

    #[test]
    fn an_address_with_another_prefix_is_another_one() {
        let new = |address, prefix| Lease { address, prefix, ..Lease::default() };
        assert!(other_prefix(&new([10, 0, 0, 2], 16), &new([10, 0, 0, 2], 24)));
        assert!(!other_prefix(&new([10, 0, 0, 2], 24), &new([10, 0, 0, 2], 24)));
        // Nothing was there before.
        assert!(!other_prefix(&Lease::default(), &new([10, 0, 0, 2], 24)));
    }

    #[test]
    fn leases_without_an_end_and_very_short_ones() {
        assert_eq!(Times::new(Duration::ZERO, &lease(None)), None);
        assert_eq!(Times::new(Duration::ZERO, &lease(Some(u32::MAX))), None);
        let times = Times::new(Duration::ZERO, &lease(Some(0))).unwrap();
        assert_eq!(times.renew, Duration::from_secs(1));
    }
}
