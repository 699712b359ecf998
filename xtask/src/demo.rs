//! `cargo xtask demo`: from nothing to a microVM that runs a Python program.

use std::path::PathBuf;
use std::process::Command;

use crate::{debian, kernel, packages, rootfs};

const PROGRAM: &str = "import os, platform\n\
    print(f'Hello from Linux {platform.release()} in a microVM with {os.cpu_count()} CPU')\n\
    print('6 * 7 =', 6 * 7)";

/// Gets what is missing, builds the command and runs a Python program in a microVM.
///
/// # Errors
/// What is missing, or that the program did not end well.
pub fn run() -> Result<(), String> {
    packages::ensure("the demonstration", &["gcc", "libc6-dev"])?;
    let root = rootfs::ensure(rootfs::PYTHON)?;
    let (kernel, which) = kernel()?;
    println!("kernel: {} ({which})", kernel.display());
    let build = ["build", "--quiet", "--release", "-p", "krun-cli"];
    let status = Command::new("cargo").args(build).status().map_err(|e| format!("cannot run cargo: {e}"))?;
    if !status.success() {
        return Err("building krun failed".into());
    }
    let krun = crate::target_dir().join("release/krun");
    if !Command::new(&krun).arg("doctor").output().is_ok_and(|o| o.status.success()) {
        // No usable KVM: the emulated host needs its own kernel and QEMU.
        crate::emulated::Lab::ensure(&krun)?;
    }
    let mut command = Command::new(&krun);
    command.arg("run").arg("--root").arg(&root).arg("--kernel").arg(&kernel);
    command.args(["--", "python3", "-c", PROGRAM]);
    println!("$ krun run --root {} --kernel {} -- python3 -c ...", root.display(), kernel.display());
    let status = command.status().map_err(|e| format!("cannot run {}: {e}", krun.display()))?;
    if status.success() { Ok(()) } else { Err(format!("the microVM ended with {status}")) }
}

/// Our kernel if it is built, else Debian's bundle, which takes seconds to get, else ours, built now.
fn kernel() -> Result<(PathBuf, &'static str), String> {
    if let Some(paths) = kernel::cached_guest()? {
        return Ok((paths.bundle, "built from kernel/"));
    }
    match debian::bundle() {
        Ok(path) => Ok((path, "Debian's libkrunfw5; cargo xtask kernel builds one that boots faster")),
        Err(why) => {
            eprintln!("Debian's bundle cannot be had ({why}); building ours");
            kernel::ensure_guest().map(|paths| (paths.bundle, "built from kernel/"))
        }
    }
}
