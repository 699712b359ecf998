//! Debian's own `libkrunfw5`: a real kernel bundle that needs no build.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache_dir;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The path of Debian's `libkrunfw.so.5`, fetched with apt into the cache if it is not there.
///
/// # Errors
/// Not a Debian host, or apt's reason.
pub fn ensure() -> Result<PathBuf, String> {
    let dir = cache_dir()?.join("debian-bundle");
    let found = dir.join("libkrunfw.so.5");
    if found.exists() {
        return Ok(found);
    }
    crate::packages::ensure("fetching Debian's kernel bundle", &["debian-archive-keyring"])?;
    let work = dir.join(format!("partial.{}", std::process::id()));
    let result = fetch(&work).and_then(|library| {
        fs::rename(&library, &found)
            .map_err(|e| format!("cannot move the bundle to {}: {e}", found.display()))
    });
    let _ = fs::remove_dir_all(&work);
    result.map(|()| found)
}

/// Asks apt, in a configuration of its own that knows only sid, for the package and unpacks it.
fn fetch(work: &Path) -> Result<PathBuf, String> {
    for sub in ["state/lists/partial", "cache/archives/partial", "etc"] {
        let dir = work.join(sub);
        fs::create_dir_all(&dir).map_err(|e| format!("cannot create {}: {e}", dir.display()))?;
    }
    let archive = debian_archive()?;
    let write = |name: &str, text: String| {
        fs::write(work.join(name), text)
            .map_err(|e| format!("cannot write {name} in {}: {e}", work.display()))
    };
    write("state/status", String::new())?;
    write("etc/sources.list", format!("deb [signed-by={KEYRING}] {archive} sid main\n"))?;
    let w = work.display();
    write(
        "apt.conf",
        format!(
            "Dir::State \"{w}/state\";\nDir::State::status \"{w}/state/status\";\nDir::Cache \"{w}/cache\";\n\
             Dir::Etc::sourcelist \"{w}/etc/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n\
             Dir::Etc::preferencesparts \"/dev/null\";\nAcquire::Languages \"none\";\nAPT::Sandbox::User \"root\";\n"
        ),
    )?;
    eprintln!("fetching Debian's kernel bundle libkrunfw5 (once, a few seconds)");
    run(Command::new("apt-get").args(["-q", "-c", "apt.conf", "update"]).current_dir(work))?;
    run(Command::new("apt-get").args(["-q", "-c", "apt.conf", "download", "libkrunfw5"]).current_dir(work))?;
    let package = newest(work, "libkrunfw5_", ".deb")?;
    run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(work.join("root")))?;
    for lib in ["usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu"] {
        if let Ok(path) = newest(&work.join("root").join(lib), "libkrunfw.so.5.", "") {
            return Ok(path);
        }
    }
    Err("Debian's libkrunfw5 holds no libkrunfw.so.5".into())
}

/// The address of Debian's archive in the host's own apt configuration.
fn debian_archive() -> Result<String, String> {
    let out = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL)", "Created-By: Packages"])
        .output()
        .map_err(|e| format!("cannot run apt-get: {e}; Debian's bundle needs a Debian host"))?;
    String::from_utf8_lossy(&out.stdout)
        .lines()
        .find_map(|l| l.strip_suffix(" Debian Debian").map(str::to_owned))
        .ok_or_else(|| "apt knows no Debian archive; run: apt-get update".into())
}

fn newest(dir: &Path, prefix: &str, suffix: &str) -> Result<PathBuf, String> {
    let list = fs::read_dir(dir).map_err(|e| format!("cannot read {}: {e}", dir.display()))?;
    list.flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_file()))
        .map(|e| e.path())
        .filter(|p| {
            let name = p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            name.starts_with(prefix) && name.ends_with(suffix)
        })
        .max()
        .ok_or_else(|| format!("no {prefix}*{suffix} in {}", dir.display()))
}

fn run(command: &mut Command) -> Result<(), String> {
    let out = command.output().map_err(|e| format!("cannot run {command:?}: {e}"))?;
    if out.status.success() {
        return Ok(());
    }
    Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&out.stderr).trim()))
}
