//! Debian packages that a command needs: present, installed when root, or named exactly.

use std::process::{Command, Stdio};

/// Makes sure that `packages` are installed. As root on Debian missing ones are installed; otherwise the
/// error holds the command to run.
///
/// # Errors
/// What is missing and how to get it.
pub fn ensure(purpose: &str, packages: &[&str]) -> Result<(), String> {
    let missing: Vec<&str> = packages.iter().copied().filter(|p| !installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    let by_hand = format!("sudo apt-get update && sudo apt-get install --no-install-recommends {list}");
    if !rustix::process::geteuid().is_root() {
        return Err(format!("{purpose} needs packages that are not installed. Run:\n    {by_hand}"));
    }
    eprintln!("{purpose}: installing {list}");
    let apt = |args: &[&str]| {
        Command::new("apt-get")
            .args(["-q", "-y", "-o", "Dpkg::Use-Pty=0"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("cannot run apt-get: {e}; {purpose} needs: {list}"))
    };
    let install: Vec<&str> =
        ["install", "--no-install-recommends"].into_iter().chain(missing.iter().copied()).collect();
    if apt(&install)?.status.success() {
        return Ok(());
    }
    // The package lists may be missing or old.
    apt(&["update"])?;
    let out = apt(&install)?;
    if out.status.success() {
        return Ok(());
    }
    Err(format!("installing {list} failed:\n{}\nTry: {by_hand}", String::from_utf8_lossy(&out.stderr).trim()))
}

fn installed(package: &str) -> bool {
    let out = Command::new("dpkg-query").args(["-W", "-f=${Status}", package]).output();
    out.is_ok_and(|o| o.stdout.starts_with(b"install ok installed"))
}
