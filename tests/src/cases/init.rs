//! What the guest's init sets up.

use std::ffi::OsString;
use std::fs;
use std::sync::Arc;

use krun::{Command, Overlay, OverlayContent};

use crate::harness::{Case, Env, Failure, contains, run, same};

pub const CASE: Case = Case { name: "init", host, guest };

fn guest(_: &[OsString]) -> Result<u8, String> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|e| e.to_string())?;
    for (dir, kind) in [
        ("/proc", "proc"),
        ("/sys", "sysfs"),
        ("/dev", "devtmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),
        ("/sys/fs/cgroup", "cgroup2"),
    ] {
        let is_mounted = mounts.lines().any(|l| {
            let mut words = l.split(' ').skip(1);
            words.next() == Some(dir) && words.next() == Some(kind)
        });
        if !is_mounted {
            return Err(format!("{dir} is no {kind}:\n{mounts}"));
        }
    }
    let own = fs::read_to_string("/proc/self/status").map_err(|e| e.to_string())?;
    for line in ["Uid:\t65534\t65534\t65534\t65534", "Gid:\t65534\t65534\t65534\t65534"] {
        if !own.contains(line) {
            return Err(format!("{line:?} is not in\n{own}"));
        }
    }
    let limits = fs::read_to_string("/proc/self/limits").map_err(|e| e.to_string())?;
    let files = limits.lines().find(|l| l.starts_with("Max open files")).unwrap_or_default();
    if files.split_whitespace().collect::<Vec<_>>() != ["Max", "open", "files", "123", "456", "files"] {
        return Err(format!("limits: {files}"));
    }
    let host = fs::read_to_string("/proc/sys/kernel/hostname").map_err(|e| e.to_string())?;
    let cwd = std::env::current_dir().map_err(|e| e.to_string())?;
    println!("{} {} {}", host.trim(), cwd.display(), std::env::var("GREETING").unwrap_or_default());
    Ok(0)
}

fn host(env: &Env) -> Result<(), Failure> {
    let mut config = env.guest_half("init", ["x"]);
    config.command.user = Some(("nobody".into(), Some("nogroup".into())));
    config.command.hostname = Some("box".into());
    config.command.cwd = Some("/usr/share".into());
    config.command = config.command.env("GREETING", "hello");
    config.command.limits = vec!["nofile=123:456".parse()?];
    let output = run(config)?.success()?;
    same("host name, directory, variable", output.out().as_str(), "box /usr/share hello\n")?;

    // More files than the kernel permits without being told, which container engines ask for.
    let mut config = env.shell("ulimit -n");
    config.command.limits = vec!["nofile=2000000".parse()?];
    same("limit of open files", run(config)?.success()?.out().trim(), "2000000")?;

    // Without a command, the image's configuration that the environment names says what runs.
    let mut config = env.shell("");
    config.command = Command { env: vec!["KRUN_CONFIG=/own.json".into()], ..Command::default() };
    let text = br#"{"process": {"args": ["/bin/sh", "-c", "echo from $PWD"], "cwd": "/usr"}}"#;
    let content = OverlayContent::File { data: Arc::new(&text[..]), one_shot: false };
    config.shares[0].overlays.push(Overlay { path: "own.json".into(), mode: 0o444, content });
    same("command of a configuration", run(config)?.success()?.out().as_str(), "from /usr\n")?;

    // Orphans are reaped, and processes left behind do not keep the machine.
    let script = "(sleep 0.1 & ) ; sleep 0.4; ps -eo stat,comm | grep -c '^Z' ; sleep 1000 & exit 5";
    let output = run(env.shell(script))?;
    same("status with a process left", output.code, 5)?;
    same("zombies", output.out().trim(), "0")?;
    let loopback = run(env.shell("cat /sys/class/net/lo/flags"))?.success()?;
    contains("loopback is up", &loopback.out(), "0x9")
}
