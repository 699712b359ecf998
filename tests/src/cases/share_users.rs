//! Owners in shares of a VMM that is root in a user namespace only, as in rootless containers.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use crate::harness::{Case, Env, Failure, TempDir, no_guest, same};

pub const CASE: Case = Case { name: "share_userns", host, guest: no_guest };

/// Owners and set-id bits by the guest's root, then what another user makes.
const GUEST: &str = r#"cd /media; echo one > a
chown 5:6 a 2> /dev/null; echo "chown $?"
mkdir s; chmod 2775 s; chgrp 6 s 2> /dev/null; echo "chgrp $?"; touch s/x; chmod 777 .
setpriv --reuid 5 --regid 6 --clear-groups sh -c 'echo > b; echo > s/y' 2> /dev/null
mknod dev c 1 3 2> /dev/null; echo "mknod $?"
stat -c '%n %u:%g %a' a b s s/x; exit 7"#;

fn host(env: &Env) -> Result<(), Failure> {
    // One user is all that a process may map without help; a range is what newuidmap gives.
    let one = "chown 1\nchgrp 1\nmknod 1\na 0:0 644\nb 0:0 644\ns 0:0 2775\ns/x 0:0 644\n";
    let many = "chown 0\nchgrp 0\nmknod 1\na 5:6 644\nb 5:6 644\ns 0:6 2775\ns/x 0:6 644\n";
    for (map, wanted, owner) in [("0 0 1", one, 0), ("0 0 65536", many, 5)] {
        let dir = TempDir::new("share-userns")?;
        same(&format!("with {map}"), guest(env, &dir, map)?.as_str(), wanted)?;
        same("the owner on the host", fs::metadata(dir.path().join("a"))?.uid(), owner)?;
    }
    Ok(())
}

/// What the guest of a VMM in a user namespace prints, whose users are mapped as in `/proc/PID/uid_map`.
fn guest(env: &Env, dir: &TempDir, map: &str) -> Result<String, Failure> {
    let krun = env.krun()?;
    let mut child = Command::new("unshare")
        .args(["--user", "sh", "-c", "echo; read x; exec \"$@\"", "sh"])
        .arg(krun.get_program())
        .args(krun.get_args())
        .args(["--volume", &format!("{}:/media", dir.path().display()), "--", "/bin/sh", "-c", GUEST])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // It is in its namespace once `unshare` has become the shell.
    let mut out = child.stdout.take().ok_or_else(|| Failure::Wrong("no output".into()))?;
    out.read_exact(&mut [0])?;
    for file in ["uid_map", "gid_map"] {
        if let Err(e) = fs::write(format!("/proc/{}/{file}", child.id()), map) {
            let _ = child.kill();
            return Err(Failure::Skip(format!("users cannot be mapped here: {e}")));
        }
    }
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(b"\n")?;
    }
    // The rest of its output; what it says on its standard error is little.
    let mut text = String::new();
    out.read_to_string(&mut text)?;
    let end = child.wait_with_output()?;
    let errors = String::from_utf8_lossy(&end.stderr).into_owned();
    same(&format!("status; {text} {errors}"), end.status.code(), Some(7))?;
    Ok(text)
}
