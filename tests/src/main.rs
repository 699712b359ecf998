//! VM tests. Each file under `cases` holds the host half and the guest half of one behaviour; both run
//! from this one program, which the guest finds in a share.
//!
//! ```text
//! krun-vmtests host --root DIR [--kernel FILE] [--krun FILE] [--chroot-vm FILE] [--shard I/N] [--without NAME,...]
//!     [NAME...]
//! krun-vmtests guest CASE [ARGUMENT...]
//! krun-vmtests list
//! ```
//! The host half needs working KVM. It prints a line per case and ends with the counts.

mod cases;
mod harness;
mod network;
mod uinput;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use harness::{Case, Env, Failure};
use watch::{Progress, Watch};

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let mode = words.next().unwrap_or_default();
    let rest: Vec<_> = words.collect();
    match mode.to_str() {
        Some("host") => match Options::parse(&rest) {
            Ok(options) => host(&options),
            Err(e) => usage(&e),
        },
        Some("guest") => guest(&rest),
        Some("list") => {
            cases::ALL.iter().for_each(|case| println!("{}", case.name));
            ExitCode::SUCCESS
        }
        _ => usage("the first word is host, guest or list"),
    }
}

fn usage(why: &str) -> ExitCode {
    eprintln!("krun-vmtests: {why}");
    ExitCode::from(2)
}

/// What the host half was told.
struct Options {
    env: Env,
    shard: (usize, usize),
    names: Vec<String>,
    progress: Progress,
    without: Vec<String>,
}

impl Options {
    fn parse(words: &[std::ffi::OsString]) -> Result<Self, String> {
        let (mut root, mut kernel, mut krun, mut chroot_vm) = (None, None, None, None);
        let (mut shard, mut names, mut progress) = ((0, 1), Vec::new(), Progress::default());
        let mut without = Vec::new();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let option = word.to_str().ok_or("options are UTF-8")?;
            if !option.starts_with("--") {
                names.push(option.to_owned());
                continue;
            }
            let value = words.next().ok_or_else(|| format!("{option} wants a value"))?;
            let path = Some(PathBuf::from(value));
            match option {
                "--root" => root = path,
                "--kernel" => kernel = path,
                "--krun" => krun = path,
                "--chroot-vm" => chroot_vm = path,
                "--progress" => {
                    let text = value.to_str().unwrap_or_default();
                    progress = Progress::parse(text).ok_or("--progress is of this program's own making")?;
                }
                "--without" => {
                    without = value.to_string_lossy().split(',').map(str::to_owned).collect();
                }
                "--shard" => {
                    let text = value.to_str().unwrap_or_default();
                    let (i, n) = text.split_once('/').ok_or("--shard I/N")?;
                    shard = (i.parse().map_err(|_| "--shard I/N")?, n.parse().map_err(|_| "--shard I/N")?);
                }
                other => return Err(format!("unknown option {other}")),
            }
        }
        let root = root.ok_or("--root is missing")?;
        Ok(Self { env: Env::new(root, kernel, krun, chroot_vm)?, shard, names, progress, without })
    }

    fn wants(&self, index: usize, case: &Case) -> bool {
        if self.without.iter().any(|name| name == case.name) {
            return false;
        }
        let named = self.names.is_empty() || self.names.iter().any(|n| case.name.starts_with(n.as_str()));
        named && (!self.names.is_empty() || index % self.shard.1 == self.shard.0)
    }
}

fn host(options: &Options) -> ExitCode {
    if let Err(e) = krun::raise_open_file_limit() {
        println!("the limit of open files stays: {e}");
    }
    let watch = match Watch::new() {
        Ok(watch) => watch,
        Err(e) => return usage(&format!("cannot start a thread: {e}")),
    };
    let mut progress = options.progress;
    let cases = cases::ALL.iter().enumerate().skip(progress.next);
    for (index, case) in cases.filter(|(i, c)| options.wants(*i, c)) {
        if progress.given_up() {
            println!("vm test {} ... FAILED: not run, as others hung", case.name);
            progress.failed += 1;
            continue;
        }
        progress.next = index;
        watch.begin(case.name, progress);
        let start = Instant::now();
        let result = std::panic::catch_unwind(|| (case.host)(&options.env));
        watch.end();
        report(case.name, start.elapsed().as_secs_f64(), result, &mut progress);
    }
    let Progress { passed, failed, skipped, .. } = progress;
    println!("vm tests: {passed} passed, {failed} failed, {skipped} skipped");
    ExitCode::from(u8::from(failed > 0))
}

/// Prints and counts how a case ended.
fn report(name: &str, took: f64, result: thread::Result<Result<(), Failure>>, progress: &mut Progress) {
    match result {
        Ok(Ok(())) => {
            progress.passed += 1;
            println!("vm test {name} ... ok ({took:.1} s)");
        }
        Ok(Err(Failure::Skip(why))) => {
            progress.skipped += 1;
            println!("vm test {name} ... skipped: {why}");
        }
        Ok(Err(Failure::Wrong(why))) => {
            progress.failed += 1;
            println!("vm test {name} ... FAILED ({took:.1} s)\n    {}", why.replace('\n', "\n    "));
        }
        Err(_) => {
            progress.failed += 1;
            println!("vm test {name} ... FAILED ({took:.1} s): panicked");
        }
    }
}

fn guest(words: &[std::ffi::OsString]) -> ExitCode {
    let name = words.first().and_then(|w| w.to_str()).unwrap_or_default();
    let Some(case) = cases::ALL.iter().find(|c| c.name == name) else {
        return usage(&format!("no case {name}"));
    };
    match (case.guest)(words.get(1..).unwrap_or_default()) {
        Ok(code) => ExitCode::from(code),
        Err(why) => {
            eprintln!("guest half of {name}: {why}");
            ExitCode::from(99)
        }
    }
}
