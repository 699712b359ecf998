//! Virtual CPUs and memory are what was asked for.

use std::ffi::OsString;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::harness::{Case, Env, Failure, run, same};

pub const CASE: Case = Case { name: "processors", host, guest };

fn guest(args: &[OsString]) -> Result<u8, String> {
    let wanted: usize =
        args.first().and_then(|a| a.to_str()).and_then(|a| a.parse().ok()).ok_or("a number")?;
    let seen = std::thread::available_parallelism().map_err(|e| e.to_string())?.get();
    if seen != wanted {
        return Err(format!("{seen} processors, wanted {wanted}"));
    }
    // All of them work on one counter.
    let counter = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..wanted {
            scope.spawn(|| (0..10_000).for_each(|_| _ = counter.fetch_add(1, Ordering::Relaxed)));
        }
    });
    if counter.into_inner() != wanted as u64 * 10_000 {
        return Err("increments were lost".into());
    }
    let meminfo = std::fs::read_to_string("/proc/meminfo").map_err(|e| e.to_string())?;
    let kib = meminfo.split_whitespace().nth(1).unwrap_or_default();
    println!("{kib}");
    Ok(0)
}

fn host(env: &Env) -> Result<(), Failure> {
    // The last one crosses the hole below 4 GiB.
    for (vcpus, mib) in [(1, 128), (2, 256), (16, 512), (1, 5000)] {
        let mut config = env.guest_half("processors", [vcpus.to_string()]);
        (config.vcpus, config.memory_mib) = (vcpus, mib);
        let output = run(config)?.success()?;
        let kib: u64 = output.out().trim().parse()?;
        let expected = u64::from(mib) * 1024;
        // The kernel keeps a part for itself.
        same(&format!("{mib} MiB seen as {kib} KiB"), kib <= expected && kib > expected * 6 / 10, true)?;
    }
    Ok(())
}
