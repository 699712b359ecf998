//! Programs of others that the VM tests run or talk to, built from the Rust registry once and cached.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use crate::{cache_dir, packages};

/// A crate that has a program of its own name.
type Peer = (&'static str, &'static str);

const VIRTIOFSD: Peer = ("virtiofsd", "1.14.0");
/// Few, for each takes minutes to build.
const PEERS: [Peer; 4] = [("vhost-device-rng", "0.1.0"), VIRTIOFSD, ("pjdfstest", "0.2.2"), ("fsx", "0.3.2")];

/// The directories of the programs, as in `PATH`, those named by `KRUN_TEST_PEERS` first.
///
/// # Errors
/// A package or cargo's reason.
pub fn ensure() -> Result<OsString, String> {
    let mut dirs: Vec<_> =
        std::env::var_os("KRUN_TEST_PEERS").iter().flat_map(std::env::split_paths).collect();
    for peer in PEERS {
        dirs.push(build(peer)?);
    }
    std::env::join_paths(dirs).map_err(|e| format!("KRUN_TEST_PEERS: {e}"))
}

/// The server of shares that QEMU's users have.
///
/// # Errors
/// As for [`ensure`].
pub fn virtiofsd() -> Result<PathBuf, String> {
    Ok(build(VIRTIOFSD)?.join(VIRTIOFSD.0))
}

/// The directory of the program.
fn build((name, version): Peer) -> Result<PathBuf, String> {
    let home = cache_dir()?.join("peers");
    let dir = home.join(format!("{name}-{version}"));
    let programs = dir.join("bin");
    if programs.join(name).is_file() {
        return Ok(programs);
    }
    packages::ensure("building programs for the tests", &["libcap-ng-dev", "libseccomp-dev"])?;
    eprintln!("building {name} {version} from the Rust registry (once, some minutes)");
    let work = home.join(format!("partial.{}", std::process::id()));
    let done = Command::new("cargo")
        .args(["install", "--quiet", "--locked", "--version", version, name, "--root"])
        .arg(&dir)
        .env("CARGO_TARGET_DIR", &work)
        .status();
    let _ = std::fs::remove_dir_all(&work);
    match done {
        Ok(status) if status.success() => Ok(programs),
        Ok(status) => Err(format!("cargo install {name} {version} ended with {status}")),
        Err(e) => Err(format!("cannot run cargo: {e}")),
    }
}
