//! Disks: file systems made, filled and checked by the guest, from images of each format.

use std::path::Path;
use std::process::Command;

use krun::{BlockError, Disk, DiskFormat, Error, SyncMode, Vm};

use super::suites::ext4;
use crate::harness::{Case, Env, Failure, TempDir, contains, no_guest, run, same, start};

pub const CASE: Case = Case { name: "disk", host, guest: no_guest };
pub const SIZE: Case = Case { name: "disk_size", host: size, guest: no_guest };
pub const FORMATS: Case = Case { name: "disk_formats", host: formats, guest: no_guest };
pub const FIO: Case = Case { name: "disk_fio", host: fio, guest: no_guest };

pub const MIB: u64 = 1 << 20;

/// A sparse raw image.
pub fn image(path: &Path, len: u64) -> Result<(), Failure> {
    Ok(std::fs::File::create(path)?.set_len(len)?)
}

/// Bytes of the host that a file takes.
fn allocated(path: &Path) -> Result<u64, Failure> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

/// Runs a program of this host; `None` when there is none.
pub fn tool(program: &str, args: &[&str]) -> Result<Option<(i32, String)>, Failure> {
    match Command::new(program).args(args).output() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e.into()),
        Ok(out) => {
            let text = [out.stdout, out.stderr].concat();
            Ok(Some((out.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())))
        }
    }
}

/// Fails unless the ext4 file system in an image is whole.
pub fn check_ext4(path: &Path) -> Result<(), Failure> {
    match tool("e2fsck", &["-f", "-n", &path.to_string_lossy()])? {
        Some((0, _)) => Ok(()),
        Some((code, text)) => Err(Failure::Wrong(format!("e2fsck says {code}: {text}"))),
        None => Err(Failure::Skip("no e2fsck on this host".into())),
    }
}

/// Makes a file system, fills it, mounts it again and compares; one more inside a file of it.
const FILL: &str = "set -e
    mkfs.ext4 -q -F /dev/vda; mkdir -p /run/d; mount /dev/vda /run/d
    dd if=/dev/urandom of=/run/d/a bs=1M count=24 2>/dev/null
    for i in $(seq 200); do echo $i > /run/d/$i; done
    sum=$(sha256sum < /run/d/a); umount /run/d; mount /dev/vda /run/d
    test \"$sum\" = \"$(sha256sum < /run/d/a)\"; test \"$(cat /run/d/200)\" = 200
    truncate -s 8M /run/d/b; mkfs.ext4 -q -F /run/d/b; mount -o loop /run/d/b /srv; echo x > /srv/x; umount /srv
    rm /run/d/a /run/d/b; sync; fstrim /run/d; umount /run/d";

fn host(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("disk")?;
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    image(&a, 64 * MIB)?;
    std::fs::write(&b, vec![b'x'; MIB as usize])?;
    let script = format!(
        "{FILL}
        cat /sys/block/vda/serial; echo; cat /sys/block/vdb/ro; ls /sys/block/vda/mq | wc -l
        cat /sys/block/vda/queue/write_cache; head -c 3 /dev/vdb; echo
        if dd if=/dev/zero of=/dev/vdb bs=512 count=1 2>/dev/null; then echo written; fi"
    );
    let mut config = env.shell(&script);
    config.vcpus = 2;
    config.disks = vec![
        Disk { sync: SyncMode::Full, ..Disk::new("serial-number", &a) },
        Disk { read_only: true, ..Disk::new("b", &b) },
    ];
    let output = run(config)?.success()?;
    same("what the guest sees", output.out(), "serial-number\n1\n2\nwrite back\nxxx\n".into())?;
    same("a read-only image", std::fs::read(&b)? == vec![b'x'; MIB as usize], true)?;
    let left = allocated(&a)?;
    same(&format!("trimmed space is given back, {left} bytes are left"), left < 20 * MIB, true)?;
    check_ext4(&a)?;

    // The command, and one image for one machine.
    let mut first = env.shell("read x; exit 3");
    first.disks = vec![Disk::new("a", &a)];
    let mut second = env.shell("true");
    second.disks = vec![Disk::new("a", &a)];
    let first = start(first)?;
    match Vm::start(second) {
        Err(e @ Error::Disk(BlockError::Locked { .. })) => {
            contains("the message", &e.to_string(), "in use by another VM")?;
        }
        other => return Err(Failure::Wrong(format!("a second writer: {other:?}"))),
    }
    same("the first one goes on", first.finish()?.code, 3)?;
    let out = env
        .krun()?
        .arg("--disk")
        .arg(format!("{}:ro:queues=1", a.display()))
        .args(["--", "/bin/sh", "-c", "mount -o ro /dev/vda /mnt && cat /mnt/7"])
        .output()?;
    same("krun run --disk", String::from_utf8_lossy(&out.stdout).into_owned(), "7\n".into())
}

/// A disk that grows, and one that shrinks, while it is used.
fn size(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("disk-size")?;
    let path = dir.path().join("disk");
    image(&path, 16 * MIB)?;
    let mut config = env.shell(
        "mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt && cat /sys/block/vda/size; read x
        while [ $(cat /sys/block/vda/size) = 32768 ]; do sleep 0.05; done
        umount /mnt && e2fsck -fy /dev/vda > /run/log 2>&1 && resize2fs /dev/vda > /run/log 2>&1 || cat /run/log
        cat /sys/block/vda/size; echo grown; read x
        dd if=/dev/vda of=/dev/null bs=4k skip=6000 count=1 iflag=direct 2>/dev/null || echo error
        dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null && echo head; echo shrunk; read x
        dd if=/dev/vda of=/dev/null bs=4k skip=6000 count=1 iflag=direct 2>/dev/null && echo back",
    );
    config.disks = vec![Disk::new("d", &path)];
    let mut captured = start(config)?;
    let set = |len: u64| std::fs::OpenOptions::new().write(true).open(&path)?.set_len(len);
    let go = |captured: &mut crate::harness::Captured, after: &str| -> Result<(), Failure> {
        use std::io::Write;
        captured.wait_for_output(after)?;
        let stdin = captured.stdin.as_mut().ok_or_else(|| Failure::Wrong("no input".into()))?;
        Ok(stdin.write_all(b"\n")?)
    };
    captured.wait_for_output("32768\n")?;
    set(32 * MIB)?;
    same("the new size", captured.vm.refresh_disk("d")?, 32 * MIB)?;
    go(&mut captured, "32768\n")?;
    captured.wait_for_output("grown\n")?;
    check_ext4(&path)?;
    let whole = std::fs::read(&path)?;
    set(8 * MIB)?;
    go(&mut captured, "grown\n")?;
    captured.wait_for_output("shrunk\n")?;
    std::fs::write(&path, whole)?;
    go(&mut captured, "shrunk\n")?;
    let output = captured.finish()?.success()?;
    same("output", output.out(), "32768\n65536\ngrown\nerror\nhead\nshrunk\nback\n".into())
}

/// qcow2 with a base, and VMDK, made and checked by QEMU's own tool.
fn formats(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("disk-formats")?;
    let at = |name: &str| dir.path().join(name);
    let text = |name: &str| at(name).to_string_lossy().into_owned();
    let qemu_img = |args: &[&str]| match tool("qemu-img", args)? {
        Some((0, text)) => Ok(text),
        Some((code, text)) => Err(Failure::Wrong(format!("qemu-img {args:?}: {code}: {text}"))),
        None => Err(Failure::Skip("no qemu-img on this host".into())),
    };
    let (base, top, flat) = (text("base"), text("top"), text("flat.vmdk"));
    qemu_img(&["create", "-q", "-f", "qcow2", &base, "64M"])?;
    let with = |script: &str, disk: Disk| {
        let mut config = env.shell(script);
        config.disks = vec![disk];
        config
    };
    let qcow2 = |path: &str| Disk { format: DiskFormat::Qcow2, ..Disk::new("q", path) };
    run(with(FILL, qcow2(&base)))?.success()?;
    qemu_img(&["check", &base])?;
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top])?;
    match Vm::start(with("true", qcow2(&top))) {
        Err(Error::Disk(BlockError::Backing { .. })) => {}
        other => return Err(Failure::Wrong(format!("a base that was not allowed: {other:?}"))),
    }
    let before = std::fs::read(&base)?;
    let change =
        "set -e; mount /dev/vda /mnt; test $(cat /mnt/7) = 7; echo new > /mnt/7; rm /mnt/8; umount /mnt";
    run(with(change, Disk { backing: true, ..qcow2(&top) }))?.success()?;
    qemu_img(&["check", &top])?;
    same("the base is as it was", std::fs::read(&base)? == before, true)?;
    qemu_img(&["convert", "-O", "raw", &top, &text("raw")])?;
    check_ext4(&at("raw"))?;
    qemu_img(&["convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", &top, &flat])?;
    let vmdk = Disk { format: DiskFormat::Vmdk, read_only: true, ..Disk::new("v", &flat) };
    let output = run(with("mount -o ro /dev/vda /mnt && cat /mnt/7", vmdk))?.success()?;
    same("a file in a VMDK image", output.out(), "new\n".into())?;
    std::fs::remove_file(&base)?;
    match Vm::start(with("true", Disk { backing: true, ..qcow2(&top) })) {
        Err(e) => contains("a missing base", &e.to_string(), "base: No such file"),
        Ok(_) => Err(Failure::Wrong("started without the base".into())),
    }
}

/// fio writes and verifies at random, with several requests in flight; also past the host's page cache.
fn fio(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("disk-fio")?;
    let ext4 = ext4(&dir, 200)?;
    let mut images = Vec::new();
    for (at, direct_io) in [(dir.path(), false), (ext4.path(), true)] {
        let (raw, qcow2) = (at.join("raw"), at.join("qcow2"));
        image(&raw, 64 * MIB)?;
        images.push(Disk { direct_io, ..Disk::new("raw", &raw) });
        let made = tool("qemu-img", &["create", "-q", "-f", "qcow2", &qcow2.to_string_lossy(), "64M"])?;
        if matches!(made, Some((0, _))) {
            images.push(Disk { direct_io, format: DiskFormat::Qcow2, ..Disk::new("qcow2", &qcow2) });
        }
    }
    let random = "--rw=randwrite --bsrange=512-64k --bs_unaligned=0 --blockalign=512 --norandommap=0";
    let all = [
        ("random", random),
        ("mixed with trims", "--rw=randtrimwrite --bs=16k"),
        ("with fsync", "--rw=randwrite --bs=4k --fsync=8 --io_size=4m"),
    ];
    for disk in &images {
        for (what, more) in &all[..if disk.direct_io { 1 } else { 3 }] {
            let script = format!(
                "fio --name=t --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=16 --size=24m \
                 --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=7 --output-format=terse {more} 2>&1"
            );
            let mut config = env.shell(&script);
            (config.vcpus, config.disks) = (2, vec![disk.clone()]);
            let output = run(config)?;
            if output.code == 127 {
                return Err(Failure::Skip("no fio in the root".into()));
            }
            let host = if disk.direct_io { ", direct on the host" } else { "" };
            let text = format!("fio {what} on {}{host}: {}", disk.id, output.out());
            same(&text, output.code, 0)?;
        }
    }
    for disk in images.iter().filter(|d| d.format == DiskFormat::Qcow2) {
        let check = tool("qemu-img", &["check", &disk.path.to_string_lossy()])?;
        same("qemu-img check", check.map(|r| r.0), Some(0))?;
    }
    Ok(())
}
