//! Compares programs side by side.
//!
//! ```text
//! krun-bench times ROUNDS VARIANTS    LABEL LEAST MEDIAN MOST, in ms; every round runs each variant once
//! krun-bench exits VARIANTS           LABEL REASON=N...: how often vCPUs left KVM for the program
//! krun-bench memory SECONDS VARIANTS  LABEL KIB: private memory after so long, guest RAM and kernel apart
//! krun-bench figures ROUNDS VARIANTS  LABEL NAME MEDIAN UNIT of the lines NAME VALUE UNIT that variants print
//! VARIANTS: LABEL [KEY=VALUE...] -- PROGRAM [ARGUMENT...] [;; VARIANTS]
//! ```

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

const MODES: &str = "the first word is times, exits, memory or figures";

struct Variant {
    label: String,
    env: Vec<(OsString, OsString)>,
    argv: Vec<OsString>,
    times: Vec<Duration>,
}

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let number = |word: &OsString| word.to_str().and_then(|n| n.parse::<u32>().ok());
    let result = match words.split_first() {
        Some((mode, rest)) if mode == "exits" => variants(rest).and_then(exits),
        Some((mode, [n, rest @ ..])) => match (mode.to_str(), number(n)) {
            (Some("times"), Some(rounds)) => variants(rest).and_then(|all| times(rounds, all)),
            (Some("memory"), Some(seconds)) => variants(rest).and_then(|all| memory(seconds, all)),
            (Some("figures"), Some(rounds)) => variants(rest).and_then(|all| figures(rounds, &all)),
            (Some("times" | "memory" | "figures"), None) => Err(format!("{} is no number", n.display())),
            _ => Err(MODES.into()),
        },
        _ => Err(MODES.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("krun-bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn variants(words: &[OsString]) -> Result<Vec<Variant>, String> {
    words.split(|w| w == ";;").map(variant).collect()
}

fn variant(words: &[OsString]) -> Result<Variant, String> {
    let at = words.iter().position(|w| w == "--").ok_or("a variant has no --")?;
    let (head, argv) = (&words[..at], words[at + 1..].to_vec());
    let label = head.first().and_then(|l| l.to_str()).ok_or("a variant has no label")?.to_owned();
    let env = head[1..].iter().filter_map(|entry| {
        let bytes = entry.as_bytes();
        let at = bytes.iter().position(|b| *b == b'=')?;
        let part = |b: &[u8]| std::ffi::OsStr::from_bytes(b).to_owned();
        Some((part(&bytes[..at]), part(&bytes[at + 1..])))
    });
    Ok(Variant { label, env: env.collect(), argv, times: Vec::new() })
}

fn command(argv: &[OsString]) -> Result<Command, String> {
    let (program, args) = argv.split_first().ok_or("a variant has no program")?;
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null());
    Ok(command)
}

/// Runs it to its end.
fn run(v: &Variant, mut command: Command) -> Result<Duration, String> {
    let start = Instant::now();
    let status = command.envs(v.env.clone()).status().map_err(|e| format!("{}: {e}", v.label))?;
    let took = start.elapsed();
    if status.success() { Ok(took) } else { Err(format!("{} ended with {status}", v.label)) }
}

fn times(rounds: u32, mut variants: Vec<Variant>) -> Result<(), String> {
    // The first round warms caches and is not counted, unless it is the only one.
    for round in 0..=rounds {
        for v in &mut variants {
            let took = run(v, command(&v.argv)?)?;
            if round > 0 || rounds == 0 {
                v.times.push(took);
            }
        }
    }
    for v in &mut variants {
        v.times.sort();
        let ms = |t: Option<&Duration>| t.map_or(0.0, |t| t.as_secs_f64() * 1e3);
        let middle = v.times.get(v.times.len() / 2);
        println!("{}\t{:.4}\t{:.4}\t{:.4}", v.label, ms(v.times.first()), ms(middle), ms(v.times.last()));
    }
    Ok(())
}

/// What a variant has printed of one figure, in all rounds.
#[derive(Debug, Default, PartialEq)]
struct Figure {
    name: String,
    unit: String,
    values: Vec<f64>,
}

/// Takes in what one run has printed; figures stay in the order of their first line.
fn collect(text: &str, figures: &mut Vec<Figure>) -> Result<(), String> {
    for line in text.lines() {
        let [name, value, unit] = line.split('\t').collect::<Vec<_>>()[..] else {
            return Err(format!("{line:?} is no figure"));
        };
        let value = value.parse().map_err(|e| format!("{line:?}: {e}"))?;
        match figures.iter_mut().find(|f| f.name == name) {
            Some(figure) => figure.values.push(value),
            None => figures.push(Figure { name: name.into(), unit: unit.into(), values: vec![value] }),
        }
    }
    Ok(())
}

fn figures(rounds: u32, variants: &[Variant]) -> Result<(), String> {
    let mut all: Vec<Vec<Figure>> = variants.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds.max(1) {
        for (v, figures) in variants.iter().zip(&mut all) {
            let mut command = command(&v.argv)?;
            command.envs(v.env.clone()).stdout(Stdio::piped()).stderr(Stdio::inherit());
            let out = command.output();
            let out = out.map_err(|e| format!("{}: {e}", v.label))?;
            if !out.status.success() {
                return Err(format!("{} ended with {}", v.label, out.status));
            }
            collect(&String::from_utf8_lossy(&out.stdout), figures)
                .map_err(|e| format!("{}: {e}", v.label))?;
            if figures.is_empty() {
                return Err(format!("{} has printed no figure", v.label));
            }
        }
    }
    for (v, figures) in variants.iter().zip(&mut all) {
        for figure in figures {
            figure.values.sort_by(f64::total_cmp);
            let median = figure.values[figure.values.len() / 2];
            println!("{}\t{}\t{median}\t{}", v.label, figure.name, figure.unit);
        }
    }
    Ok(())
}

/// Exits to user space, as strace sees them.
fn exits(variants: Vec<Variant>) -> Result<(), String> {
    let log = std::env::temp_dir().join(format!("krun-bench.{}", std::process::id()));
    for v in &variants {
        let mut words: Vec<OsString> =
            ["strace", "-f", "-qq", "-e", "trace=ioctl", "-e", "kvm=vcpu", "-o"].map(Into::into).into();
        words.push(log.clone().into());
        words.extend(v.env.iter().flat_map(|(key, value)| {
            let pair = [key.as_bytes(), b"=", value.as_bytes()].concat();
            ["-E".into(), std::os::unix::ffi::OsStringExt::from_vec(pair)]
        }));
        words.extend(v.argv.iter().cloned());
        // Not in the environment of strace itself, which has libraries of its own.
        let bare = Variant { label: v.label.clone(), env: Vec::new(), argv: Vec::new(), times: Vec::new() };
        let ended = run(&bare, command(&words)?);
        let text = std::fs::read(&log).map_err(|e| format!("{}: {e}", log.display()))?;
        let _ = std::fs::remove_file(&log);
        ended?;
        let mut reasons = BTreeMap::<&str, u32>::new();
        let text = String::from_utf8_lossy(&text);
        for (_, rest) in text.lines().filter_map(|line| line.split_once("(KVM_EXIT_")) {
            *reasons.entry(rest.trim_end_matches(')')).or_default() += 1;
        }
        let total: u32 = reasons.values().sum();
        let list: Vec<_> =
            reasons.iter().map(|(reason, n)| format!("{} {n}", reason.to_lowercase())).collect();
        println!("{}\t{total}\t{}", v.label, list.join(", "));
    }
    Ok(())
}

/// Ends the program in every case.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Mappings from this size on are guest RAM.
const RAM_KIB: u64 = 8 << 10;

fn memory(seconds: u32, variants: Vec<Variant>) -> Result<(), String> {
    for v in &variants {
        let fail = |e: std::io::Error| format!("{}: {e}", v.label);
        let child = Ended(command(&v.argv)?.envs(v.env.clone()).spawn().map_err(fail)?);
        std::thread::sleep(Duration::from_secs(seconds.into()));
        let text = std::fs::read_to_string(format!("/proc/{}/smaps", child.0.id())).map_err(fail)?;
        // That of a process that has ended is empty.
        let kib = private_kib(&text)?;
        let shown = if kib > 0 { kib.to_string() } else { "ended before it was looked at".into() };
        println!("{}\t{shown}", v.label);
    }
    Ok(())
}

/// Sum of the private pages of all mappings but guest RAM and the kernel library, which is guest memory too.
fn private_kib(smaps: &str) -> Result<u64, String> {
    let (mut sum, mut guest) = (0, false);
    for line in smaps.lines() {
        let Some((key, rest)) = line.split_once(':').filter(|_| line.ends_with(" kB")) else {
            if line.contains('-') && !line.starts_with("VmFlags") {
                guest = line.contains("libkrunfw");
            }
            continue;
        };
        let kib: u64 = rest.trim().trim_end_matches(" kB").parse().map_err(|e| format!("{line}: {e}"))?;
        match key {
            "Size" => guest |= kib >= RAM_KIB,
            "Private_Clean" | "Private_Dirty" if !guest => sum += kib,
            _ => {}
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_collected_by_name() {
        let mut figures = Vec::new();
        collect("b\t1.5\tMiB/s\na\t2\t1/s\n", &mut figures).unwrap();
        collect("a\t3\t1/s\n", &mut figures).unwrap();
        let figure = |name: &str, unit: &str, values: &[f64]| Figure {
            name: name.into(),
            unit: unit.into(),
            values: values.into(),
        };
        assert_eq!(figures, [figure("b", "MiB/s", &[1.5]), figure("a", "1/s", &[2.0, 3.0])]);
        for bad in ["a", "a\tx\t1/s", "a\t1\t1/s\tmore"] {
            assert!(collect(bad, &mut figures).is_err(), "{bad}");
        }
    }

    #[test]
    fn guest_memory_is_not_counted() {
        let smaps = "55a0-55b0 r-xp 0 08:01 7 /usr/bin/vmm\nSize: 64 kB\nPrivate_Clean: 8 kB\nPrivate_Dirty: 4 kB\nVmFlags: rd-ex\n\
            7f00-7f90 rw-p 0 00:00 0\nSize: 524288 kB\nPrivate_Dirty: 9000 kB\n\
            7fa0-7fb0 rw-p 0 08:01 9 /lib/libkrunfw.so.5\nSize: 100 kB\nPrivate_Dirty: 50 kB\n\
            7fc0-7fd0 rw-p 0 00:00 0 [heap]\nSize: 132 kB\nPrivate_Dirty: 20 kB\n";
        assert_eq!(private_kib(smaps), Ok(32));
        assert!(private_kib("Size: x kB").is_err());
    }
}
