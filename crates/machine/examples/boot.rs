//! Boots a kernel without the rest of the project: `boot [--key value]...`.
//!
//! Keys: `kernel` (file; else the bundle), `bundle` (library), `initramfs`, `cmdline`, `vcpus`, `ram` (MiB),
//! `entry` (pvh, long64), `format` (elf, gz, bz2, zstd), `serial` (yes: a serial port on standard output), `console` (yes: a virtio
//! console there), `root` (directory), `rng` (yes), `split`, `nested`, `shared` (yes), `repeat` (times).

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use krun_devices::console::{Console, ConsoleSpec, PortSpec};
use krun_devices::fs::{self, Fs, FsSpec};
use krun_devices::rng::Rng;
use krun_machine::{Entry, Kernel, KernelFormat, Machine, SerialSpec, Spec};
use krun_virtio::VirtioDevice;

type Error = Box<dyn std::error::Error>;
type Keys = HashMap<String, String>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let keys: Keys =
        args.chunks_exact(2).map(|p| (p[0].trim_start_matches('-').to_owned(), p[1].clone())).collect();
    for _ in 0..keys.get("repeat").and_then(|n| n.parse().ok()).unwrap_or(1) {
        if let Err(e) = run(&keys) {
            eprintln!("boot: {e}");
            return ExitCode::FAILURE;
        }
    }
    let count = |dir: &str| std::fs::read_dir(dir).map_or(0, Iterator::count);
    eprintln!(
        "boot: {} threads and {} descriptors left",
        count("/proc/self/task"),
        count("/proc/self/fd") - 1
    );
    ExitCode::SUCCESS
}

fn spec(keys: &Keys) -> Result<Spec, Error> {
    let mut spec = Spec::default();
    if let Some(line) = keys.get("cmdline") {
        spec.cmdline = line.clone();
    }
    if let Some(n) = keys.get("vcpus") {
        spec.vcpus = n.parse()?;
    }
    if let Some(n) = keys.get("ram") {
        spec.ram_mib = n.parse()?;
    }
    match keys.get("entry").map(String::as_str) {
        Some("pvh") => spec.entry = Entry::Pvh,
        Some("long64") => spec.entry = Entry::Long64,
        _ => {}
    }
    spec.kernel = match keys.get("kernel") {
        Some(path) => Kernel::File {
            path: path.into(),
            format: match keys.get("format").map(String::as_str) {
                Some("elf") => KernelFormat::Elf,
                Some("gz") => KernelFormat::ImageGz,
                Some("bz2") => KernelFormat::ImageBz2,
                Some("zstd") => KernelFormat::ImageZstd,
                _ => KernelFormat::Raw,
            },
            initramfs: keys.get("initramfs").map(Into::into),
            cmdline: None,
        },
        None => Kernel::Bundle(keys.get("bundle").map(Into::into)),
    };
    spec.split_irqchip = keys.contains_key("split");
    spec.nested = keys.contains_key("nested");
    spec.shared_memory = keys.contains_key("shared");
    if keys.contains_key("serial") {
        spec.serial = Some(SerialSpec { input: None, output: Some(rustix::io::dup(std::io::stdout())?) });
    }
    Ok(spec)
}

fn run(keys: &Keys) -> Result<(), Error> {
    let started = Instant::now();
    let spec = spec(keys)?;
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    let code = Arc::new(fs::ExitCode::new());
    if let Some(root) = keys.get("root") {
        let spec = FsSpec {
            tag: "/dev/root".into(),
            source: Some(root.into()),
            exit_code: Some(Arc::clone(&code)),
            ..FsSpec::default()
        };
        devices.push(Box::new(Fs::new(spec)?));
    }
    if keys.contains_key("console") {
        let out = rustix::io::dup(std::io::stdout())?;
        let ports = vec![PortSpec::console(None, Some(out), None)];
        devices.push(Box::new(Console::new(ConsoleSpec { ports })?));
    }
    if keys.contains_key("rng") {
        devices.push(Box::new(Rng::new()));
    }
    let running = Machine::start(spec, devices)?;
    let ready = started.elapsed();
    let outcome = running.wait();
    eprintln!("boot: {outcome} after {:?}, set up in {ready:?}, code {:?}", started.elapsed(), code.get());
    let counts: Vec<_> =
        running.exits().iter().filter(|(_, n)| *n > 0).map(|(r, n)| format!("{r} {n}")).collect();
    eprintln!("boot: exits: {}", counts.join(", "));
    Ok(())
}
