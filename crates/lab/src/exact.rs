//! A machine whose every run is the same, instruction by instruction, for measurements that noise does
//! not reach.
//!
//! QEMU counts instructions and derives all time from them: 16 ns each, so a time in the machine divided
//! by 16 is a number of instructions. Nothing may come from outside: there is no device that answers when
//! it likes, all files are in the initial RAM disk, the clock starts at a fixed time and the processor's
//! random numbers follow from a fixed seed. (Without any, the first to ask for some waits 2.5 s, 158 million
//! instructions, until the kernel has collected its own.)

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use krun_wire::host::{COMMAND_PATH, EXIT_MARK, HostCommand, HostRoot, ROLE};

use crate::qemu::{Qemu, in_memory, inherited_path};
use crate::{Engine, Error, template};

/// Nanoseconds of the machine's time that an instruction takes, as a power of two.
const SHIFT: u32 = 4;
/// How long a run may take. Counting makes QEMU slow, and it has been seen to stop for good.
const PATIENCE: Duration = Duration::from_secs(120);
/// Frequency of its time stamp counter in kHz: it counts nanoseconds.
const COUNTER_KHZ: u32 = 1_000_000;

/// A command for [`Engine::run_exact`]. It runs as root in a system of nothing but `files`, with standard
/// input empty, and standard output and error together.
#[derive(Debug, Clone, Default)]
pub struct Exact {
    /// Program and arguments. A program without a slash is looked up in `PATH` of `env`.
    pub argv: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// All files of the system. Directories are made as needed; `/dev`, `/proc` and `/sys` are mounted.
    pub files: Vec<ExactFile>,
}

/// A file for [`Exact`].
#[derive(Debug, Clone)]
pub struct ExactFile {
    /// Absolute path there.
    pub path: PathBuf,
    /// What it holds.
    pub source: Source,
    /// Permission bits; `None`: those of the file it comes from, or 0644.
    pub mode: Option<u32>,
}

/// What a file holds.
#[derive(Debug, Clone)]
pub enum Source {
    /// What this file of this machine holds.
    Host(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
}

/// The archive with init, the command and its files.
fn initrd(engine: &Engine, command: &Exact) -> Result<Vec<u8>, Error> {
    let bytes = |s: &OsStr| s.as_bytes().to_vec();
    let entry = |(key, value): &(OsString, OsString)| [key.as_bytes(), b"=", value.as_bytes()].concat();
    let message = HostCommand {
        argv: command.argv.iter().map(|a| bytes(a)).collect(),
        env: command.env.iter().map(entry).collect(),
        cwd: b"/".to_vec(),
        root: HostRoot::Initial,
        ..HostCommand::default()
    };
    let relative = COMMAND_PATH.trim_start_matches('/');
    let mut archive = template::initrd(engine).file(relative.as_bytes(), 0o600, &message.encode());
    let mut made = BTreeSet::new();
    for file in &command.files {
        let path = relative_path(&file.path)?;
        for parent in parents(&path) {
            if made.insert(parent.clone()) {
                archive = archive.directory(parent.as_os_str().as_bytes(), 0o755);
            }
        }
        let (data, mode) = read(&file.source)?;
        archive = archive.file(path.as_os_str().as_bytes(), file.mode.unwrap_or(mode), &data);
    }
    Ok(archive.finish())
}

fn read(source: &Source) -> Result<(Vec<u8>, u32), Error> {
    match source {
        Source::Bytes(bytes) => Ok((bytes.clone(), 0o644)),
        Source::Host(path) => {
            let what = || format!("reading {}", path.display());
            let mode = fs::metadata(path).map_err(Error::host(what()))?.permissions().mode() & 0o7777;
            Ok((fs::read(path).map_err(Error::host(what()))?, mode))
        }
    }
}

/// The path below the root, which has no `..` in it.
fn relative_path(path: &Path) -> Result<PathBuf, Error> {
    let mut relative = PathBuf::new();
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => relative.push(name),
            Component::ParentDir | Component::Prefix(_) => {
                let why = "not an absolute path without \"..\"".to_owned();
                return Err(Error::File { path: path.to_owned(), why });
            }
        }
    }
    Ok(relative)
}

/// The directories above a path, outermost first. The first archive has `dev`, `proc` and `sys`.
fn parents(path: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = path.ancestors().skip(1).map(Path::to_owned).collect();
    all.retain(|p| {
        !p.as_os_str().is_empty() && !["dev", "proc", "sys"].iter().any(|there| p == Path::new(there))
    });
    all.reverse();
    all
}

/// The machine. It has nothing but a processor, memory and a serial console.
fn arguments(engine: &Engine) -> Vec<String> {
    let words = [
        "-M",
        "microvm,acpi=off",
        "-m",
        &engine.memory_mib.to_string(),
        "-accel",
        "tcg,thread=single,tb-size=512",
        "-icount",
        &format!("shift={SHIFT},sleep=off"),
        "-cpu",
        "EPYC,+invtsc",
        "-smp",
        "1",
        "-seed",
        "1",
        "-rtc",
        "base=2026-01-01T00:00:00,clock=vm",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-chardev",
        "stdio,id=log,signal=off",
        "-serial",
        "chardev:log",
        "-append",
        &format!(
            "console=ttyS0 loglevel=2 panic=-1 reboot=t tsc=reliable tsc_early_khz={COUNTER_KHZ} {ROLE}"
        ),
    ];
    words.map(str::to_owned).into()
}

/// Runs `command` and waits for its end.
pub fn run(engine: &Engine, command: &Exact) -> Result<(i32, Vec<u8>), Error> {
    let initrd = in_memory(&initrd(engine, command)?)?;
    let mut qemu = Command::new(&engine.qemu);
    qemu.args(arguments(engine))
        .arg("-kernel")
        .arg(&engine.kernel)
        .arg("-initrd")
        .arg(inherited_path(&initrd));
    let mut qemu = Qemu::launch(qemu, vec![initrd])?;
    if qemu.wait_within(PATIENCE)?.is_none() {
        let what = format!("the command has not ended after {} s; another try may help", PATIENCE.as_secs());
        return Err(qemu.failure(what));
    }
    let mut printed = qemu.printed(u64::MAX);
    let Some((at, status)) = exit_mark(&printed) else {
        return Err(qemu.failure("the machine ended before the command"));
    };
    printed.truncate(at);
    // QEMU's own warnings come first, before the machine has run an instruction.
    let start = without_warnings(&printed);
    Ok((status, printed.split_off(start)))
}

/// Where the mark of the end begins, and the status in it. The kernel may print something after it.
fn exit_mark(printed: &[u8]) -> Option<(usize, i32)> {
    let at = printed.windows(EXIT_MARK.len()).rposition(|window| window == EXIT_MARK)?;
    let rest = &printed[at + EXIT_MARK.len()..];
    let digits = rest.split(|b| *b == b'\n').next().filter(|digits| digits.len() < rest.len())?;
    Some((at, std::str::from_utf8(digits).ok()?.parse().ok()?))
}

/// Length of QEMU's warnings at the beginning.
fn without_warnings(printed: &[u8]) -> usize {
    let lines = printed.split_inclusive(|b| *b == b'\n');
    lines.take_while(|line| line.starts_with(b"qemu-system-")).map(<[u8]>::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_found() {
        assert_eq!(exit_mark(b"a\x1ekrun exit 1\nb\x1ekrun exit 143\n"), Some((15, 143)));
        assert_eq!(exit_mark(b"\x1ekrun exit 0\n[    0.7] reboot: Restarting system"), Some((0, 0)));
        for bad in [&b""[..], b"out\n", b"\x1ekrun exit ", b"\x1ekrun exit 1", b"\x1ekrun exit x\n"] {
            assert_eq!(exit_mark(bad), None);
        }
        assert_eq!(
            without_warnings(b"qemu-system-x86_64: warning: a\nqemu-system-x86_64: b\nout\nqemu-\n"),
            53
        );
        assert_eq!(without_warnings(b"out"), 0);
    }

    #[test]
    fn directories_come_before_what_is_in_them() {
        assert_eq!(parents(Path::new("a/b/c")), [Path::new("a"), Path::new("a/b")]);
        assert_eq!(parents(Path::new("dev/x")), [] as [PathBuf; 0]);
        assert_eq!(relative_path(Path::new("/a/./b")).unwrap(), Path::new("a/b"));
        assert!(relative_path(Path::new("/a/../b")).unwrap_err().to_string().contains(".."));
    }
}
