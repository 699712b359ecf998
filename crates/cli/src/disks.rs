//! `--disk` and `--root-disk`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use krun::{Disk, DiskFormat, RootDisk, SyncMode};

use crate::args::Run;

/// One such option.
#[derive(Debug, Clone)]
pub struct DiskArg {
    /// The image and how it is used; without an id it gets one by its place.
    pub disk: Disk,
    /// Partition that is the root.
    pub part: Option<u8>,
}

/// Reads `FILE[:OPTION]...` of `--disk`.
pub fn parse_disk(text: &OsStr) -> Result<DiskArg, String> {
    let arg = parse(text)?;
    if arg.part.is_some() {
        return Err("part=N is for --root-disk; the guest sees all partitions of a disk".into());
    }
    Ok(arg)
}

/// Reads `FILE[:OPTION]...` of `--root-disk`.
pub fn parse_root(text: &OsStr) -> Result<DiskArg, String> {
    parse(text)
}

/// A colon that does not begin an option is part of the file's name.
fn parse(text: &OsStr) -> Result<DiskArg, String> {
    let mut rest = text.as_bytes();
    let mut words = Vec::new();
    while let Some(at) = rest.iter().rposition(|b| *b == b':') {
        let Ok(word) = std::str::from_utf8(&rest[at + 1..]) else { break };
        if !is_option(word) {
            break;
        }
        words.push(word);
        rest = &rest[..at];
    }
    if rest.is_empty() {
        return Err("the name of the image is empty".into());
    }
    let path = PathBuf::from(OsString::from_vec(rest.to_vec()));
    let mut arg = DiskArg { disk: Disk { sync: SyncMode::Full, ..Disk::new("", path) }, part: None };
    words.iter().rev().try_for_each(|word| apply(&mut arg, word))?;
    Ok(arg)
}

/// Whether a word looks like an option, right or wrong.
fn is_option(word: &str) -> bool {
    let key = word.split('=').next().unwrap_or_default();
    let known = ["ro", "rw", "direct", "backing", "format", "sync", "id", "queues", "part"];
    known.contains(&key) || word.contains('=') && !word.contains('/')
}

fn apply(arg: &mut DiskArg, word: &str) -> Result<(), String> {
    let disk = &mut arg.disk;
    match word.split_once('=') {
        None => match word {
            "ro" => disk.read_only = true,
            "rw" => disk.read_only = false,
            "direct" => disk.direct_io = true,
            "backing" => disk.backing = true,
            other => return Err(format!("{other} needs a value: {other}=...")),
        },
        Some(("format", "raw")) => disk.format = DiskFormat::Raw,
        Some(("format", "qcow2")) => disk.format = DiskFormat::Qcow2,
        Some(("format", "vmdk")) => disk.format = DiskFormat::Vmdk,
        Some(("format", other)) => return Err(format!("format={other}: write raw, qcow2 or vmdk")),
        Some(("sync", "none")) => disk.sync = SyncMode::None,
        Some(("sync", "relaxed")) => disk.sync = SyncMode::Relaxed,
        Some(("sync", "full")) => disk.sync = SyncMode::Full,
        Some(("sync", other)) => return Err(format!("sync={other}: write none, relaxed or full")),
        Some(("id", id)) => id.clone_into(&mut disk.id),
        Some(("queues", n)) => {
            disk.queues = Some(n.parse().map_err(|_| format!("queues={n}: write a number from 1 to 16"))?);
        }
        Some(("part", n)) => {
            let number = n.parse().ok().filter(|n| *n > 0);
            arg.part = Some(number.ok_or_else(|| format!("part={n}: write the number of a partition"))?);
        }
        Some((key, _)) => {
            return Err(format!(
                "unknown option {key}; there are ro, format, sync, direct, backing, id, queues"
            ));
        }
    }
    Ok(())
}

/// All disks, the root's first, and what becomes the root.
pub fn disks(args: &Run) -> (Vec<Disk>, Option<RootDisk>) {
    let all = args.root_disk.iter().chain(&args.disks);
    let disks = all.enumerate().map(|(n, arg)| {
        let id = if arg.disk.id.is_empty() { format!("disk{n}") } else { arg.disk.id.clone() };
        Disk { id, ..arg.disk.clone() }
    });
    let root = args.root_disk.as_ref().map(|arg| RootDisk {
        device: arg.part.map_or_else(|| "/dev/vda".into(), |n| format!("/dev/vda{n}")),
        options: if arg.disk.read_only { "ro".into() } else { String::new() },
        ..RootDisk::default()
    });
    (disks.collect(), root)
}

/// Checks that the images are there.
pub fn check(args: &Run) -> Result<(), String> {
    let named = |option: &'static str| move |arg| (option, arg);
    let all = args.root_disk.iter().map(named("--root-disk")).chain(args.disks.iter().map(named("--disk")));
    for (option, arg) in all {
        let path = &arg.disk.path;
        let kind = std::fs::metadata(path).map_err(|e| format!("{option} {}: {e}", path.display()))?;
        if kind.is_dir() {
            return Err(format!("{option} {}: it is a directory; name a disk image", path.display()));
        }
    }
    Ok(())
}

/// Directories of images that the guest writes to.
pub fn writable_paths(args: &Run) -> impl Iterator<Item = PathBuf> {
    let all = args.root_disk.iter().chain(&args.disks).filter(|arg| !arg.disk.read_only);
    all.map(|arg| match arg.disk.path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => Path::new(".").to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_follow_the_name() {
        let arg = parse_disk(OsStr::new("a:b.img:ro:format=qcow2:sync=none:id=x:queues=2")).unwrap();
        let disk = arg.disk;
        assert_eq!(disk.path, Path::new("a:b.img"));
        assert_eq!((disk.format, disk.sync), (DiskFormat::Qcow2, SyncMode::None));
        assert_eq!((disk.read_only, &disk.id[..], disk.queues, disk.backing), (true, "x", Some(2), false));
        let plain = parse_root(OsStr::new("/x/y:part=2")).unwrap();
        assert_eq!((plain.disk.sync, plain.part, plain.disk.direct_io), (SyncMode::Full, Some(2), false));
    }

    #[test]
    fn mistakes_are_told() {
        for (text, why) in [
            ("", "empty"),
            (":ro", "empty"),
            ("a:format=vdi", "raw, qcow2 or vmdk"),
            ("a:sync=x", "none, relaxed or full"),
            ("a:queues=many", "1 to 16"),
            ("a:color=red", "unknown option color"),
            ("a:format", "needs a value"),
            ("a:part=1", "--root-disk"),
        ] {
            let error = parse_disk(OsStr::new(text)).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert!(parse_root(OsStr::new("a:part=0")).is_err());
    }
}
