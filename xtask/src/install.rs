//! `cargo xtask install --prefix DIR`: library, header, pkg-config file, command, completions, manual.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Version of the C ABI that pkg-config reports: that of the libkrun 1.x it serves.
const ABI_VERSION: &str = "1.19.0";

/// Builds a release and puts it under `prefix`; `destdir` is put before every path.
///
/// # Errors
/// What could not be built or written.
pub fn run(prefix: &Path, destdir: Option<&Path>) -> Result<(), String> {
    let build = ["build", "--quiet", "--release", "-p", "krun-cli", "-p", "libkrun"];
    let status = Command::new("cargo").args(build).status().map_err(|e| format!("cannot run cargo: {e}"))?;
    if !status.success() {
        return Err("the build failed".into());
    }
    let release = crate::target_dir().join("release");
    let krun = release.join("krun");
    let to = |path: &str| -> PathBuf {
        let under = prefix.join(path);
        match destdir {
            Some(dir) => dir.join(under.strip_prefix("/").unwrap_or(&under)),
            None => under,
        }
    };
    put(&to("bin/krun"), &read(&krun)?, 0o755)?;
    let real = format!("libkrun.so.{ABI_VERSION}");
    put(&to("lib").join(&real), &read(&release.join("libkrun.so"))?, 0o755)?;
    link(&real, &to("lib/libkrun.so.1"))?;
    link("libkrun.so.1", &to("lib/libkrun.so"))?;
    put(&to("include/libkrun.h"), &read(Path::new("include/libkrun.h"))?, 0o644)?;
    put(&to("include/libkrun_input.h"), &read(Path::new("include/libkrun_input.h"))?, 0o644)?;
    put(&to("lib/pkgconfig/libkrun.pc"), pkg_config(prefix).as_bytes(), 0o644)?;
    for (path, args) in [
        ("share/man/man1/krun.1", &["man"] as &[&str]),
        ("share/man/man1/krun-run.1", &["man", "run"]),
        ("share/man/man1/krun-doctor.1", &["man", "doctor"]),
        ("share/man/man1/krun-lab.1", &["man", "lab"]),
        ("share/man/man1/krun-completions.1", &["man", "completions"]),
        ("share/man/man1/krun-man.1", &["man", "man"]),
        ("share/bash-completion/completions/krun", &["completions", "bash"]),
        ("share/zsh/site-functions/_krun", &["completions", "zsh"]),
        ("share/fish/vendor_completions.d/krun.fish", &["completions", "fish"]),
    ] {
        let out = Command::new(&krun).args(args).output().map_err(|e| format!("{}: {e}", krun.display()))?;
        put(&to(path), &out.stdout, 0o644)?;
    }
    println!("krun {VERSION} is in {}", prefix.display());
    Ok(())
}

/// Installs into an empty directory and uses what is there as a stranger would: builds the C example with
/// pkg-config, and runs it and the command.
///
/// # Errors
/// What is missing or does not work.
pub fn check() -> Result<(), String> {
    let dir = crate::target_dir().join("install-check");
    let _ = fs::remove_dir_all(&dir);
    let prefix = dir.join("usr");
    run(&prefix, None)?;
    let example = dir.join("chroot_vm");
    let build = "cc -o \"$1\" examples/chroot_vm.c $(pkg-config --cflags --libs libkrun)";
    output(
        Command::new("sh")
            .args(["-ec", build, "sh"])
            .arg(&example)
            .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig")),
    )?;
    // Without arguments it loads the library and says what it wants.
    let usage = Command::new(&example).env("LD_LIBRARY_PATH", prefix.join("lib")).output();
    let usage = usage.map_err(|e| format!("{}: {e}", example.display()))?;
    if !String::from_utf8_lossy(&usage.stderr).starts_with("usage: ") {
        return Err(format!("the C example with the installed library: {usage:?}"));
    }
    let version = output(Command::new(prefix.join("bin/krun")).arg("--version"))?;
    if version.trim() != format!("krun {VERSION}") {
        return Err(format!("krun --version printed {version:?}"));
    }
    for (path, part) in [
        ("share/man/man1/krun.1", "krun\\-run(1)"),
        ("share/man/man1/krun-run.1", "\\-\\-volume"),
        ("share/bash-completion/completions/krun", "complete"),
        ("share/zsh/site-functions/_krun", "#compdef krun"),
        ("share/fish/vendor_completions.d/krun.fish", "complete -c krun"),
        ("include/libkrun_input.h", "#include"),
    ] {
        let path = prefix.join(path);
        if !String::from_utf8_lossy(&read(&path)?).contains(part) {
            return Err(format!("{} has no {part:?}", path.display()));
        }
    }
    exports(&read(&prefix.join("include/libkrun.h"))?, &prefix.join("lib/libkrun.so.1"))?;
    fs::remove_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))
}

/// The functions that a header declares.
fn declared(header: &[u8]) -> BTreeSet<String> {
    let name = |line: &str| {
        let line = line.strip_prefix("int32_t ").or_else(|| line.strip_prefix("int "))?;
        line.split_once('(').map(|(name, _)| name.to_owned())
    };
    String::from_utf8_lossy(header).lines().filter_map(name).collect()
}

/// Checks that a library exports what the header declares and nothing else.
fn exports(header: &[u8], library: &Path) -> Result<(), String> {
    let symbols = output(Command::new("nm").args(["-D", "--defined-only"]).arg(library))?;
    let exported: BTreeSet<_> =
        symbols.lines().filter_map(|l| l.rsplit_once(' ')).map(|(_, name)| name.to_owned()).collect();
    let declared = declared(header);
    let missing: Vec<_> = declared.difference(&exported).collect();
    let foreign: Vec<_> = exported.difference(&declared).collect();
    if declared.is_empty() || !missing.is_empty() || !foreign.is_empty() {
        return Err(format!(
            "{}: of {} functions of the header {missing:?} are not exported; {foreign:?} are exported and not in it",
            library.display(),
            declared.len()
        ));
    }
    Ok(())
}

fn output(command: &mut Command) -> Result<String, String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    Err(format!("{command:?}: {}: {}", out.status, String::from_utf8_lossy(&out.stderr)))
}

fn pkg_config(prefix: &Path) -> String {
    format!(
        "prefix={}\nlibdir=${{prefix}}/lib\nincludedir=${{prefix}}/include\n\n\
         Name: libkrun\nDescription: Run a program in a microVM\nVersion: {ABI_VERSION}\n\
         Libs: -L${{libdir}} -lkrun\nCflags: -I${{includedir}}\n",
        prefix.display()
    )
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn put(path: &Path, bytes: &[u8], mode: u32) -> Result<(), String> {
    let fail = |e: std::io::Error| format!("{}: {e}", path.display());
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(fail)?;
    }
    // A running program or a mapped library keeps its file; the name gets a new one.
    let _ = fs::remove_file(path);
    fs::write(path, bytes).map_err(fail)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(fail)
}

fn link(target: &str, path: &Path) -> Result<(), String> {
    let _ = fs::remove_file(path);
    symlink(target, path).map_err(|e| format!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declarations_are_found() {
        let header = b"/* int32_t x(void) */\nint32_t krun_a(uint32_t ctx_id,\n    int fd);\nint krun_b(void);\n#define A 1\n";
        assert_eq!(declared(header).into_iter().collect::<Vec<_>>(), ["krun_a", "krun_b"]);
    }

    #[test]
    fn the_pkg_config_file_names_the_prefix_once() {
        let text = pkg_config(Path::new("/opt/krun"));
        assert!(text.starts_with("prefix=/opt/krun\n"));
        assert_eq!(text.matches("/opt/krun").count(), 1);
    }
}
