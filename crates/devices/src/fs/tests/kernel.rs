//! The server behind the host's own FUSE client, through `/dev/fuse`: what real programs make of a share,
//! without a virtual machine. Takes root, and happens in a mount namespace of its own.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;

use krun_memory::VolatileSlice;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use super::client::is_root;
use crate::fs::flat::{FlatSink, FlatSource};
use crate::fs::server::Server;
use crate::fs::{CachePolicy, FsSpec, setup};

/// Room for the largest request: 1 MiB of data and its head.
const REQUEST_MAX: usize = (1 << 20) + (64 << 10);

struct Mounted {
    at: PathBuf,
    source: PathBuf,
    server: Option<JoinHandle<()>>,
    _dirs: (tempfile::TempDir, Option<tempfile::TempDir>),
}

/// Mounts a share on the host; `None` (said why) where that is not possible.
fn mount(source: Option<PathBuf>, change: impl FnOnce(&mut FsSpec)) -> Option<Mounted> {
    if !is_root() {
        println!("skipped: mounting takes root");
        return None;
    }
    let Ok(device) = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") else {
        println!("skipped: the host has no /dev/fuse");
        return None;
    };
    if crate::fs::sys::private_mounts().is_err() {
        println!("skipped: no mount namespace can be had");
        return None;
    }
    rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE).unwrap();
    let at = tempfile::tempdir().unwrap();
    let own = source.is_none().then(|| tempfile::tempdir().unwrap());
    let source = source.or(own.as_ref().map(|d| d.path().to_owned())).unwrap();
    let mut spec = FsSpec { tag: "host".into(), source: Some(source.clone()), ..FsSpec::default() };
    change(&mut spec);
    let server = Server::new(setup::share(&spec).unwrap(), None);
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
        device.as_raw_fd()
    );
    let options = std::ffi::CString::new(options).unwrap();
    rustix::mount::mount("krun", at.path(), "fuse", MountFlags::empty(), Some(&*options)).unwrap();
    let server = std::thread::spawn(move || serve(server, device));
    Some(Mounted { at: at.path().to_owned(), source, server: Some(server), _dirs: (at, own) })
}

fn serve(mut server: Server, mut device: fs::File) {
    server.attach().unwrap();
    let (mut request, mut reply) = (vec![0u8; REQUEST_MAX], vec![0u8; REQUEST_MAX]);
    loop {
        let n = match device.read(&mut request) {
            Ok(n) => n,
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => return,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ENOENT)) => continue,
            Err(e) => panic!("/dev/fuse: {e}"),
        };
        let mut source = FlatSource::new(vec![VolatileSlice::from(&mut request[..n])]);
        let sink = FlatSink::new(vec![VolatileSlice::from(&mut reply[..])]);
        let n = server.serve(&mut source, sink).unwrap() as usize;
        if n > 0 {
            // ENOENT: the caller has given up meanwhile.
            match device.write(&reply[..n]) {
                Ok(written) => assert_eq!(written, n),
                Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOENT), "{e}"),
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.at, UnmountFlags::DETACH).unwrap();
        if let Some(server) = self.server.take() {
            let ended = server.join();
            if !std::thread::panicking() {
                ended.unwrap();
            }
        }
    }
}

fn sh(at: &Path, script: &str) -> String {
    let out = Command::new("sh").args(["-euc", script]).current_dir(at).output().unwrap();
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{script}\n{}\n{err}", out.status);
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn programs_work_on_a_share() {
    let Some(m) = mount(None, |_| {}) else { return };
    sh(
        &m.at,
        r"
        mkdir -p a/b/c && cd a/b/c
        seq 1 200000 > numbers && test $(wc -l < numbers) = 200000
        cp numbers copy && cmp numbers copy
        echo more >> numbers && tail -1 numbers | grep -q more
        ln numbers hard && ln -s numbers soft && test $(stat -c %h hard) = 2 && cmp soft hard
        mv copy ../moved && test ! -e copy && test -s ../moved
        mkfifo pipe && (echo through > pipe & grep -q through pipe)
        truncate -s 1G sparse && test $(stat -c %b sparse) -lt 100 && rm sparse
        dd if=numbers of=direct bs=64k oflag=direct status=none && cmp numbers direct
        chmod 4711 direct && test $(stat -c %a direct) = 4711
        for i in $(seq 1 300); do echo $i > many-$i; done
        test $(ls | grep -c many-) = 300 && rm many-*
        cd ../../.. && tar cf t.tar a && mkdir out && tar xf t.tar -C out && diff -r --no-dereference a/b/moved out/a/b/moved
        rm -rf a out t.tar && test -z $(ls -A)
        ",
    );
}

#[test]
fn users_own_what_they_make_and_nothing_more() {
    let Some(m) = mount(None, |_| {}) else { return };
    fs::set_permissions(&m.source, fs::Permissions::from_mode(0o1777)).unwrap();
    sh(
        &m.at,
        r"
        umask 022
        echo secret > root-only && chmod 600 root-only
        mkdir shared && chmod 2775 shared && chgrp 4321 shared
        setpriv --reuid 1000 --regid 1000 --groups 4321 sh -euc '
            echo x > mine && mkdir dir && echo y > shared/ours
            ! cat root-only 2>/dev/null
            ! rm -f root-only 2>/dev/null
            ! chown 0 mine 2>/dev/null
            chmod 4755 mine && echo more >> mine && test $(stat -c %a mine) = 755
        '
        ",
    );
    let ids = |name: &str| {
        let meta = fs::metadata(m.source.join(name)).unwrap();
        (meta.uid(), meta.gid(), meta.mode() & 0o7777)
    };
    assert_eq!(ids("mine"), (1000, 1000, 0o755));
    assert_eq!(ids("dir"), (1000, 1000, 0o755));
    assert_eq!(ids("shared/ours"), (1000, 4321, 0o644));
    assert!(fs::metadata(m.source.join("root-only")).is_ok());
}

#[test]
fn changes_of_the_host_are_seen() {
    let Some(m) = mount(None, |s| s.cache = CachePolicy::NEVER) else { return };
    fs::write(m.source.join("f"), "one").unwrap();
    assert_eq!(fs::read(m.at.join("f")).unwrap(), b"one");
    fs::write(m.source.join("f"), "three").unwrap();
    assert_eq!(fs::read(m.at.join("f")).unwrap(), b"three");
    let mut open = fs::File::open(m.at.join("f")).unwrap();
    fs::write(m.source.join("g"), "new").unwrap();
    fs::rename(m.source.join("g"), m.source.join("f")).unwrap();
    assert_eq!(fs::read(m.at.join("f")).unwrap(), b"new");
    let mut old = String::new();
    open.read_to_string(&mut old).unwrap();
    assert_eq!(old, "three", "what is open stays");
    fs::remove_file(m.source.join("f")).unwrap();
    assert!(fs::metadata(m.at.join("f")).is_err());
}

#[test]
fn what_is_written_back_arrives_as_it_was_written() {
    let Some(m) = mount(None, |s| s.cache = CachePolicy::WRITE_BACK) else { return };
    fs::write(m.source.join("parts"), ".".repeat(9000)).unwrap();
    sh(
        &m.at,
        r"
        for n in $(seq 1 300); do echo $n >> log; done && test $(wc -l < log) = 300
        printf x | dd of=parts bs=1 seek=4500 conv=notrunc status=none
        printf y >> parts && test $(stat -c %s parts) = 9001
        touch -d 2001-02-03T04:05:06Z log && test $(stat -c %Y log) = 981173106
        printf z > new && truncate -s 5000 new && printf tail >> new
        ",
    );
    let lines: String = (1..=300).map(|n| format!("{n}\n")).collect();
    assert_eq!(fs::read_to_string(m.source.join("log")).unwrap(), lines);
    assert_eq!(fs::metadata(m.source.join("log")).unwrap().mtime(), 981_173_106);
    let parts = fs::read(m.source.join("parts")).unwrap();
    assert_eq!((parts.len(), parts[4499], parts[4500], parts[9000]), (9001, b'.', b'x', b'y'));
    let new = fs::read(m.source.join("new")).unwrap();
    assert_eq!((new.len(), new[0], &new[5000..]), (5004, b'z', &b"tail"[..]));
    assert!(new[1..5000].iter().all(|b| *b == 0));
}

#[test]
fn mapped_files_and_locks_work() {
    let Some(m) = mount(None, |_| {}) else { return };
    sh(
        &m.at,
        r#"
        cat > t.py <<'END'
import fcntl, mmap, os, subprocess, sys
with open("map", "w+b") as f:
    f.truncate(1 << 20)
    m = mmap.mmap(f.fileno(), 1 << 20)
    m[4096:4100] = b"mmap"
    m.flush()
    m.close()
    assert os.pread(f.fileno(), 4, 4096) == b"mmap"
    fcntl.lockf(f, fcntl.LOCK_EX)
    fcntl.flock(f, fcntl.LOCK_EX)
    other = "import fcntl,sys\nf=open('map','r+b')\ntry: fcntl.lockf(f, fcntl.LOCK_EX|fcntl.LOCK_NB)\nexcept OSError: sys.exit(7)"
    assert subprocess.run([sys.executable, "-c", other]).returncode == 7
os.unlink("map")
f = os.open("gone", os.O_RDWR | os.O_CREAT)
os.unlink("gone")
os.write(f, b"still")
assert os.fstat(f).st_nlink == 0 and os.pread(f, 5, 0) == b"still"
END
        command -v python3 > /dev/null || exit 0
        python3 t.py
        "#,
    );
}

/// `KRUN_FS_SERVE="SOURCE COMMAND"` runs COMMAND in a share of SOURCE: for test suites of others.
#[test]
#[ignore = "a tool: serves the directory and runs the command of $KRUN_FS_SERVE"]
fn serve_for_a_command() {
    let Ok(what) = std::env::var("KRUN_FS_SERVE") else { return };
    let (source, command) = what.split_once(' ').unwrap();
    let Some(m) = mount(Some(source.into()), |_| {}) else { return };
    let status = Command::new("sh").args(["-c", command]).current_dir(&m.at).status().unwrap();
    assert!(status.success());
}
