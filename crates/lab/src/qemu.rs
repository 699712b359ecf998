//! QEMU's command line and process.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use krun_wire::STDIO_PORTS;
use krun_wire::host::{CONTROL_PORT, ROLE, ROOT_TAG};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::command::escaped;
use crate::{Engine, Error, sys};

/// The emulator's program. The emulated host is an x86-64 one whatever this machine is.
const PROGRAM: &str = "qemu-system-x86_64";

/// Directories that one command can have writable.
///
/// Each is a device, and the machine has eight places for devices: one is the root's, one the ports'. The
/// devices are part of a template, so those that a command does not need export an empty directory.
pub const WRITABLE_SLOTS: usize = 6;

/// Environment variable that tells QEMU's shell where to save its state.
pub const STATE_VARIABLE: &str = "KRUN_LAB_STATE";

/// How much of the end of the log an error shows, in bytes.
const LOG_TAIL: u64 = 4096;

/// Tag of the n-th writable export.
pub fn slot_tag(n: usize) -> String {
    format!("rw{n}")
}

/// QEMU in `PATH`.
///
/// # Errors
/// It is not there.
pub fn find() -> Result<PathBuf, Error> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let programs = std::env::split_paths(&path).map(|dir| dir.join(PROGRAM));
    let runs = |p: &PathBuf| rustix::fs::access(p, rustix::fs::Access::EXEC_OK).is_ok() && p.is_file();
    programs.into_iter().find(runs).ok_or(Error::NoQemu { program: PROGRAM })
}

/// How the machine comes to life.
#[derive(Debug)]
pub enum Birth<'a> {
    /// Boots, with its memory in `ram`, to be saved to `state`.
    Template { dir: &'a Path },
    /// Waits to be told to continue as the template in this directory, whose state is to be inherited.
    Resume { dir: &'a Path, state: OwnedFd },
    /// Boots to run one command; the initial RAM disk is to be inherited.
    Cold { initrd: OwnedFd },
}

/// This side of the machine's ports.
#[derive(Debug)]
pub struct Ports {
    /// The conversation with its process 1.
    pub control: UnixStream,
    /// The command's standard streams.
    pub stdio: [UnixStream; 3],
}

/// A running QEMU.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    /// What it and its machine's serial console print.
    log: File,
    /// The monitor, where there is a template.
    pub monitor: Option<UnixStream>,
}

/// The machine, but for descriptors and what its devices are connected to. Also a template's key.
pub fn machine(engine: &Engine) -> Vec<String> {
    let mut args: Vec<String> = [
        "-M",
        "microvm,acpi=off,memory-backend=ram",
        "-m",
        &engine.memory_mib.to_string(),
        "-accel",
        "tcg,thread=multi,tb-size=512",
        // The nested paging of AMD's processors is what QEMU can emulate. A time stamp counter that may
        // be trusted keeps Linux from clocks that make the guests in it hang.
        "-cpu",
        "EPYC,+invtsc",
        "-smp",
        &engine.cpus.to_string(),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "chardev:log",
        "-device",
        &format!("virtio-serial-device,max_ports={}", STDIO_PORTS.len() + 2),
        // Port 0 is for consoles.
        "-device",
        &format!("virtserialport,nr=1,chardev=control,name={CONTROL_PORT}"),
    ]
    .map(str::to_owned)
    .into();
    for (n, name) in STDIO_PORTS.iter().enumerate() {
        args.push("-device".into());
        args.push(format!("virtserialport,nr={},chardev=stdio{n},name={name}", n + 2));
    }
    args.push("-device".into());
    args.push(format!("virtio-9p-device,fsdev=root,mount_tag={ROOT_TAG}"));
    args
}

fn joined(parts: &[&OsStr]) -> OsString {
    let mut all = OsString::new();
    parts.iter().for_each(|part| all.push(part));
    all
}

/// The exported directories. With `empty`, a directory, there is a device for every slot.
fn exports(empty: Option<&Path>, writable: &[PathBuf]) -> Vec<OsString> {
    let option = |id: &str, path: &Path, rest: &str| {
        let start = format!("local,id={id},path=");
        // Owners and modes are those of this machine, as far as QEMU may set them. Several of its file
        // systems in one export may use the same numbers for different files.
        let rest = format!(",security_model=none,multidevs=remap{rest}");
        [OsString::from("-fsdev"), joined(&[start.as_ref(), &escaped(path), rest.as_ref()])]
    };
    let mut args = Vec::from(option("root", Path::new("/"), ",readonly=on"));
    for n in 0..WRITABLE_SLOTS {
        let tag = slot_tag(n);
        args.extend(match (writable.get(n), empty) {
            (Some(path), _) => option(&tag, path, ""),
            (None, Some(empty)) => option(&tag, empty, ",readonly=on"),
            (None, None) => break,
        });
        args.push("-device".into());
        args.push(format!("virtio-9p-device,fsdev={tag},mount_tag={tag}").into());
    }
    args
}

/// The machine's memory, and what it continues from.
fn memory(engine: &Engine, birth: &Birth<'_>) -> Vec<OsString> {
    let in_file = |dir: &Path, share: &str| {
        let size = engine.memory_mib;
        let start = format!("memory-backend-file,id=ram,size={size}M,share={share},mem-path=");
        vec!["-object".into(), joined(&[start.as_ref(), &escaped(&dir.join("ram"))])]
    };
    match birth {
        Birth::Template { dir } => in_file(dir, "on"),
        Birth::Resume { dir, .. } => {
            let mut args = in_file(dir, "off");
            args.extend(["-incoming", "defer"].map(OsString::from));
            args
        }
        Birth::Cold { .. } => {
            let size = engine.memory_mib;
            vec!["-object".into(), format!("memory-backend-ram,id=ram,size={size}M").into()]
        }
    }
}

/// The kernel's command line. `khz` is the frequency of the time stamp counter: given, nothing needs
/// measuring, and nothing is measured wrong because this machine is busy.
pub fn kernel_line(khz: u64) -> String {
    // An emulator runs a repeated string instruction one repetition at a time: clearing a page by it takes
    // four times as long as by plain stores, and clearing pages was a ninth of the time of a guest's boot.
    format!(
        "console=ttyS0 quiet panic=-1 reboot=t clearcpuid=rep_good tsc=reliable tsc_early_khz={khz} {ROLE}"
    )
}

/// Frequency in kHz of the counter that the machine sees, measured in a few milliseconds.
fn counter_khz() -> u64 {
    const TIME: Duration = Duration::from_millis(10);
    const NANOSECONDS_PER_MS: u64 = 1_000_000;
    let Some(first) = sys::time_stamp() else { return NANOSECONDS_PER_MS };
    let start = Instant::now();
    std::thread::sleep(TIME);
    let (last, elapsed) = (sys::time_stamp().unwrap_or(first), start.elapsed());
    let ticks = u128::from(last.saturating_sub(first)) * u128::from(NANOSECONDS_PER_MS);
    u64::try_from(ticks / elapsed.as_nanos().max(1)).unwrap_or(NANOSECONDS_PER_MS)
}

fn pair() -> Result<(UnixStream, OwnedFd), Error> {
    let (near, far) = UnixStream::pair().map_err(Error::host("creating a socket"))?;
    Ok((near, far.into()))
}

/// A file without a name.
pub fn in_memory(bytes: &[u8]) -> Result<OwnedFd, Error> {
    let file =
        memfd_create("krun-lab", MemfdFlags::CLOEXEC).map_err(Error::host("creating a file in memory"))?;
    let mut file = File::from(file);
    file.write_all(bytes).map_err(Error::host("writing a file in memory"))?;
    Ok(file.into())
}

/// The name by which a process that inherits `fd` can open it.
pub fn inherited_path(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

impl Qemu {
    /// Starts QEMU; `initrd` is the initial RAM disk.
    pub fn spawn(
        engine: &Engine,
        initrd: &Path,
        birth: Birth<'_>,
        writable: &[PathBuf],
    ) -> Result<(Self, Ports), Error> {
        let mut command = Command::new(&engine.qemu);
        command
            .args(["-chardev", "stdio,id=log,signal=off"])
            .args(machine(engine))
            .args(memory(engine, &birth));
        let empty = match &birth {
            Birth::Template { dir } | Birth::Resume { dir, .. } => Some(dir.join("empty")),
            Birth::Cold { .. } => None,
        };
        command.args(exports(empty.as_deref(), writable));
        let mut inherited = Vec::new();
        let mut socket = |id: &str| {
            let (near, far) = pair()?;
            command.arg("-chardev").arg(format!("socket,id={id},fd={}", far.as_raw_fd()));
            inherited.push(far);
            Ok::<_, Error>(near)
        };
        let control = socket("control")?;
        let stdio = [socket("stdio0")?, socket("stdio1")?, socket("stdio2")?];
        // A resumed kernel has read its command line long ago.
        let khz = if matches!(birth, Birth::Resume { .. }) { 0 } else { counter_khz() };
        let mut monitor = None;
        if !matches!(birth, Birth::Cold { .. }) {
            monitor = Some(socket("monitor")?);
        }
        match birth {
            Birth::Template { dir } => drop(command.env(STATE_VARIABLE, dir.join("state"))),
            Birth::Resume { state, .. } => inherited.push(state),
            Birth::Cold { initrd } => inherited.push(initrd),
        }
        if monitor.is_some() {
            command.args(["-mon", "chardev=monitor,mode=control"]);
        }
        command
            .arg("-append")
            .arg(kernel_line(khz))
            .arg("-kernel")
            .arg(&engine.kernel)
            .arg("-initrd")
            .arg(initrd);
        let mut qemu = Self::launch(command, inherited)?;
        qemu.monitor = monitor;
        Ok((qemu, Ports { control, stdio }))
    }

    /// Starts QEMU with these arguments and descriptors, and a log as its standard output and error.
    pub fn launch(mut command: Command, inherited: Vec<OwnedFd>) -> Result<Self, Error> {
        let log = File::from(in_memory(b"")?);
        let copy = || log.try_clone().map_err(Error::host("duplicating the log"));
        command.stdin(Stdio::null()).stdout(copy()?).stderr(copy()?);
        let child = sys::spawn(&mut command, inherited)
            .map_err(Error::host(format!("starting {}", command.get_program().display())))?;
        Ok(Self { child, log, monitor: None })
    }

    /// The last of what QEMU and its machine's serial console have printed, at most `most` bytes.
    pub fn printed(&self, most: u64) -> Vec<u8> {
        let len = self.log.metadata().map_or(0, |m| m.len());
        let mut text = vec![0; usize::try_from(len.min(most)).unwrap_or(0)];
        // Reading at a position leaves the position that QEMU writes at as it is.
        let got = self.log.read_at(&mut text, len.saturating_sub(most)).unwrap_or(0);
        text.truncate(got);
        text
    }

    /// An error with the last of what QEMU and the kernel printed.
    pub fn failure(&self, what: impl Into<String>) -> Error {
        let text = self.printed(LOG_TAIL);
        let text = String::from_utf8_lossy(&text);
        // What the emulation lacks of that processor is known and does no harm.
        let lines: Vec<_> =
            text.lines().filter(|l| !l.contains("TCG doesn't support requested feature")).collect();
        Error::Qemu { what: what.into(), log: lines.join("\n").trim().to_owned() }
    }

    /// Waits for its end on its own.
    pub fn wait(&mut self) -> Result<ExitStatus, Error> {
        self.child.wait().map_err(Error::host("waiting for QEMU"))
    }

    /// Waits for its end on its own, at most so long; `None`: it still runs.
    pub fn wait_within(&mut self, patience: Duration) -> Result<Option<ExitStatus>, Error> {
        let process = self.handle()?;
        let end = Instant::now() + patience;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let limit = rustix::event::Timespec::try_from(left).ok();
            let mut polled = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
            match rustix::event::poll(&mut polled, limit.as_ref()) {
                Ok(0) => return Ok(None),
                Ok(_) => return self.wait().map(Some),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::host("watching QEMU")(e)),
            }
        }
    }

    /// A descriptor through which it can be killed from elsewhere.
    pub fn handle(&self) -> Result<OwnedFd, Error> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
            .map_err(Error::host("watching QEMU"))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
