//! Network interfaces.

use std::ffi::{c_char, c_int};
use std::os::fd::RawFd;
use std::path::PathBuf;

use krun_api::{Net, NetPeer, Offloads};

use crate::context::{Context, with};
use crate::start::duplicate;
use crate::{Answer, EINVAL, args};

/// Flag: the first datagram says which protocol it is.
const VFKIT: u32 = 1;
/// Flag: init asks for an address.
const DHCP: u32 = 2;
/// What the two older functions enable.
const COMPAT: Offloads = Offloads::CSUM
    .union(Offloads::GUEST_CSUM)
    .union(Offloads::GUEST_TSO4)
    .union(Offloads::GUEST_UFO)
    .union(Offloads::HOST_TSO4)
    .union(Offloads::HOST_UFO);
/// Hardware address of their interface, if none was set.
const DEFAULT_MAC: [u8; 6] = [0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee];

/// What was said of networks so far.
#[derive(Debug, Default)]
pub struct Nets {
    /// From `krun_add_net_*`.
    added: Vec<Described>,
    /// From `krun_set_passt_fd` or `krun_set_gvproxy_path`; not together with the others.
    older: Option<Peer>,
    older_mac: Option<[u8; 6]>,
}

/// An interface as the caller described it.
#[derive(Debug)]
struct Described {
    peer: Peer,
    mac: [u8; 6],
    offloads: Offloads,
    dhcp: bool,
}

#[derive(Debug)]
enum Peer {
    Stream(Socket),
    Datagram(Socket, bool),
    Tap(String),
}

/// Descriptors are the caller's numbers until the VM starts.
#[derive(Debug)]
enum Socket {
    Path(PathBuf),
    Fd(RawFd),
}

impl Nets {
    /// All of them.
    pub fn take(&mut self) -> Answer<Vec<Net>> {
        let mac = self.older_mac.take().unwrap_or(DEFAULT_MAC);
        let older = self.older.take().map(|peer| Described { peer, mac, offloads: COMPAT, dhcp: false });
        older.into_iter().chain(self.added.drain(..)).map(Described::open).collect()
    }
}

impl Described {
    fn open(self) -> Answer<Net> {
        let own = |fd| duplicate(fd)?.ok_or(EINVAL);
        let peer = match self.peer {
            Peer::Stream(Socket::Path(path)) => NetPeer::Stream(path),
            Peer::Stream(Socket::Fd(fd)) => NetPeer::StreamFd(own(fd)?),
            Peer::Datagram(Socket::Path(path), vfkit) => NetPeer::Datagram { path, vfkit },
            // Who made the connection has said what it is.
            Peer::Datagram(Socket::Fd(fd), _) => NetPeer::DatagramFd(own(fd)?),
            Peer::Tap(name) => NetPeer::Tap(name),
        };
        Ok(Net { peer, mac: self.mac, offloads: self.offloads, dhcp: self.dhcp })
    }
}

/// Adds an interface. `flags` are those of the caller, `known` those that its function has.
fn add(context: &mut Context, peer: Peer, mac: [u8; 6], features: u32, flags: u32, known: u32) -> Answer<()> {
    let offloads = Offloads::from_bits(features).ok_or(EINVAL)?;
    if flags & !known != 0 || context.nets.older.is_some() {
        return Err(EINVAL);
    }
    context.nets.added.push(Described { peer, mac, offloads, dhcp: flags & DHCP != 0 });
    Ok(())
}

/// An address, which a network interface has: neither zero nor one of a group.
///
/// # Safety
/// `mac` is NULL or points to 6 bytes.
unsafe fn address(mac: *const u8) -> Answer<[u8; 6]> {
    if mac.is_null() {
        return Err(EINVAL);
    }
    // SAFETY: not NULL, so 6 bytes by contract.
    let mac = unsafe { mac.cast::<[u8; 6]>().read() };
    if mac[0] & 1 != 0 || mac == [0; 6] { Err(EINVAL) } else { Ok(mac) }
}

/// Exactly one of path and descriptor.
///
/// # Safety
/// `path` is NULL or a string.
unsafe fn socket(path: *const c_char, fd: c_int) -> Answer<Socket> {
    match (path.is_null(), fd) {
        (true, 0..) => Ok(Socket::Fd(fd)),
        // SAFETY: not NULL, so a string by contract.
        (false, ..0) => unsafe { args::path(path) }.map(Socket::Path),
        _ => Err(EINVAL),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_net_unixstream(
    ctx_id: u32,
    path: *const c_char,
    fd: c_int,
    mac: *const u8,
    features: u32,
    flags: u32,
) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a string or NULL, and for an address.
        let (socket, mac) = unsafe { (socket(path, fd)?, address(mac)?) };
        add(context, Peer::Stream(socket), mac, features, flags, DHCP)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_net_unixgram(
    ctx_id: u32,
    path: *const c_char,
    fd: c_int,
    mac: *const u8,
    features: u32,
    flags: u32,
) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a string or NULL, and for an address.
        let (socket, mac) = unsafe { (socket(path, fd)?, address(mac)?) };
        let vfkit = flags & VFKIT != 0;
        add(context, Peer::Datagram(socket, vfkit), mac, features, flags, VFKIT | DHCP)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_net_tap(
    ctx_id: u32,
    tap_name: *const c_char,
    mac: *const u8,
    features: u32,
    flags: u32,
) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a string and an address.
        let (name, mac) = unsafe { (args::text(tap_name)?, address(mac)?) };
        if name.is_empty() {
            return Err(EINVAL);
        }
        add(context, Peer::Tap(name), mac, features, flags, DHCP)
    })
}

fn set_older(context: &mut Context, peer: Peer) -> Answer<()> {
    if !context.nets.added.is_empty() {
        return Err(EINVAL);
    }
    context.nets.older = Some(peer);
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_set_passt_fd(ctx_id: u32, fd: c_int) -> i32 {
    with(ctx_id, |context| {
        if fd < 0 {
            return Err(EINVAL);
        }
        set_older(context, Peer::Stream(Socket::Fd(fd)))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_gvproxy_path(ctx_id: u32, path: *const c_char) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a string.
        let path = unsafe { args::path(path) }?;
        set_older(context, Peer::Datagram(Socket::Path(path), true))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_net_mac(ctx_id: u32, mac: *const u8) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for an address.
        context.nets.older_mac = Some(unsafe { address(mac) }?);
        Ok(())
    })
}
