//! Read-only shares, overlays, and what the guest must not reach.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::harness::{Case, Env, Failure, TempDir, run, same};
use krun::{Overlay, OverlayContent, ROOT_TAG, Share};

pub const CASE: Case = Case { name: "shares", host, guest };

fn guest(_: &[OsString]) -> Result<u8, String> {
    let errno = |r: std::io::Result<()>| r.err().and_then(|e| e.raw_os_error());
    let want = |what: &str, seen: Option<i32>, wanted: i32| match seen {
        Some(code) if code == wanted => Ok(()),
        other => Err(format!("{what}: got {other:?}, wanted errno {wanted}")),
    };
    let erofs = rustix::io::Errno::ROFS.raw_os_error();
    want("create on a read-only share", errno(fs::write("/media/new", "x")), erofs)?;
    want("write on a read-only share", errno(fs::write("/media/file", "x")), erofs)?;
    want("remove on a read-only share", errno(fs::remove_file("/media/file")), erofs)?;
    if fs::read_to_string("/media/file").map_err(|e| e.to_string())? != "host" {
        return Err("the file does not hold what the host wrote".into());
    }
    // The link leads to the guest's own root, never to the host's.
    if fs::read_to_string("/media/escape").is_ok_and(|t| t == "secret") {
        return Err("a symbolic link left the share".into());
    }
    // The host's process that serves this machine, as its procfs shows it.
    let me = fs::read_link("/opt/self").map_err(|e| format!("the host's /proc/self: {e}"))?;
    let process = Path::new("/opt").join(me);
    let eacces = rustix::io::Errno::ACCESS.raw_os_error();
    for name in ["mem", "maps", "environ", "../kmsg", "../version"] {
        let path = process.join(name);
        fs::symlink_metadata(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        want(name, errno(fs::read(&path).map(drop)), eacces)?;
        want(name, errno(fs::OpenOptions::new().write(true).open(&path).map(drop)), eacces)?;
    }
    fs::read_link(process.join("exe")).map_err(|e| format!("exe: {e}"))?;
    let listed = fs::read_dir(process.join("fd")).map_err(|e| format!("the host's fd: {e}"))?.count();
    if listed < 3 {
        return Err(format!("the host's process has {listed} descriptors"));
    }
    let virtual_file = fs::read("/media/virtual/deep").map_err(|e| format!("overlay: {e}"))?;
    if virtual_file != b"made up".repeat(1000) {
        return Err(format!("the overlay file has {} bytes", virtual_file.len()));
    }
    let names: Vec<_> =
        fs::read_dir("/").map_err(|e| e.to_string())?.flatten().map(|e| e.file_name()).collect();
    if names.iter().any(|n| n.to_string_lossy().contains("krun")) {
        return Err(format!("init's files are listed: {names:?}"));
    }
    if !Path::new("/init.krun").exists() {
        return Err("init cannot be found by its name".into());
    }
    Ok(0)
}

fn host(env: &Env) -> Result<(), Failure> {
    let (dir, outside) = (TempDir::new("shares")?, TempDir::new("outside")?);
    fs::write(outside.path().join("secret"), "secret")?;
    fs::write(dir.path().join("file"), "host")?;
    std::os::unix::fs::symlink(outside.path().join("secret"), dir.path().join("escape"))?;
    let mut config = env.guest_half("shares", ["x"]);
    let data = Arc::new(b"made up".repeat(1000));
    let overlays = vec![
        Overlay { path: "virtual".into(), mode: 0o755, content: OverlayContent::Directory },
        Overlay {
            path: "virtual/deep".into(),
            mode: 0o644,
            content: OverlayContent::File { data, one_shot: false },
        },
    ];
    let share = Share::new("ro", dir.path());
    config.shares.push(Share { read_only: true, mount: Some("/media".into()), overlays, ..share });
    config.shares.push(Share { mount: Some("/opt".into()), ..Share::new("proc", "/proc") });
    run(config)?.success()?;
    same("nothing was written", fs::read_dir(dir.path())?.count(), 2)?;

    // A root that cannot be changed still runs programs.
    let mut config = env.shell("touch /x && exit 1; echo fine");
    for share in config.shares.iter_mut().filter(|s| s.tag == ROOT_TAG) {
        share.read_only = true;
    }
    let output = run(config)?.success()?;
    same("read-only root", output.out().as_str(), "fine\n")
}
