//! What the guest keeps of a share, and the owners it shows.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use super::share_faults::go;
use crate::harness::{Case, Env, Failure, TempDir, contains, no_guest, run, same, start};
use krun::{Cache, Share};

pub const CASE: Case = Case { name: "share_cache", host, guest: no_guest };
pub const IDMAP: Case = Case { name: "share_idmap", host: idmap, guest: no_guest };

/// Two thousand small writes; `log` is appended to, `parts` is overwritten in the middle of pages.
const SMALL_WRITES: &str = r#"
import os
with open("/media/log", "ab", buffering=0) as f:
    for n in range(1000): f.write(b"%04d\n" % n)
fd = os.open("/media/parts", os.O_WRONLY)
for n in range(1000): os.pwrite(fd, b"x", n * 9)
os.close(fd)
"#;

/// Requests of one kind that a share has served, in the command's log.
fn requests(log: &str, tag: &str, kind: &str) -> Result<u64, Failure> {
    let line = log.lines().find(|l| l.contains(" requests: ") && l.contains(tag));
    let mut words = line.ok_or_else(|| Failure::Wrong(format!("no counts of {tag} in {log}")))?.split(' ');
    if !words.any(|w| w == kind) {
        return Ok(0);
    }
    Ok(words.next().unwrap_or_default().parse()?)
}

fn host(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("share-cache")?;
    let log: String = (0..1000).map(|n| format!("{n:04}\n")).collect();
    let parts: Vec<u8> = (0..9000).map(|n| if n % 9 == 0 { b'x' } else { b'.' }).collect();
    for (how, most) in [("auto", u64::MAX), ("never", u64::MAX), ("writeback", 20)] {
        fs::write(dir.path().join("log"), "")?;
        fs::write(dir.path().join("parts"), ".".repeat(9000))?;
        let volume = format!("{}:/media:cache={how}", dir.path().display());
        let out =
            env.krun()?.args(["-vv", "--volume", &volume, "--", "python3", "-c", SMALL_WRITES]).output()?;
        let err = String::from_utf8_lossy(&out.stderr);
        same(&format!("with {how}: {err}"), out.status.code(), Some(0))?;
        same("what was appended", fs::read_to_string(dir.path().join("log"))? == log, true)?;
        same("what was overwritten", fs::read(dir.path().join("parts"))? == parts, true)?;
        let writes = requests(&err, "volume0", "write")?;
        println!("    cache={how}: {writes} write requests");
        same(&format!("{writes} write requests with {how}"), writes <= most, true)?;
    }
    changes_at_once(env)
}

/// With no cache each side sees at once what the other one did.
fn changes_at_once(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("share-uncached")?;
    let at = |name: &str| dir.path().join(name);
    fs::write(at("file"), "one")?;
    let script = "cd /media; exec 3>>file; ls; cat file; ls new 2>&1; echo; read x; cat file; ls; echo -n four >&3; \
        echo; read x; cat file; ls new 2>&1; true";
    let mut config = env.shell(script);
    let share = Share::new("uncached", dir.path());
    config.shares.push(Share { cache: Cache::Never, mount: Some("/media".into()), ..share });
    let mut captured = start(config)?;
    let missing = "ls: cannot access 'new': No such file or directory\n";
    captured.wait_for_output(missing)?;
    fs::write(at("file"), "two")?;
    fs::write(at("new"), "")?;
    go(&mut captured)?;
    captured.wait_for_output("twofile\nnew\n\n")?;
    same("what the guest appended", fs::read_to_string(at("file"))?.as_str(), "twofour")?;
    fs::write(at("file"), "six")?;
    fs::remove_file(at("new"))?;
    go(&mut captured)?;
    let output = captured.finish()?.success()?;
    let expected = format!("file\none{missing}\ntwofile\nnew\n\nsix{missing}");
    same("what the guest saw", output.out(), expected)
}

/// Mounts the share once more with owners shifted by 10,000, as engines of containers do.
const SHIFT: &str = r#"
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
def check(what, result):
    if result < 0: raise OSError(ctypes.get_errno(), what + ": " + os.strerror(ctypes.get_errno()))
    return result
ready, tell = os.pipe(); hold, release = os.pipe()
child = os.fork()
if child == 0:
    check("unshare", libc.unshare(0x10000000)); os.write(tell, b"x"); os.read(hold, 1); os._exit(0)
os.read(ready, 1)
for kind in "uid", "gid":
    with open(f"/proc/{child}/{kind}_map", "w") as f: f.write("0 10000 1000")
ns = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
tree = check("open_tree", libc.syscall(428, -100, b"/media", 0o2000001))
attr = struct.pack("QQQQ", 0x100000, 0, 0, ns)
check("mount_setattr", libc.syscall(442, tree, b"", 0x1000, attr, len(attr)))
check("move_mount", libc.syscall(429, tree, b"", -100, b"/srv", 4))
s = os.stat("/srv/file"); print(s.st_uid, s.st_gid)
user = os.fork()
if user == 0:
    os.setgroups([]); os.setgid(10008); os.setuid(10007)
    open("/srv/dir/new", "w").close(); os.mkdir("/srv/dir/sub"); os.symlink("x", "/srv/dir/link"); os.mkfifo("/srv/dir/fifo")
    os.rename("/srv/dir/new", "/srv/dir/moved"); os.chmod("/srv/dir/moved", 0o640)
    try: os.unlink("/srv/file")
    except PermissionError: os._exit(7)
    os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(user, 0)[1]))
s = os.stat("/srv/dir/moved"); print(s.st_uid, s.st_gid)
os.chown("/srv/dir/moved", 10009, 10010)
s = os.stat("/media/dir/moved"); print(s.st_uid, s.st_gid)
"#;

fn idmap(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("share-idmap")?;
    let at = |name: &str| dir.path().join(name);
    fs::write(at("file"), "")?;
    chown(at("file"), Some(5), Some(6))?;
    fs::create_dir(at("dir"))?;
    fs::set_permissions(at("dir"), fs::Permissions::from_mode(0o777))?;
    let mut config = env.program("python3", ["-c", SHIFT]);
    config.shares.push(Share { mount: Some("/media".into()), ..Share::new("idmap", dir.path()) });
    let output = run(config)?;
    contains(&format!("{:?} {}", output.code, output.err()), &output.out(), "10005 10006\n")?;
    same("what the guest saw", output.out().as_str(), "10005 10006\n7\n10007 10008\n9 10\n")?;
    let owner = |name: &str| fs::symlink_metadata(at(name)).map(|m| (m.uid(), m.gid()));
    for name in ["dir/sub", "dir/link", "dir/fifo"] {
        same(name, owner(name)?, (7, 8))?;
    }
    same("a file that was given away", owner("dir/moved")?, (9, 10))
}
