//! More devices than interrupt lines, each of them usable, and all at the same time.

use std::time::Duration;

use krun::{Disk, Share};

use crate::harness::{Case, Env, Failure, TempDir, no_guest, same, start};

pub const CASE: Case = Case { name: "many_devices", host, guest: no_guest };

const DISKS: usize = 24;
const SHARES: usize = 16;
/// The root, a console, the source of randomness and the balloon.
const OTHERS: usize = 4;
const DISK: u64 = 1 << 20;

/// Tells how many devices have a driver; then works on every disk and share at once: each disk is written
/// from its end to its start around the name of its own that it came with, each share gets a file.
const SCRIPT: &str = "ls -d /sys/bus/virtio/devices/*/driver | wc -l
    work() { dd if=/dev/urandom of=/run/$1.in bs=4k count=32 2>/dev/null
        dd if=/run/$1.in of=$2 bs=4k seek=4 oflag=direct conv=notrunc 2>/dev/null &&
        dd if=$2 of=/run/$1.out bs=4k skip=4 count=32 iflag=$3 2>/dev/null &&
        cmp /run/$1.in /run/$1.out || echo $1 is broken; }
    n=0; for d in /sys/block/vd*; do
        test \"$(head -c 16 /dev/${d##*/} | tr -d '\\0')\" = \"$(cat $d/serial)\" || echo $d has another name
        work ${d##*/} /dev/${d##*/} direct &
        n=$((n + 1)); done
    for i in $(seq 0 15); do mkdir /run/s$i; mount -t virtiofs s$i /run/s$i
        test $(cat /run/s$i/name) = s$i || echo s$i has another name
        touch /run/s$i/new; work s$i /run/s$i/new nocache &
    done; wait; head -c 4 /dev/hwrng | wc -c; echo $n; read line; sync";

fn host(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("many")?;
    let mut config = env.shell(SCRIPT);
    config.vcpus = 2;
    for n in 0..DISKS {
        let (name, path) = (format!("disk{n}"), dir.path().join(format!("disk{n}")));
        std::fs::write(&path, &name)?;
        std::fs::File::options().write(true).open(&path)?.set_len(DISK)?;
        config.disks.push(Disk::new(&name, &path));
    }
    for n in 0..SHARES {
        let (name, path) = (format!("s{n}"), dir.path().join(format!("s{n}")));
        std::fs::create_dir(&path)?;
        std::fs::write(path.join("name"), &name)?;
        config.shares.push(Share::new(name, path));
    }
    let captured = start(config)?;
    let wanted = format!("{}\n4\n{DISKS}\n", DISKS + SHARES + OTHERS);
    captured.wait_for_output(&format!("4\n{DISKS}\n"))?;
    let total = captured.vm.memory_stats(Duration::from_secs(60))?.total.unwrap_or(0);
    same(&format!("the balloon tells of {total} bytes"), total > 100 << 20, true)?;
    let output = captured.finish()?.success()?;
    same("what the guest says", output.out(), wanted)?;
    for n in 0..SHARES {
        let len = std::fs::metadata(dir.path().join(format!("s{n}/new")))?.len();
        same(&format!("the file in share {n}"), len, (4 + 32) * 4096)?;
    }
    Ok(())
}
