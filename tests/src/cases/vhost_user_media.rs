//! Devices of other processes, with the back ends of rust-vmm: an input device, sound, a CAN bus; and one that does
//! not answer. As in `vhost_user`, programs that are not there are skipped.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use krun::{DeviceIds, DeviceKind, Error, InputConfig, InputEvent, Outcome, VhostUser, VmConfig};

use super::driver::{Driver, Found};
use super::vhost_user::{Peer, tell, with, words};
use crate::harness::{Case, Env, Failure, TempDir, contains, no_guest, same, start};
use crate::uinput::Uinput;

pub const INPUT: Case = Case { name: "vhost_user_input", host: input, guest: no_guest };
pub const SOUND: Case = Case { name: "vhost_user_sound", host: sound, guest: no_guest };
pub const CAN: Case = Case { name: "vhost_user_can", host: can, guest: no_guest };
pub const HUNG: Case = Case { name: "vhost_user_hung", host: hung, guest: no_guest };

/// What a script says for "this kernel has no driver".
const MISSING: i32 = 77;

/// Shows the device, then the events: six each of a type, a code and a value.
const INPUT_SCRIPT: &str = r#"
import os, struct, sys
try:
    device = os.open("/dev/input/event0", os.O_RDONLY)
except FileNotFoundError:
    sys.exit(77)
def say(path):
    with open("/sys/class/input/event0/device/" + path) as f:
        print(f.read().strip(), end=" ", flush=True)
for path in "name", "id/bustype", "id/vendor", "id/product", "id/version", "capabilities/key":
    say(path)
print("ready", flush=True)
left = 6
while left > 0:
    data = os.read(device, 24 * left)
    for at in range(0, len(data), 24):
        print(*struct.unpack("HHi", data[at + 16:at + 24]), end=" ", flush=True)
        left -= 1
print("done", flush=True)
"#;

fn input(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("vhost-input")?;
    // Keys alone: vhost-device-input 0.1.0 tells nothing of an axis but that it is there.
    let config = InputConfig {
        ids: DeviceIds { bus: 6, vendor: 0x1234, product: 0x5678, version: 9 },
        ..InputConfig::new("krun keys").with(1, [1, 30])
    };
    let uinput = Uinput::new(env, &config)?;
    let at = |path: &std::path::Path| path.display().to_string();
    let args = words(["--socket-path", &at(&dir.path().join("input")), "--event-list", &at(&uinput.event)]);
    let socket = dir.path().join("input0");
    let _peer = Peer::start("vhost-device-input", &args, &socket)?;
    let device = VhostUser::new(DeviceKind::INPUT, &socket);
    let captured = start(with(env.program("python3", ["-c", INPUT_SCRIPT]), device))?;
    if captured.wait_for_output("ready\n").is_err() {
        let output = captured.finish()?;
        return match output.code {
            MISSING => Err(Failure::Skip("this kernel has no evdev or no virtio-input driver".into())),
            _ => output.success().map(|_| ()),
        };
    }
    for (key, value) in [(30, 1), (30, 0), (1, 1)] {
        let event = |kind, code, value| InputEvent { kind, code, value };
        uinput.send(&[event(1, key, value), event(0, 0, 0)])?;
    }
    let done = captured.wait_for_output("done");
    let output = captured.finish()?.success()?.out();
    done?;
    let wanted = "krun keys 0006 1234 5678 0009 40000002 ready\n1 30 1 0 0 0 1 30 0 0 0 0 1 1 1 0 0 0 done\n";
    same("what the guest says", output.as_str(), wanted)
}

/// Plays five buffers of stereo sound, 16 bits at 48 kHz (Linux: include/uapi/sound/asound.h). A fourth of a buffer at a
/// time: the back end plays faster than time goes by, and of a whole buffer that was played since it last looked the
/// driver sees nothing.
const SOUND_SCRIPT: &str = r#"
import fcntl, os, struct, sys, time
def request(number, size, both=True):
    return (3 << 30 if both else 0) | size << 16 | ord("A") << 8 | number
try:
    pcm = os.open("/dev/snd/pcmC0D0p", os.O_WRONLY)
except FileNotFoundError:
    sys.exit(77)
with open("/sys/class/sound/card0/id") as f:
    print(f.read().strip(), end=" ", flush=True)
def mask(bit):
    return struct.pack("8I", 1 << bit, *[0] * 7)
ranges = [(0, 0xffffffff, 0)] * 12
for what, value in (10 - 8, 2), (11 - 8, 48000), (13 - 8, 1024), (17 - 8, 4096):
    ranges[what] = value, value, 4
params = struct.pack("I", 0) + mask(3) + mask(2) + mask(0) + bytes(160)
params += b"".join(struct.pack("3I", *r) for r in ranges) + bytes(108)
params += struct.pack("6I", 0xffffffff, 0, 0, 0, 0, 0) + bytes(72)
fcntl.ioctl(pcm, request(0x11, 608), bytearray(params))
# It begins at once, and does not end when all is played.
never = 1 << 62
params = struct.pack("3I4x7Q2I56x", 0, 1, 0, 1024, 1, 1, never, 0, 0, 0, 0, 0)
fcntl.ioctl(pcm, request(0x13, 136), bytearray(params))
fcntl.ioctl(pcm, request(0x40, 0, False))
def free():
    status = bytearray(152)
    fcntl.ioctl(pcm, 2 << 30 | request(0x20, 152, False), status)
    return struct.unpack("Q", status[64:72])[0]
for n in range(20):
    assert os.write(pcm, bytes(4096)) == 4096
    end = time.monotonic() + 60
    while free() < 4096:
        assert time.monotonic() < end, n
        time.sleep(0.001)
fcntl.ioctl(pcm, request(0x43, 0, False))
os.close(pcm)
print("played", flush=True)
"#;

fn sound(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("vhost-sound")?;
    let socket = dir.path().join("sound");
    let args = words(["--socket", &socket.display().to_string(), "--backend", "null"]);
    let _peer = Peer::start("vhost-device-sound", &args, &socket)?;
    let device = VhostUser::new(DeviceKind::SND, &socket);
    let output = start(with(env.program("python3", ["-c", SOUND_SCRIPT]), device))?.finish()?;
    if output.code == MISSING {
        return Err(Failure::Skip("this kernel has no driver for virtio sound".into()));
    }
    let output = output.success()?.out();
    contains("what the guest says", &output, "played")
}

/// The virtual CAN interface of this host; it goes with the value.
struct Interface;

impl Interface {
    const NAME: &str = "vcan7";

    fn new() -> Result<Self, Failure> {
        for words in [["add", Self::NAME, "type", "vcan"].as_slice(), &["set", Self::NAME, "up"]] {
            let output = Command::new("ip").arg("link").args(words).output()?;
            if !output.status.success() {
                let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                return Err(Failure::Skip(format!("no CAN interface: {why}")));
            }
        }
        Ok(Self)
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", Self::NAME]).output();
    }
}

/// Linux 6.12 has no driver, and leaves the device alone. A driver of a few instructions sends a frame, which comes back
/// over the host's bus: the back end listens there with a socket of its own.
fn can(env: &Env) -> Result<(), Failure> {
    const FEATURES: u32 = 0x10;
    const CONFIGURATION: u32 = 0x100;
    /// Classic frames.
    const CLASSIC: u32 = 1;
    const SEND: u32 = 0;
    const RECEIVE: u32 = 1;
    const CONTROL: u32 = 2;
    let dir = TempDir::new("vhost-can")?;
    let _interface = Interface::new()?;
    let path = dir.path().join("can").display().to_string();
    let args = words(["--socket-path", &path, "--can-devices", Interface::NAME]);
    let socket = dir.path().join("can0");
    let mut peer = Peer::start("vhost-device-can", &args, &socket)?;
    let device = || VhostUser::new(DeviceKind::CAN, &socket);

    let found = Found::new(dir.path(), device())?;
    // Classic frames and FD, indirect descriptors and event indexes; the status of the bus is 0.
    let seen = (found.register(FEATURES).map(|word| word & 0x3000_0007), found.register(CONFIGURATION));
    same("features and configuration", seen, (Some(0x3000_0003), Some(0)))?;

    // What it is, its length, two reserved words, flags, the identifier, data.
    let frame = |kind: u16| {
        let words = [kind, 5, 0, 0, 0, 0, 0x123, 0].map(u16::to_le_bytes);
        [words.concat(), b"hello".to_vec()].concat()
    };
    let mut driver = Driver::new(&found, CLASSIC, 3);
    driver.send(RECEIVE, &[], 128)?;
    driver.send(CONTROL, &[1, 2], 1)?;
    driver.wait(CONTROL, 1);
    driver.send(SEND, &frame(1), 1)?;
    driver.wait(SEND, 1);
    driver.wait(RECEIVE, 1);
    peer.await_socket(&socket)?;
    let done = driver.run(dir.path(), device())?;
    let states = (done.answer(CONTROL, 0)?, done.answer(SEND, 0)?);
    same("the controller's start, and a frame", states, ([0], [0]))?;
    let received: [u8; 21] = done.answer(RECEIVE, 0)?;
    same("the frame from the bus", &received[..], &frame(0x101)[..])?;

    peer.await_socket(&socket)?;
    let script = "cat /sys/bus/virtio/devices/*/device | grep -c 0x0024; exit 5";
    let output = start(with(env.shell(script), device()))?.finish()?;
    same("devices that Linux sees, and the end", (output.out().as_str(), output.code), ("1\n", 5))
}

/// A back end that says what it can, and then nothing more: answers one request, the first for its features. Says when
/// the connection has ended.
fn silent(mut socket: UnixStream, ended: &mpsc::Sender<()>) -> std::io::Result<()> {
    const GET_FEATURES: u32 = 1;
    const VERSION_1: u64 = 1 << 32;
    let mut answered = false;
    let mut header = [0; 12];
    while socket.read_exact(&mut header).is_ok() {
        let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|n| header[at + n]));
        let mut payload = vec![0; word(8) as usize];
        socket.read_exact(&mut payload)?;
        if word(0) == GET_FEATURES && !answered {
            answered = true;
            let words = [GET_FEATURES, 1 | 1 << 2, 8].map(u32::to_ne_bytes).concat();
            socket.write_all(&[words, VERSION_1.to_ne_bytes().to_vec()].concat())?;
        }
    }
    // Nobody may be interested any more.
    let _ = ended.send(());
    Ok(())
}

/// Killing a machine does not wait for an answer, though it may take an hour.
fn hung(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("vhost-hung")?;
    let socket = dir.path().join("socket");
    let listener = UnixListener::bind(&socket)?;
    let (sender, ended) = mpsc::channel();
    thread::spawn(move || -> std::io::Result<()> {
        loop {
            silent(listener.accept()?.0, &sender)?;
        }
    });
    let device = VhostUser { timeout: Duration::from_secs(3600), ..VhostUser::new(DeviceKind::RNG, &socket) };
    let config = VmConfig { rng: false, ..with(env.shell("echo runs; read line"), device) };
    let mut captured = start(config)?;
    captured.wait_for_output("runs")?;
    same("the connection is held", ended.try_recv(), Err(mpsc::TryRecvError::Empty))?;
    captured.vm.kill();
    match captured.vm.wait() {
        Err(e) if matches!(&*e, Error::Ended { outcome: Outcome::Killed, .. }) => {}
        other => return Err(Failure::Wrong(format!("a kill was told as {other:?}"))),
    }
    // The machine's guest is gone, and with it what it could be told.
    let _ = tell(&mut captured, "");
    Ok(ended.recv_timeout(Duration::from_secs(20))?)
}
