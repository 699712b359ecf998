//! What all tests of the emulated host need.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "only tests call it")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use krun_lab::{Command, Engine, Running, Stream};

/// The engine, or `None` with the reason printed: no QEMU, or no kernel for the emulated host.
pub fn engine() -> Option<Engine> {
    static ENGINE: OnceLock<Option<Engine>> = OnceLock::new();
    ENGINE
        .get_or_init(|| {
            let kernel = kernel().or_else(|| skip("no kernel for the emulated host: cargo xtask kernel"))?;
            Engine::new(&kernel, krun::INIT.to_vec()).map_err(|e| skip::<()>(&e.to_string())).ok()
        })
        .clone()
}

fn skip<T>(why: &str) -> Option<T> {
    println!("skipped: {why}");
    None
}

/// The kernel that the environment names, else the newest in the cache.
fn kernel() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("KRUN_HOST_KERNEL") {
        return Some(path.into());
    }
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache")))?;
    let entries = std::fs::read_dir(cache.join("krun/kernel")).ok()?.flatten();
    let kernels = entries.map(|e| e.path().join("vmlinux-host"));
    kernels.filter_map(|p| Some((p.metadata().ok()?.modified().ok()?, p))).max().map(|(_, p)| p)
}

/// A shell script with nothing on its standard input.
pub fn script(text: &str) -> Command {
    Command { stdin: Stream::Null, ..Command::new(["sh", "-c", text]) }
}

/// Starts `command` with its output on sockets.
pub fn start(engine: &Engine, mut command: Command) -> (Running, UnixStream, UnixStream) {
    let (stdout, out) = UnixStream::pair().unwrap();
    let (stderr, err) = UnixStream::pair().unwrap();
    command.stdout = Stream::Fd(out.into());
    command.stderr = Stream::Fd(err.into());
    (engine.run(command).unwrap(), stdout, stderr)
}

/// Runs `command`; its status, standard output and error.
pub fn run(engine: &Engine, command: Command) -> (i32, String, String) {
    let (running, mut stdout, mut stderr) = start(engine, command);
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        stderr.read_to_end(&mut text).unwrap();
        text
    });
    let mut output = Vec::new();
    stdout.read_to_end(&mut output).unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (running.wait().unwrap(), text(output), text(errors.join().unwrap()))
}

/// Reads until `wanted` was seen; gives back everything up to there.
pub fn read_until(from: &mut impl Read, wanted: &str) -> String {
    let (mut seen, mut byte) = (Vec::new(), [0]);
    while !seen.ends_with(wanted.as_bytes()) {
        assert_eq!(from.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

/// Types text.
pub fn write(to: &mut impl Write, text: &str) {
    to.write_all(text.as_bytes()).unwrap();
}

/// Processes that this one has started and that still exist.
pub fn children() -> Vec<String> {
    let me = std::process::id().to_string();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let stats = entries.filter_map(|e| std::fs::read_to_string(e.path().join("stat")).ok());
    stats
        .filter(|stat| {
            let after_name = stat.rsplit(')').next().unwrap_or_default();
            after_name.split_whitespace().nth(1) == Some(&me)
        })
        .collect()
}
