//! `cargo xtask bench boot [ROUNDS]`: process start to `/bin/true` to process end, beside peers, in one run in the
//! emulated host.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::emulated::Lab;
use crate::{debian_bundle, kernel, packages, rootfs, test};

const ROUNDS: &str = "7";

/// Runs the benchmark named first.
///
/// # Errors
/// What could not be built, or a program that failed.
pub fn run(args: &[String]) -> Result<(), String> {
    match args {
        [what] if what == "boot" => boot(ROUNDS),
        [what, rounds] if what == "boot" => boot(rounds),
        _ => Err("usage: cargo xtask bench boot [ROUNDS]".into()),
    }
}

fn boot(rounds: &str) -> Result<(), String> {
    packages::ensure("the benchmark", &["busybox-static", "cpio", "qemu-system-x86"])?;
    let ours = kernel::ensure_guest()?;
    let debian = debian_bundle::ensure()?;
    let root = rootfs::ensure(rootfs::PYTHON)?;
    let built = test::build()?;
    let upstream = upstream()?;
    let stage = std::path::absolute(crate::target_dir().join("bench")).map_err(|e| e.to_string())?;
    let _ = fs::remove_dir_all(&stage);
    let release = std::path::absolute(crate::target_dir().join("release")).map_err(|e| e.to_string())?;
    let library = release.join("libkrun.so");
    let places = [
        ("krun, our kernel", place(&stage, "a", &library, &ours.bundle)?),
        ("krun, Debian's bundle", place(&stage, "b", &library, &debian)?),
        ("libkrun 1.19.7, our kernel", place(&stage, "c", &upstream, &ours.bundle)?),
        ("libkrun 1.19.7, Debian's bundle", place(&stage, "d", &upstream, &debian)?),
    ];
    let program = std::path::absolute(&built.chroot_vm).map_err(|e| e.to_string())?;
    let mut words: Vec<OsString> = vec![release.join("krun-bench").into(), rounds.into()];
    for (label, dir) in &places {
        let mut path = OsString::from("LD_LIBRARY_PATH=");
        path.push(dir);
        words.extend([(*label).into(), path, "--".into(), program.clone().into(), root.clone().into()]);
        words.extend(["/bin/true".into(), ";;".into()]);
    }
    words.extend(["QEMU microvm, our kernel, initramfs".into(), "--".into()]);
    words.extend(qemu(&ours.vmlinux, &initramfs(&stage)?));
    let (status, text) = Lab::ensure(&built.krun)?.capture(&words, &[], &[root])?;
    if !status.success() {
        return Err(format!("the benchmark ended with {status}"));
    }
    print_table(&text);
    Ok(())
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

fn print_table(text: &str) {
    let rows: Vec<Vec<&str>> =
        text.lines().map(|l| l.split('\t').collect()).filter(|r: &Vec<_>| r.len() == 4).collect();
    let median = |row: &[&str]| row[2].parse::<f64>().unwrap_or(f64::NAN);
    let first = rows.first().map_or(f64::NAN, |r| median(r));
    println!("| what | least, ms | median, ms | most, ms | ours to it |\n|---|---|---|---|---|");
    for row in &rows {
        println!("| {} | {} | {} | {} | {:.2} |", row[0], row[1], row[2], row[3], first / median(row));
    }
}
