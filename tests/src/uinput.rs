//! An input device of this host that a test makes up (Linux: include/uapi/linux/uinput.h).

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use krun::{InputConfig, InputEvent};
use rustix::fs::OFlags;

use crate::harness::{Env, Failure};

/// Bytes of `struct input_event`; its last eight are type, code and value.
const RECORD: usize = 24;
const TIME: usize = RECORD - 8;

/// Tells the kernel, on its standard input, what the device is: its name, four numbers, and what it knows as
/// `type:code`, with the five numbers of an axis after that. Type 0 stands for properties.
const SET_UP: &str = r#"
import fcntl, struct, sys
def request(number, size):
    return 1 << 30 | size << 16 | ord("U") << 8 | number
codes = {1: 101, 2: 102, 3: 103, 0x11: 105}
for word in sys.argv[6:]:
    kind, code, *axis = map(int, word.split(":"))
    if kind == 0:
        fcntl.ioctl(0, request(110, 4), code)
        continue
    fcntl.ioctl(0, request(100, 4), kind)
    fcntl.ioctl(0, request(codes[kind], 4), code)
    if axis:
        fcntl.ioctl(0, request(4, 28), struct.pack("HHiiiiii", code, 0, 0, *axis))
ids = map(int, sys.argv[2:6])
fcntl.ioctl(0, request(3, 92), struct.pack("HHHH80sI", *ids, sys.argv[1].encode(), 0))
fcntl.ioctl(0, 0x5501)
"#;

/// The device; it goes with the value.
pub struct Uinput {
    file: File,
    /// `/dev/input/eventN`.
    pub event: PathBuf,
}

fn bits(bytes: &[u8]) -> impl Iterator<Item = usize> {
    (0..bytes.len() * 8).filter(|n| bytes[n / 8] & 1 << (n % 8) != 0)
}

fn words(config: &InputConfig) -> Vec<String> {
    let ids = &config.ids;
    let mut words = vec![String::from_utf8_lossy(&config.name).into_owned()];
    words.extend([ids.bus, ids.vendor, ids.product, ids.version].map(|n| n.to_string()));
    words.extend(bits(&config.properties).map(|n| format!("0:{n}")));
    for (kind, codes) in &config.events {
        for code in bits(codes) {
            let axis = config.axes.get(&(code as u8)).filter(|_| *kind == 3).map(|a| {
                let [min, max] = [a.min, a.max].map(|n| n as i32);
                format!(":{min}:{max}:{}:{}:{}", a.fuzz, a.flat, a.resolution)
            });
            words.push(format!("{kind}:{code}{}", axis.unwrap_or_default()));
        }
    }
    words
}

impl Uinput {
    /// Makes one of all that `config` says but for the serial number.
    pub fn new(env: &Env, config: &InputConfig) -> Result<Self, Failure> {
        let mut options = File::options();
        let file = match options.read(true).write(true).open("/dev/uinput") {
            Ok(file) => file,
            Err(e) => return Err(Failure::Skip(format!("/dev/uinput: {e}"))),
        };
        // This host may have no Python, the guest's root has.
        let mut command = Command::new("chroot");
        command.arg(&env.root).args(["python3", "-c", SET_UP]).args(words(config));
        let output = command.stdin(Stdio::from(file.try_clone()?)).output()?;
        if !output.status.success() {
            return Err(Failure::Wrong(format!("uinput: {}", String::from_utf8_lossy(&output.stderr))));
        }
        rustix::fs::fcntl_setfl(&file, OFlags::NONBLOCK)?;
        let event = find(&config.name)?;
        Ok(Self { file, event })
    }

    /// Sends events as if from the device.
    pub fn send(&self, events: &[InputEvent]) -> Result<(), Failure> {
        for event in events {
            let mut record = [0; RECORD];
            record[TIME..TIME + 2].copy_from_slice(&event.kind.to_ne_bytes());
            record[TIME + 2..TIME + 4].copy_from_slice(&event.code.to_ne_bytes());
            record[TIME + 4..].copy_from_slice(&event.value.to_ne_bytes());
            (&self.file).write_all(&record)?;
        }
        Ok(())
    }

    /// The next event for the device, such as a light to switch.
    pub fn receive(&self) -> Result<Option<InputEvent>, Failure> {
        let mut record = [0; RECORD];
        match (&self.file).read(&mut record) {
            Ok(_) => {
                let half = |at: usize| u16::from_ne_bytes([record[at], record[at + 1]]);
                let value = u32::from(half(TIME + 4)) | u32::from(half(TIME + 6)) << 16;
                Ok(Some(InputEvent { kind: half(TIME), code: half(TIME + 2), value }))
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// The device file of the device with this name.
fn find(name: &[u8]) -> Result<PathBuf, Failure> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        for entry in fs::read_dir("/sys/class/input")? {
            let entry = entry?;
            let of = fs::read(entry.path().join("device/name")).unwrap_or_default();
            let file = PathBuf::from("/dev/input").join(entry.file_name());
            if of.trim_ascii_end() == name
                && entry.file_name().to_string_lossy().starts_with("event")
                && file.exists()
            {
                return Ok(file);
            }
        }
        if Instant::now() > end {
            return Err(Failure::Wrong("the made-up input device has no file".into()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
