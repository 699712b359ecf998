//! Random sequences of operations give what the same calls give on a directory of the host.

use std::ffi::CString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::client::{Client, Entry, ROOT, Reply, Set};
use crate::fs::FsSpec;
use crate::fs::abi::Fattr;

#[derive(Debug, Clone)]
enum Step {
    Mkdir(usize),
    Create(usize),
    Write(usize, u16, Vec<u8>),
    Truncate(usize, u16),
    Chmod(usize, u32),
    Unlink(usize),
    Rmdir(usize),
    Rename(usize, usize),
    Link(usize, usize),
    Symlink(usize),
}

/// All places there are: three names on each of three levels.
fn places() -> Vec<PathBuf> {
    let names = ["a", "b", "c"];
    let mut all = Vec::new();
    for x in names {
        all.push(PathBuf::from(x));
        for y in names {
            all.push(Path::new(x).join(y));
            for z in names {
                all.push(Path::new(x).join(y).join(z));
            }
        }
    }
    all
}

fn step() -> impl Strategy<Value = Step> {
    let n = || 0..places().len();
    prop_oneof![
        3 => n().prop_map(Step::Mkdir),
        3 => n().prop_map(Step::Create),
        3 => (n(), 0u16..5000, proptest::collection::vec(any::<u8>(), 0..200)).prop_map(|(a, b, c)| Step::Write(a, b, c)),
        1 => (n(), 0u16..6000).prop_map(|(a, b)| Step::Truncate(a, b)),
        1 => (n(), prop_oneof![Just(0o755u32), Just(0o700), Just(0o1777), Just(0o6755)]).prop_map(|(a, b)| Step::Chmod(a, b)),
        2 => n().prop_map(Step::Unlink),
        2 => n().prop_map(Step::Rmdir),
        3 => (n(), n()).prop_map(|(a, b)| Step::Rename(a, b)),
        1 => (n(), n()).prop_map(|(a, b)| Step::Link(a, b)),
        1 => n().prop_map(Step::Symlink),
    ]
}

struct Guest {
    c: Client,
    /// Lookups to give back at the end.
    owed: Vec<u64>,
}

impl Guest {
    fn note(&mut self, e: Entry) -> Entry {
        self.owed.push(e.node);
        e
    }

    /// What the guest's kernel says of a path through something else than a directory; links lead nowhere.
    fn enter(e: Entry) -> Reply<u64> {
        match e.attr.mode & libc::S_IFMT {
            libc::S_IFDIR => Ok(e.node),
            libc::S_IFLNK => Err(libc::ENOENT),
            _ => Err(libc::ENOTDIR),
        }
    }

    fn find(&mut self, path: &Path) -> Reply<Entry> {
        let mut at = None;
        for part in path {
            let name = CString::new(part.to_str().unwrap()).unwrap();
            let node = at.map_or(Ok(ROOT), Self::enter)?;
            let e = self.c.lookup(node, &name)?;
            at = Some(self.note(e));
        }
        Ok(at.unwrap())
    }

    fn parent(&mut self, path: &Path) -> Reply<(u64, CString)> {
        let name = CString::new(path.file_name().unwrap().to_str().unwrap()).unwrap();
        let parent = path.parent().unwrap();
        if parent.as_os_str().is_empty() {
            return Ok((ROOT, name));
        }
        let e = self.find(parent)?;
        Ok((Self::enter(e)?, name))
    }

    fn run(&mut self, step: &Step, all: &[PathBuf]) -> Reply<()> {
        match step {
            Step::Mkdir(p) => {
                let (d, n) = self.parent(&all[*p])?;
                let e = self.c.mkdir(d, &n, 0o755)?;
                self.note(e);
            }
            Step::Create(p) => {
                let (d, n) = self.parent(&all[*p])?;
                let (e, fh) = self.c.create(d, &n, libc::O_RDWR | libc::O_EXCL, 0o644)?;
                self.note(e);
                self.c.release(fh)?;
            }
            Step::Write(p, at, data) => {
                let e = self.find(&all[*p])?;
                let (fh, _) = self.c.open(e.node, libc::O_WRONLY)?;
                assert_eq!(self.c.write(fh, (*at).into(), data, 0)? as usize, data.len());
                self.c.release(fh)?;
            }
            Step::Truncate(p, size) => {
                let e = self.find(&all[*p])?;
                self.c.setattr(e.node, Fattr::SIZE, Set { size: (*size).into(), ..Set::default() })?;
            }
            Step::Chmod(p, mode) => {
                let e = self.find(&all[*p])?;
                self.c.setattr(e.node, Fattr::MODE, Set { mode: *mode, ..Set::default() })?;
            }
            Step::Unlink(p) => {
                let (d, n) = self.parent(&all[*p])?;
                self.c.unlink(d, &n)?;
            }
            Step::Rmdir(p) => {
                let (d, n) = self.parent(&all[*p])?;
                self.c.rmdir(d, &n)?;
            }
            Step::Rename(a, b) => {
                let (d, n) = self.parent(&all[*a])?;
                let (e, m) = self.parent(&all[*b])?;
                self.c.rename((d, &n), (e, &m), 0)?;
            }
            Step::Link(a, b) => {
                let old = self.find(&all[*a])?;
                let (d, n) = self.parent(&all[*b])?;
                let e = self.c.link(old.node, d, &n)?;
                self.note(e);
            }
            Step::Symlink(p) => {
                let (d, n) = self.parent(&all[*p])?;
                let e = self.c.symlink(d, &n, c"nowhere")?;
                self.note(e);
            }
        }
        Ok(())
    }
}

fn direct(root: &Path, step: &Step, all: &[PathBuf]) -> std::io::Result<()> {
    let at = |i: &usize| root.join(&all[*i]);
    // What the guest's kernel would refuse before it asks.
    let is_link = |p: &Path| fs::symlink_metadata(p).is_ok_and(|m| m.file_type().is_symlink());
    match step {
        Step::Mkdir(p) => {
            fs::create_dir(at(p))?;
            // Whatever this process's umask is. The set-group-ID bit comes from the directory above.
            let inherited = fs::metadata(at(p))?.mode() & libc::S_ISGID;
            fs::set_permissions(at(p), fs::Permissions::from_mode(0o755 | inherited))
        }
        Step::Create(p) => {
            fs::OpenOptions::new().write(true).create_new(true).open(at(p))?;
            fs::set_permissions(at(p), fs::Permissions::from_mode(0o644))
        }
        Step::Write(p, offset, data) if !is_link(&at(p)) => {
            fs::OpenOptions::new().write(true).open(at(p))?.write_all_at(data, (*offset).into())
        }
        Step::Truncate(p, size) if !is_link(&at(p)) => {
            fs::OpenOptions::new().write(true).open(at(p))?.set_len((*size).into())
        }
        Step::Chmod(p, mode) if !is_link(&at(p)) => {
            fs::set_permissions(at(p), fs::Permissions::from_mode(*mode))
        }
        Step::Write(..) | Step::Truncate(..) | Step::Chmod(..) => Err(ErrorKind::Unsupported.into()),
        Step::Unlink(p) => fs::remove_file(at(p)),
        Step::Rmdir(p) => fs::remove_dir(at(p)),
        Step::Rename(a, b) => fs::rename(at(a), at(b)),
        Step::Link(a, b) => fs::hard_link(at(a), at(b)),
        Step::Symlink(p) => std::os::unix::fs::symlink("nowhere", at(p)),
    }
}

/// Everything below `root`: path, mode, links, contents.
fn picture(root: &Path) -> Vec<(PathBuf, u32, u64, Vec<u8>)> {
    let (mut out, mut todo) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(dir) = todo.pop() {
        for e in fs::read_dir(root.join(&dir)).unwrap() {
            let path = dir.join(e.unwrap().file_name());
            let m = fs::symlink_metadata(root.join(&path)).unwrap();
            let data = if m.is_file() { fs::read(root.join(&path)).unwrap() } else { Vec::new() };
            if m.is_dir() {
                todo.push(path.clone());
            }
            let links = if m.is_dir() { 0 } else { m.nlink() };
            out.push((path, m.mode(), links, data));
        }
    }
    out.sort();
    out
}

/// Runs the steps in a share and in a directory, and compares. `few` descriptors are kept.
fn compare(steps: &[Step], few: usize) -> Result<(), TestCaseError> {
    let twin = tempfile::tempdir().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let spec = FsSpec { source: Some(dir.path().to_owned()), ..FsSpec::default() };
    let mut guest = Guest { c: Client::build(dir, spec, |_| {}, few), owed: Vec::new() };
    let all = places();
    for s in steps {
        let (ours, theirs) = (guest.run(s, &all), direct(twin.path(), s, &all));
        prop_assert_eq!(ours.is_ok(), theirs.is_ok(), "{:?}: {:?} but {:?}", s, ours, theirs);
        if let (Err(a), Some(b)) = (ours, theirs.err().and_then(|e| e.raw_os_error()))
            && !matches!(s, Step::Truncate(..))
        {
            prop_assert_eq!(a, b, "{:?}", s);
        }
    }
    prop_assert_eq!(picture(guest.c.dir.path()), picture(twin.path()));
    for node in std::mem::take(&mut guest.owed) {
        guest.c.forget(node, 1);
    }
    prop_assert_eq!(guest.c.counts(), (1, 0, 0));
    Ok(())
}

/// Mode 6755 on a directory: those made in it have the set-group-ID bit too.
#[test]
fn directories_in_one_with_the_set_group_id_bit_inherit_it() {
    compare(&[Step::Mkdir(0), Step::Chmod(0, 0o6755), Step::Mkdir(9), Step::Create(1)], 2).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_share_does_what_the_host_does(steps in proptest::collection::vec(step(), 1..80), few in 1usize..4) {
        compare(&steps, few)?;
    }
}
