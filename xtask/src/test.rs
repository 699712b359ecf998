//! `cargo xtask test`: everything that can be checked here, with counts.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::emulated::{End, Lab, Patience};
use crate::{arrows, debian, install, kernel, packages, peers, rootfs};

/// What a part of the tests came to.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Counts {
    passed: u32,
    failed: u32,
    /// Why each skipped test was.
    skipped: Vec<String>,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped.extend(other.skipped);
    }

    /// Counts a check that is not one of a test runner's.
    fn check(&mut self, what: &str, result: Result<(), String>) {
        match result {
            Ok(()) => self.passed += 1,
            Err(e) => {
                self.failed += 1;
                eprintln!("{what} failed: {e}");
            }
        }
    }

    /// Takes in one line of `cargo test` or of the VM tests.
    fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            let number = |word: &str| {
                let before = rest.split(word).next().unwrap_or_default();
                before.rsplit(' ').find_map(|w| w.parse::<u32>().ok()).unwrap_or(0)
            };
            self.passed += number(" passed");
            self.failed += number(" failed");
        } else if let Some(rest) = line.strip_prefix("vm tests: ") {
            let mut words = rest.split(' ');
            let mut number = || words.by_ref().find_map(|w| w.parse::<u32>().ok()).unwrap_or(0);
            self.passed += number();
            self.failed += number();
        } else if line.contains(" ... skipped: ")
            || line.starts_with("skipped: ")
            || line.contains(" ... ignored")
        {
            self.skipped.push(line.to_owned());
        }
    }
}

/// Runs `command`, shows what it prints and counts it.
fn counted(what: &str, command: &mut Command) -> Counts {
    let mut counts = Counts::default();
    let mut child = match command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn() {
        Ok(child) => child,
        Err(e) => {
            counts.check(what, Err(format!("cannot start: {e}")));
            return counts;
        }
    };
    // What tests that passed have printed is of interest only where it says that nothing was tested.
    let mut silent = false;
    for line in
        child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(Result::ok)
    {
        silent = line == "successes:" || silent && line != "failures:" && !line.starts_with("test result: ");
        if !silent {
            println!("{line}");
        }
        counts.line(&line);
    }
    match child.wait() {
        Ok(status) if status.success() => {}
        // Failures that were counted make the status bad too; a bad status without any is one more.
        Ok(status) if counts.failed == 0 => counts.check(what, Err(format!("ended with {status}"))),
        Ok(_) => {}
        Err(e) => counts.check(what, Err(e.to_string())),
    }
    counts
}

fn cargo(args: &[&str]) -> Result<(), String> {
    let status = Command::new("cargo").args(args).env("RUSTDOCFLAGS", "-D warnings").status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("cargo {} ended with {status}", args.join(" "))),
        Err(e) => Err(format!("cannot run cargo: {e}")),
    }
}

fn stage(name: &str) {
    println!("== {name}");
}

/// Runs all tests, or only the VM tests whose names start with one of `names`.
///
/// # Errors
/// Something failed, or a part could not be run at all.
pub fn run(names: &[String]) -> Result<(), String> {
    let start = Instant::now();
    let mut counts = Counts::default();
    if names.is_empty() {
        packages::ensure("the tests", TOOLS)?;
        stage("format, lints, documentation, dependency arrows");
        counts.check("cargo fmt", cargo(&["fmt", "--all", "--check"]));
        counts.check("dependency arrows", arrows::check());
        let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
        counts.check("cargo clippy", cargo(&clippy));
        counts.check("cargo doc", cargo(&["doc", "--quiet", "--workspace", "--no-deps"]));
        stage("unit and property tests");
        let mut unit = Command::new("cargo");
        unit.args(["test", "--quiet", "--workspace", "--no-fail-fast", "--", "--show-output"]);
        // Those of the emulated host need it.
        let lab = Lab::ensure(&build()?.krun)?;
        counts.add(counted("cargo test", &mut unit));
        stage("tests of the hypervisor and the machine, under the emulated host's KVM");
        counts.add(kvm_tests(&lab)?);
        stage("krun run in the emulated host");
        counts.check("krun run --accel emulated", emulated_run(&lab));
        stage("installation");
        counts.check("cargo xtask install", install::check());
    }
    stage("VM tests in the emulated host");
    counts.add(vm_tests(names)?);
    for why in &counts.skipped {
        println!("skipped: {why}");
    }
    println!("{} skipped, {:.0} s", counts.skipped.len(), start.elapsed().as_secs_f64());
    println!("{} passed, {} failed", counts.passed, counts.failed);
    if counts.failed == 0 { Ok(()) } else { Err(format!("{} tests failed", counts.failed)) }
}

/// Runs the tests that need a faithful KVM where there is one. Nothing may be skipped there.
fn kvm_tests(lab: &Lab) -> Result<Counts, String> {
    let args =
        ["test", "--quiet", "-p", "krun-hv", "-p", "krun-machine", "--no-run", "--message-format=json"];
    let out = Command::new("cargo").args(args).stderr(Stdio::inherit()).output();
    let out = out.map_err(|e| format!("cannot run cargo: {e}"))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let programs: Vec<_> = text.lines().filter_map(executable).collect();
    let mut counts = Counts::default();
    if !out.status.success() {
        counts.check("building the tests under KVM", Err(out.status.to_string()));
    }
    for program in &programs {
        let words = [program, "--quiet", "--show-output"].map(Into::into);
        let mut part = Counts::default();
        let patience = Patience { whole: Some(KVM_TESTS_LIMIT), silence: None };
        let end = lab.lines(&words, &[], &[], patience, |line| {
            part.line(line);
            if line.contains("FAILED") || line.contains("panicked") {
                println!("{line}");
            }
        })?;
        let is_good = matches!(&end, End::Status(status) if status.success());
        if !is_good && part.failed == 0 {
            part.check(program, Err(end.to_string()));
        }
        println!("{program}: {} passed, {} failed", part.passed, part.failed);
        counts.add(part);
    }
    if programs.len() < 3 {
        counts.check("the tests under KVM", Err(format!("cargo named only {programs:?}")));
    }
    for why in std::mem::take(&mut counts.skipped) {
        counts.check("a test under KVM", Err(why));
    }
    Ok(counts)
}

/// `krun run` where KVM does not serve, as a user has it: input, both outputs, a volume and the status.
fn emulated_run(lab: &Lab) -> Result<(), String> {
    let root = rootfs::ensure(rootfs::TEST)?;
    let fail = |e: std::io::Error| format!("a directory for it: {e}");
    let dir = std::path::absolute(crate::target_dir().join("emulated-run")).map_err(fail)?;
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).map_err(fail)?;
    let script = "cat; echo err >&2; cat > /mnt/written < /proc/sys/kernel/hostname; exit 37";
    let mut volume = dir.clone().into_os_string();
    volume.push(":/mnt");
    let mut command = lab.emulated();
    command.arg("--kernel").arg(debian::bundle()?).arg("--root").arg(root).arg("--volume").arg(volume);
    command
        .args(["--", "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| format!("cannot start: {e}"))?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(b"in\n").map_err(|e| format!("standard input: {e}"))?;
    }
    let out = child.wait_with_output().map_err(|e| e.to_string())?;
    let written = std::fs::read(dir.join("written")).unwrap_or_default();
    let seen = (out.status.code(), &out.stdout[..], &out.stderr[..], &written[..]);
    if seen == (Some(37), b"in\n", b"err\n", b"localhost\n") {
        return Ok(());
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Err(format!("{}, {:?}, {:?}, {:?}", out.status, text(&out.stdout), text(&out.stderr), text(&written)))
}

/// The test program that a line of cargo's messages names; examples lie elsewhere.
fn executable(line: &str) -> Option<&str> {
    line.split_once("\"executable\":\"")?.1.split('"').next().filter(|path| path.contains("/deps/"))
}

/// Packages besides those of the kernel build and the emulated host, which say so themselves.
const TOOLS: &[&str] = &[
    "gcc",
    "libc6-dev",
    "pkg-config",
    "bzip2",
    "zstd",
    "gzip",
    "cpio",
    "dmidecode",
    "e2fsprogs",
    "iproute2",
    "passt",
];

/// Builds what the VM tests need and runs them against both kernel bundles, one emulated host each.
fn vm_tests(names: &[String]) -> Result<Counts, String> {
    let ours = kernel::ensure_guest()?;
    let debian = debian::bundle()?;
    let root = rootfs::ensure(rootfs::TEST)?;
    let built = build()?;
    let images = kernel_images(&ours.vmlinux)?;
    let (stock, gvproxy) = (debian::kernel()?, debian::gvproxy()?);
    // The two halves run side by side; the emulated host is single-threaded.
    let lab = Lab::ensure(&built.krun)?;
    // After QEMU: installing that removes qemu-utils of another version.
    packages::ensure("the tests of disks", &["qemu-utils", "qemu-system-common"])?;
    let peers = peers::ensure()?;
    let mut bundles = vec![(OURS, ours.bundle), ("Debian's libkrunfw5", debian)];
    if std::env::var_os(ONLY_OURS).is_some_and(|v| !v.is_empty()) {
        println!("{ONLY_OURS} is set: VM tests run with our kernel only");
        bundles.truncate(1);
    }
    let runs: Vec<_> = bundles
        .into_iter()
        .map(|(label, bundle)| {
            let mut words = vec![
                built.tests.clone().into_os_string(),
                "host".into(),
                "--root".into(),
                root.clone().into(),
                "--kernel".into(),
                bundle.into(),
                "--krun".into(),
                built.krun.clone().into(),
                "--chroot-vm".into(),
                built.chroot_vm.clone().into(),
            ];
            words.extend(names.iter().map(Into::into));
            if names.is_empty() && label != OURS {
                println!("{label}: without {}, which run with our kernel", ONCE.join(", "));
                words.extend(["--without".into(), ONCE.join(",").into()]);
            }
            let env = vec![
                ("KRUN_TEST_KERNELS".into(), images.clone().into_os_string()),
                ("KRUN_TEST_BZIMAGE".into(), stock.clone().into_os_string()),
                ("KRUN_TEST_PEERS".into(), peers.clone()),
                ("KRUN_TEST_GVPROXY".into(), gvproxy.clone().into_os_string()),
                // Its own and empty, so that what a test leaves behind can be seen.
                ("TMPDIR".into(), "/run".into()),
            ];
            let (root, lab) = (root.clone(), lab.clone());
            thread::spawn(move || {
                let (mut part, mut whole) = (Counts::default(), false);
                let (start, mut so_far, mut anew) = (Instant::now(), None::<String>, 0);
                while !whole {
                    let left = VM_TESTS_LIMIT.saturating_sub(start.elapsed());
                    let patience = Patience { whole: Some(left), silence: Some(VM_TESTS_SILENCE) };
                    let mut words = words.clone();
                    words.extend(so_far.iter().flat_map(|at| ["--progress".into(), at.into()]));
                    let end = lab.lines(&words, &env, std::slice::from_ref(&root), patience, |line| {
                        match line.strip_prefix(SO_FAR) {
                            Some(at) => so_far = Some(at.to_owned()),
                            None => {
                                println!("{label}: {line}");
                                part.line(line);
                                whole |= line.starts_with("vm tests: ");
                            }
                        }
                    })?;
                    if whole {
                        break;
                    }
                    if matches!(end, End::Silence) && so_far.is_some() && anew < HOSTS_AGAIN {
                        anew += 1;
                        println!(
                            "{label}: NOTE: the emulated host has stood still for {} s, which QEMU's now and then \
                             does; the case under way and those behind it run in a new one",
                            VM_TESTS_SILENCE.as_secs()
                        );
                        continue;
                    }
                    part.check(label, Err(format!("{end} before the last test")));
                    break;
                }
                Ok::<_, String>(part)
            })
        })
        .collect();
    let mut counts = Counts::default();
    for run in runs {
        counts.add(run.join().map_err(|_| "a test thread panicked".to_owned())??);
    }
    Ok(counts)
}

const OURS: &str = "our kernel";

/// Leaves out the tests with Debian's bundle, to save time while something is written.
const ONLY_OURS: &str = "KRUN_TEST_ONLY_OURS";

/// Cases that run with one bundle only, unless named: they bring their own kernel, or are about programs and disks
/// at work for long, with nothing of the kernel that other cases do not show.
const ONCE: &[&str] = &[
    "kernels",
    "kernels_bzimage",
    "bare",
    "leftovers",
    "programs_git",
    "programs_compile",
    "programs_dpkg",
    "disk_fio",
    "disk_power_cut",
    "share_no_space",
    "share_dax_root",
    "suite_pjdfstest",
    "suite_fsx",
    "load_pgbench",
    "load_dbench",
    "load_stress",
    "load_stress_files",
    "vhost_user_fs",
    "vhost_user_can",
    "vhost_user_rtc",
    "vhost_user_hung",
];

/// How long one of the test programs under the emulated host's KVM may take; they took under a minute.
const KVM_TESTS_LIMIT: Duration = Duration::from_secs(5 * 60);
/// What the test program's lines about its progress begin with; there is one every 10 s.
const SO_FAR: &str = "vm tests so far: ";
/// How long it may say nothing. QEMU 7.2 has been seen to loop without running its processor.
const VM_TESTS_SILENCE: Duration = Duration::from_secs(90);
/// How often another emulated host is tried.
const HOSTS_AGAIN: u32 = 4;
/// How long the VM tests of one bundle may take, in all hosts together; they took 13 to 19 minutes where that was measured.
const VM_TESTS_LIMIT: Duration = Duration::from_secs(35 * 60);

/// Programs under test.
pub struct Built {
    /// The `krun` command.
    pub krun: PathBuf,
    /// The VM tests.
    pub tests: PathBuf,
    /// The C example; `libkrun.so.1` lies beside it, and `calls`, what else the tests do in C.
    pub chroot_vm: PathBuf,
}

/// Builds the release programs and the C example against the library.
///
/// # Errors
/// The compiler's.
pub fn build() -> Result<Built, String> {
    cargo(&["build", "--quiet", "--release", "-p", "krun-cli", "-p", "libkrun"])?;
    // Apart, as in one call what the tests want of a dependency would be in the programs too.
    cargo(&["build", "--quiet", "--release", "-p", "krun-tests"])?;
    let release = crate::target_dir().join("release");
    let soname = release.join("libkrun.so.1");
    let _ = std::fs::remove_file(&soname);
    std::os::unix::fs::symlink("libkrun.so", &soname).map_err(|e| format!("{}: {e}", soname.display()))?;
    let compile = |name: &str, source: &str| {
        let program = release.join(name);
        let status = Command::new("cc")
            .args(["-O2", "-Wall", "-Wextra", "-Werror", "-Iinclude", "-o"])
            .arg(&program)
            .arg(source)
            .arg(format!("-L{}", release.display()))
            .arg("-lkrun")
            .status()
            .map_err(|e| format!("cannot run cc: {e}"))?;
        if status.success() { Ok(program) } else { Err(format!("compiling {source}: {status}")) }
    };
    // Found beside the other.
    compile("calls", "tests/c/calls.c")?;
    let chroot_vm = compile("chroot_vm", "examples/chroot_vm.c")?;
    Ok(Built { krun: release.join("krun"), tests: release.join("krun-vmtests"), chroot_vm })
}

/// The guest kernel in every format that `krun_set_kernel` takes on this architecture.
fn kernel_images(vmlinux: &std::path::Path) -> Result<PathBuf, String> {
    let dir = vmlinux.with_file_name("images");
    let done = dir.join("complete");
    if done.exists() {
        return Ok(dir);
    }
    std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let script = "cp \"$1\" vmlinux && gzip -9nc vmlinux > image.gz && bzip2 -9c vmlinux > image.bz2 && \
        zstd -q -f -19 vmlinux -o image.zst && cp vmlinux image && touch complete";
    let status = Command::new("sh")
        .args(["-ec", script, "sh"])
        .arg(vmlinux)
        .current_dir(&dir)
        .status()
        .map_err(|e| format!("cannot run sh: {e}"))?;
    if status.success() {
        Ok(dir)
    } else {
        Err(format!("making kernel images in {}: {status}", dir.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_says_where_a_test_program_is() {
        let line = r#"{"reason":"compiler-artifact","executable":"/t/deps/krun_hv-1","fresh":true}"#;
        assert_eq!(executable(line), Some("/t/deps/krun_hv-1"));
        assert_eq!(executable(&line.replace("deps", "examples")), None);
        assert_eq!(executable(r#"{"reason":"compiler-artifact","executable":null}"#), None);
    }

    #[test]
    fn lines_are_counted() {
        let mut counts = Counts::default();
        for line in [
            "running 3 tests",
            "test result: ok. 12 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.1s",
            "vm test kernels ... skipped: no images",
            "vm tests: 5 passed, 2 failed, 1 skipped",
        ] {
            counts.line(line);
        }
        let skipped = vec!["vm test kernels ... skipped: no images".to_owned()];
        assert_eq!(counts, Counts { passed: 17, failed: 3, skipped });
    }
}
