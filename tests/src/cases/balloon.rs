//! Memory that the guest does not use goes back to the host.

use std::ffi::OsString;
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

use crate::harness::{Captured, Case, Env, Failure, same, start};

pub const CASE: Case = Case { name: "balloon", host, guest };

const MIB: u64 = 1 << 20;
const RAM: u32 = 512;
/// What the guest fills.
const AMOUNT: u64 = 256 * MIB;
const PATIENCE: Duration = Duration::from_secs(60);

/// Fills memory and frees it, a step per line of input.
fn guest(_: &[OsString]) -> Result<u8, String> {
    let mut held = Vec::new();
    for line in std::io::stdin().lock().lines() {
        match line.map_err(|e| e.to_string())?.as_str() {
            "fill" => held = vec![0x5au8; AMOUNT as usize],
            "check" => {
                if held.iter().any(|b| *b != 0x5a) {
                    return Err("memory in use has changed".into());
                }
            }
            "free" => held = Vec::new(),
            other => return Err(format!("unknown step {other}")),
        }
        println!("done");
    }
    Ok(0)
}

/// Memory of this process that is in the host's memory, in bytes.
fn resident() -> Result<u64, Failure> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm.split_whitespace().nth(1).unwrap_or_default().parse()?;
    Ok(pages * 4096)
}

fn until(what: &str, mut done: impl FnMut() -> Result<bool, Failure>) -> Result<(), Failure> {
    let start = Instant::now();
    while !done()? {
        if start.elapsed() > PATIENCE {
            return Err(Failure::Wrong(format!(
                "{what}: not within {PATIENCE:?}; resident {}",
                resident()? / MIB
            )));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn steps(captured: &mut Captured, steps: &[&str], before: usize) -> Result<(), Failure> {
    let stdin = captured.stdin.as_mut().ok_or_else(|| Failure::Wrong("no standard input".into()))?;
    for step in steps {
        writeln!(stdin, "{step}")?;
    }
    captured.wait_for_output(&"done\n".repeat(before + steps.len()))
}

fn host(env: &Env) -> Result<(), Failure> {
    let mut config = env.guest_half("balloon", [""; 0]);
    config.memory_mib = RAM;
    let mut captured = start(config)?;
    steps(&mut captured, &["fill", "check"], 0)?;
    let filled = resident()?;
    steps(&mut captured, &["free"], 2)?;
    // By itself: free page reporting.
    until("freed memory is not given back", || Ok(resident()? + AMOUNT * 8 / 10 < filled))?;
    println!(
        "    {} MiB resident with memory in use, {} MiB after it was freed",
        filled / MIB,
        resident()? / MIB
    );

    let stats = captured.vm.memory_stats(PATIENCE)?;
    let (total, free) = (stats.total.unwrap_or(0), stats.free.unwrap_or(0));
    let plausible = total <= u64::from(RAM) * MIB && free > AMOUNT && free < total;
    same(&format!("statistics {stats:?}"), plausible, true)?;
    let hinted: u64 = captured.vm.free_memory_hints(PATIENCE)?.iter().map(|(_, len)| len).sum();
    same(
        &format!("{} MiB hinted as free, {} MiB are", hinted / MIB, free / MIB),
        hinted > free / 2 && hinted <= total,
        true,
    )?;

    // On request, and back for want of memory.
    let target = 300 * MIB;
    captured.vm.set_balloon(target / MIB)?;
    until("the balloon is not filled", || Ok(captured.vm.balloon_status()?.actual == target))?;
    // The pages given up do not come back by themselves.
    let small = resident()?;
    steps(&mut captured, &["fill", "check"], 3)?;
    let status = captured.vm.balloon_status()?;
    same(
        &format!("a guest out of memory takes it from the balloon: {status:?}"),
        status.actual < target,
        true,
    )?;
    println!(
        "    {} MiB resident with the balloon filled; {} MiB of it left when memory ran out",
        small / MIB,
        status.actual / MIB
    );
    captured.vm.set_balloon(0)?;
    until("the balloon is not emptied", || Ok(captured.vm.balloon_status()?.actual == 0))?;
    steps(&mut captured, &["check", "free"], 5)?;
    captured.finish()?.success().map(|_| ())
}
