//! Builds the guest's init as a static binary and tells the crate where it is.
//!
//! The musl target is preferred; without it the host's own target is linked statically against glibc.

#![allow(clippy::panic, reason = "a build script has no other way to say why it cannot go on")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const INIT: &str = "krun-init";

fn main() {
    let root = PathBuf::from(var("CARGO_MANIFEST_DIR")).join("../..");
    for part in ["guest/init", "crates/wire", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", root.join(part).display());
    }
    println!("cargo::rerun-if-env-changed=KRUN_INIT_BINARY");
    let binary = match env::var_os("KRUN_INIT_BINARY") {
        Some(path) => PathBuf::from(path),
        None => build(&root),
    };
    let out = PathBuf::from(var("OUT_DIR")).join("init.krun");
    fs::copy(&binary, &out)
        .unwrap_or_else(|e| panic!("cannot copy {} to {}: {e}", binary.display(), out.display()));
    println!("cargo::rustc-env=KRUN_INIT={}", out.display());
}

fn var(name: &str) -> String {
    env::var(name).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn build(root: &Path) -> PathBuf {
    let arch = var("CARGO_CFG_TARGET_ARCH");
    let musl = format!("{arch}-unknown-linux-musl");
    // Fixed addresses: nothing to relocate before it runs. No unwinding: a panic aborts.
    const SMALL: &str =
        "-Ctarget-feature=+crt-static\x1f-Crelocation-model=static\x1f-Cforce-unwind-tables=no";
    let (target, flags) = if has_target(&musl) {
        (musl, format!("-Clinker=rust-lld\x1f-Clink-self-contained=yes\x1f{SMALL}"))
    } else {
        println!(
            "cargo::warning=the Rust target {musl} is not installed; init is linked against static glibc"
        );
        (format!("{arch}-unknown-linux-gnu"), SMALL.to_owned())
    };
    let target_dir = PathBuf::from(var("OUT_DIR")).join("init-target");
    let status = Command::new(var("CARGO"))
        .current_dir(root)
        .args(["build", "--quiet", "--profile", "init", "--package", INIT, "--target", &target])
        .arg("--target-dir")
        .arg(&target_dir)
        // What the outer build was told (clippy as the compiler, lints, coverage) is not meant for init.
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("CARGO_ENCODED_RUSTDOCFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .status()
        .unwrap_or_else(|e| panic!("cannot run cargo to build init: {e}"));
    assert!(status.success(), "building init for {target} failed: {status}");
    target_dir.join(target).join("init").join(INIT)
}

fn has_target(target: &str) -> bool {
    let printed = Command::new(var("RUSTC")).args(["--print", "sysroot"]).output();
    printed.is_ok_and(|out| {
        let sysroot = String::from_utf8_lossy(&out.stdout);
        Path::new(sysroot.trim()).join("lib/rustlib").join(target).join("lib").is_dir()
    })
}
