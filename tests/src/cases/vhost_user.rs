//! Devices of other processes, with programs that others have written: QEMU's storage daemon, virtiofsd, and the
//! devices of rust-vmm. Those that are not there are skipped; `KRUN_TEST_PEERS` has the directories to look in.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use krun::{DeviceKind, VhostUser, VmConfig};

use super::disk::{MIB, image};
use crate::harness::{Captured, Case, Env, Failure, TempDir, find, no_guest, noise, run, same, start};
use crate::network;

pub const BLOCK: Case = Case { name: "vhost_user_block", host: block, guest: no_guest };
pub const RNG: Case = Case { name: "vhost_user_rng", host: rng, guest: no_guest };
pub const FS: Case = Case { name: "vhost_user_fs", host: fs, guest: no_guest };
pub const VSOCK: Case = Case { name: "vhost_user_vsock", host: vsock, guest: no_guest };
pub const CONSOLE: Case = Case { name: "vhost_user_console", host: console, guest: no_guest };

/// How long a program may take to listen.
const PATIENCE: Duration = Duration::from_secs(30);

/// A back end that ends with the value.
pub(super) struct Peer(Child);

impl Peer {
    /// Starts it; it listens at `socket` before this returns.
    pub(super) fn start(program: &str, args: &[String], socket: &Path) -> Result<Self, Failure> {
        let _ = std::fs::remove_file(socket);
        let mut command = Command::new(find(program)?);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut peer = Self(command.spawn()?);
        peer.await_socket(socket)?;
        Ok(peer)
    }

    /// Waits until it listens: those of rust-vmm do so anew after each connection.
    pub(super) fn await_socket(&mut self, socket: &Path) -> Result<(), Failure> {
        let start = Instant::now();
        while !network::listens(socket)? {
            if let Some(status) = self.0.try_wait()? {
                return Err(Failure::Wrong(format!(
                    "the back end at {} has ended: {status}",
                    socket.display()
                )));
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure::Wrong(format!("nobody listens at {}", socket.display())));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

pub(super) fn with(mut config: VmConfig, device: VhostUser) -> VmConfig {
    config.vhost_user.push(device);
    config
}

/// Lets the guest go on.
pub(super) fn tell(captured: &mut Captured, line: &str) -> Result<(), Failure> {
    let stdin = captured.stdin.as_mut().ok_or_else(|| Failure::Wrong("no standard input".into()))?;
    Ok(writeln!(stdin, "{line}")?)
}

/// QEMU's storage daemon with one image.
fn storage(dir: &Path) -> Result<Peer, Failure> {
    let at = |name: &str| dir.join(name).display().to_string();
    let args = [
        "--blockdev".to_owned(),
        format!("file,filename={},node-name=f", at("image")),
        "--export".to_owned(),
        format!(
            "vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on,num-queues=2",
            at("block")
        ),
    ];
    Peer::start("qemu-storage-daemon", &args, &dir.join("block"))
}

/// Writes and reads; after the process was killed and another has taken its place, takes the device
/// out of service and back, and goes on.
const BLOCK_SCRIPT: &str = r#"
import hashlib, mmap, os, sys
MIB = 1 << 20
def pattern(n):
    return hashlib.sha256(b"%d" % n).digest() * (MIB // 32)
def opened():
    return os.open("/dev/vda", os.O_RDWR | os.O_DIRECT)
disk = opened()
page = mmap.mmap(-1, MIB)
def write(n):
    page[:] = pattern(n)
    assert os.pwrite(disk, page, n * MIB) == MIB
def check(n):
    assert os.preadv(disk, [page], n * MIB) == MIB
    assert page[:] == pattern(n), n
for n in range(8):
    write(n)
for n in range(8):
    check(n)
os.close(disk)
print("idle", end=".", flush=True)
sys.stdin.readline()
drivers = "/sys/bus/virtio/drivers/virtio_blk/"
name = [n for n in os.listdir(drivers) if n.startswith("virtio")][0]
for step in "unbind", "bind":
    with open(drivers + step, "w") as f:
        f.write(name)
disk = opened()
for n in range(8, 32):
    write(n)
for n in range(32):
    check(n)
os.fsync(disk)
print("done", end=".", flush=True)
"#;

fn block(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("vhost-block")?;
    let disk = dir.path().join("image");
    image(&disk, 32 * MIB)?;
    let peer = storage(dir.path())?;
    let device = VhostUser::new(DeviceKind::BLOCK, dir.path().join("block"));
    let mut captured = start(with(env.program("python3", ["-c", BLOCK_SCRIPT]), device))?;
    captured.wait_for_output("idle.")?;
    drop(peer);
    let _peer = storage(dir.path())?;
    tell(&mut captured, "go on")?;
    same("what the guest says", captured.finish()?.success()?.out().as_str(), "idle.done.")?;
    let bytes = std::fs::read(&disk)?;
    let zero = bytes.chunks(MIB as usize).position(|part| part.iter().all(|b| *b == 0));
    same("length, and a part that was not written", (bytes.len() as u64, zero), (32 * MIB, None))
}

/// Takes random bytes; waits while the process is replaced; takes the device out of service and back, and goes on.
const RNG_SCRIPT: &str = r#"set -e
cat /sys/class/misc/hw_random/rng_current
test $(head -c 8000 /dev/hwrng | gzip | wc -c) -gt 7900
echo taken; read line
for device in /sys/bus/virtio/drivers/virtio_rng/virtio*; do name=${device##*/}; done
echo $name > /sys/bus/virtio/drivers/virtio_rng/unbind
echo $name > /sys/bus/virtio/drivers/virtio_rng/bind
test $(head -c 8000 /dev/hwrng | gzip | wc -c) -gt 7900
echo again"#;

fn rng(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("vhost-rng")?;
    let socket = dir.path().join("rng0");
    let listen = || {
        let args = words(["--socket-path", &dir.path().join("rng").display().to_string()]);
        Peer::start("vhost-device-rng", &args, &socket)
    };
    let peer = listen()?;
    let device = VhostUser::new(DeviceKind::RNG, &socket);
    let mut captured = start(VmConfig { rng: false, ..with(env.shell(RNG_SCRIPT), device) })?;
    captured.wait_for_output("taken\n")?;
    drop(peer);
    let _peer = listen()?;
    tell(&mut captured, "go on")?;
    same("what the guest says", captured.finish()?.success()?.out().as_str(), "virtio_rng.0\ntaken\nagain\n")
}

const FS_SCRIPT: &str = "set -e; mkdir -p /run/share; mount -t virtiofs theirs /run/share; cd /run/share
    test $(wc -l < numbers) = 1000; cp numbers copy; mv copy moved; ln -s moved link; mkdir -p a/b/c
    for i in $(seq 50); do echo $i > a/b/c/$i; done; test $(ls a/b/c | wc -l) = 50
    dd if=/dev/urandom of=big bs=1M count=4 2>/dev/null; sync
    echo 3 > /proc/sys/vm/drop_caches; sha256sum < big; cd /; umount /run/share
    mount -t virtiofs theirs /run/share; cmp /run/share/numbers /run/share/link; umount /run/share";

fn fs(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("vhost-fs")?;
    let (share, socket) = (dir.path().join("share"), dir.path().join("socket"));
    std::fs::create_dir(&share)?;
    std::fs::write(share.join("numbers"), (1..=1000).map(|n| format!("{n}\n")).collect::<String>())?;
    for told in [true, false] {
        let paths = [&share, &socket].map(|p| p.display().to_string());
        let mut args = words(["--shared-dir", &paths[0], "--socket-path", &paths[1], "--sandbox", "none"]);
        args.extend(words(["--log-level", "off"]));
        if told {
            args.extend(words(["--tag", "theirs"]));
        }
        let _peer = Peer::start("virtiofsd", &args, &socket)?;
        let tag = (!told).then(|| "theirs".to_owned());
        let device = VhostUser { tag, ..VhostUser::new(DeviceKind::FS, &socket) };
        let output = run(with(env.shell(FS_SCRIPT), device))?.success()?.out();
        let sum = super::disk::tool("sha256sum", &[&share.join("big").display().to_string()])?;
        let sum = sum.map(|(_, text)| text.split(' ').next().unwrap_or_default().to_owned());
        same("the sum of what was written", Some(output.replace("  -\n", "")), sum)?;
        std::fs::remove_dir_all(share.join("a"))?;
        std::fs::remove_file(share.join("link"))?;
    }
    Ok(())
}

/// Takes so many bytes and sends them back. Their number says where they end: with the end of what one side sends
/// vhost-device-vsock 0.3 takes the connection down both ways.
const VSOCK_SCRIPT: &str = r#"
import socket
for n in range(3):
    s = socket.socket(socket.AF_VSOCK)
    s.connect((2, 5000))
    data = b""
    while len(data) < 30000:
        part = s.recv(1 << 16)
        assert part, len(data)
        data += part
    s.sendall(data[::-1])
    assert s.recv(1) == b""
    s.close()
"#;

fn vsock(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("vhost-vsock")?;
    let at = |name: &str| dir.path().join(name).display().to_string();
    let args = words(["--guest-cid", "3", "--socket", &at("vsock"), "--uds-path", &at("host")]);
    let socket = dir.path().join("vsock");
    let _peer = Peer::start("vhost-device-vsock", &args, &socket)?;
    let listener = UnixListener::bind(at("host_5000"))?;
    let device = VhostUser::new(DeviceKind::VSOCK, &socket);
    let captured = start(with(env.program("python3", ["-c", VSOCK_SCRIPT]), device))?;
    for seed in 1..4 {
        let (mut stream, _) = listener.accept()?;
        let mut data = noise(30_000, seed);
        stream.write_all(&data)?;
        let mut back = vec![0; data.len()];
        stream.read_exact(&mut back)?;
        drop(stream);
        data.reverse();
        same("length, and whether it is the same", (back.len(), back == data), (data.len(), true))?;
    }
    captured.finish()?.success().map(|_| ())
}

/// The console that is not the machine's own, and comes after that.
const CONSOLE_SCRIPT: &str = "set -e; exec 3<>/dev/hvc1; stty raw -echo <&3; echo ready >&3
    heard=$(head -c 1 <&3); echo \"heard $heard\" >&3; echo heard; read line";

fn console(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("vhost-console")?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let (socket, number) = (dir.path().join("console0"), port.to_string());
    let path = dir.path().join("console").display().to_string();
    let args = words(["--socket-path", &path, "--backend", "network", "--tcp-port", &number]);
    let _peer = Peer::start("vhost-device-console", &args, &socket)?;
    let device = VhostUser::new(DeviceKind::CONSOLE, &socket);
    let mut captured = start(with(env.shell(CONSOLE_SCRIPT), device))?;
    let begin = Instant::now();
    let mut stream = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(e) if begin.elapsed() > PATIENCE => return Err(e.into()),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    read_until(&mut stream, "ready")?;
    // One byte: vhost-device-console 0.1.0 takes all buffers that the guest has put out, fills one and forgets the
    // others. What comes next gets there or not, as the guest has put out another in time, or too early.
    stream.write_all(b"x")?;
    read_until(&mut stream, "heard x")?;
    tell(&mut captured, "end")?;
    captured.finish()?.success().map(|_| ())
}

fn read_until(stream: &mut TcpStream, part: &str) -> Result<(), Failure> {
    let mut text = String::new();
    while !text.contains(part) {
        let mut bytes = [0; 100];
        match stream.read(&mut bytes) {
            Ok(n @ 1..) => text.push_str(&String::from_utf8_lossy(&bytes[..n])),
            other => return Err(Failure::Wrong(format!("{other:?} after {text:?}, waiting for {part:?}"))),
        }
    }
    Ok(())
}
