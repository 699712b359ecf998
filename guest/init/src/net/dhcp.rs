//! Messages of DHCP (RFC 2131, 2132, 3442), and their IP packets for one who has no address yet.

/// An IPv4 address.
pub type Address = [u8; 4];

pub const SERVER_PORT: u16 = 67;
pub const CLIENT_PORT: u16 = 68;
const IP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
/// Bytes of a message before its options.
const FIXED: usize = 236;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
/// Shortest message that some relays pass on.
const LEAST: usize = 300;

/// Options.
mod option {
    pub const PAD: u8 = 0;
    pub const MASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const DNS: u8 = 6;
    pub const DOMAIN: u8 = 15;
    pub const MTU: u8 = 26;
    pub const REQUESTED: u8 = 50;
    pub const LEASE_TIME: u8 = 51;
    pub const KIND: u8 = 53;
    pub const SERVER: u8 = 54;
    pub const WANTED: u8 = 55;
    pub const ROUTES: u8 = 121;
    pub const END: u8 = 255;
}

/// What the client says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Is there a server?
    Discover,
    /// That address, please.
    Request {
        /// What was offered.
        address: Address,
        /// By whom.
        server: Address,
    },
    /// That address for longer, please: it is in use.
    Renew {
        /// Which.
        address: Address,
    },
}

/// What the server says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Could have it.
    Offer,
    /// Has it.
    Ack,
    /// Cannot have it.
    Nak,
}

/// A route; a gateway of zeroes means that there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    pub to: Address,
    pub prefix: u8,
    pub gateway: Address,
}

/// What an interface gets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lease {
    pub address: Address,
    /// Bits of the network's part of the address.
    pub prefix: u8,
    pub server: Address,
    pub routes: Vec<Route>,
    pub dns: Vec<Address>,
    pub domain: Vec<u8>,
    pub mtu: Option<u16>,
    /// Seconds that it holds.
    pub seconds: Option<u32>,
}

/// The packet that asks, to everybody.
pub fn ask(ask: Ask, mac: [u8; 6], id: u32, seconds: u16) -> Vec<u8> {
    packet(&request(ask, mac, id, seconds))
}

/// The message that asks.
pub fn request(ask: Ask, mac: [u8; 6], id: u32, seconds: u16) -> Vec<u8> {
    let mut message = vec![0; FIXED];
    // A request, over Ethernet, with addresses of 6 bytes.
    message[..3].copy_from_slice(&[1, 1, 6]);
    message[4..8].copy_from_slice(&id.to_be_bytes());
    message[8..10].copy_from_slice(&seconds.to_be_bytes());
    message[28..34].copy_from_slice(&mac);
    if let Ask::Renew { address } = ask {
        message[12..16].copy_from_slice(&address);
    }
    message.extend(MAGIC);
    let mut put = |code: u8, value: &[u8]| {
        message.extend([code, value.len() as u8]);
        message.extend(value);
    };
    match ask {
        Ask::Discover => put(option::KIND, &[1]),
        Ask::Request { address, server } => {
            put(option::KIND, &[3]);
            put(option::REQUESTED, &address);
            put(option::SERVER, &server);
        }
        Ask::Renew { .. } => put(option::KIND, &[3]),
    }
    put(
        option::WANTED,
        &[
            option::MASK,
            option::ROUTES,
            option::ROUTER,
            option::DNS,
            option::DOMAIN,
            option::MTU,
            option::LEASE_TIME,
        ],
    );
    message.push(option::END);
    message.resize(message.len().max(LEAST), 0);
    message
}

/// Wraps a message of a client without an address, to everybody.
fn packet(message: &[u8]) -> Vec<u8> {
    let udp_len = (UDP_HEADER + message.len()) as u16;
    let total = (IP_HEADER as u16 + udp_len).to_be_bytes();
    // Version 4, 5 words of header, 64 hops, UDP.
    let mut ip = [0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255];
    let sum = !checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut udp = Vec::with_capacity(usize::from(udp_len));
    for word in [CLIENT_PORT, SERVER_PORT, udp_len, 0] {
        udp.extend(word.to_be_bytes());
    }
    udp.extend(message);
    // The pseudo header: both addresses, the protocol, the length.
    let pseudo = [&ip[12..20], &[0, 17], &udp_len.to_be_bytes()].concat();
    let sum = match !checksum(&[&pseudo[..], &udp].concat()) {
        0 => 0xffff,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    [&ip[..], &udp].concat()
}

fn checksum(data: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    let mut sum: u32 = data.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn array<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..)?.first_chunk().copied()
}

fn word(data: &[u8], at: usize) -> Option<u16> {
    array(data, at).map(u16::from_be_bytes)
}

/// The DHCP message in an IP packet for a client. Checksums are not looked at: those of a packet that never left the
/// host may be open.
fn message(packet: &[u8]) -> Option<&[u8]> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let total = usize::from(word(packet, 2)?);
    // Neither a fragment nor followed by one.
    let whole = word(packet, 6)? & 0x3fff == 0;
    if packet[0] >> 4 != 4 || header < IP_HEADER || !whole || *packet.get(9)? != 17 {
        return None;
    }
    let udp = packet.get(header..total)?;
    if word(udp, 0)? != SERVER_PORT || word(udp, 2)? != CLIENT_PORT {
        return None;
    }
    udp.get(UDP_HEADER..usize::from(word(udp, 4)?))
}

/// Reads the answer to a request with `id` and `mac`; `None` for any other packet.
pub fn answer(packet: &[u8], mac: [u8; 6], id: u32) -> Option<(Answer, Lease)> {
    read(message(packet)?, mac, id)
}

/// The same without IP and UDP.
pub fn read(message: &[u8], mac: [u8; 6], id: u32) -> Option<(Answer, Lease)> {
    let is_answer = message.first() == Some(&2);
    if !is_answer
        || array(message, 4)? != id.to_be_bytes()
        || array(message, 28)? != mac
        || array(message, FIXED)? != MAGIC
    {
        return None;
    }
    let mut lease = Lease { address: array(message, 16)?, ..Lease::default() };
    let (mut kind, mut mask, mut routers, mut routes) = (None, None, Vec::new(), None);
    let mut rest = message.get(FIXED + MAGIC.len()..)?;
    while let Some((&code, tail)) = rest.split_first() {
        if code == option::END {
            break;
        }
        if code == option::PAD {
            rest = tail;
            continue;
        }
        let (&len, tail) = tail.split_first()?;
        let (value, tail) = tail.split_at_checked(len.into())?;
        rest = tail;
        match code {
            option::KIND => kind = value.first().copied(),
            option::MASK => mask = array(value, 0),
            option::ROUTER => routers = addresses(value),
            option::DNS => lease.dns = addresses(value),
            option::DOMAIN => lease.domain = domain(value),
            // RFC 2132: the least is 68.
            option::MTU => lease.mtu = word(value, 0).filter(|mtu| *mtu >= 68),
            option::LEASE_TIME => lease.seconds = array(value, 0).map(u32::from_be_bytes),
            option::SERVER => lease.server = array(value, 0)?,
            option::ROUTES => routes = classless(value),
            _ => {}
        }
    }
    let kind = match kind? {
        2 => Answer::Offer,
        5 => Answer::Ack,
        6 => Answer::Nak,
        _ => return None,
    };
    lease.prefix = mask.map_or(Some(32), prefix)?;
    // RFC 3442: where there are such routes, the router counts no more.
    lease.routes = routes.unwrap_or_else(|| {
        let default = |gateway: &Address| Route { to: [0; 4], prefix: 0, gateway: *gateway };
        routers.first().map(default).into_iter().collect()
    });
    let usable = !matches!(lease.address[0], 0 | 127 | 224..);
    (usable || kind == Answer::Nak).then_some((kind, lease))
}

fn addresses(value: &[u8]) -> Vec<Address> {
    value.chunks_exact(4).filter_map(|c| array(c, 0)).collect()
}

/// Bits of a mask, which is ones followed by zeroes.
fn prefix(mask: Address) -> Option<u8> {
    let mask = u32::from_be_bytes(mask);
    let ones = mask.leading_ones();
    (mask.checked_shl(ones).unwrap_or(0) == 0).then_some(ones as u8)
}

/// A name that may go into a file; empty for any other.
fn domain(value: &[u8]) -> Vec<u8> {
    let value = value.strip_suffix(&[0]).unwrap_or(value);
    let plain = value.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    if plain { value.to_vec() } else { Vec::new() }
}

/// RFC 3442: prefix, as many bytes of the address as it needs, gateway. `None` for damaged ones.
fn classless(mut value: &[u8]) -> Option<Vec<Route>> {
    let mut routes = Vec::new();
    while let Some((&prefix, rest)) = value.split_first() {
        let len = usize::from(prefix).div_ceil(8);
        if prefix > 32 || rest.len() < len + 4 {
            return None;
        }
        let mut to = [0; 4];
        to[..len].copy_from_slice(&rest[..len]);
        routes.push(Route { to, prefix, gateway: array(rest, len)? });
        value = &rest[len + 4..];
    }
    Some(routes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAC: [u8; 6] = [2, 3, 4, 5, 6, 7];

    /// An answer as a server sends it.
    fn reply(options: &[u8]) -> Vec<u8> {
        let mut packet = ask(Ask::Discover, MAC, 77, 0);
        packet.truncate(28 + FIXED);
        packet[28] = 2;
        packet[28 + 16..28 + 20].copy_from_slice(&[192, 168, 7, 9]);
        packet.extend(MAGIC);
        packet.extend(options);
        // From the server's port to the client's.
        packet[20..24].copy_from_slice(&[0, 67, 0, 68]);
        let len = packet.len() as u16;
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        packet[24..26].copy_from_slice(&(len - 20).to_be_bytes());
        packet
    }

    #[test]
    fn checksums_of_requests_are_right() {
        let packet = ask(Ask::Request { address: [10, 0, 0, 2], server: [10, 0, 0, 1] }, MAC, 5, 1);
        assert_eq!(checksum(&packet[..20]), 0xffff);
        let len = (packet.len() - 20) as u16;
        let pseudo = [&packet[12..20], &[0, 17], &len.to_be_bytes()].concat();
        assert_eq!(checksum(&[&pseudo[..], &packet[20..]].concat()), 0xffff);
        assert!(packet.len() >= 28 + LEAST);
    }

    #[test]
    fn a_renewal_names_the_address_as_its_own_only() {
        let message = request(Ask::Renew { address: [10, 0, 0, 2] }, MAC, 5, 1);
        assert_eq!(message[12..16], [10, 0, 0, 2]);
        assert_eq!(message[FIXED + 4..FIXED + 8], [option::KIND, 1, 3, option::WANTED]);
    }

    #[test]
    fn a_lease_is_read() {
        let mut options = vec![53, 1, 5, 0, 1, 4, 255, 255, 255, 0, 3, 4, 192, 168, 7, 1, 26, 2, 0xff, 0xf0];
        options.extend([
            6, 8, 1, 1, 1, 1, 8, 8, 8, 8, 15, 4, b'a', b'.', b'b', 0, 51, 4, 0, 0, 1, 0, 54, 4, 10, 0, 0, 1,
        ]);
        let unfinished = reply(&options);
        options.push(255);
        let wanted = Lease {
            address: [192, 168, 7, 9],
            prefix: 24,
            server: [10, 0, 0, 1],
            routes: vec![Route { to: [0; 4], prefix: 0, gateway: [192, 168, 7, 1] }],
            dns: vec![[1; 4], [8; 4]],
            domain: b"a.b".to_vec(),
            mtu: Some(65520),
            seconds: Some(256),
        };
        assert_eq!(answer(&reply(&options), MAC, 77), Some((Answer::Ack, wanted.clone())));
        // Without its end, but whole.
        assert_eq!(answer(&unfinished, MAC, 77), Some((Answer::Ack, wanted)));
        assert_eq!(answer(&reply(&options), MAC, 78), None);
        assert_eq!(answer(&reply(&options), [9; 6], 77), None);
        assert_eq!(answer(&ask(Ask::Discover, MAC, 77, 0), MAC, 77), None);
    }

    #[test]
    fn routes_without_classes_count_more_than_the_router() {
        let options =
            [53, 1, 2, 3, 4, 1, 1, 1, 1, 121, 14, 24, 10, 1, 2, 5, 6, 7, 8, 0, 192, 168, 7, 254, 0, 255];
        let options = [&options[..9], &[121, 13], &options[11..24], &[255]].concat();
        let (kind, lease) = answer(&reply(&options), MAC, 77).unwrap();
        let route = |to, prefix, gateway| Route { to, prefix, gateway };
        assert_eq!(kind, Answer::Offer);
        assert_eq!(
            lease.routes,
            [route([10, 1, 2, 0], 24, [5, 6, 7, 8]), route([0; 4], 0, [192, 168, 7, 254])]
        );
        assert_eq!(lease.prefix, 32);
    }

    #[test]
    fn nonsense_is_no_answer() {
        // No kind; a mask with a hole; an option past the end; a name for a file that is none.
        assert_eq!(answer(&reply(&[1, 4, 255, 0, 0, 0, 255]), MAC, 77), None);
        assert_eq!(answer(&reply(&[53, 1, 5, 1, 4, 255, 0, 255, 0, 255]), MAC, 77), None);
        assert_eq!(answer(&reply(&[53, 1, 5, 6, 200, 1]), MAC, 77), None);
        let (_, lease) = answer(&reply(&[53, 1, 5, 15, 3, b'a', b'\n', b'b', 255]), MAC, 77).unwrap();
        assert_eq!(lease.domain, b"");
        assert_eq!([prefix([255; 4]), prefix([0; 4]), prefix([0, 255, 0, 0])], [Some(32), Some(0), None]);
    }

    proptest! {
        #[test]
        fn no_packet_panics(packet: Vec<u8>) {
            let _ = answer(&packet, MAC, 77);
        }

        #[test]
        fn no_options_panic(options: Vec<u8>) {
            if let Some((_, lease)) = answer(&reply(&options), MAC, 77) {
                prop_assert!(lease.prefix <= 32 && lease.routes.iter().all(|r| r.prefix <= 32));
            }
        }

        #[test]
        fn no_damage_panics(at in 0..280usize, value: u8, cut in 0..280usize) {
            let mut packet = reply(&[53, 1, 5, 121, 5, 0, 1, 2, 3, 4, 255]);
            let at = at % packet.len();
            packet[at] = value;
            packet.truncate(packet.len() - cut % packet.len());
            let _ = answer(&packet, MAC, 77);
        }
    }
}
