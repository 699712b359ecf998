//! The root and shares behave like the directories that they are.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use crate::harness::{Case, Env, Failure, TempDir, contains, run, same};
use krun::Share;

pub const CASE: Case = Case { name: "files", host, guest };
pub const MANY: Case = Case { name: "files_many", host: many_host, guest: many_guest };

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// What is held without being open as a file is: FIFOs, sockets, working directories.
const REMOVED: &str = r#"exec 2>&1; set -e; mkdir removed; cd removed
    mkfifo f; exec 3<>f; rm f; echo through >&3; head -n 1 <&3; stat -L -c '%F, %h' /proc/self/fd/3
    mkfifo f; exec 4<>f; : > g; mv g f; echo replaced >&4; head -n 1 <&4
    mkdir d; cd d; rmdir ../d; ls -a .; stat -c '%F, %h' .; cd ..
    perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0) && bind(S, sockaddr_un("s")) or die;
        mkdir "d"; symlink "x", "l"; open F, ">r"; close F;
        for ("s", "d", "l", "r") {
            sysopen(my $h, $_, 010000000 | 0400000) or die "$_: $!"; push @held, $h;
            ($_ eq "d" ? rmdir : unlink) or die "$_: $!";
        }
        for (@held) { @s = stat $_ or die "stat: $!"; printf "%o %d\n", $s[2] & 0170000, $s[3] }'
    rm f; cd ..; rmdir removed"#;

fn removed(dir: &Path) -> Result<String, String> {
    let output = std::process::Command::new("/bin/sh")
        .args(["-c", REMOVED])
        .current_dir(dir)
        .output()
        .map_err(text)?;
    Ok(format!("{}{}", String::from_utf8_lossy(&output.stdout), output.status))
}

fn guest(_: &[OsString]) -> Result<u8, String> {
    let dir = Path::new("/media");
    fs::write(dir.join("removed.txt"), removed(dir)?).map_err(text)?;
    fs::create_dir_all(dir.join("a/b/c")).map_err(text)?;
    fs::write(dir.join("a/b/c/file"), "hello").map_err(text)?;
    fs::hard_link(dir.join("a/b/c/file"), dir.join("link")).map_err(text)?;
    symlink("a/b/c/file", dir.join("sym")).map_err(text)?;
    fs::rename(dir.join("a/b/c/file"), dir.join("a/renamed")).map_err(text)?;
    chown(dir.join("link"), Some(1234), Some(5678)).map_err(text)?;
    fs::set_permissions(dir.join("link"), fs::Permissions::from_mode(0o4751)).map_err(text)?;

    // A file that has no name any more is still a file.
    let path = dir.join("gone");
    let mut gone = OpenOptions::new().read(true).write(true).create_new(true).open(&path).map_err(text)?;
    fs::remove_file(&path).map_err(text)?;
    gone.write_all(b"still here").and_then(|()| gone.seek(SeekFrom::Start(0))).map_err(text)?;
    let mut back = String::new();
    gone.read_to_string(&mut back).map_err(text)?;
    if back != "still here" || gone.metadata().map_err(text)?.nlink() != 0 {
        return Err(format!("unlinked file: {back:?}"));
    }
    let sparse = File::create(dir.join("sparse")).map_err(text)?;
    sparse.write_all_at(b"end", 1 << 20).and_then(|()| sparse.set_len((1 << 20) + 2)).map_err(text)?;

    let shell = "set -e; cd /media; setfattr -n user.krun -v value link; getfattr -n user.krun --only-values link; \
        mkfifo fifo; (echo through the fifo > fifo &); cat fifo >/dev/null; \
        exec 9>lock; flock 9; if flock -n lock true; then echo the lock did not hold; exit 1; fi; \
        ln -s /etc/passwd escape; test -e escape; chmod 1777 a; touch -d 2001-02-03T04:05:06Z link";
    let status = std::process::Command::new("/bin/sh").args(["-c", shell]).status().map_err(text)?;
    if status.success() { Ok(0) } else { Err(format!("shell part: {status}")) }
}

fn host(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("files")?;
    let mut config = env.guest_half("files", ["x"]);
    config.shares.push(Share { mount: Some("/media".into()), ..Share::new("files", dir.path()) });
    let output = run(config)?.success()?;
    same("extended attribute in the guest", output.out().as_str(), "value")?;
    let at = |name: &str| dir.path().join(name);
    let native = removed(dir.path())?;
    contains("removed, on the host", &native, "through\nfifo, 0\nreplaced\n")?;
    contains("removed, on the host", &native, "exit status: 0")?;
    same("removed", fs::read_to_string(at("removed.txt"))?.as_str(), native.as_str())?;
    same("contents", fs::read_to_string(at("a/renamed"))?.as_str(), "hello")?;
    let link = fs::metadata(at("link"))?;
    same("owner", (link.uid(), link.gid()), (1234, 5678))?;
    same("mode", link.mode() & 0o7777, 0o4751)?;
    same("links", link.nlink(), 2)?;
    same("modification time", link.mtime(), 981_173_106)?;
    same("sticky directory", fs::metadata(at("a"))?.mode() & 0o7777, 0o1777)?;
    same("symbolic link", fs::read_link(at("sym"))?.to_string_lossy().as_ref(), "a/b/c/file")?;
    let sparse = fs::metadata(at("sparse"))?;
    same("sparse length", sparse.len(), (1 << 20) + 2)?;
    same("sparse blocks stay few", sparse.blocks() < 64, true)?;
    same("nothing of the unlinked file", at("gone").exists(), false)
}

/// Open files at once, and files touched.
const OPEN: usize = 2_000;
const TOUCHED: usize = 2_500;

fn many_guest(_: &[OsString]) -> Result<u8, String> {
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: Some(OPEN as u64 + 100), maximum: Some(OPEN as u64 + 100) },
    )
    .map_err(text)?;
    let name = |n: usize| format!("/media/{n}");
    for n in 0..TOUCHED {
        fs::write(name(n), n.to_string()).map_err(|e| format!("file {n}: {e}"))?;
    }
    let open: Result<Vec<File>, _> = (0..OPEN).map(|n| File::open(name(n))).collect();
    for (n, mut file) in open.map_err(text)?.into_iter().enumerate() {
        let mut content = String::new();
        file.read_to_string(&mut content).map_err(text)?;
        if content != n.to_string() {
            return Err(format!("file {n} holds {content:?}"));
        }
    }
    let count = fs::read_dir("/media").map_err(text)?.count();
    if count == TOUCHED { Ok(0) } else { Err(format!("{count} entries")) }
}

fn many_host(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("many")?;
    let mut config = env.guest_half("files_many", ["x"]);
    config.shares.push(Share { mount: Some("/media".into()), ..Share::new("many", dir.path()) });
    run(config)?.success().map(|_| ())
}
