//! Shares with a DAX window: the guest maps files of the host.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use krun::{Cache, Dax, Disk, Share};

use super::disk::image;
use super::share_faults::go;
use crate::harness::{
    Captured, Case, Env, Failure, Mounted, TempDir, contains, no_guest, noise, same, start,
};

pub const CASE: Case = Case { name: "share_dax", host, guest: no_guest };
pub const BUFFERS: Case = Case { name: "share_dax_buffers", host: buffers, guest: no_guest };
pub const SHORTER: Case = Case { name: "share_dax_shorter", host: shorter, guest: no_guest };
pub const ROOT: Case = Case { name: "share_dax_root", host: root, guest: no_guest };

const MIB: u64 = 1 << 20;
/// Eight pieces of 2 MiB.
const WINDOW: u64 = 16 * MIB;

/// What the guest's programs begin with.
const COMMON: &str = r#"
import errno, hashlib, mmap, os, sys
def wait(*words): print(*words, flush=True); sys.stdin.readline()
def shared(path, flags=os.O_RDWR, prot=mmap.PROT_READ | mmap.PROT_WRITE):
    fd = os.open(path, flags); m = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, prot); os.close(fd); return m
"#;

/// Both sides see at once what the other one writes; many files, and a share that is read-only.
const COHERENT: &str = r#"
m = shared("/media/f"); r = shared("/srv/f", os.O_RDONLY, mmap.PROT_READ)
wait(m[:5], r[:5])
print(m[:5], r[:5], m[3 << 20:(3 << 20) + 5])
m[3 << 20:(3 << 20) + 5] = b"guest"
fd = os.open("/media/f", os.O_RDWR); os.pwrite(fd, b"written", 1 << 20); print(os.pread(fd, 5, 3 << 20))
wait("wrote")
for path, flags in ("/srv/f", os.O_RDWR), ("/srv/new", os.O_RDWR | os.O_CREAT):
    try: os.open(path, flags)
    except OSError as e: print(errno.errorcode[e.errno])
os.posix_fallocate(fd, 4 << 20, 1 << 20); os.pwrite(fd, b"longer", 5 << 20); print(os.fstat(fd).st_size)
os.ftruncate(fd, 2 << 20); os.ftruncate(fd, 3 << 20); print(os.pread(fd, 3, 2 << 20), os.pread(fd, 7, 1 << 20))
m.close()
sys.stdout.flush()
names = [f"/media/many{n}" for n in range(24)]
def sums(order): return {n: hashlib.md5(open(n, "rb").read()).hexdigest() for n in order}
if os.fork() == 0:
    assert sums(names[::-1]) == sums(names); os._exit(0)
maps = [shared(n) for n in names]
for n, m in enumerate(maps): m[n] = m[n]
assert os.wait()[1] == 0
for n, m in enumerate(maps): m[n] = n
assert [m[n] for n, m in enumerate(maps)] == list(range(24))
for m in maps: m.close()
"#;

fn media(dir: &Path) -> Share {
    Share { mount: Some("/media".into()), dax: Some(Dax::new(WINDOW)), ..Share::new("dax", dir) }
}

fn read_only(dir: &Path) -> Share {
    let dax = Some(Dax::new(WINDOW / 2));
    Share { mount: Some("/srv".into()), dax, read_only: true, ..Share::new("dax-ro", dir) }
}

/// Starts a guest that runs a Python program, with these shares.
fn python(env: &Env, program: &str, shares: Vec<Share>) -> Result<Captured, Failure> {
    let mut config = env.program("python3", ["-c".to_owned(), format!("{COMMON}{program}")]);
    config.shares.extend(shares);
    start(config)
}

/// Files of this process's mappings.
fn mapped() -> Result<String, Failure> {
    Ok(fs::read_to_string("/proc/self/maps")?)
}

fn host(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("share-dax")?;
    let at = |name: &str| dir.path().join(name);
    fs::write(at("f"), noise(4 << 20, 1))?;
    let file = File::options().read(true).write(true).open(at("f"))?;
    file.write_all_at(b"first", 0)?;
    for n in 0..24 {
        fs::write(at(&format!("many{n}")), noise(2 << 20, n))?;
    }
    let mut captured = python(env, COHERENT, vec![media(dir.path()), read_only(dir.path())])?;
    captured.wait_for_output("b'first' b'first'\n")?;
    contains("mappings of this process", &mapped()?, &at("f").display().to_string())?;
    file.write_all_at(b"hosts", 0)?;
    file.write_all_at(b"hosts", 3 * MIB)?;
    go(&mut captured)?;
    captured.wait_for_output("wrote\n")?;
    let read = |offset, len| {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset).map(|()| String::from_utf8_lossy(&bytes).into_owned())
    };
    same("what the guest wrote", (read(3 * MIB, 5)?, read(MIB, 7)?), ("guest".into(), "written".into()))?;
    go(&mut captured)?;
    let expected = "b'first' b'first'\nb'hosts' b'hosts' b'hosts'\nb'guest'\nwrote\nEROFS\nEROFS\n5242886\n\
        b'\\x00\\x00\\x00' b'written'\n";
    same("what the guest saw", captured.finish()?.success()?.out().as_str(), expected)?;
    for n in 0..24u64 {
        let mut wanted = noise(2 << 20, n);
        wanted[n as usize] = n as u8;
        same(&format!("file {n} of many"), fs::read(at(&format!("many{n}")))? == wanted, true)?;
    }
    same("mappings that are left", mapped()?.contains("share-dax"), false)
}

/// Devices read and write what is mapped: files of another share and of the same, and a disk.
const BUFFERED: &str = r#"
source = shared("/srv/source", os.O_RDONLY, mmap.PROT_READ)
target = shared("/media/target")
fd = os.open("/media/plain", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
assert os.write(fd, source) == len(source)
assert os.preadv(fd, [target], 0) == len(target)
assert target[:] == source[:]
fd = os.open("/media/appended", os.O_WRONLY | os.O_CREAT)
assert os.write(fd, source) + os.write(fd, target) == 2 * len(source)
disk = os.open("/dev/vda", os.O_RDWR | os.O_DIRECT)
other = shared("/media/other")
assert os.pwritev(disk, [source], 0) == len(source)
assert os.preadv(disk, [memoryview(other)[512:(6 << 20) + 512]], 512) == 6 << 20
assert other[512:(6 << 20) + 512] == source[512:(6 << 20) + 512] and other[:512] == bytes(512)
r, w = os.pipe()
for m in source, target, other: m.close() if m is not other else m.flush()
print(hashlib.md5(open("/srv/source", "rb").read()).hexdigest() == hashlib.md5(open("/media/plain", "rb").read()).hexdigest())
"#;

fn buffers(env: &Env) -> Result<(), Failure> {
    let (dir, from) = (TempDir::new("share-dax-buffers")?, TempDir::new("share-dax-source")?);
    let at = |name: &str| dir.path().join(name);
    let source = noise(8 << 20, 5);
    fs::write(from.path().join("source"), &source)?;
    for name in ["target", "other"] {
        fs::write(at(name), vec![0; source.len()])?;
    }
    let disk = at("disk");
    image(&disk, 16 * MIB)?;
    let mut config = env.program("python3", ["-c".to_owned(), format!("{COMMON}{BUFFERED}")]);
    config.shares.extend([media(dir.path()), read_only(from.path())]);
    config.disks.push(Disk::new("disk", &disk));
    same("what the guest printed", crate::harness::run(config)?.success()?.out().as_str(), "True\n")?;
    for (name, copies) in [("plain", 1), ("target", 1), ("appended", 2)] {
        same(name, fs::read(at(name))? == source.repeat(copies), true)?;
    }
    same("the disk", fs::read(disk)?[..source.len()] == source[..], true)
}

/// The host makes files shorter that are mapped, and longer again; its disk fills up.
const SHORTER_GUEST: &str = r#"
m = shared("/media/f"); r = shared("/srv/f", os.O_RDONLY, mmap.PROT_READ)
wait(m[2 << 20:(2 << 20) + 3], r[:3], r[2 << 20:(2 << 20) + 3])
print(m[4096], bytes(m[2 << 20:(2 << 20) + 3]), bytes(r[3 << 20:(3 << 20) + 3]), m[:3], flush=True)
m[2 << 20] = 1
fd = os.open("/media/plain", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
print(os.write(fd, memoryview(m)[1 << 20:2 << 20]), flush=True)
wait("short")
print(os.stat("/media/f").st_size, m[2 << 20:(2 << 20) + 3], flush=True)
fd = os.open("/media/sparse", os.O_RDWR)
try: print(os.pwrite(fd, b"x" * 4096, 0))
except OSError as e: print(errno.errorcode[e.errno], flush=True)
if os.fork() == 0:
    shared("/media/sparse")[0] = 1
print(os.waitstatus_to_exitcode(os.wait()[1]))
"#;

fn shorter(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("share-dax-shorter")?;
    let small = Mounted::new(&["-t", "tmpfs", "-o", "size=12m"], "tmpfs", dir.path())?;
    let at = |name: &str| small.path().join(name);
    fs::write(at("f"), vec![b'a'; 4 << 20])?;
    let file = File::options().read(true).write(true).open(at("f"))?;
    let mut captured = python(env, SHORTER_GUEST, vec![media(small.path()), read_only(small.path())])?;
    captured.wait_for_output("b'aaa' b'aaa' b'aaa'\n")?;
    file.set_len(4097)?;
    go(&mut captured)?;
    captured.wait_for_output("short\n")?;
    same("what the guest wrote past the end", file.metadata()?.len(), 4097)?;
    file.set_len(4 * MIB)?;
    file.write_all_at(b"new", 2 * MIB)?;
    std::thread::sleep(std::time::Duration::from_millis(1200));
    // No room for a file that is all holes.
    File::create(at("sparse"))?.set_len(2 * MIB)?;
    let filler = fs::write(at("filler"), vec![1; 12 << 20]);
    same("a full disk", filler.map_err(|e| e.kind()), Err(std::io::ErrorKind::StorageFull))?;
    go(&mut captured)?;
    let expected = "b'aaa' b'aaa' b'aaa'\n97 b'\\x00\\x00\\x00' b'\\x00\\x00\\x00' b'aaa'\n1048576\nshort\n\
        4194304 b'new'\nENOSPC\n-7\n";
    same("what the guest saw", captured.finish()?.success()?.out().as_str(), expected)
}

/// A root that is read through its window.
fn root(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("share-dax-root")?;
    fs::write(
        dir.path().join("main.c"),
        "#include <stdio.h>\nint main(void) { puts(\"compiled\"); return 0; }\n",
    )?;
    let script = "cd /media && gcc -O1 -o prog main.c && ./prog && python3 -c 'import json; print(json.dumps([1, 2]))' \
        && echo ready && read x && cat /proc/mounts | grep -c 'virtiofs.*dax' ; true";
    let mut config = env.shell(script);
    config.memory_mib = 512;
    let dax = Some(Dax::new(128 * MIB));
    config.shares[0] = Share { read_only: true, cache: Cache::Always, dax, ..Share::root(&env.root) };
    config.shares.push(Share { mount: Some("/media".into()), ..Share::new("work", dir.path()) });
    let mut captured = start(config)?;
    captured.wait_for_output("ready\n")?;
    let maps = mapped()?;
    let ours = |line: &&str| line.contains(&*env.root.to_string_lossy()) && line.contains("libc.so.6");
    same(&format!("the root's C library among {maps}"), maps.lines().any(|line| ours(&line)), true)?;
    go(&mut captured)?;
    let output = captured.finish()?.success()?;
    same("what the guest printed", output.out().as_str(), "compiled\n[1, 2]\nready\n0\n")
}
