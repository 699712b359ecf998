//! `--net`.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use krun::{Net, NetPeer, Offloads};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::args::Run;

/// One such option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetArg {
    peer: Peer,
    mac: Option<[u8; 6]>,
    dhcp: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Peer {
    /// One that this command starts, with its options.
    Passt(Vec<String>),
    Stream(PathBuf),
    Datagram {
        path: PathBuf,
        vfkit: bool,
    },
    Tap(String),
}

const KINDS: &str = "write passt, unix-stream:PATH, unix-dgram:PATH or tap:NAME";

/// Reads `PEER[,OPTION]...`.
pub fn parse(text: &str) -> Result<NetArg, String> {
    let mut words = text.split(',');
    let peer = words.next().unwrap_or_default();
    let peer = match peer.split_once(':') {
        None if peer == "passt" => Peer::Passt(Vec::new()),
        Some((kind, "")) => return Err(format!("{kind}: has nothing after the colon; {KINDS}")),
        Some(("unix-stream", path)) => Peer::Stream(path.into()),
        Some(("unix-dgram", path)) => Peer::Datagram { path: path.into(), vfkit: false },
        Some(("tap", name)) => Peer::Tap(name.into()),
        _ => return Err(format!("there is no network {peer:?}; {KINDS}")),
    };
    let mut arg = NetArg { peer, mac: None, dhcp: true };
    words.try_for_each(|word| apply(&mut arg, word))?;
    Ok(arg)
}

fn apply(arg: &mut NetArg, word: &str) -> Result<(), String> {
    match (word.split_once('='), &mut arg.peer) {
        (Some(("mac", text)), _) => arg.mac = Some(mac(text)?),
        (Some(("dhcp", "on")), _) => arg.dhcp = true,
        (Some(("dhcp", "off")), _) => arg.dhcp = false,
        (Some(("dhcp", other)), _) => return Err(format!("dhcp={other}: write on or off")),
        (Some(("tcp", ports)), Peer::Passt(words)) => words.extend(["-t".into(), ports.into()]),
        (Some(("udp", ports)), Peer::Passt(words)) => words.extend(["-u".into(), ports.into()]),
        (None, Peer::Datagram { vfkit, .. }) if word == "vfkit" => *vfkit = true,
        _ => {
            return Err(format!(
                "unknown option {word}; there are mac=ADDRESS, dhcp=off, for unix-dgram vfkit, for passt tcp=PORTS and udp=PORTS"
            ));
        }
    }
    Ok(())
}

/// `52:54:00:12:34:56`
fn mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            // The parser itself would take a sign.
            let plain = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        })
        .collect();
    let mac = bytes.and_then(|b| <[u8; 6]>::try_from(b).ok());
    mac.ok_or_else(|| format!("mac={text}: write six bytes as in 52:54:00:12:34:56"))
}

/// A program that ends with the value.
#[derive(Debug)]
pub struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // It ends by itself when the machine's side of its socket is closed; this makes sure, and reaps it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Adds all interfaces, and gives back the programs that were started for them.
pub fn add(args: &Run, nets: &mut Vec<Net>, verbose: bool) -> Result<Vec<Program>, String> {
    let mut programs = Vec::new();
    for (n, arg) in args.nets.iter().enumerate() {
        let number = u8::try_from(n).map_err(|_| "--net: more than 256 interfaces".to_owned())?;
        let (peer, offloads) = match &arg.peer {
            Peer::Passt(words) => {
                let (program, socket) = passt(words, verbose)?;
                programs.push(program);
                // It takes segments of any length.
                let offloads = Offloads::CSUM | Offloads::HOST_TSO4 | Offloads::HOST_TSO6;
                (NetPeer::StreamFd(socket), Some(offloads))
            }
            Peer::Stream(path) => (NetPeer::Stream(path.clone()), None),
            Peer::Datagram { path, vfkit } => (NetPeer::Datagram { path: path.clone(), vfkit: *vfkit }, None),
            Peer::Tap(name) => (NetPeer::Tap(name.clone()), None),
        };
        let mut net = Net { dhcp: arg.dhcp, ..Net::new(peer, number) };
        net.offloads = offloads.unwrap_or(net.offloads);
        net.mac = arg.mac.unwrap_or(net.mac);
        nets.push(net);
    }
    Ok(programs)
}

/// Starts passt on one end of a socket pair; the other one is the machine's.
fn passt(words: &[String], verbose: bool) -> Result<(Program, OwnedFd), String> {
    let fail = |e: &dyn std::fmt::Display| format!("--net passt: {e}");
    let (ours, theirs) = UnixStream::pair().map_err(|e| fail(&e))?;
    // Nothing else is started meanwhile that could inherit it.
    fcntl_setfd(&theirs, FdFlags::empty()).map_err(|e| fail(&e))?;
    let mut command = Command::new("passt");
    command.args(["--foreground", "--quiet", "--fd", &theirs.as_raw_fd().to_string()]).args(words);
    // Some versions tell how to start QEMU, and more, whatever they are told.
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(if verbose { Stdio::inherit() } else { Stdio::null() });
    match command.spawn() {
        Ok(child) => Ok((Program(child), ours.into())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(fail(&"there is no program passt; install the package passt"))
        }
        Err(e) => Err(fail(&e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_and_options() {
        let arg = parse("unix-dgram:/run/a:b,vfkit,mac=52:54:00:12:34:5f,dhcp=off").unwrap();
        assert_eq!(arg.peer, Peer::Datagram { path: "/run/a:b".into(), vfkit: true });
        assert_eq!((arg.mac, arg.dhcp), (Some([0x52, 0x54, 0, 0x12, 0x34, 0x5f]), false));
        let arg = parse("passt,tcp=8080:80,udp=53").unwrap();
        assert_eq!(arg.peer, Peer::Passt(["-t", "8080:80", "-u", "53"].map(String::from).to_vec()));
        assert!(arg.dhcp && parse("tap:x").is_ok() && parse("unix-stream:y").is_ok());
    }

    #[test]
    fn mistakes_are_told() {
        for (text, why) in [
            ("", "write passt"),
            ("slirp", "no network \"slirp\""),
            ("tap:", "nothing after the colon"),
            ("passt,mac=1:2", "six bytes"),
            ("passt,mac=052:54:00:12:34:5f", "six bytes"),
            ("passt,mac=+2:54:00:12:34:5f", "six bytes"),
            ("passt,dhcp=no", "on or off"),
            ("tap:x,vfkit", "unknown option vfkit"),
            ("tap:x,tcp=1", "unknown option tcp=1"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
