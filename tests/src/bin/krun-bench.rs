//! Times programs side by side: every round runs each variant once, so that what disturbs one disturbs all.
//!
//! ```text
//! krun-bench ROUNDS LABEL [KEY=VALUE...] -- PROGRAM [ARGUMENT...] [;; LABEL ... -- PROGRAM ...]...
//! krun-bench memory MAPPING[,MAPPING...] SECONDS PROGRAM [ARGUMENT...]
//! ```
//! The first form prints `LABEL MIN MEDIAN MAX` in milliseconds for each variant. The second prints the private
//! bytes of the program after some time, those of the named mappings apart.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

struct Variant {
    label: String,
    env: Vec<(OsString, OsString)>,
    argv: Vec<OsString>,
    times: Vec<Duration>,
}

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let result = match words.split_first() {
        Some((first, rest)) if first == "memory" => memory(rest),
        Some((first, rest)) => match first.to_str().and_then(|n| n.parse().ok()) {
            Some(rounds) => times(rounds, rest),
            None => Err("the first word is a number of rounds, or memory".into()),
        },
        None => Err("nothing to time".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("krun-bench: {e}");
            ExitCode::FAILURE
        }
    }
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

fn times(rounds: u32, words: &[OsString]) -> Result<(), String> {
    let mut variants = words.split(|w| w == ";;").map(variant).collect::<Result<Vec<_>, _>>()?;
    // The first round warms caches and is not counted.
    for round in 0..=rounds {
        for v in &mut variants {
            let start = Instant::now();
            let status =
                command(&v.argv)?.envs(v.env.clone()).status().map_err(|e| format!("{}: {e}", v.label))?;
            let took = start.elapsed();
            if !status.success() {
                return Err(format!("{} ended with {status}", v.label));
            }
            if round > 0 {
                v.times.push(took);
            }
        }
    }
    for v in &mut variants {
        v.times.sort();
        let ms = |t: Option<&Duration>| t.map_or(0.0, |t| t.as_secs_f64() * 1e3);
        let middle = v.times.get(v.times.len() / 2);
        println!("{}\t{:.1}\t{:.1}\t{:.1}", v.label, ms(v.times.first()), ms(middle), ms(v.times.last()));
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

fn memory(words: &[OsString]) -> Result<(), String> {
    let [apart, seconds, argv @ ..] = words else {
        return Err("memory wants mappings, seconds, a program".into());
    };
    let apart: Vec<&str> = apart.to_str().unwrap_or_default().split(',').collect();
    let seconds: f64 = seconds.to_str().and_then(|s| s.parse().ok()).ok_or("seconds are a number")?;
    let child = Ended(command(argv)?.spawn().map_err(|e| e.to_string())?);
    std::thread::sleep(Duration::from_secs_f64(seconds));
    let path = format!("/proc/{}/smaps", child.0.id());
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    let (mut own, mut named, mut is_named) = (0u64, 0u64, false);
    for line in text.lines() {
        if line.contains('-') && !line.contains(" kB") {
            is_named = apart.iter().any(|name| line.contains(name));
        } else if let Some(rest) =
            line.strip_prefix("Private_Clean:").or_else(|| line.strip_prefix("Private_Dirty:"))
        {
            let kib: u64 = rest.trim().trim_end_matches(" kB").parse().map_err(|e| format!("{line}: {e}"))?;
            *(if is_named { &mut named } else { &mut own }) += kib;
        }
    }
    println!("private {own} KiB, guest {named} KiB");
    Ok(())
}
