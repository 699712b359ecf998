//! Virtual CPUs and memory are what was asked for.

use std::ffi::OsString;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::harness::{Case, Env, Failure, contains, no_guest, run, same, start};
use krun::Vm;

pub const CASE: Case = Case { name: "processors", host, guest };
pub const NESTED: Case = Case { name: "nested", host: nested, guest: no_guest };
pub const HUGE: Case = Case { name: "huge_pages", host: huge_pages, guest: no_guest };

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
    // Past 3 GiB memory goes on above a hole. With 16 GiB the kernel's own tables take 256 MiB of the host's.
    for (vcpus, mib, split_irqchip) in [
        (1, 128, false),
        (2, 256, false),
        (16, 512, false),
        (1, 5000, false),
        (1, 16384, false),
        (1, 128, true),
        (2, 256, true),
    ] {
        let mut config = env.guest_half("processors", [vcpus.to_string()]);
        (config.vcpus, config.memory_mib, config.split_irqchip) = (vcpus, mib, split_irqchip);
        let output = run(config)?.success()?;
        let kib: u64 = output.out().trim().parse()?;
        let expected = u64::from(mib) * 1024;
        // The kernel keeps a part for itself.
        same(&format!("{mib} MiB seen as {kib} KiB"), kib <= expected && kib > expected * 6 / 10, true)?;
    }
    Ok(())
}

/// The processor's virtualisation is there when asked for, and only then.
fn nested(env: &Env) -> Result<(), Failure> {
    if !krun::host::nested_virtualisation() {
        return Err(Failure::Skip("this host's KVM does not let guests run virtual machines".into()));
    }
    for nested in [false, true] {
        let mut config = env.shell("grep -cwE 'svm|vmx' /proc/cpuinfo");
        config.nested = nested;
        same("processors that have it", run(config)?.out().trim(), if nested { "1" } else { "0" })?;
    }
    Ok(())
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Memory from the host's pool of huge pages, and an error that says what is missing.
fn huge_pages(env: &Env) -> Result<(), Failure> {
    let had = std::fs::read_to_string(POOL)?;
    let pool = |pages: &str| match std::fs::write(POOL, pages) {
        Ok(()) => Ok(()),
        Err(e) => Err(Failure::Skip(format!("the number of huge pages cannot be changed: {e}"))),
    };
    pool("3")?;
    let result = (|| {
        let config = || {
            let mut config = env.shell("echo up; read line");
            (config.memory_mib, config.huge_pages) = (128, true);
            config
        };
        let refused = Vm::start(config()).err().map(|e| e.to_string()).unwrap_or_default();
        let wanted = "64 huge pages of 2 MiB are needed and 3 are free, 61 are missing; as root: sysctl vm.nr_hugepages=64";
        contains("too few", &refused, wanted)?;
        pool("64")?;
        let captured = start(config())?;
        captured.wait_for_output("up")?;
        let smaps = std::fs::read_to_string("/proc/self/smaps")?;
        let kib = |field: &str| -> u64 {
            let lines = smaps.lines().filter_map(|line| line.strip_prefix(field));
            lines.filter_map(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()).sum()
        };
        let used = kib("Shared_Hugetlb:") + kib("Private_Hugetlb:");
        same(&format!("{used} KiB of the machine's memory in huge pages"), used > 16 << 10, true)?;
        captured.finish()?;
        // All went back.
        let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")?;
        same("free huge pages", free.trim(), "64")
    })();
    pool(&had)?;
    result
}
