//! Programs of others that the VM tests run or talk to, built from the Rust registry once and cached.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use crate::{cache_dir, packages};

/// A crate that has a program of its own name: that, its version, and more words for cargo.
type Peer = (&'static str, &'static str, &'static [&'static str]);

const VIRTIOFSD: Peer = ("virtiofsd", "1.14.0", &[]);
const PEERS: [Peer; 9] = [
    ("vhost-device-rng", "0.1.0", &[]),
    ("vhost-device-vsock", "0.3.0", &[]),
    ("vhost-device-console", "0.1.0", &[]),
    ("vhost-device-input", "0.1.0", &[]),
    ("vhost-device-can", "0.1.0", &[]),
    // With the back end that plays to nobody, for the others need libraries of the host.
    ("vhost-device-sound", "0.3.0", &["--no-default-features"]),
    VIRTIOFSD,
    ("pjdfstest", "0.2.2", &[]),
    ("fsx", "0.3.2", &[]),
];

/// The directories of the programs, as in `PATH`, those named by `KRUN_TEST_PEERS` first.
///
/// # Errors
/// A package or cargo's reason.
pub fn ensure() -> Result<OsString, String> {
    let mut dirs: Vec<_> =
        std::env::var_os("KRUN_TEST_PEERS").iter().flat_map(std::env::split_paths).collect();
    let work = Work::new()?;
    for peer in PEERS {
        dirs.push(build(peer, &work)?);
    }
    std::env::join_paths(dirs).map_err(|e| format!("KRUN_TEST_PEERS: {e}"))
}

/// The server of shares that QEMU's users have.
///
/// # Errors
/// As for [`ensure`].
pub fn virtiofsd() -> Result<PathBuf, String> {
    Ok(build(VIRTIOFSD, &Work::new()?)?.join(VIRTIOFSD.0))
}

/// Where programs are built, one after the other: they have much in common, and what was built for one serves the next.
struct Work {
    home: PathBuf,
    dir: PathBuf,
}

impl Work {
    fn new() -> Result<Self, String> {
        let home = cache_dir()?.join("peers");
        let dir = home.join(format!("partial.{}", std::process::id()));
        Ok(Self { home, dir })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The directory of the program.
fn build((name, version, words): Peer, work: &Work) -> Result<PathBuf, String> {
    let dir = work.home.join(format!("{name}-{version}"));
    let programs = dir.join("bin");
    if programs.join(name).is_file() {
        return Ok(programs);
    }
    packages::ensure("building programs for the tests", &["libcap-ng-dev", "libseccomp-dev"])?;
    eprintln!("building {name} {version} from the Rust registry (once, a minute or so)");
    let done = Command::new("cargo")
        .args(["install", "--quiet", "--locked", "--version", version, name, "--root"])
        .arg(&dir)
        .args(words)
        .env("CARGO_TARGET_DIR", &work.dir)
        .status();
    match done {
        Ok(status) if status.success() => Ok(programs),
        Ok(status) => Err(format!("cargo install {name} {version} ended with {status}")),
        Err(e) => Err(format!("cannot run cargo: {e}")),
    }
}
