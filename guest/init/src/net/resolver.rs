//! The name servers' file.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::mount_bind;

use super::dhcp::Lease;
use crate::mounts::make_directories;

/// Where programs look for it.
const PATH: &[u8] = b"/etc/resolv.conf";
/// Where ours is until it is mounted there.
const OWN: &str = "/dev/.resolv.conf";
/// Name servers that programs read.
const MOST: usize = 3;

/// Makes `/etc/resolv.conf` say what the leases say. The root's own file, which may be the host's, is covered and not
/// changed; where there is none, an empty one is made to be covered. Gives back the file, unless there was nothing to
/// say.
pub fn write<'a>(
    leases: impl Iterator<Item = &'a Lease> + Clone,
    others: &[String],
) -> Result<Option<OwnedFd>, Errno> {
    let Some(text) = contents(leases, others) else { return Ok(None) };
    let mode = Mode::from_raw_mode(0o644);
    let file =
        rustix::fs::open(OWN, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC, mode)?;
    let result = rustix::io::write(&file, text.as_bytes()).and_then(|_| cover(mode));
    let _ = rustix::fs::unlink(OWN);
    result.map(|()| Some(file))
}

/// Makes the file that [`write()`] made say something else.
pub fn update<'a>(
    file: &OwnedFd,
    leases: impl Iterator<Item = &'a Lease> + Clone,
    others: &[String],
) -> Result<(), Errno> {
    // Old servers are better than none.
    let Some(text) = contents(leases, others) else { return Ok(()) };
    rustix::io::pwrite(file, text.as_bytes(), 0)?;
    rustix::fs::ftruncate(file, text.len() as u64)
}

fn cover(mode: Mode) -> Result<(), Errno> {
    match mount_bind(OWN, PATH) {
        Err(Errno::NOENT) => {}
        result => return result,
    }
    let target = match rustix::fs::readlink(PATH, Vec::new()) {
        Ok(target) => target.into_bytes(),
        Err(_) => PATH.to_vec(),
    };
    // A link whose target is made by a service that does not run here.
    let target = if target.starts_with(b"/") { target } else { [b"/etc/", &target[..]].concat() };
    if let Some(slash) = target.iter().rposition(|b| *b == b'/') {
        make_directories(&target[..slash.max(1)])?;
    }
    rustix::fs::openat(CWD, &target[..], OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC, mode)?;
    mount_bind(OWN, PATH)
}

/// The text; `None` when there is nothing to say. The leases' servers come first.
fn contents<'a>(leases: impl Iterator<Item = &'a Lease> + Clone, others: &[String]) -> Option<String> {
    let domain = leases.clone().map(|l| &l.domain).find(|d| !d.is_empty());
    let mut text = domain.map(|d| format!("search {}\n", String::from_utf8_lossy(d))).unwrap_or_default();
    let mut servers: Vec<String> = Vec::new();
    let of_leases = leases.flat_map(|l| &l.dns).map(|address| Ipv4Addr::from(*address).to_string());
    for server in of_leases.chain(others.iter().cloned()) {
        if !servers.contains(&server) && servers.len() < MOST {
            servers.push(server);
        }
    }
    for server in &servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    (!servers.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_of_all_leases_once_each() {
        let lease = |domain: &str, dns: &[[u8; 4]]| Lease {
            domain: domain.into(),
            dns: dns.to_vec(),
            ..Lease::default()
        };
        let leases = [lease("", &[[1; 4], [2; 4]]), lease("a.b", &[[1; 4], [3; 4], [4; 4]])];
        let wanted = "search a.b\nnameserver 1.1.1.1\nnameserver 2.2.2.2\nnameserver 3.3.3.3\n";
        assert_eq!(contents(leases.iter(), &["fe80::1%2".into()]).as_deref(), Some(wanted));
        assert_eq!(contents([lease("a", &[])].iter(), &[]), None);
        let wanted = "nameserver 1.1.1.1\nnameserver fe80::1%2\n";
        let both = contents([lease("", &[[1; 4]])].iter(), &["fe80::1%2".into()]);
        assert_eq!(both.as_deref(), Some(wanted));
    }
}
