//! Loads that people run: a database, a file server's, and a machine's under stress; on a disk and on a share.

use std::collections::BTreeSet;
use std::process::Command;

use krun::{Disk, Share, SyncMode, VmConfig};

use super::disk::{MIB, check_ext4, image};
use super::suites::{ext4, whole};
use crate::harness::{Case, Env, Failure, Mounted, TempDir, no_guest, run, same};

pub const PGBENCH: Case = Case { name: "load_pgbench", host: pgbench, guest: no_guest };
pub const DBENCH: Case = Case { name: "load_dbench", host: dbench, guest: no_guest };
pub const STRESS: Case = Case { name: "load_stress", host: stress, guest: no_guest };
pub const STRESS_FILES: Case = Case { name: "load_stress_files", host: stress_files, guest: no_guest };

/// Makes the guest's directory on the disk.
const FORMAT: &str = "set -e; mkfs.ext4 -q -F /dev/vda; mount /dev/vda /mnt; ";

/// A disk, which the guest mounts on `/mnt`, and a share of ext4, on `/media`.
struct Ground {
    dir: TempDir,
    share: Mounted,
}

impl Ground {
    fn new(name: &str, mib: u64) -> Result<Self, Failure> {
        let dir = TempDir::new(name)?;
        image(&dir.path().join("disk"), mib * MIB)?;
        let share = ext4(&dir, mib)?;
        Ok(Self { dir, share })
    }

    /// A guest that runs `script`, which finds both places.
    fn guest(&self, env: &Env, script: &str) -> VmConfig {
        let mut config = env.shell(&format!("{FORMAT}{script}\numount /mnt"));
        (config.vcpus, config.memory_mib) = (2, 512);
        config.disks = vec![Disk { sync: SyncMode::Full, ..Disk::new("disk", self.dir.path().join("disk")) }];
        config.shares.push(Share { mount: Some("/media".into()), ..Share::new("share", self.share.path()) });
        config
    }

    /// The disk is whole.
    fn check(&self) -> Result<(), Failure> {
        check_ext4(&self.dir.path().join("disk"))
    }
}

/// A database is made, used by four clients, killed, recovered, and adds up.
const DATABASE: &str = r#"
cat > /run/base <<'END'
set -e
cd $1
export PATH=$(echo /usr/lib/postgresql/*/bin):$PATH PGHOST=/dev/shm PGDATABASE=postgres
start() { pg_ctl -D db -w -s -l log -o "-k $PGHOST -c listen_addresses= -c shared_buffers=16MB" start; }
# Making a database is mostly work of the processor; the second place gets a copy of the first one's.
if [ -z "$2" ]; then initdb -D db -A trust --locale=C -E UTF8 > log 2>&1; else cp -a $2 db; fi
start
[ -n "$2" ] || pgbench -i -q -s 1 > log.init 2>&1
pgbench -n -c 4 -j 2 -t 25 > log.run 2>&1
grep -E 'processed|failed' log.run
pg_ctl -D db -s -m immediate stop
start
export PGOPTIONS='-c client_min_messages=warning'
psql -Atq -v ON_ERROR_STOP=1 <<SQL
select count(*), sum(delta) = (select sum(abalance) from pgbench_accounts) as accounts,
  sum(delta) = (select sum(tbalance) from pgbench_tellers) as tellers,
  sum(delta) = (select sum(bbalance) from pgbench_branches) as branches from pgbench_history;
create extension if not exists amcheck;
select bt_index_check('pgbench_accounts_pkey', true);
SQL
pg_ctl -D db -s -m fast stop
END
run() {
    chown postgres $1
    setpriv --reuid postgres --regid postgres --clear-groups sh /run/base $@ 2>&1 || tail -n 20 $1/log*
}
run /mnt
run /media /mnt/db"#;

fn pgbench(env: &Env) -> Result<(), Failure> {
    let ground = Ground::new("pgbench", 200)?;
    let output = run(ground.guest(env, DATABASE))?;
    let text = format!("{}{}", output.out(), output.err());
    same(&format!("status; {text}"), output.code, 0)?;
    let run =
        "number of transactions actually processed: 100/100\nnumber of failed transactions: 0 (0.000%)\n";
    // With what was done before the copy.
    let wanted = format!("{run}100|t|t|t\n\n{run}200|t|t|t\n\n");
    same("on the disk and on the share", output.out(), wanted)?;
    ground.check()
}

/// dbench, what a file server's clients ask of it, with two of them.
fn dbench(env: &Env) -> Result<(), Failure> {
    let ground = Ground::new("dbench", 200)?;
    let output = run(ground.guest(
        env,
        "for place in /mnt /media; do dbench -D $place -c /usr/share/dbench/client.txt -t 10 2 2>&1; done",
    ))?;
    let text = output.out();
    same(&format!("status; {text}"), output.code, 0)?;
    same(&format!("runs to the end: {text}"), text.matches("Throughput").count(), 2)?;
    // Its clients say "[12] open x failed for handle 3 (reason)" when something is not as their script has it.
    let complaints: Vec<_> =
        text.lines().filter(|l| l.starts_with(['[', '(']) || l.contains("ERROR")).collect();
    same(&format!("complaints; {text}"), complaints.is_empty(), true)?;
    for line in text.lines().filter(|l| l.starts_with("Throughput")) {
        println!("    {line}");
    }
    ground.check()
}

/// stress-ng checks what it reads back, from files, memory and sockets.
fn stress(env: &Env) -> Result<(), Failure> {
    let ground = Ground::new("stress", 200)?;
    let stressors =
        "--hdd 2 --hdd-bytes 8m --hdd-ops 1000 --vm 2 --vm-bytes 32m --vm-ops 2000 --sock 2 --sock-ops 500";
    let script = format!(
        "for place in /mnt /media; do stress-ng --temp-path $place {stressors} --verify -t 60 2>&1; done"
    );
    let output = run(ground.guest(env, &script))?;
    let text = output.out();
    same(&format!("status; {text}"), output.code, 0)?;
    same(&format!("runs to the end: {text}"), text.matches("] successful run completed").count(), 2)?;
    ground.check()
}

/// Stressors of files that are not of the file system, or that a second is not enough for.
const SLOW: &str =
    "eventfd,ioprio,procfs,chdir,dir,dirdeep,dirmany,fpunch,io,iomix,link,symlink,inotify,open";

/// Each of stress-ng's stressors of files, on the share and on its file system on the host.
fn stress_files(env: &Env) -> Result<(), Failure> {
    let ground = Ground::new("stress-files", 200)?;
    let (without, seconds) = if whole() { ("eventfd,ioprio,procfs", 3) } else { (SLOW, 1) };
    let words = format!("--sequential 1 --class filesystem -x {without} --verify -t {seconds}");
    let own = ground.share.path().join("host");
    std::fs::create_dir(&own)?;
    // The guest's own program, with the libraries of its root.
    let root = env.root.display().to_string();
    let libraries = format!("{root}/lib/x86_64-linux-gnu:{root}/usr/lib/x86_64-linux-gnu");
    let host = Command::new(env.root.join("lib64/ld-linux-x86-64.so.2"))
        .args(["--library-path", &libraries])
        .arg(env.root.join("usr/bin/stress-ng"))
        .arg("--temp-path")
        .arg(&own)
        .args(words.split(' '))
        .output()?;
    let host = [host.stdout, host.stderr].concat();
    let output = run(ground.guest(env, &format!("stress-ng --temp-path /media {words} 2>&1 || true")))?;
    let (host, guest) = (Stressed::from(&String::from_utf8_lossy(&host)), Stressed::from(&output.out()));
    let text = output.out();
    println!(
        "    {} stressors; skipped {:?}, on the host {:?}; failed on the host {:?}",
        guest.ran, guest.skipped, host.skipped, host.failed
    );
    same(&format!("status; {text}"), output.code, 0)?;
    same(&format!("stressors; {text}"), guest.ran, host.ran)?;
    same("enough of them", guest.ran > 20, true)?;
    let worse: Vec<_> = guest.failed.difference(&host.failed).collect();
    same(&format!("what fails in the guest only; {text}"), worse.is_empty(), true)
}

/// What stress-ng said of its stressors.
struct Stressed {
    ran: usize,
    skipped: BTreeSet<String>,
    failed: BTreeSet<String>,
}

impl Stressed {
    fn from(text: &str) -> Self {
        let ran = text.lines().find_map(|l| l.split_once("dispatching hogs: "));
        // stress-ng: fail:  [12] name: what was seen
        let named = |line: &str| line.split(']').nth(1)?.split(':').next().map(|n| n.trim().to_owned());
        let all = |mark: &str| text.lines().filter(|l| l.contains(mark)).filter_map(named).collect();
        Self {
            ran: ran.map_or(0, |(_, list)| list.split(',').count()),
            skipped: all("skipping stress"),
            failed: all("stress-ng: fail:"),
        }
    }
}
