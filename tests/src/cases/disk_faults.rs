//! Disks when the host fails: no space, and a machine that is killed.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;

use krun::{Disk, DiskFormat, SyncMode};

use super::disk::{MIB, image, tool};
use crate::harness::{Case, Env, Failure, Mounted, TempDir, no_guest, run, same, start};

pub const SPACE: Case = Case { name: "disk_no_space", host: no_space, guest: no_guest };
pub const POWER_CUT: Case = Case { name: "disk_power_cut", host: power_cut, guest: records };

fn no_space(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("disk-space")?;
    let target = dir.path().to_string_lossy();
    let _mounted = Mounted::new(&["-t", "tmpfs", "-o", "size=8m"], "tmpfs", dir.path())?;
    let path = dir.path().join("disk");
    image(&path, 32 * MIB)?;
    let mut config = env.shell(
        "w() { dd if=/dev/urandom of=/dev/vda bs=64k count=256 oflag=direct conv=notrunc 2>/dev/null; }
        w && exit 9; echo full; read x; w || exit 8; echo resumed; read x; w || exit 7; echo still",
    );
    config.disks = vec![Disk::new("d", &path)];
    let mut captured = start(config)?;
    captured.wait_for_output("full\n")?;
    same("more space", tool("mount", &["-o", "remount,size=64m", &target])?.map(|r| r.0), Some(0))?;
    let go = |captured: &mut crate::harness::Captured| -> Result<(), Failure> {
        let stdin = captured.stdin.as_mut().ok_or_else(|| Failure::Wrong("no input".into()))?;
        Ok(stdin.write_all(b"\n")?)
    };
    go(&mut captured)?;
    captured.wait_for_output("resumed\n")?;
    // An image that becomes read-only stays open for writing.
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o400))?;
    go(&mut captured)?;
    let output = captured.finish()?.success()?;
    same("output", output.out(), "full\nresumed\nstill\n".into())
}

const RECORD: usize = 4096;
/// Far enough apart that each record needs a cluster of its own.
const STRIDE: u64 = 3 * 65536;
const RECORDS: u64 = 300;

fn record(n: u64) -> Vec<u8> {
    let mut bytes = n.to_le_bytes().repeat(RECORD / 8);
    bytes[8] = 0x5a;
    bytes
}

/// `write`: stores records, each with an fsync, and says so; `check N`: the first N are there.
fn records(args: &[OsString]) -> Result<u8, String> {
    let fail = |e: std::io::Error| e.to_string();
    let disk = std::fs::OpenOptions::new().read(true).write(true).open("/dev/vda").map_err(fail)?;
    if args.first().is_some_and(|a| a == "write") {
        let mut out = std::io::stdout();
        for n in 0..RECORDS {
            disk.write_all_at(&record(n), n * STRIDE).map_err(fail)?;
            disk.sync_data().map_err(fail)?;
            writeln!(out, "{n}").and_then(|()| out.flush()).map_err(fail)?;
        }
        return Ok(0);
    }
    let count: u64 = args.get(1).and_then(|a| a.to_str()?.parse().ok()).ok_or("check N")?;
    for n in 0..count {
        let mut bytes = vec![0; RECORD];
        disk.read_exact_at(&mut bytes, n * STRIDE).map_err(fail)?;
        if bytes != record(n) {
            return Err(format!("record {n} of {count} is lost"));
        }
    }
    Ok(0)
}

fn power_cut(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("disk-cut")?;
    let (raw, qcow2) = (dir.path().join("raw"), dir.path().join("qcow2"));
    let size = RECORDS * STRIDE + MIB;
    let made =
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &qcow2.to_string_lossy(), &size.to_string()])?;
    let mut images = vec![(raw, "raw", DiskFormat::Raw)];
    match made {
        Some((0, _)) => images.push((qcow2, "qcow2", DiskFormat::Qcow2)),
        other => println!("    qcow2 is left out, qemu-img is not there: {other:?}"),
    }
    let own = std::env::current_exe()?;
    let folder = own.parent().unwrap_or(Path::new("/")).to_string_lossy().into_owned();
    let name = own.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for (path, word, format) in images {
        if format == DiskFormat::Raw {
            image(&path, size)?;
        }
        for stop_after in [1u64, 20, 61] {
            let mut child = env
                .krun()?
                .arg("--disk")
                .arg(format!("{}:format={word}:sync=full", path.display()))
                .args(["--volume", &format!("{folder}:/mnt:ro"), "--", &format!("/mnt/{name}"), "guest"])
                .args(["disk_power_cut", "write"])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()?;
            let stdout = child.stdout.take().ok_or_else(|| Failure::Wrong("no output".into()))?;
            let mut acknowledged = 0u64;
            let mut killed = false;
            // What was said before the kill and is still in the pipe counts as well.
            for line in BufReader::new(stdout).lines() {
                acknowledged = line?.parse::<u64>()? + 1;
                if acknowledged >= stop_after && !killed {
                    child.kill()?;
                    killed = true;
                }
            }
            child.wait()?;
            same(&format!("{acknowledged} records were stored"), acknowledged >= stop_after, true)?;
            if format == DiskFormat::Qcow2 {
                // 3: clusters that nothing refers to, which cost space and nothing else.
                match tool("qemu-img", &["check", &path.to_string_lossy()])? {
                    Some((0 | 3, _)) => {}
                    other => return Err(Failure::Wrong(format!("qemu-img check: {other:?}"))),
                }
            }
            let mut config = env.guest_half("disk_power_cut", ["check".to_owned(), acknowledged.to_string()]);
            config.disks = vec![Disk { format, sync: SyncMode::Full, ..Disk::new("d", &path) }];
            run(config)?.success()?;
        }
    }
    Ok(())
}
