//! Programs of others that the VM tests talk to, built from the Rust registry once and cached.

use std::ffi::OsString;
use std::process::Command;

use crate::{cache_dir, packages};

/// Crates and their versions; each has a program of its own name. Two, for each takes minutes to build.
const PEERS: &[(&str, &str)] = &[("vhost-device-rng", "0.1.0"), ("virtiofsd", "1.14.0")];

/// The directories of the programs, as in `PATH`, those named by `KRUN_TEST_PEERS` first.
///
/// # Errors
/// A package or cargo's reason.
pub fn ensure() -> Result<OsString, String> {
    let home = cache_dir()?.join("peers");
    let mut dirs: Vec<_> =
        std::env::var_os("KRUN_TEST_PEERS").iter().flat_map(std::env::split_paths).collect();
    for (name, version) in PEERS {
        let dir = home.join(format!("{name}-{version}"));
        if !dir.join("bin").join(name).is_file() {
            packages::ensure("building vhost-user back ends", &["libcap-ng-dev", "libseccomp-dev"])?;
            eprintln!("building {name} {version} from the Rust registry (once, some minutes)");
            let work = home.join(format!("partial.{}", std::process::id()));
            let done = Command::new("cargo")
                .args(["install", "--quiet", "--locked", "--version", version, name, "--root"])
                .arg(&dir)
                .env("CARGO_TARGET_DIR", &work)
                .status();
            let _ = std::fs::remove_dir_all(&work);
            match done {
                Ok(status) if status.success() => {}
                Ok(status) => return Err(format!("cargo install {name} {version} ended with {status}")),
                Err(e) => return Err(format!("cannot run cargo: {e}")),
            }
        }
        dirs.push(dir.join("bin"));
    }
    std::env::join_paths(dirs).map_err(|e| format!("KRUN_TEST_PEERS: {e}"))
}
