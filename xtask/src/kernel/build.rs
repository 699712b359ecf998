//! From source to published results.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::source::Source;
use super::{Arch, Plan, Role, bundle, config, elf};

/// Debian packages that a build needs besides the source.
pub fn packages(arch: Arch) -> &'static [&'static str] {
    const NATIVE: &[&str] = &[
        "gcc",
        "libc6-dev",
        "binutils",
        "make",
        "flex",
        "bison",
        "bc",
        "libelf-dev",
        "libssl-dev",
        "xz-utils",
        "patch",
        "perl",
        "cpio",
    ];
    const TO_AARCH64: &[&str] = &[
        "gcc",
        "libc6-dev",
        "binutils",
        "make",
        "flex",
        "bison",
        "bc",
        "libelf-dev",
        "libssl-dev",
        "xz-utils",
        "patch",
        "perl",
        "cpio",
        "gcc-aarch64-linux-gnu",
    ];
    const TO_X86_64: &[&str] = &[
        "gcc",
        "libc6-dev",
        "binutils",
        "make",
        "flex",
        "bison",
        "bc",
        "libelf-dev",
        "libssl-dev",
        "xz-utils",
        "patch",
        "perl",
        "cpio",
        "gcc-x86-64-linux-gnu",
    ];
    match (arch.tools(), arch) {
        ("", _) => NATIVE,
        (_, Arch::Aarch64) => TO_AARCH64,
        (_, Arch::X86_64) => TO_X86_64,
    }
}

/// Builds `plan` in a work folder under `home` and publishes it at `plan.dir` in one step.
///
/// # Errors
/// Which step failed, with the end of its log.
pub fn run(plan: &Plan, source: &Source, home: &Path, keep: bool) -> Result<(), String> {
    let start = Instant::now();
    let work = home.join("work");
    // Left by a run that was stopped.
    remove(&work)?;
    let result = build(plan, source, home, &work);
    if keep {
        eprintln!("the build tree stays in {}", work.display());
    } else {
        remove(&work)?;
    }
    result?;
    eprintln!("{} kernel: built in {:.0} s", plan.role.name(), start.elapsed().as_secs_f64());
    Ok(())
}

fn build(plan: &Plan, source: &Source, home: &Path, work: &Path) -> Result<(), String> {
    let (tree, objects, out) = (work.join("source"), work.join("objects"), work.join("out"));
    for dir in [&objects, &out] {
        fs::create_dir_all(dir).map_err(|e| format!("cannot create {}: {e}", dir.display()))?;
    }
    eprintln!("{} kernel: unpacking the source", plan.role.name());
    let version = source.unpack(&tree)?;
    for patch in &plan.patches {
        apply(patch, &tree, source.is_debian() || version == (6, 12))?;
    }
    let log = home.join(format!("{}.log", plan.role.name()));
    let make = Make { arch: plan.arch, tree: &tree, objects: &objects, log: &log };
    configure(plan, &make, work)?;
    let targets: &[&str] = match plan.arch {
        Arch::X86_64 => &["vmlinux"],
        Arch::Aarch64 => &["vmlinux", "Image"],
    };
    make.run_shown(plan.role.name(), targets)?;
    let vmlinux = objects.join("vmlinux");
    match plan.role {
        Role::Host => strip(plan.arch, &vmlinux, &out.join("vmlinux-host"))?,
        Role::Guest => {
            let stripped = out.join("vmlinux");
            strip(plan.arch, &vmlinux, &stripped)?;
            let flat = flat(plan.arch, &stripped, &objects)?;
            let compiler = format!("{}gcc", plan.arch.tools());
            bundle::build(&flat, &compiler, work, &out.join(bundle::SONAME))?;
        }
    }
    let kept = out.join("config");
    fs::copy(objects.join(".config"), &kept).map_err(|e| format!("{}: {e}", kept.display()))?;
    // A folder from an incomplete publication of old must not be in the way.
    remove(&plan.dir)?;
    fs::rename(&out, &plan.dir).map_err(|e| format!("cannot publish {}: {e}", plan.dir.display()))
}

/// Makes `.config` from the options and checks that each of them is in it.
fn configure(plan: &Plan, make: &Make<'_>, work: &Path) -> Result<(), String> {
    let wanted = work.join("wanted.config");
    fs::write(&wanted, config::to_text(&plan.options)).map_err(|e| format!("{}: {e}", wanted.display()))?;
    let mut command = make.command();
    command.arg("allnoconfig").env("KCONFIG_ALLCONFIG", &wanted);
    let out = command.output().map_err(|e| format!("cannot run make: {e}"))?;
    if !out.status.success() {
        return Err(format!(
            "configuring the kernel failed:\n{}",
            String::from_utf8_lossy(&out.stderr).trim()
        ));
    }
    let path = make.objects.join(".config");
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let dropped = config::dropped(&plan.options, &text);
    if dropped.is_empty() {
        return Ok(());
    }
    Err(format!("this source does not take all of kernel/config: {}", dropped.join(", ")))
}

/// Applies `patch` to `tree`. In a source that the patches are not made for, one that does not fit is left
/// out: they only save time.
fn apply(patch: &Path, tree: &Path, must: bool) -> Result<(), String> {
    let patch_tool = |extra: &[&str]| {
        let mut command = Command::new("patch");
        command.args(["-p1", "-s", "--no-backup-if-mismatch", "-d"]).arg(tree).args(extra);
        command.arg("-i").arg(patch).output().map_err(|e| format!("cannot run patch: {e}"))
    };
    if !patch_tool(&["--dry-run", "--force"])?.status.success() {
        let what = format!("{} does not apply to this source", patch.display());
        if must {
            return Err(what);
        }
        eprintln!("{what}; going on without it");
        return Ok(());
    }
    let out = patch_tool(&["--force"])?;
    if out.status.success() { Ok(()) } else { Err(format!("{} failed half way", patch.display())) }
}

struct Make<'a> {
    arch: Arch,
    tree: &'a Path,
    objects: &'a Path,
    log: &'a Path,
}

impl Make<'_> {
    fn command(&self) -> Command {
        let mut command = Command::new("make");
        command.arg("-C").arg(self.tree).arg(format!("O={}", self.objects.display()));
        command.arg(format!("ARCH={}", self.arch.kernel_name()));
        command.arg(format!("CROSS_COMPILE={}", self.arch.tools()));
        // The same inputs make the same bytes.
        command.env("KBUILD_BUILD_TIMESTAMP", "2025-01-01 00:00:00 UTC");
        command.env("KBUILD_BUILD_USER", "krun").env("KBUILD_BUILD_HOST", "krun").env("LC_ALL", "C");
        for variable in ["MAKEFLAGS", "KCONFIG_CONFIG", "KBUILD_OUTPUT", "CFLAGS", "LDFLAGS"] {
            command.env_remove(variable);
        }
        command
    }

    /// Builds `targets` with a line of progress; the whole output goes to the log.
    fn run_shown(&self, label: &str, targets: &[&str]) -> Result<(), String> {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let (reader, writer) = std::io::pipe().map_err(|e| format!("cannot make a pipe: {e}"))?;
        let mut command = self.command();
        command.arg(format!("-j{jobs}")).args(targets);
        command.stderr(writer.try_clone().map_err(|e| format!("cannot make a pipe: {e}"))?).stdout(writer);
        let mut child = command.spawn().map_err(|e| format!("cannot run make: {e}"))?;
        // It holds the writing end, which must close with make.
        drop(command);
        let log_error = |e: std::io::Error| format!("{}: {e}", self.log.display());
        let mut log = File::create(self.log).map_err(log_error)?;
        let mut progress = Progress::new(label);
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            log.write_all(&line).and_then(|()| log.write_all(b"\n")).map_err(log_error)?;
            progress.line(&line);
        }
        progress.end();
        let status = child.wait().map_err(|e| format!("cannot wait for make: {e}"))?;
        if status.success() {
            return Ok(());
        }
        let text = fs::read(self.log).map_err(log_error)?;
        Err(format!("building the {label} kernel failed; {} ends:\n{}", self.log.display(), tail(&text)))
    }
}

/// The last lines of `log`.
fn tail(log: &[u8]) -> String {
    let text = String::from_utf8_lossy(log);
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(25)..).unwrap_or_default().join("\n")
}

/// Counts what was compiled.
struct Progress {
    label: String,
    start: Instant,
    shown: Instant,
    objects: u32,
    tty: bool,
}

impl Progress {
    fn new(label: &str) -> Self {
        let tty = std::io::stderr().is_terminal();
        let now = Instant::now();
        eprintln!("{label} kernel: compiling about 1400 files, a few minutes");
        Self { label: label.to_owned(), start: now, shown: now, objects: 0, tty }
    }

    fn line(&mut self, line: &[u8]) {
        if !compiles(line) {
            return;
        }
        self.objects += 1;
        let pause = if self.tty { Duration::from_millis(200) } else { Duration::from_secs(20) };
        if self.shown.elapsed() < pause {
            return;
        }
        self.shown = Instant::now();
        let text = format!(
            "{} kernel: {} files, {:.0} s",
            self.label,
            self.objects,
            self.start.elapsed().as_secs_f64()
        );
        if self.tty { eprint!("\r{text}\x1b[K") } else { eprintln!("{text}") }
    }

    fn end(&self) {
        if self.tty {
            eprint!("\r\x1b[K");
        }
    }
}

/// Whether a line of kbuild's output tells of a compiled file.
fn compiles(line: &[u8]) -> bool {
    let line = line.trim_ascii_start();
    line.starts_with(b"CC ") || line.starts_with(b"AS ")
}

fn strip(arch: Arch, from: &Path, to: &Path) -> Result<(), String> {
    let tool = format!("{}strip", arch.tools());
    let out = Command::new(&tool)
        .arg("-o")
        .arg(to)
        .arg(from)
        .output()
        .map_err(|e| format!("cannot run {tool}: {e}"))?;
    if out.status.success() {
        return Ok(());
    }
    Err(format!("{tool} failed: {}", String::from_utf8_lossy(&out.stderr).trim()))
}

/// The image of the bundle: x86_64's segments laid out flat; on aarch64 the kernel's own raw image.
fn flat(arch: Arch, vmlinux: &Path, objects: &Path) -> Result<elf::Flat, String> {
    let read = |path: &PathBuf| fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
    match arch {
        Arch::X86_64 => elf::flatten(&read(&vmlinux.to_path_buf())?, bundle::ALIGN)
            .map_err(|e| format!("{}: {e}", vmlinux.display())),
        Arch::Aarch64 => {
            let mut image = read(&objects.join("arch/arm64/boot/Image"))?;
            image.resize(image.len().next_multiple_of(64 << 10), 0);
            Ok(elf::Flat { image, load: 0x8000_0000, entry: 0x8000_0000 })
        }
    }
}

fn remove(dir: &Path) -> Result<(), String> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("cannot remove {}: {e}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_compiled_files_count() {
        for line in ["  CC      mm/slub.o", "  AS      arch/x86/entry/entry.o"] {
            assert!(compiles(line.as_bytes()), "{line}");
        }
        for line in ["  LD      vmlinux.o", "make[1]: CC ", "  HOSTCC  scripts/x", ""] {
            assert!(!compiles(line.as_bytes()), "{line}");
        }
    }

    #[test]
    fn the_end_of_a_log_is_shown() {
        let log: String = (0..100).map(|i| format!("line {i}\n")).collect();
        let shown = tail(log.as_bytes());
        assert!(shown.starts_with("line 75\n") && shown.ends_with("line 99"));
        assert_eq!(tail(b"\xff one"), "\u{fffd} one");
        assert_eq!(tail(b""), "");
    }

    #[test]
    fn a_patch_that_does_not_fit_is_an_error_only_where_it_must_fit() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tree/a");
        fs::create_dir(dir.path().join("tree")).unwrap();
        let patch = dir.path().join("p.patch");
        fs::write(&patch, "--- a/a\n+++ b/a\n@@ -1 +1 @@\n-one\n+two\n").unwrap();
        let tree = dir.path().join("tree");
        fs::write(&file, "one\n").unwrap();
        apply(&patch, &tree, true).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "two\n");
        fs::write(&file, "three\n").unwrap();
        apply(&patch, &tree, false).unwrap();
        assert!(apply(&patch, &tree, true).unwrap_err().contains("does not apply"));
        assert_eq!(fs::read_to_string(&file).unwrap(), "three\n");
    }
}
