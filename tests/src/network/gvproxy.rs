//! Networks through gvproxy, as it serves QEMU: address and name server by DHCP, names, TCP and UDP to the host, and
//! connections from the host.
//!
//! gvproxy ends a connection as soon as one side has no more to send, so the sides of these do that last.
//!
//! The datagram listener is not in Linux' gvproxy 0.8.1; `net_datagram` has a small peer of our own instead.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use krun::{Net, NetPeer, Offloads};

use super::{
    Close, PATIENCE, Program, arg, echo_servers, exchange, exchange_all, in_namespace, ping, serve_once,
};
use crate::harness::{Case, Env, Failure, TempDir, contains, start};

pub const GVPROXY: Case = Case { name: "net_gvproxy", host: gvproxy, guest };

/// Router and name server.
const ROUTER: &str = "192.168.127.1";
/// The host's loopback address, as the guest sees it, and its name.
const HOST: &str = "192.168.127.254";
const HOST_NAME: &str = "host.containers.internal";
/// Port of the guest, and of the host, for connections from the host.
const INBOUND: u16 = 7777;
/// Bytes each way.
const AMOUNT: usize = 4 << 20;

fn guest(args: &[OsString]) -> Result<u8, String> {
    let port = arg(args, 0)?;
    let text = |e: std::io::Error| e.to_string();
    let resolver = std::fs::read_to_string("/etc/resolv.conf").map_err(text)?;
    if !resolver.contains(&format!("nameserver {ROUTER}\n")) {
        return Err(format!("resolv.conf: {resolver:?}"));
    }
    exchange_all((HOST, port), AMOUNT)?;
    for len in [1, 1000] {
        ping((HOST, port), len)?;
    }
    let found: Vec<_> = (HOST_NAME, port).to_socket_addrs().map_err(text)?.collect();
    if !found.iter().any(|address| address.ip().to_string() == HOST) {
        return Err(format!("{HOST_NAME} is {found:?}"));
    }
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(text)?;
    socket.connect((ROUTER, 9)).map_err(text)?;
    serve_once(INBOUND, &format!("at {} listening", socket.local_addr().map_err(text)?.ip()))?;
    Ok(0)
}

/// Asks gvproxy to make the guest's port reachable.
fn expose(services: &Path, guest: &str) -> Result<(), Failure> {
    let body = format!(
        "{{\"local\":\"127.0.0.1:{INBOUND}\",\"remote\":\"{guest}:{INBOUND}\",\"protocol\":\"tcp\"}}"
    );
    let mut stream = UnixStream::connect(services)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "POST /services/forwarder/expose HTTP/1.1\r\nHost: gvproxy\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    contains("the answer of gvproxy", &answer, " 200 OK\r\n")
}

fn gvproxy(env: &Env) -> Result<(), Failure> {
    in_namespace(|| {
        let dir = TempDir::new("gvproxy")?;
        let (socket, services) = (dir.path().join("socket"), dir.path().join("services"));
        let port = echo_servers("127.0.0.1")?;
        let url = |path: &Path| format!("unix://{}", path.display());
        for offloads in [Offloads::empty(), Offloads::all()] {
            let program = std::env::var_os("KRUN_TEST_GVPROXY").unwrap_or_else(|| "gvproxy".into());
            let _ = std::fs::remove_file(&services);
            let mut command = Command::new(program);
            command.args(["-ssh-port", "-1", "-listen", &url(&services), "-listen-qemu", &url(&socket)]);
            let _program = Program::start(&mut command, &socket)?;
            let mut config = env.guest_half("net_gvproxy", [port.to_string()]);
            config.nets.push(Net { offloads, ..Net::new(NetPeer::Stream(socket.clone()), 5) });
            let captured = start(config)?;
            // What is wrong, if anything, is on the guest's standard error.
            let inbound = captured.wait_for_output(" listening").and_then(|()| {
                let text = captured.output_so_far();
                let address = text.split(' ').nth(1).unwrap_or_default();
                expose(&services, address)?;
                let stream = TcpStream::connect(("127.0.0.1", INBOUND))?;
                Ok(exchange(&stream, AMOUNT / 4, 9, Close::Late)?)
            });
            captured.finish()?.success()?;
            inbound?;
        }
        Ok(())
    })
}
