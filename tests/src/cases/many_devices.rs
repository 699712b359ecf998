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

/// Tells how many devices have a driver, and checks that each disk and share is the one of its name; then
/// writes to all of them at once and compares.
const SCRIPT: &str = "cd /dev/shm; head -c 128k /dev/urandom > in
    ls -d /sys/bus/virtio/devices/*/driver | wc -l
    disk() { dd if=in of=$1 bs=16k seek=1 oflag=direct conv=notrunc 2>$2 &&
        dd if=$1 bs=16k skip=1 count=8 iflag=direct 2>$2 | cmp - in || { echo $1 is broken; cat $2; }; }
    share() { cp in $1/new && cmp in $1/new || echo $1 is broken; }
    n=0; for d in /sys/block/vd*; do
        disk=/dev/${d##*/}; read name < $disk; read serial < $d/serial
        test \"$name\" = \"$serial\" || echo $disk says $name, $serial
        disk $disk error$n & n=$((n + 1)); done
    i=0; while test $i -lt 16; do
        mkdir s$i; mount -t virtiofs s$i s$i; read name < s$i/name
        test $name = s$i || echo s$i says $name
        share s$i & i=$((i + 1)); done
    wait; head -c 4 /dev/hwrng | wc -c; echo $n; cat";

fn host(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("many")?;
    let mut config = env.shell(SCRIPT);
    config.vcpus = 2;
    for n in 0..DISKS {
        let (name, path) = (format!("disk{n}"), dir.path().join(format!("disk{n}")));
        std::fs::write(&path, format!("{name}\n"))?;
        std::fs::File::options().write(true).open(&path)?.set_len(DISK)?;
        config.disks.push(Disk::new(&name, &path));
    }
    for n in 0..SHARES {
        let (name, path) = (format!("s{n}"), dir.path().join(format!("s{n}")));
        std::fs::create_dir(&path)?;
        std::fs::write(path.join("name"), format!("{name}\n"))?;
        config.shares.push(Share::new(name, path));
    }
    let captured = start(config)?;
    let devices = DISKS + SHARES + OTHERS;
    captured.wait_for_output(&format!("{devices}\n"))?;
    let total = captured.vm.memory_stats(Duration::from_secs(120))?.total.unwrap_or(0);
    same(&format!("the balloon tells of {total} bytes"), total > 100 << 20, true)?;
    let output = captured.finish()?.success()?;
    same("what the guest says", output.out(), format!("{devices}\n4\n{DISKS}\n"))?;
    for n in 0..SHARES {
        let len = std::fs::metadata(dir.path().join(format!("s{n}/new")))?.len();
        same(&format!("the file in share {n}"), len, 128 << 10)?;
    }
    Ok(())
}
