//! Locks that programs of guest and host see of each other.

use std::fs::File;
use std::time::Duration;

use rustix::fs::{FlockOperation, fcntl_lock, flock};

use super::share_faults::go;
use crate::harness::{Case, Env, Failure, TempDir, no_guest, same, start};
use krun::Share;

pub const CASE: Case = Case { name: "share_locks", host, guest: no_guest };

const GUEST: &str = r#"
import fcntl, os, struct, subprocess, sys
def wait(word): print(word, flush=True); sys.stdin.readline()
def attempt(what, call, f, how):
    try: call(f, how); print(what, "got it", flush=True)
    except OSError as e: print(what, os.strerror(e.errno), flush=True)
f = open("/media/file", "r+b")
attempt("flock", fcntl.flock, f, fcntl.LOCK_EX | fcntl.LOCK_NB)
attempt("flock", fcntl.flock, f, fcntl.LOCK_SH | fcntl.LOCK_NB)
print("waiting", flush=True)
attempt("flock", fcntl.flock, f, fcntl.LOCK_EX)
wait("held")
attempt("record", fcntl.lockf, f, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("waiting again", flush=True)
attempt("record", fcntl.lockf, f, fcntl.LOCK_EX)
wait("held again")
other = [sys.executable, "-c", "import fcntl; f = open('/media/file', 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print('other', flush=True)"]
child = subprocess.Popen(other)
try: child.wait(0.5); print("the other one did not wait")
except subprocess.TimeoutExpired: pass
open("/media/file").close()
child.wait()
wait("closed")
own = open("/media/file", "r+b")
fcntl.fcntl(own, 37, struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 0, 0)) # F_OFD_SETLK
wait("held by a file")
own.close()
wait("closed that file")
"#;

fn host(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("share-locks")?;
    let path = dir.path().join("file");
    std::fs::write(&path, "0123456789")?;
    let open = || File::options().read(true).write(true).open(&path);
    let mut config = env.program("python3", ["-c", GUEST]);
    config.shares.push(Share {
        locks: true,
        mount: Some("/media".into()),
        ..Share::new("locks", dir.path())
    });
    let file = open()?;
    flock(&file, FlockOperation::LockExclusive)?;
    let mut captured = start(config)?;
    captured.wait_for_output("waiting\n")?;
    std::thread::sleep(Duration::from_millis(300));
    flock(&file, FlockOperation::Unlock)?;
    captured.wait_for_output("held\n")?;
    same("flock here", flock(&file, FlockOperation::NonBlockingLockShared).is_err(), true)?;
    fcntl_lock(&file, FlockOperation::LockShared)?;
    go(&mut captured)?;
    captured.wait_for_output("waiting again\n")?;
    std::thread::sleep(Duration::from_millis(300));
    fcntl_lock(&file, FlockOperation::Unlock)?;
    captured.wait_for_output("held again\n")?;
    same("a record lock here", fcntl_lock(&file, FlockOperation::NonBlockingLockShared).is_err(), true)?;
    go(&mut captured)?;
    captured.wait_for_output("closed\n")?;
    // The owner closed the file once, as fcntl(2) has it; the BSD lock is still there.
    fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)?;
    same("flock here", flock(&file, FlockOperation::NonBlockingLockShared).is_err(), true)?;
    fcntl_lock(&file, FlockOperation::Unlock)?;
    go(&mut captured)?;
    captured.wait_for_output("held by a file\n")?;
    same("a record lock here", fcntl_lock(&file, FlockOperation::NonBlockingLockShared).is_err(), true)?;
    go(&mut captured)?;
    captured.wait_for_output("closed that file\n")?;
    // The guest's kernel tells of it in its own time.
    let told = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        fcntl_lock(&file, FlockOperation::NonBlockingLockShared).is_ok()
    });
    same("the lock of a file that was closed is gone", told, true)?;
    go(&mut captured)?;
    let output = captured.finish()?.success()?;
    let busy = "Resource temporarily unavailable";
    let expected = format!(
        "flock {busy}\nflock {busy}\nwaiting\nflock got it\nheld\nrecord {busy}\nwaiting again\nrecord got it\n\
         held again\nother\nclosed\nheld by a file\nclosed that file\n"
    );
    same("what the guest saw", output.out(), expected)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(())
}
