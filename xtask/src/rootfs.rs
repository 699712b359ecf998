//! Debian root file systems for guests, made once and cached.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::{cache_dir, packages};

/// A set of packages in a root file system.
#[derive(Debug, Clone, Copy)]
pub struct Rootfs {
    /// Name of its folder in the cache.
    pub name: &'static str,
    /// Packages besides the essential ones.
    pub packages: &'static [&'static str],
}

/// For the first microVM a user sees.
pub const PYTHON: Rootfs = Rootfs { name: "python", packages: &["python3-minimal"] };

/// For the tests: the programs that the guest runs there.
pub const TEST: Rootfs = Rootfs {
    name: "test",
    packages: &[
        "python3",
        "perl",
        "git",
        "gcc",
        "libc6-dev",
        "procps",
        "attr",
        "strace",
        "fio",
        "stress-ng",
        "dbench",
        "postgresql",
    ],
};

/// The folder of `rootfs`, made if it is not in the cache.
///
/// # Errors
/// A package or mmdebstrap's reason.
pub fn ensure(rootfs: Rootfs) -> Result<PathBuf, String> {
    let suite = suite();
    let home = cache_dir()?.join("rootfs");
    let dir = home.join(format!("{}-{suite}-{:08x}", rootfs.name, fingerprint(rootfs)));
    if dir.is_dir() {
        return Ok(dir);
    }
    packages::ensure("building a Debian root file system", &["mmdebstrap", "debian-archive-keyring"])?;
    fs::create_dir_all(&home).map_err(|e| format!("cannot create {}: {e}", home.display()))?;
    let partial = home.join(format!("{}.partial.{}", rootfs.name, std::process::id()));
    eprintln!("building a Debian {suite} root with {} (once, about a minute)", rootfs.packages.join(", "));
    let out = Command::new("mmdebstrap")
        .args(["--quiet", "--variant=minbase", "--aptopt=Apt::Install-Recommends false"])
        .arg(format!("--include={}", rootfs.packages.join(",")))
        .arg("--dpkgopt=path-exclude=/usr/share/doc/*")
        .arg("--dpkgopt=path-exclude=/usr/share/man/*")
        .arg(&suite)
        .arg(&partial)
        .output()
        .map_err(|e| format!("cannot run mmdebstrap: {e}"))?;
    if !out.status.success() {
        let _ = fs::remove_dir_all(&partial);
        return Err(format!("mmdebstrap failed:\n{}", String::from_utf8_lossy(&out.stderr).trim()));
    }
    if let Err(e) = fs::rename(&partial, &dir) {
        let _ = fs::remove_dir_all(&partial);
        // Another run may have finished first.
        if !dir.is_dir() {
            return Err(format!("cannot move the root to {}: {e}", dir.display()));
        }
    }
    Ok(dir)
}

/// The host's Debian release, or bookworm where the host is something else.
fn suite() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field =
        |key: &str| release.lines().find_map(|l| l.strip_prefix(key)).map(|v| v.trim_matches('"').to_owned());
    match (field("ID="), field("VERSION_CODENAME=")) {
        (Some(id), Some(name)) if id == "debian" => name,
        _ => "bookworm".to_owned(),
    }
}

fn fingerprint(rootfs: Rootfs) -> u32 {
    // FNV-1a: a changed list makes another folder.
    rootfs.packages.join(",").bytes().fold(0x811c_9dc5, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193))
}
