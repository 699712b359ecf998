//! The booted machine, saved once and continued by every command.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use krun_wire::FrameReader;
use krun_wire::host::FromHostRole;
use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom, fallocate, flock, seek};
use serde_json::json;

use crate::cpio::Archive;
use crate::qemu::{Birth, Ports, Qemu, STATE_VARIABLE, kernel_line, machine};
use crate::qmp::Qmp;
use crate::{Engine, Error};

/// Templates of other kernels or programs that are kept.
const KEEP_OTHERS: usize = 2;
/// How long the machine may take to boot.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);
/// Longest state that can be read from a pipe without a writer beside it, in bytes.
const MAX_STATE: usize = 1 << 20;

/// Everything that goes into a template, as one number. Files count by name, size and time of change:
/// reading a kernel each time would take longer than the rest of the start.
fn key(engine: &Engine) -> Result<String, Error> {
    let mut hasher = DefaultHasher::new();
    machine(engine).hash(&mut hasher);
    kernel_line(0).hash(&mut hasher);
    engine.init.hash(&mut hasher);
    for file in [&engine.qemu, &engine.kernel] {
        let real = fs::canonicalize(file).map_err(Error::host(format!("reading {}", file.display())))?;
        let meta = fs::metadata(&real).map_err(Error::host(format!("reading {}", real.display())))?;
        let changed = meta.modified().ok();
        (real, meta.len(), changed).hash(&mut hasher);
    }
    // The emulated counter runs at the speed of this processor's, which the kernel learned when it booted.
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    processor.lines().find(|l| l.starts_with("model name")).hash(&mut hasher);
    Ok(format!("{:016x}", hasher.finish()))
}

/// The initial RAM disk: init, and what the kernel needs to start it.
pub fn initrd(engine: &Engine) -> Archive {
    Archive::default()
        .directory(b"dev", 0o755)
        .device(b"dev/console", 0o600, 5, 1)
        .directory(b"proc", 0o755)
        .directory(b"sys", 0o755)
        .file(b"init", 0o755, &engine.init)
}

/// The template's directory, made if it is not there. QEMU runs as a child of the calling thread.
pub fn ensure(engine: &Engine) -> Result<PathBuf, Error> {
    let Some(home) = &engine.cache else {
        return Err(Error::Qemu { what: "there is no directory for templates".into(), log: String::new() });
    };
    fs::create_dir_all(home).map_err(Error::host(format!("creating {}", home.display())))?;
    let dir = home.join(key(engine)?);
    if dir.join("state").exists() {
        return Ok(dir);
    }
    // One at a time; the next finds it made.
    let lock_path = home.join("lock");
    let lock = File::create(&lock_path).map_err(Error::host(format!("creating {}", lock_path.display())))?;
    flock(&lock, FlockOperation::LockExclusive).map_err(Error::host("locking the templates"))?;
    if dir.join("state").exists() {
        return Ok(dir);
    }
    let partial = home.join("partial");
    let _ = fs::remove_dir_all(&partial);
    tracing::debug!(dir = %dir.display(), "booting the emulated host to save it as a template");
    let made = make(engine, &partial).and_then(|()| {
        let _ = fs::remove_dir_all(&dir);
        fs::rename(&partial, &dir).map_err(Error::host(format!("creating {}", dir.display())))
    });
    if let Err(e) = made {
        let _ = fs::remove_dir_all(&partial);
        return Err(e);
    }
    forget_old(home, &dir);
    Ok(dir)
}

/// Boots the machine until its process 1 waits for a command, and saves it in `dir`.
fn make(engine: &Engine, dir: &Path) -> Result<(), Error> {
    fs::create_dir_all(dir.join("empty")).map_err(Error::host(format!("creating {}", dir.display())))?;
    let initrd_path = dir.join("initrd");
    fs::write(&initrd_path, initrd(engine).finish()).map_err(Error::host("writing the initial RAM disk"))?;
    let ram = File::options().read(true).write(true).create(true).truncate(true).open(dir.join("ram"));
    let ram = ram.map_err(Error::host("creating the file of the machine's memory"))?;
    let (mut qemu, ports) = Qemu::spawn(engine, &initrd_path, Birth::Template { dir }, &[])?;
    wait_ready(&qemu, &ports)?;
    save(&mut qemu, &dir.join("state")).map_err(|e| qemu.failure(e.to_string()))?;
    drop(qemu);
    release_zeroes(&ram).map_err(Error::host("shrinking the file of the machine's memory"))
}

/// Gives back the blocks of a file that hold only zeroes: about half of what a kernel has touched.
fn release_zeroes(file: &File) -> io::Result<()> {
    const STEP: usize = 64 * 1024;
    let mut block = vec![0; STEP];
    let mut at = 0;
    // Fails with NXIO after the last data.
    while let Ok(data) = seek(file, SeekFrom::Data(at)) {
        let end = seek(file, SeekFrom::Hole(data))?;
        at = data;
        while at < end {
            let n = file.read_at(&mut block, at)?;
            if n == 0 {
                return Ok(());
            }
            if block[..n].iter().all(|byte| *byte == 0) {
                fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, n as u64)?;
            }
            at += n as u64;
        }
    }
    Ok(())
}

fn wait_ready(qemu: &Qemu, ports: &Ports) -> Result<(), Error> {
    let timeout = ports.control.set_read_timeout(Some(BOOT_PATIENCE));
    timeout.map_err(Error::host("waiting for the emulated host"))?;
    let (mut reader, mut chunk) = (FrameReader::default(), [0u8; 256]);
    loop {
        match reader.next::<FromHostRole>() {
            Ok(Some(FromHostRole::Ready)) => return Ok(()),
            Ok(None) => {}
            other => return Err(qemu.failure(format!("its init said {other:?}"))),
        }
        match (&ports.control).read(&mut chunk) {
            Ok(n) if n > 0 => reader.push(&chunk[..n]),
            Ok(_) => return Err(qemu.failure("QEMU ended while its kernel booted")),
            Err(e) => return Err(qemu.failure(format!("its kernel did not boot: {e}"))),
        }
    }
}

fn save(qemu: &mut Qemu, state: &Path) -> Result<(), Error> {
    let monitor = qemu.monitor.take().ok_or_else(|| Error::internal("asking for the monitor"))?;
    let mut qmp = Qmp::new(monitor)?;
    // Not stopped: a machine that is saved running runs when it is continued.
    memory_is_in_its_file(&mut qmp)?;
    // By way of the environment any path survives the shell.
    qmp.call("migrate", json!({"uri": format!("exec:cat >\"${STATE_VARIABLE}\"")}))?;
    qmp.migrated()?;
    let size = fs::metadata(state).map_err(Error::host("looking at the saved state"))?.len();
    if size == 0 || size > MAX_STATE as u64 {
        return Err(Error::Qemu { what: format!("a saved state has {size} bytes"), log: String::new() });
    }
    Ok(())
}

/// Leaves the memory out of the state: it is in its file.
fn memory_is_in_its_file(qmp: &mut Qmp) -> Result<(), Error> {
    let capability = json!([{"capability": "x-ignore-shared", "state": true}]);
    qmp.call("migrate-set-capabilities", json!({ "capabilities": capability })).map(drop)
}

/// The state of the template in `dir`, in a pipe.
fn state(dir: &Path) -> Result<OwnedFd, Error> {
    let path = dir.join("state");
    let bytes = fs::read(&path).map_err(Error::host(format!("reading {}", path.display())))?;
    let (read, write) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(Error::host("creating a pipe"))?;
    let room = rustix::pipe::fcntl_setpipe_size(&write, bytes.len()).map_err(Error::host("sizing a pipe"))?;
    if room < bytes.len() {
        return Err(Error::internal("sizing a pipe"));
    }
    File::from(write).write_all(&bytes).map_err(Error::host("filling a pipe"))?;
    Ok(read)
}

/// Starts a machine from the template in `dir`.
pub fn resume(engine: &Engine, dir: &Path, writable: &[PathBuf]) -> Result<(Qemu, Ports), Error> {
    let state = state(dir)?;
    let number = state.as_raw_fd();
    let (mut qemu, ports) = Qemu::spawn(engine, &dir.join("initrd"), Birth::Resume { dir, state }, writable)?;
    let load = |monitor| {
        let mut qmp = Qmp::new(monitor)?;
        memory_is_in_its_file(&mut qmp)?;
        // It runs as soon as it is complete; a state that does not fit ends QEMU.
        qmp.call("migrate-incoming", json!({ "uri": format!("fd:{number}") })).map(drop)
    };
    let monitor = qemu.monitor.take().ok_or_else(|| Error::internal("asking for the monitor"))?;
    match load(monitor) {
        Ok(()) => Ok((qemu, ports)),
        Err(e) => Err(qemu.failure(e.to_string())),
    }
}

/// Removes a template that does not work.
pub fn discard(dir: &Path) {
    let _ = fs::remove_file(dir.join("state"));
}

/// Removes the oldest templates but a few.
fn forget_old(home: &Path, current: &Path) {
    let entries = fs::read_dir(home).map(|list| list.flatten().collect::<Vec<_>>()).unwrap_or_default();
    let mut others: Vec<_> = entries
        .into_iter()
        .map(|e| e.path())
        .filter(|p| p.is_dir() && p != current)
        .map(|p| (fs::metadata(&p).and_then(|m| m.modified()).ok(), p))
        .collect();
    others.sort();
    let surplus = others.len().saturating_sub(KEEP_OTHERS);
    for (_, path) in others.into_iter().take(surplus) {
        let _ = fs::remove_dir_all(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_few_others_are_kept() {
        let home = tempfile::tempdir().unwrap();
        for n in 0..9 {
            fs::create_dir(home.path().join(n.to_string())).unwrap();
        }
        fs::write(home.path().join("lock"), "").unwrap();
        forget_old(home.path(), &home.path().join("0"));
        assert!(home.path().join("0").exists() && home.path().join("lock").exists());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1 + 1 + KEEP_OTHERS);
    }

    #[test]
    fn zeroes_are_released_and_the_rest_stays() {
        use std::os::unix::fs::MetadataExt;
        let mut file = tempfile::tempfile().unwrap();
        let mut data = vec![0; 1 << 20];
        (data[300_000], data[(1 << 20) - 1]) = (1, 2);
        file.write_all(&data).unwrap();
        file.set_len(4 << 20).unwrap();
        file.sync_all().unwrap();
        let before = file.metadata().unwrap().blocks();
        release_zeroes(&file).unwrap();
        assert!(file.metadata().unwrap().blocks() < before / 4);
        let mut after = vec![0; 1 << 20];
        file.read_exact_at(&mut after, 0).unwrap();
        assert!(after == data && file.metadata().unwrap().len() == 4 << 20);
    }

    #[test]
    fn the_key_follows_what_goes_in() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            fs::write(&path, name).unwrap();
            path
        };
        let engine = Engine {
            qemu: file("qemu"),
            kernel: file("kernel"),
            init: vec![1],
            memory_mib: 64,
            cpus: 1,
            cache: None,
        };
        let first = key(&engine).unwrap();
        assert_eq!(key(&engine).unwrap(), first);
        for other in [
            Engine { init: vec![2], ..engine.clone() },
            Engine { memory_mib: 65, ..engine.clone() },
            Engine { cpus: 2, ..engine.clone() },
            Engine { kernel: file("another"), ..engine.clone() },
        ] {
            assert_ne!(key(&other).unwrap(), first, "{other:?}");
        }
        fs::write(&engine.kernel, "longer than before").unwrap();
        assert_ne!(key(&engine).unwrap(), first);
    }
}
