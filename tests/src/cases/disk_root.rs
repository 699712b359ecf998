//! A disk as the root: init moves there and the exit status still arrives.

use std::path::{Path, PathBuf};

use krun::{Disk, RootDisk, VmConfig};

use super::disk::{MIB, check_ext4, image, tool};
use crate::harness::{Case, Env, Failure, TempDir, contains, no_guest, run, same};

pub const CASE: Case = Case { name: "disk_root", host, guest: no_guest };

/// A program of the guest's root with the libraries that it needs, as a list of paths.
const PROGRAMS: [&str; 6] = [
    "bin/dash",
    "bin/cat",
    "bin/df",
    "lib/x86_64-linux-gnu/libc.so.6",
    "lib/x86_64-linux-gnu/libselinux.so.1",
    "lib64/ld-linux-x86-64.so.2",
];

/// A small root file system in an ext4 image.
fn root_image(env: &Env, dir: &Path) -> Result<PathBuf, Failure> {
    let (tree, path) = (dir.join("tree"), dir.join("root.img"));
    for name in ["dev", "proc", "sys", "tmp", "run", "etc", "share"] {
        std::fs::create_dir_all(tree.join(name))?;
    }
    for name in PROGRAMS {
        let to = tree.join(name);
        std::fs::create_dir_all(to.parent().unwrap_or(&tree))?;
        if let Ok(bytes) = std::fs::read(env.root.join(name)) {
            std::fs::write(&to, bytes)?;
            std::fs::set_permissions(&to, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        }
    }
    std::fs::write(tree.join("etc/who"), "a disk\n")?;
    image(&path, 64 * MIB)?;
    let (from, to) = (tree.to_string_lossy(), path.to_string_lossy());
    match tool("mke2fs", &["-q", "-F", "-t", "ext4", "-d", &from, &to])? {
        Some((0, _)) => Ok(path),
        Some((code, text)) => Err(Failure::Wrong(format!("mke2fs: {code}: {text}"))),
        None => Err(Failure::Skip("no mke2fs on this host".into())),
    }
}

fn host(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("disk-root")?;
    let path = root_image(env, dir.path())?;
    let with = |script: &str, root: RootDisk| -> VmConfig {
        let mut config = env.program("/bin/dash", ["-c", script]);
        config.shares.clear();
        (config.disks, config.root_disk) = (vec![Disk::new("root", &path)], Some(root));
        config
    };
    let script = "cat /etc/who; while read dev at type more; do
        test $at = / && last=$type; done < /proc/mounts; echo $last; echo kept > /kept; exit 42";
    let output = run(with(script, RootDisk::default()))?;
    same(&format!("status; {}", output.err()), output.code, 42)?;
    same("output", output.out(), "a disk\next4\n".into())?;
    check_ext4(&path)?;

    let ext4 = RootDisk { fstype: Some("ext4".into()), options: "ro,noatime".into(), ..RootDisk::default() };
    let mut config = with("cat /kept /share/f; echo x > /new || exit 7", ext4);
    let shared = dir.path().join("shared");
    std::fs::create_dir(&shared)?;
    std::fs::write(shared.join("f"), "shared\n")?;
    config.shares.push(krun::Share { mount: Some("/share".into()), ..krun::Share::new("s", &shared) });
    let output = run(config)?;
    same("status", output.code, 7)?;
    same("a second start, read-only, with a share", output.out(), "kept\nshared\n".into())?;
    same("killed by a signal", run(with("kill -9 $$", RootDisk::default()))?.code, 137)?;
    check_ext4(&path)?;

    for (root, part) in [
        (RootDisk { device: "/dev/vdz".into(), ..RootDisk::default() }, "/dev/vdz: it does not exist"),
        (RootDisk { fstype: Some("xyz".into()), ..RootDisk::default() }, "it cannot be mounted (tried xyz)"),
    ] {
        let output = run(with("true", root))?;
        same("status of a bad root", output.code, 125)?;
        contains("what init says", &output.err(), part)?;
    }

    let Some(kernel) = &env.kernel else { return Ok(()) };
    let out = std::process::Command::new(env.krun()?.get_program())
        .args(["run", "--accel", "kvm", "--kernel"])
        .arg(kernel)
        .arg("--root-disk")
        .arg(&path)
        .args(["--", "/bin/dash", "-c", "cat /kept; exit 5"])
        .output()?;
    same("krun run --root-disk", (out.status.code(), &out.stdout[..]), (Some(5), &b"kept\n"[..]))
}
