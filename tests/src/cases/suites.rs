//! File-system test suites from the Rust registry, run in the guest and, to compare, on the host's own file system.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use krun::{Dax, Share, VmConfig};

use super::disk::{MIB, image, tool};
use super::programs::Copy;
use crate::harness::{Case, Env, Failure, Mounted, TempDir, find, no_guest, run, same};

pub const PJDFSTEST: Case = Case { name: "suite_pjdfstest", host: pjdfstest, guest: no_guest };
pub const FSX: Case = Case { name: "suite_fsx", host: fsx, guest: no_guest };

/// Where the guest finds the programs.
const PROGRAMS: &str = "/opt";

/// The directory of a suite's program.
fn home(program: &str) -> Result<PathBuf, Failure> {
    let mut path = find(program)?;
    path.pop();
    Ok(path)
}

/// Whether all there is runs, which takes many minutes and a longer `KRUN_TEST_CASE_SECONDS`.
pub fn whole() -> bool {
    std::env::var_os("KRUN_TEST_WHOLE").is_some()
}

/// An empty file system of this host, in memory.
fn tmpfs(dir: &TempDir) -> Result<Mounted, Failure> {
    let at = dir.path().join("tmpfs");
    std::fs::create_dir(&at)?;
    Mounted::new(&["-t", "tmpfs"], "tmpfs", &at)
}

/// An empty ext4 file system of this host, with blocks of 4 KiB.
pub fn ext4(dir: &TempDir, mib: u64) -> Result<Mounted, Failure> {
    ext4_of_blocks(dir, mib, 4096)
}

/// The same with blocks of so many bytes.
fn ext4_of_blocks(dir: &TempDir, mib: u64, block: u32) -> Result<Mounted, Failure> {
    let (file, at) = (dir.path().join("image"), dir.path().join("ext4"));
    image(&file, mib * MIB)?;
    std::fs::create_dir(&at)?;
    let file = file.to_string_lossy();
    match tool("mkfs.ext4", &["-q", "-F", "-m", "0", "-b", &block.to_string(), &file])? {
        Some((0, _)) => Mounted::new(&["-o", "loop"], &file, &at),
        other => Err(Failure::Skip(format!("no ext4 can be made here: {other:?}"))),
    }
}

/// What became of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    Skipped,
}

/// The verdicts in what pjdfstest printed, by name, and the lines that belong to failures.
fn verdicts(text: &str) -> (BTreeMap<String, Verdict>, String) {
    let (mut all, mut failures, mut failing) = (BTreeMap::new(), String::new(), false);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let verdict = match (words.next(), words.next(), words.next()) {
            (Some(_), Some("ok"), None) => Some(Verdict::Passed),
            (Some(_), Some("FAILED"), None) => Some(Verdict::Failed),
            (Some(_), Some("skipped"), None) => Some(Verdict::Skipped),
            _ => None,
        };
        if let (Some(verdict), Some(name)) = (verdict, line.split_whitespace().next()) {
            all.insert(name.to_owned(), verdict);
            failing = verdict == Verdict::Failed;
        }
        if failing {
            failures.push_str(line);
            failures.push('\n');
        }
    }
    (all, failures)
}

/// The guest's verdicts are the host's.
fn compare(what: &str, host: &str, guest: &str) -> Result<(), Failure> {
    let ((host, _), (guest, failures)) = (verdicts(host), verdicts(guest));
    let count = |all: &BTreeMap<String, Verdict>, v| all.values().filter(|seen| **seen == v).count();
    let counts = |all| [Verdict::Passed, Verdict::Failed, Verdict::Skipped].map(|v| count(all, v));
    println!("    {what}: passed, failed, skipped {:?}; on the host {:?}", counts(&guest), counts(&host));
    let failing = host.iter().filter(|(_, v)| **v == Verdict::Failed).map(|(name, _)| name.as_str());
    let failing: Vec<_> = failing.collect();
    if !failing.is_empty() {
        println!("    fail on the host itself: {}", failing.join(", "));
    }
    let mut wrong = String::new();
    for (name, here) in &host {
        let there = guest.get(name);
        // More than the host's own file system can do is no fault.
        if there != Some(here) && there != Some(&Verdict::Passed) && !is_known(name, there) {
            wrong.push_str(&format!("{name}: {there:?}, on the host {here:?}\n"));
        }
    }
    if wrong.is_empty() && counts(&guest)[0] > 30 && host.len() == guest.len() {
        return Ok(());
    }
    let tests = format!("{} tests, on the host {}", guest.len(), host.len());
    Err(Failure::Wrong(format!("{what}: {tests}\n{wrong}{failures}")))
}

/// The guest cannot tell how many links a file may have: glibc knows that of ext4 and few others by their names.
fn is_known(name: &str, there: Option<&Verdict>) -> bool {
    name.ends_with("link_count_max") && there == Some(&Verdict::Skipped)
}

/// Remounting read-only fails on the host as well, for files of tests before are still in use now and then.
const SETTINGS: &str = "[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
allow_remount = false
expected_failures = []
[dummy_auth]
entries = [[\"nobody\", \"nogroup\"], [\"games\", \"games\"]]
";

/// The command that runs tests of pjdfstest whose names contain one of `patterns` in `dir`.
fn suite(programs: &str, settings: &str, dir: &str, patterns: &str) -> String {
    // Other users must get to the directory; `/dev/shm` is the other file system.
    format!(
        "umask 022; mkdir -p {dir}; NO_COLOR=1 {programs}/pjdfstest -c {settings} -p {dir} -s /dev/shm {patterns} \
         2>&1; true"
    )
}

/// A guest with the suites' programs, the settings and one more share.
fn guest(env: &Env, programs: &Path, settings: &TempDir, script: &str) -> VmConfig {
    let mut config = env.shell(script);
    config.shares.extend([
        Share { read_only: true, mount: Some(PROGRAMS.into()), ..Share::new("suites", programs) },
        Share { read_only: true, mount: Some("/srv".into()), ..Share::new("settings", settings.path()) },
    ]);
    config
}

/// Runs a script on this host.
fn here(script: &str) -> Result<String, Failure> {
    let out = Command::new("/bin/sh").args(["-c", script]).output()?;
    Ok(String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
}

/// pjdfstest on a share and on the root; in part, unless the whole is asked for.
fn pjdfstest(env: &Env) -> Result<(), Failure> {
    let programs = home("pjdfstest")?;
    let (dir, settings) = (TempDir::new("pjdfstest")?, TempDir::new("settings")?);
    let own = settings.path().join("pjdfstest");
    std::fs::write(&own, SETTINGS)?;
    let here = |at: &Path, patterns: &str| {
        let text = |path: &Path| path.display().to_string();
        here(&suite(&text(&programs), &text(&own), &text(at), patterns))
    };
    let there = |at: &str, patterns: &str| suite(PROGRAMS, "/srv/pjdfstest", at, patterns);
    let (some, few) = match whole() {
        true => ("", ""),
        false => ("open:: rename:: unlink:: utimensat:: truncate chown", "rename::"),
    };
    let mut disks = vec![("a share of tmpfs", tmpfs(&dir)?)];
    if whole() {
        disks.push(("a share of ext4", ext4(&dir, 64)?));
    }
    for (what, disk) in disks {
        let reference = here(&disk.path().join("host"), some)?;
        let mut config = guest(env, &programs, &settings, &there("/media/guest", some));
        config.shares.push(Share { mount: Some("/media".into()), ..Share::new("disk", disk.path()) });
        compare(what, &reference, &run(config)?.success()?.out())?;
    }
    let root = Copy::of(&env.root)?;
    let reference = here(&root.path().join("host"), few)?;
    let mut config = guest(env, &programs, &settings, &there("/guest", few));
    config.shares[0] = Share::root(root.path());
    compare("the root, an overlay", &reference, &run(config)?.success()?.out())
}

/// Everything that fsx can do on Linux.
const OPERATIONS: &str = "[weights]
close_open = 2
read = 10
write = 10
mapread = 10
mapwrite = 10
invalidate = 1
truncate = 4
fsync = 1
fdatasync = 1
posix_fallocate = 2
punch_hole = 3
sendfile = 3
posix_fadvise = 1
copy_file_range = 3
";

/// fsx with several seeds on a share, on one through its DAX window, and on the root, which the host's file system passes as well.
fn fsx(env: &Env) -> Result<(), Failure> {
    let programs = home("fsx")?;
    let (dir, settings) = (TempDir::new("fsx")?, TempDir::new("settings")?);
    std::fs::write(settings.path().join("fsx"), OPERATIONS)?;
    let (seeds, steps) = if whole() { (5, 5_000) } else { (2, 1_000) };
    let script = |programs: &str, settings: &str, dirs: &str| {
        format!(
            "for d in {dirs}; do for s in $(seq {seeds}); do mkdir -p $d; \
             {programs}/fsx -f {settings} -S $s -N {steps} -P $d $d/file$s 2>&1 || exit 1; done; done; echo passed"
        )
    };
    let disk = ext4_of_blocks(&dir, 64, 1024)?;
    let own = settings.path().join("fsx").display().to_string();
    let host = here(&script(
        &programs.display().to_string(),
        &own,
        &disk.path().join("host").display().to_string(),
    ))?;
    same(&format!("on the host: {host}"), host.trim_end().ends_with("passed"), true)?;
    let root = Copy::of(&env.root)?;
    let mut config =
        guest(env, &programs, &settings, &script(PROGRAMS, "/srv/fsx", "/media/guest /dax/dax /guest"));
    config.shares[0] = Share::root(root.path());
    config.shares.push(Share { mount: Some("/media".into()), ..Share::new("disk", disk.path()) });
    let dax = Some(Dax { from: 0, ..Dax::new(16 * MIB) });
    config.shares.push(Share { dax, mount: Some("/dax".into()), ..Share::new("dax", disk.path()) });
    let output = run(config)?;
    same(&format!("in the guest: {}", output.out()), output.code, 0)?;
    // What the guest left is what the host's own run left: the same steps on the same file system.
    for seed in 1..=seeds {
        let [a, b, c] =
            ["host", "guest", "dax"].map(|d| std::fs::read(disk.path().join(d).join(format!("file{seed}"))));
        let a = a?;
        same(&format!("the file of seed {seed}"), a == b?, true)?;
        same(&format!("the file of seed {seed} in a DAX window"), a == c?, true)?;
    }
    Ok(())
}
