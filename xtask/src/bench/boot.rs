//! `cargo xtask bench boot [ROUNDS]`: process start to `/bin/true` to process end.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::emulated::Lab;
use crate::{debian, kernel, packages, rootfs, test};

/// How often each program runs, if not said.
pub const ROUNDS: &str = "7";
/// Nanoseconds that an instruction takes in a bit-exact run.
const NS_PER_INSTRUCTION: f64 = 16.0;
/// How often a bit-exact run is tried.
const TRIES: u32 = 3;

/// What is compared: a library with a kernel bundle, by the directory that has both; none: QEMU.
struct Variant {
    label: &'static str,
    dir: Option<PathBuf>,
}

/// What all variants need.
struct Setup {
    release: PathBuf,
    program: PathBuf,
    root: PathBuf,
    qemu: Vec<OsString>,
    variants: Vec<Variant>,
    lab: Lab,
}

/// Builds all, runs all and prints the tables.
///
/// # Errors
/// What could not be built, or a program that failed.
pub fn run(rounds: &str) -> Result<(), String> {
    let setup = prepare()?;
    let times = setup.bench(&["times", rounds], "/bin/true")?;
    println!("Time from process start to end, {rounds} rounds\n");
    print_ratios("ms", &times);
    let exits = setup.bench(&["exits"], "/bin/true")?;
    println!("\nExits to user space in one run\n\n| what | exits | by reason |\n|---|---|---|");
    for [label, total, reasons, ..] in exits.iter().filter_map(|row| row.first_chunk::<3>()) {
        println!("| {label} | {total} | {reasons} |");
    }
    let memory = setup.bench(&["memory", "4"], "/bin/sleep 9")?;
    println!("\nPrivate memory of the VMM beyond guest RAM\n\n| what | KiB |\n|---|---|");
    for row in memory.iter().filter_map(|row| row.first_chunk::<2>()) {
        println!("| {} | {} |", row[0], row[1]);
    }
    setup.split()?;
    println!(
        "\nInstructions of the host and its guest together, bit-exact, a root with nothing but /bin/true\n"
    );
    println!("| what | million instructions | ours to it |\n|---|---|---|");
    let mut first = None;
    for v in &setup.variants {
        let Some(dir) = &v.dir else { continue };
        match setup.exact(v.label, dir) {
            Ok(millions) => {
                let ratio = *first.get_or_insert(millions) / millions;
                println!("| {} | {millions:.2} | {ratio:.2} |", v.label);
            }
            Err(e) => println!("| {} | not measured: {} | |", v.label, e.lines().next().unwrap_or_default()),
        }
    }
    Ok(())
}

fn prepare() -> Result<Setup, String> {
    packages::ensure("the benchmark", &["busybox-static", "cpio", "qemu-system-x86", "strace"])?;
    let ours = kernel::ensure_guest()?;
    let debian = debian::bundle()?;
    let built = test::build()?;
    let upstream = upstream()?;
    let absolute = |p: PathBuf| std::path::absolute(p).map_err(|e| e.to_string());
    let stage = absolute(crate::target_dir().join("bench"))?;
    let _ = fs::remove_dir_all(&stage);
    let release = absolute(crate::target_dir().join("release"))?;
    let library = release.join("libkrun.so");
    let variant = |label, dir| Variant { label, dir: Some(dir) };
    let variants = vec![
        variant("krun, our kernel", place(&stage, "a", &library, &ours.bundle)?),
        variant("krun, Debian's bundle", place(&stage, "b", &library, &debian)?),
        variant("libkrun 1.19.7, our kernel", place(&stage, "c", &upstream, &ours.bundle)?),
        variant("libkrun 1.19.7, Debian's bundle", place(&stage, "d", &upstream, &debian)?),
        Variant { label: "QEMU microvm, our kernel, initramfs", dir: None },
    ];
    Ok(Setup {
        program: absolute(built.chroot_vm)?,
        root: rootfs::ensure(rootfs::PYTHON)?,
        qemu: qemu(&ours.vmlinux, &initramfs(&stage)?),
        lab: Lab::ensure(&built.krun)?,
        release,
        variants,
    })
}

impl Setup {
    /// Runs `krun-bench` in a mode over all variants; QEMU has only the one thing it does. Rows of fields.
    fn bench(&self, mode: &[&str], command: &str) -> Result<Vec<Vec<String>>, String> {
        let mut words: Vec<OsString> = vec![self.release.join("krun-bench").into()];
        words.extend(mode.iter().map(Into::into));
        for v in &self.variants {
            match &v.dir {
                Some(dir) => {
                    let mut path = OsString::from("LD_LIBRARY_PATH=");
                    path.push(dir);
                    words.extend([v.label.into(), path, "--".into(), self.program.clone().into()]);
                    words.push(self.root.clone().into());
                    words.extend(command.split(' ').map(OsString::from));
                    words.push(";;".into());
                }
                // It resets at once, so there is no time to look at its memory.
                None if mode[0] == "memory" => {}
                None => {
                    words.extend([v.label.into(), "--".into()]);
                    words.extend(self.qemu.iter().cloned());
                    words.push(";;".into());
                }
            }
        }
        words.pop();
        let (status, text) = self.lab.capture(&words, &[], std::slice::from_ref(&self.root))?;
        if !status.success() {
            return Err(format!("krun-bench {} ended with {status}", mode.join(" ")));
        }
        Ok(rows(&text))
    }

    /// Million instructions from process start to end.
    fn exact(&self, label: &str, dir: &Path) -> Result<f64, String> {
        let mut path = OsString::from("LD_LIBRARY_PATH=");
        path.push(dir);
        let mut words: Vec<OsString> = vec![self.release.join("krun-bench").into()];
        words.extend(["times", "0", label].map(OsString::from));
        words.extend([path, "--".into(), self.program.clone().into(), "/r".into(), "/bin/true".into()]);
        let text = self
            .exactly(&words, &[self.program.clone(), dir.join("libkrun.so.1"), dir.join("libkrunfw.so.5")])?;
        let ms = rows(&text).first().and_then(|row| row.get(2)?.parse::<f64>().ok());
        ms.map(|ms| ms / NS_PER_INSTRUCTION).ok_or_else(|| format!("krun-bench said {text:?}"))
    }

    fn exactly(&self, words: &[OsString], files: &[PathBuf]) -> Result<String, String> {
        let mut files: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
        files.extend(["true", "dmesg"].map(|name| format!("/bin/busybox:/r/bin/{name}")));
        let mut last = String::new();
        for _ in 0..TRIES {
            match self.lab.exact(words, &files)? {
                (status, text) if status.success() => return Ok(text),
                (status, text) => last = format!("{status}: {text}"),
            }
        }
        Err(last)
    }

    /// Where the instructions go: the VMM, the guest's kernel by its calls, init.
    fn split(&self) -> Result<(), String> {
        let Some(dir) = &self.variants[0].dir else { return Ok(()) };
        let mut words: Vec<OsString> = vec![self.release.join("krun").into()];
        words.extend(
            ["run", "-v", "--accel", "kvm", "--kernel-args", "initcall_debug loglevel=7"].map(Into::into),
        );
        words.extend(["--kernel".into(), dir.join("libkrunfw.so.5").into()]);
        words.extend(["--root", "/r", "--", "/bin/dmesg"].map(OsString::from));
        let text = self.exactly(&words, &[dir.join("libkrunfw.so.5")])?;
        println!(
            "\nWhere they go, bit-exact, of a run with initcall_debug whose command prints the kernel's log\n"
        );
        println!("| part | million instructions |\n|---|---|");
        for (what, seconds) in parts(&text)? {
            println!("| {what} | {:.2} |", seconds * 1e9 / NS_PER_INSTRUCTION / 1e6);
        }
        println!("\n| call | million instructions |\n|---|---|");
        for (name, us) in slowest(&text, 15) {
            println!("| {name} | {:.2} |", us as f64 * 1e3 / NS_PER_INSTRUCTION / 1e6);
        }
        Ok(())
    }
}

/// The parts of a run in seconds, from what `krun -v` and the guest's kernel have said. The guest's clock starts
/// shortly after its first instruction; what is before goes to the last part of the guest.
fn parts(text: &str) -> Result<[(&'static str, f64); 5], String> {
    let text = &without_colours(text);
    let find = |mark: &str, stamp: fn(&str) -> Option<f64>| {
        let line = text.lines().find(|l| l.contains(mark));
        line.and_then(stamp).ok_or_else(|| format!("nobody said {mark:?}:\n{text}"))
    };
    let [first, last, gone] = [
        find("the guest's first instruction", uptime)?,
        find("the guest's last instruction", uptime)?,
        find("the machine is gone", uptime)?,
    ];
    let (init, command) = (find(": init runs", since_boot)?, find(": the command runs", since_boot)?);
    Ok([
        ("VMM, before the guest's first instruction", first),
        ("the guest's kernel, to init", init),
        ("init, to the command", command - init),
        ("the command, and the guest's end", last - first - command),
        ("VMM, after the guest's last instruction", gone - last),
    ])
}

/// The time that init says, in seconds; its lines reach the kernel's log later.
fn since_boot(line: &str) -> Option<f64> {
    let ms: f64 = line.split_once("krun-init: ")?.1.split_once(" ms")?.0.parse().ok()?;
    Some(ms / 1e3)
}

/// What is left without the terminal's escape sequences for colours: the console there is a terminal.
fn without_colours(text: &str) -> String {
    let mut parts = text.split('\u{1b}');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    plain.extend(parts.map(|part| part.split_once('m').map_or(part, |(_, rest)| rest)));
    plain
}

/// The time at the beginning of a line of ours, in seconds.
fn uptime(line: &str) -> Option<f64> {
    line.split_once("s ")?.0.trim().parse().ok()
}

/// The initialisation calls that took longest, in microseconds.
fn slowest(log: &str, most: usize) -> Vec<(&str, u64)> {
    let mut calls: Vec<(&str, u64)> = log
        .lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once("initcall ")?.1.split_once('+')?;
            Some((name, rest.split_once(" after ")?.1.split_once(" usecs")?.0.parse().ok()?))
        })
        .collect();
    calls.sort_by_key(|(name, us)| (std::cmp::Reverse(*us), *name));
    calls.dedup();
    calls.truncate(most);
    calls
}

fn rows(text: &str) -> Vec<Vec<String>> {
    text.lines().filter(|l| l.contains('\t')).map(|l| l.split('\t').map(str::to_owned).collect()).collect()
}

/// A directory in which the loader finds a library and a kernel bundle by their names.
fn place(stage: &Path, name: &str, library: &Path, bundle: &Path) -> Result<PathBuf, String> {
    let dir = stage.join(name);
    let fail = |e: std::io::Error| format!("{}: {e}", dir.display());
    fs::create_dir_all(&dir).map_err(fail)?;
    symlink(library, dir.join("libkrun.so.1")).map_err(fail)?;
    symlink(bundle, dir.join("libkrunfw.so.5")).map_err(fail)?;
    Ok(dir)
}

/// Builds the library from the registry and finds its `cdylib`.
fn upstream() -> Result<PathBuf, String> {
    let target = std::path::absolute(crate::target_dir().join("upstream")).map_err(|e| e.to_string())?;
    let status = Command::new("cargo")
        .args([
            "build",
            "--quiet",
            "--release",
            "--manifest-path",
            "benches/upstream/Cargo.toml",
            "--target-dir",
        ])
        .arg(&target)
        .status()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    if !status.success() {
        return Err(format!("building libkrun from the registry: {status}"));
    }
    let deps = target.join("release/deps");
    fs::read_dir(&deps)
        .map_err(|e| format!("{}: {e}", deps.display()))?
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "so") && p.to_string_lossy().contains("/libkrun"))
        .ok_or_else(|| format!("no libkrun*.so in {}", deps.display()))
}

/// An initial RAM disk whose init resets the machine at once.
fn initramfs(stage: &Path) -> Result<PathBuf, String> {
    let script = "mkdir -p r/bin && cp /bin/busybox r/bin/ && printf '#!/bin/busybox sh\\n/bin/busybox reboot -f\\n' > r/init && \
        chmod 755 r/init && cd r && find . | cpio --quiet -o -H newc > ../reset.cpio";
    let status = Command::new("sh").args(["-ec", script]).current_dir(stage).status();
    match status {
        Ok(status) if status.success() => Ok(stage.join("reset.cpio")),
        other => Err(format!("making the initial RAM disk: {other:?}")),
    }
}

fn qemu(kernel: &Path, initrd: &Path) -> Vec<OsString> {
    let options = "-M microvm,acpi=off -accel kvm -cpu host -m 512 -nodefaults -no-user-config -display none -no-reboot";
    let mut words: Vec<OsString> = vec!["qemu-system-x86_64".into()];
    words.extend(options.split_whitespace().map(OsString::from));
    words.extend(["-append".into(), "reboot=t panic=-1 quiet".into()]);
    words.extend(["-kernel".into(), kernel.into(), "-initrd".into(), initrd.into()]);
    words
}

fn print_ratios(unit: &str, rows: &[Vec<String>]) {
    let number = |field: &String| field.parse::<f64>().unwrap_or(f64::NAN);
    println!("| what | least, {unit} | median, {unit} | most, {unit} | ours to it |\n|---|---|---|---|---|");
    let first = rows.first().and_then(|row| row.get(2)).map_or(f64::NAN, number);
    for [label, least, median, most] in rows.iter().filter_map(|row| row.first_chunk::<4>()) {
        let ratio = first / number(median);
        println!(
            "| {label} | {:.1} | {:.1} | {:.1} | {ratio:.2} |",
            number(least),
            number(median),
            number(most)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_log_is_understood() {
        let log = "[    0.301000] initcall b_init+0x0/0x10 returned 0 after 120 usecs\n\
            [    0.302000] initcall a_init+0x0/0x10 returned -19 after 7 usecs\n\
            [    0.302500] initcall a_init+0x0/0x10 returned -19 after 7 usecs\nnothing\n[    0.4] Run /init.krun\n";
        assert_eq!(slowest(log, 9), [("b_init", 120), ("a_init", 7)]);
        assert_eq!(slowest(log, 1), [("b_init", 120)]);
        let run = "\u{1b}[2m   0.250000000s\u{1b}[0m  INFO krun: the guest's first instruction\n[    1.7] krun-init: 1000.0 ms: init runs\n\
            [    1.7] krun-init: 1500.0 ms: the command runs\n   2.000000000s  INFO krun: the guest's last instruction\n   2.500000000s  INFO krun: the machine is gone\n";
        assert_eq!(parts(run).unwrap().map(|(_, seconds)| seconds), [0.25, 1.0, 0.5, 0.25, 0.5]);
        assert!(parts("nothing").is_err());
        assert_eq!(rows("a\t1\nno row\n"), [["a", "1"]]);
    }
}
