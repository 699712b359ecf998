//! Shares when the host changes them: no space, other programs at work, the directory gone.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::disk::tool;
use crate::harness::{Captured, Case, Env, Failure, Mounted, TempDir, no_guest, run, same, start};
use krun::Share;

pub const SPACE: Case = Case { name: "share_no_space", host: no_space, guest: no_guest };
pub const CHANGES: Case = Case { name: "share_changes", host: changes, guest: no_guest };
pub const GONE: Case = Case { name: "share_gone", host: gone, guest: no_guest };

/// Writes until there is no space, by write and through a mapping, and goes on when there is.
const FILL: &str = r#"
import errno, mmap, os, sys
def full(what, do):
    try: do()
    except OSError as e: print(what, errno.errorcode[e.errno], flush=True)
    else: print(what, "went well", flush=True)
def write():
    with open("/media/a", "wb", buffering=0) as f:
        for n in range(256): f.write(bytes([n]) * 65536)
        os.fsync(f.fileno())
def mapped():
    with open("/media/b", "w+b") as f:
        f.truncate(1 << 20)
        m = mmap.mmap(f.fileno(), 1 << 20)
        for at in range(0, 1 << 20, 4096): m[at] = 7
        m.flush(); m.close()
def names():
    for n in range(300): open(f"/media/n{n}", "w").close()
def wait(): print("next", flush=True); sys.stdin.readline()
full("write", write); full("mapped", mapped); wait()
full("write", write)
try: mapped()
except OSError: pass # The kernel tells of an error once more.
full("mapped", mapped); wait()
full("names", names); wait(); full("names", names)
data = open("/media/a", "rb").read()
assert data == b"".join(bytes([n]) * 65536 for n in range(256))
"#;

/// Gives the guest a line to read.
pub fn go(captured: &mut Captured) -> Result<(), Failure> {
    use std::io::Write;
    let stdin = captured.stdin.as_mut().ok_or_else(|| Failure::Wrong("no input".into()))?;
    Ok(stdin.write_all(b"\n")?)
}

fn no_space(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("share-space")?;
    let small = Mounted::new(&["-t", "tmpfs", "-o", "size=8m,nr_inodes=100"], "tmpfs", dir.path())?;
    let resize = |option: &str| {
        let (option, at) = (format!("remount,{option}"), small.path().to_string_lossy());
        same(&option, tool("mount", &["-o", &option, &at])?.map(|r| r.0), Some(0))
    };
    let mut config = env.program("python3", ["-c", FILL]);
    config.shares.push(Share { mount: Some("/media".into()), ..Share::new("small", small.path()) });
    let mut captured = start(config)?;
    let mut expected = String::from("write ENOSPC\nmapped ENOSPC\nnext\n");
    captured.wait_for_output(&expected)?;
    resize("size=64m")?;
    go(&mut captured)?;
    expected.push_str("write went well\nmapped went well\nnext\n");
    captured.wait_for_output(&expected)?;
    go(&mut captured)?;
    expected.push_str("names ENOSPC\nnext\n");
    captured.wait_for_output(&expected)?;
    resize("nr_inodes=1000")?;
    go(&mut captured)?;
    expected.push_str("names went well\n");
    same("what the guest saw", captured.finish()?.success()?.out(), expected)?;
    let mapped = fs::read(small.path().join("b"))?;
    same("the mapped file on the host", mapped.iter().step_by(4096).all(|b| *b == 7), true)?;
    quota(env)
}

/// A user's quota of the host is the guest's user's.
fn quota(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("share-quota")?;
    let limits = "usrquota,usrquota_block_hardlimit=1m,usrquota_inode_hardlimit=20";
    let small = Mounted::new(&["-t", "tmpfs", "-o", limits], "tmpfs", dir.path())?;
    fs::set_permissions(small.path(), fs::Permissions::from_mode(0o777))?;
    let script = r#"
import errno, os
os.setresuid(65534, 65534, 65534)
def over(what, do):
    try: do()
    except OSError as e: print(what, errno.errorcode[e.errno])
def write():
    with open("/media/a", "wb", buffering=0) as f:
        for n in range(64): f.write(bytes(65536))
def names():
    for n in range(64): open(f"/media/n{n}", "w").close()
over("write", write); os.truncate("/media/a", 0); over("names", names)
"#;
    let mut config = env.program("python3", ["-c", script]);
    config.shares.push(Share { mount: Some("/media".into()), ..Share::new("small", small.path()) });
    same("beyond a quota", run(config)?.success()?.out().as_str(), "write EDQUOT\nnames EDQUOT\n")
}

/// The guest's caches hold what it was told for a second.
const SETTLE: &str = "sleep 1.2";

fn changes(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("share-changes")?;
    let at = |name: &str| dir.path().join(name);
    fs::write(at("kept"), "one\n")?;
    fs::write(at("moved"), "moved\n")?;
    fs::write(at("removed"), "removed\n")?;
    fs::write(at("replaced"), "old\n")?;
    fs::write(at("shrinks"), "x".repeat(10_000))?;
    fs::create_dir(at("dir"))?;
    fs::write(at("dir/inside"), "inside\n")?;
    let script = format!(
        "cd /media; exec 3<kept 4<removed 5>>kept 6<replaced; cat kept moved removed replaced dir/inside >/dev/null
        wc -c < shrinks; ls absent 2>/dev/null; ls; cd dir; echo ready; read x; {SETTLE}; cd /media
        cat kept renamed replaced appeared; cat <&3 | head -c 4; cat <&4; cat <&6; wc -c < shrinks
        cat removed moved absent 2>&1; stat -c %a renamed; ls; ls other; cat other/inside
        echo guest >&5; echo seen; read x; {SETTLE}; tail -n 1 kept; cat <&3 | tail -n 1"
    );
    let mut config = env.shell(&script);
    config.shares.push(Share { mount: Some("/media".into()), ..Share::new("changes", dir.path()) });
    let mut captured = start(config)?;
    captured.wait_for_output("ready\n")?;
    // The same length, so that only the time tells.
    fs::write(at("kept"), "two\n")?;
    fs::rename(at("moved"), at("renamed"))?;
    fs::set_permissions(at("renamed"), fs::Permissions::from_mode(0o640))?;
    fs::remove_file(at("removed"))?;
    fs::write(at("new"), "new\n")?;
    fs::rename(at("new"), at("replaced"))?;
    fs::write(at("appeared"), "appeared\n")?;
    fs::OpenOptions::new().write(true).open(at("shrinks"))?.set_len(10)?;
    fs::rename(at("dir"), at("other"))?;
    go(&mut captured)?;
    captured.wait_for_output("seen\n")?;
    same("what the guest appended", fs::read_to_string(at("kept"))?.as_str(), "two\nguest\n")?;
    fs::write(at("kept"), "two\nguest\nhost\n")?;
    go(&mut captured)?;
    let output = captured.finish()?.success()?;
    let expected = "10000\ndir\nkept\nmoved\nremoved\nreplaced\nshrinks\nready\n\
        two\nmoved\nnew\nappeared\ntwo\nremoved\nold\n10\n\
        cat: removed: No such file or directory\ncat: moved: No such file or directory\n\
        cat: absent: No such file or directory\n640\n\
        appeared\nkept\nother\nrenamed\nreplaced\nshrinks\ninside\ninside\nseen\nhost\nhost\n";
    same("what the guest saw", output.out().as_str(), expected)
}

/// A share whose directory is deleted, then another takes its name.
fn gone(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("share-gone")?;
    let shared = dir.path().join("shared");
    fs::create_dir_all(shared.join("sub/deep"))?;
    fs::write(shared.join("file"), "file\n")?;
    fs::write(shared.join("sub/deep/file"), "deep\n")?;
    let script = format!(
        "cd /media/sub/deep; exec 3<file 4<>/media/file; cat file; echo ready; read x; {SETTLE}
        cat <&3; echo more >&4 && echo written; cat file 2>&1
        for c in 'ls /media/file' 'cat /media/file' 'touch /media/new' 'mkdir /media/new' 'touch here' \
            'mv /media/file /media/other' 'rmdir /media/sub' 'ln -s a /media/link' 'stat /media/sub/deep'; do
            $c >/dev/null 2>&1 && echo $c went well; done
        sync; df /media >/dev/null; stat -c %h /media; cd /; umount /media 2>/dev/null; exec 3<&- 4<&-; echo done"
    );
    let mut config = env.shell(&script);
    config.shares.push(Share { mount: Some("/media".into()), ..Share::new("gone", &shared) });
    let mut captured = start(config)?;
    captured.wait_for_output("ready\n")?;
    fs::remove_dir_all(&shared)?;
    fs::create_dir(&shared)?;
    fs::write(shared.join("file"), "another\n")?;
    go(&mut captured)?;
    let output = captured.finish()?.success()?;
    same(
        "what the guest saw",
        output.out().as_str(),
        "deep\nready\ndeep\nwritten\ncat: file: No such file or directory\n0\ndone\n",
    )?;
    same("the other directory", fs::read_dir(&shared)?.count(), 1)?;
    same("its file", fs::read_to_string(shared.join("file"))?.as_str(), "another\n")
}
