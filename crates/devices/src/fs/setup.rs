//! From a spec to a share: everything that can be wrong with it shows here.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::abi::Time;
use super::dax::{CHUNK, Dax, DaxSpec, WINDOW_MAX};
use super::inodes::Key;
use super::limits::Limits;
use super::overlay::{Content, Overlays, Parent};
use super::passthrough::{Root, Share, Stat};
use super::{FsSpec, Overlay, TAG_MAX};

/// Why a share cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FsError {
    /// The tag is empty or too long.
    #[error("virtio-fs tag {tag:?} has {len} bytes; it must have 1 to {TAG_MAX}")]
    TagLength {
        /// The tag.
        tag: String,
        /// Its length in bytes.
        len: usize,
    },
    /// The tag contains a NUL or a newline, which the guest's kernel does not take.
    #[error("virtio-fs tag {tag:?} contains a NUL or a newline")]
    TagCharacter {
        /// The tag.
        tag: String,
    },
    /// There is no such directory.
    #[error("{} does not exist", path.display())]
    SourceMissing {
        /// The source.
        path: PathBuf,
    },
    /// The source is something else.
    #[error("{} is not a directory", path.display())]
    SourceNotDirectory {
        /// The source.
        path: PathBuf,
    },
    /// The source may not be listed or searched.
    #[error("{} cannot be read: {source}", path.display())]
    SourceUnreadable {
        /// The source.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The host lacks what a share is served with.
    #[error("cannot share {what}: {source}")]
    Host {
        /// What was tried.
        what: String,
        /// The host's answer.
        source: std::io::Error,
    },
    /// A window of an impossible size.
    #[error("a DAX window of {size} bytes: must be a multiple of 2 MiB, up to 16 GiB")]
    Window {
        /// Its size.
        size: u64,
    },
    /// An overlay's path is empty, absolute, too long, or has `.` or `..` in it.
    #[error("overlay path {} must be relative, without \".\" and \"..\"", path.display())]
    OverlayPath {
        /// The path.
        path: PathBuf,
    },
    /// The directory that an overlay is to be in does not exist.
    #[error("overlay {}: {} does not exist", path.display(), parent.display())]
    OverlayNotFound {
        /// The overlay's path.
        path: PathBuf,
        /// The part that is missing.
        parent: PathBuf,
    },
    /// What an overlay is to be in is not a directory.
    #[error("overlay {}: {} is not a directory", path.display(), parent.display())]
    OverlayNotADirectory {
        /// The overlay's path.
        path: PathBuf,
        /// The part that is none.
        parent: PathBuf,
    },
    /// Two overlays have one path.
    #[error("overlay {} was added before", path.display())]
    OverlayExists {
        /// The path.
        path: PathBuf,
    },
}

/// Raises this process's soft limit of open files to the hard limit and returns it. A share keeps fewer
/// descriptors the lower the limit is, and reads it when it is created; so this comes before.
///
/// # Errors
/// The host's reason.
pub fn raise_nofile() -> std::io::Result<Option<u64>> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    }
    Ok(limit.maximum)
}

/// Checks a tag.
///
/// # Errors
/// [`FsError::TagLength`], [`FsError::TagCharacter`].
pub fn check_tag(tag: &str) -> Result<(), FsError> {
    if tag.is_empty() || tag.len() > TAG_MAX {
        return Err(FsError::TagLength { tag: tag.to_owned(), len: tag.len() });
    }
    if tag.contains(['\0', '\n']) {
        return Err(FsError::TagCharacter { tag: tag.to_owned() });
    }
    Ok(())
}

/// Opens all that the share needs.
///
/// # Errors
/// See [`FsError`].
pub fn share(spec: &FsSpec) -> Result<Share, FsError> {
    share_with(spec, Limits::new(spec.quota.clone()))
}

/// As [`share`], with other limits.
///
/// # Errors
/// See [`FsError`].
pub fn share_with(spec: &FsSpec, limits: Limits) -> Result<Share, FsError> {
    check_tag(&spec.tag)?;
    if let Some(DaxSpec { size, .. }) = spec.dax
        && (size == 0 || size % CHUNK != 0 || size > WINDOW_MAX)
    {
        return Err(FsError::Window { size });
    }
    let root = spec.source.as_deref().map(open_source).transpose()?;
    let fds = open_fds()?;
    let born = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut overlays = Overlays::new(Time { sec: born.as_secs() as i64, nsec: born.subsec_nanos() });
    if root.is_none() {
        overlays.add_root();
    }
    for overlay in &spec.overlays {
        add_overlay(&mut overlays, root.as_ref(), overlay)?;
    }
    let mut share = Share::new(root, overlays, fds, spec.cache, spec.read_only, limits)
        .map_err(|e| FsError::Host { what: format!("{:?}", spec.tag), source: e.into() })?;
    if spec.share_locks {
        share.share_locks();
    }
    if let Some(dax) = spec.dax {
        let window = Dax::new(dax).map_err(|e| FsError::Host {
            what: format!("{:?} with a DAX window of {} MiB", spec.tag, dax.size >> 20),
            source: std::io::Error::other(e),
        })?;
        share.set_window(Arc::new(window));
    }
    Ok(share)
}

fn open_source(path: &Path) -> Result<Root, FsError> {
    let fail = |e: Errno| match e {
        Errno::NOENT => FsError::SourceMissing { path: path.to_owned() },
        Errno::NOTDIR => FsError::SourceNotDirectory { path: path.to_owned() },
        e => FsError::SourceUnreadable { path: path.to_owned(), source: e.into() },
    };
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let found = rustix::fs::open(path, OFlags::PATH | flags, Mode::empty()).map_err(fail)?;
    let dir = rustix::fs::openat(&found, c".", OFlags::RDONLY | flags, Mode::empty()).map_err(fail)?;
    Ok(Root { path: Arc::new(found), dir: Arc::new(dir) })
}

/// The directory of this process's descriptors. It is held, for `/proc` may be out of reach later.
fn open_fds() -> Result<OwnedFd, FsError> {
    let path = c"/proc/self/fd";
    let fail = |e: Errno| FsError::Host { what: "without /proc/self/fd".into(), source: e.into() };
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(fail)?;
    let kind = rustix::fs::fstatfs(&fd).map_err(fail)?.f_type;
    if kind != rustix::fs::PROC_SUPER_MAGIC {
        return Err(fail(Errno::NODEV));
    }
    Ok(fd)
}

fn add_overlay(overlays: &mut Overlays, root: Option<&Root>, overlay: &Overlay) -> Result<(), FsError> {
    let path = &overlay.path;
    let bad = || FsError::OverlayPath { path: path.clone() };
    let mut names = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) if super::request::component(name.as_bytes()).is_ok() => names.push(name),
            _ => return Err(bad()),
        }
    }
    let name = names.pop().and_then(c_string).ok_or_else(bad)?;
    let mut at = match root {
        Some(root) => Parent::Host(Stat::of(&root.path).map_err(|e| host(path, e))?.id.key),
        None => Parent::Virtual(0),
    };
    let (mut walked, mut pin) = (PathBuf::new(), None);
    for part in names {
        walked.push(part);
        (at, pin) = step(overlays, root, at, part, &walked, path)?;
    }
    if let Some((key, dir)) = pin {
        overlays.pin(key, dir);
    }
    match overlays.add(at, name, overlay.content.clone(), overlay.listed) {
        Some(_) => Ok(()),
        None => Err(FsError::OverlayExists { path: path.clone() }),
    }
}

/// The directory `part` below `at`, whose path from the root is `walked`; one of the host with a descriptor.
fn step(
    overlays: &Overlays,
    root: Option<&Root>,
    at: Parent,
    part: &OsStr,
    walked: &Path,
    path: &Path,
) -> Result<(Parent, Option<(Key, OwnedFd)>), FsError> {
    let missing = || FsError::OverlayNotFound { path: path.to_owned(), parent: walked.to_owned() };
    let no_dir = || FsError::OverlayNotADirectory { path: path.to_owned(), parent: walked.to_owned() };
    let name = c_string(part).ok_or_else(missing)?;
    if let Some(index) = overlays.child(at, &name) {
        return match overlays.content(index) {
            Some(Content::Dir { .. }) => Ok((Parent::Virtual(index), None)),
            _ => Err(no_dir()),
        };
    }
    let (Some(root), Parent::Host(_)) = (root, at) else { return Err(missing()) };
    // Links in the share are followed as the guest will follow them: within the share.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    match openat2(&root.path, walked, flags, Mode::empty(), inside) {
        Ok(dir) => {
            let key = Stat::of(&dir).map_err(|e| host(path, e))?.id.key;
            Ok((Parent::Host(key), Some((key, dir))))
        }
        Err(Errno::NOENT) => Err(missing()),
        Err(Errno::NOTDIR | Errno::LOOP) => Err(no_dir()),
        Err(e) => Err(host(path, e)),
    }
}

fn host(path: &Path, e: Errno) -> FsError {
    FsError::Host { what: format!("overlay {}", path.display()), source: e.into() }
}

fn c_string(name: &OsStr) -> Option<CString> {
    CString::new(name.as_bytes()).ok().filter(|n| *n.as_c_str() != *(c"" as &CStr))
}
