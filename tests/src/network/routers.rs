//! Name servers of IPv6 routers: they come while the command runs, on an interface where no DHCP server answers.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use krun::{Net, NetPeer};
use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, netdevice, sendto, socket, sockopt};

use super::{in_namespace, ip};
use crate::harness::{Case, Env, Failure, contains, no_guest, start};

pub const ROUTERS: Case = Case { name: "net_routers", host, guest: no_guest };

/// A router's advertisement: 64 hops, half an hour; for a minute the name server 2001:db8::53 (RFC 4861, 8106).
const ADVERTISEMENT: &[u8] = &[
    134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, // router
    25, 3, 0, 0, 0, 0, 0, 60, 0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x53,
];

/// Tells everybody on the link, again and again.
fn advertise(stop: &AtomicBool) -> Result<(), Failure> {
    let socket = socket(AddressFamily::INET6, SocketType::RAW, Some(ipproto::ICMPV6))?;
    // From further away it would not be believed.
    sockopt::set_ipv6_multicast_hops(&socket, 255)?;
    let index = netdevice::name_to_index(&socket, "tap0")?;
    let everybody = SocketAddrV6::new(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 0, 0, index);
    while !stop.load(Ordering::Acquire) {
        // The link may be down yet.
        let _ = sendto(&socket, ADVERTISEMENT, SendFlags::empty(), &everybody);
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn host(env: &Env) -> Result<(), Failure> {
    in_namespace(|| {
        ip("tuntap add tap0 mode tap")?;
        ip("link set tap0 up")?;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let router = scope.spawn(|| advertise(&stop));
            let mut config = env.shell(
                "n=0; until grep -q 2001: /etc/resolv.conf || [ $n = 300 ]; do sleep 0.1; n=$((n + 1)); done
                cat /etc/resolv.conf",
            );
            config.nets.push(Net::new(NetPeer::Tap("tap0".into()), 1));
            let output = start(config).and_then(|captured| captured.finish());
            stop.store(true, Ordering::Release);
            router.join().map_err(|_| Failure::Wrong("the router panicked".into()))??;
            contains("resolv.conf", &output?.success()?.out(), "nameserver 2001:db8::53\n")
        })
    })
}
