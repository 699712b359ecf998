//! File-system test suites from the Rust registry, built once and cached.

use std::path::PathBuf;
use std::process::Command;

use crate::cache_dir;

/// Crates with their versions: a name and its programs are the same.
const CRATES: [&str; 2] = ["pjdfstest@0.2.2", "fsx@0.3.2"];

/// The directory that holds the programs.
///
/// # Errors
/// Cargo's reason: without a network, for one.
pub fn ensure() -> Result<PathBuf, String> {
    let root = cache_dir()?.join("suites").join(CRATES.join("-").replace('@', "-"));
    let bin = root.join("bin");
    if CRATES.iter().filter_map(|c| c.split('@').next()).all(|name| bin.join(name).is_file()) {
        return Ok(bin);
    }
    eprintln!("building {} (once, about two minutes)", CRATES.join(" and "));
    let status = Command::new("cargo")
        .args(["install", "--quiet", "--locked", "--no-track", "--force", "--root"])
        .arg(&root)
        .args(CRATES)
        .status()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    if status.success() { Ok(bin) } else { Err(format!("cargo install {}: {status}", CRATES.join(" "))) }
}
