//! What Debian has and needs no build: its own `libkrunfw5`, its kernel for virtual machines, and gvproxy.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache_dir;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The path of Debian's `libkrunfw.so.5`, fetched with apt into the cache if it is not there.
///
/// # Errors
/// Not a Debian host, or apt's reason.
pub fn bundle() -> Result<PathBuf, String> {
    cached("debian-bundle/libkrunfw.so.5", |work| {
        eprintln!("fetching Debian's kernel bundle libkrunfw5 (once, a few seconds)");
        let root = unpacked(work, "sid", |_| Ok("libkrunfw5".into()))?;
        let libs = ["usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu"];
        libs.iter()
            .find_map(|lib| newest(&root.join(lib), "libkrunfw.so.5.", "").ok())
            .ok_or_else(|| "Debian's libkrunfw5 holds no libkrunfw.so.5".into())
    })
}

/// The path of a bzImage as Debian's users have it, fetched with apt into the cache if it is not there.
///
/// # Errors
/// As for [`bundle`].
pub fn kernel() -> Result<PathBuf, String> {
    const META: &str = "linux-image-cloud-amd64";
    cached("debian-kernel/bzimage", |work| {
        eprintln!("fetching Debian's kernel {META} (once, a few seconds)");
        let root = unpacked(work, "bookworm", |apt_cache| {
            let depends = output(apt_cache.args(["depends", "--important", META]))?;
            let mut names = depends.lines().filter_map(|l| l.trim().strip_prefix("Depends: "));
            let image = names.find(|n| n.starts_with("linux-image-"));
            image.map(str::to_owned).ok_or_else(|| format!("{META} depends on no kernel"))
        })?;
        newest(&root.join("boot"), "vmlinuz-", "")
    })
}

/// The path of Debian 13's gvproxy, which needs no newer library than Debian 12 has, fetched with apt into the cache if
/// it is not there.
///
/// # Errors
/// As for [`bundle`].
pub fn gvproxy() -> Result<PathBuf, String> {
    cached("debian-gvproxy/gvproxy", |work| {
        eprintln!("fetching Debian 13's gvproxy (once, a few seconds)");
        let root = unpacked(work, "trixie", |_| Ok("gvproxy".into()))?;
        Ok(root.join("usr/bin/gvproxy"))
    })
}

/// The file `name` of the cache, made by `fetch` in a directory of its own if it is not there.
fn cached(name: &str, fetch: impl FnOnce(&Path) -> Result<PathBuf, String>) -> Result<PathBuf, String> {
    let found = cache_dir()?.join(name);
    if found.exists() {
        return Ok(found);
    }
    crate::packages::ensure("fetching packages of Debian", &["debian-archive-keyring"])?;
    let work = found.with_file_name(format!("partial.{}", std::process::id()));
    let result = fetch(&work).and_then(|file| {
        fs::rename(&file, &found).map_err(|e| format!("cannot move it to {}: {e}", found.display()))
    });
    let _ = fs::remove_dir_all(&work);
    result.map(|()| found)
}

/// Asks apt, in a configuration of its own that knows only `suite`, for a package and unpacks it. `name` gets an
/// `apt-cache` to find out the package's name with.
fn unpacked(
    work: &Path,
    suite: &str,
    name: impl FnOnce(&mut Command) -> Result<String, String>,
) -> Result<PathBuf, String> {
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
    write("etc/sources.list", format!("deb [signed-by={KEYRING}] {archive} {suite} main\n"))?;
    let w = work.display();
    write(
        "apt.conf",
        format!(
            "Dir::State \"{w}/state\";\nDir::State::status \"{w}/state/status\";\nDir::Cache \"{w}/cache\";\n\
             Dir::Etc::sourcelist \"{w}/etc/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n\
             Dir::Etc::preferencesparts \"/dev/null\";\nAcquire::Languages \"none\";\nAPT::Sandbox::User \"root\";\n"
        ),
    )?;
    let apt = |program: &str| {
        let mut command = Command::new(program);
        command.args(["-q", "-c", "apt.conf"]).current_dir(work);
        command
    };
    output(apt("apt-get").arg("update"))?;
    let name = name(&mut apt("apt-cache"))?;
    output(apt("apt-get").args(["download", &name]))?;
    let (package, root) = (newest(work, &format!("{name}_"), ".deb")?, work.join("root"));
    output(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&root))?;
    Ok(root)
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

fn output(command: &mut Command) -> Result<String, String> {
    let out = command.output().map_err(|e| format!("cannot run {command:?}: {e}"))?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&out.stderr).trim()))
}
