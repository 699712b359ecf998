//! Kernels in a library: `libkrunfw.so.5` and its two functions.

use std::path::{Path, PathBuf};

use super::{CMDLINE_LIMIT, Image};
use crate::boot::data::{Data, Segment};
use crate::sys::library::{self, RawBundle};

/// Name of a kernel library.
pub const SONAME: &str = "libkrunfw.so.5";
/// What `krunfw_get_version` has to say.
pub const ABI_VERSION: i32 = 5;

/// A kernel library that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// None anywhere.
    #[error(
        "no kernel: {SONAME} was not found. Install the package libkrunfw5 (Debian), build one with `cargo xtask kernel`, \
         or name a kernel file. Looked at: the system's library path, {}", tried.join(", ")
    )]
    NotFound {
        /// Where it was looked for.
        tried: Vec<String>,
    },
    /// A library was named or found and cannot be loaded.
    #[error("kernel library {path}: {reason}", path = path.display())]
    Load {
        /// The library.
        path: PathBuf,
        /// What the loader says.
        reason: String,
    },
    /// A library of another generation.
    #[error("kernel library {path} has ABI version {found}, this program needs {ABI_VERSION}", path = path.display())]
    Version {
        /// The library.
        path: PathBuf,
        /// What it has.
        found: i32,
    },
    /// A library that says something impossible.
    #[error("kernel library {path} describes a kernel of {size:#x} bytes at {load:#x} with entry {entry:#x}: {why}", path = path.display())]
    Nonsense {
        /// The library.
        path: PathBuf,
        /// Bytes.
        size: u64,
        /// Guest physical address.
        load: u64,
        /// First instruction.
        entry: u64,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// A kernel library that was loaded. It stays loaded for good: guests may run from its pages.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// The library.
    pub path: PathBuf,
    raw: RawBundle,
}

impl Bundle {
    /// Loads the library at `path`, or else the first of: where the dynamic linker finds one (one that is
    /// loaded already wins), beside this library or program, and those built by this project in the
    /// user's cache, newest first.
    ///
    /// # Errors
    /// What was tried and what to do.
    pub fn load(path: Option<&Path>) -> Result<Self, BundleError> {
        if let Some(path) = path {
            return Self::open(path);
        }
        // A failure to load a library that exists must not be hidden by the search going on.
        match library::open_by_name(SONAME) {
            Ok(found) => return Self::check(PathBuf::from(SONAME), found),
            Err(library::OpenError::Missing) => {}
            Err(library::OpenError::Other(reason)) => {
                return Err(BundleError::Load { path: SONAME.into(), reason });
            }
        }
        let candidates = candidates();
        match candidates.iter().find(|p| p.exists()) {
            Some(path) => Self::open(path),
            None => Err(BundleError::NotFound {
                tried: candidates.iter().map(|p| p.display().to_string()).collect(),
            }),
        }
    }

    fn open(path: &Path) -> Result<Self, BundleError> {
        // The linker would search for a bare name.
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        match library::open(&absolute) {
            Ok(found) => Self::check(absolute, found),
            Err(library::OpenError::Missing) => {
                Err(BundleError::Load { path: absolute, reason: "no such file".into() })
            }
            Err(library::OpenError::Other(reason)) => Err(BundleError::Load { path: absolute, reason }),
        }
    }

    fn check(path: PathBuf, raw: RawBundle) -> Result<Self, BundleError> {
        if raw.version != ABI_VERSION {
            return Err(BundleError::Version { path, found: raw.version });
        }
        let (load, entry, size) = (raw.load, raw.entry, raw.size);
        let why = if raw.bytes().is_empty() {
            Some("there is nothing there")
        } else if load % 4096 != 0 || size % 4096 != 0 {
            Some("not a multiple of the page size")
        } else if entry < load || entry - load >= size {
            Some("the entry lies outside")
        } else {
            None
        };
        match why {
            Some(why) => Err(BundleError::Nonsense { path, size, load, entry, why }),
            None => Ok(Self { path, raw }),
        }
    }

    /// The kernel, backed by the library's file where that is still the one that was loaded.
    pub fn image(&self) -> Image {
        let (data, offset) = match library::file_behind(self.raw.bytes()) {
            Some((file, offset, len)) => (Data::File(file.into(), len), offset),
            None => (Data::Static(self.raw.bytes()), 0),
        };
        let size = self.raw.size;
        Image {
            segments: vec![Segment { at: self.raw.load, data, offset, len: size, room: size }],
            entry64: self.raw.entry,
            pvh: None,
            cmdline_limit: CMDLINE_LIMIT,
            setup_header: None,
            initrd_max: u32::MAX.into(),
        }
    }
}

/// Paths that are tried when the dynamic linker knows none.
fn candidates() -> Vec<PathBuf> {
    let mut list = Vec::new();
    for place in [library::own_path(), std::env::current_exe().ok()].into_iter().flatten() {
        if let Some(dir) = place.parent() {
            list.push(dir.join(SONAME));
            list.push(dir.join("../lib").join(SONAME));
        }
    }
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|p| p.is_absolute())
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    if let Some(cache) = cache {
        let kernels = cache.join("krun/kernel");
        list.extend(newest_first(&kernels));
        list.push(kernels.join("*").join(SONAME));
    }
    // The program and the library may lie in one place.
    let mut seen = std::collections::BTreeSet::new();
    list.retain(|path| seen.insert(path.clone()));
    list
}

fn newest_first(kernels: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(kernels).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let path = entry.path().join(SONAME);
            let modified = path.metadata().ok()?.modified().ok()?;
            Some((modified, path))
        })
        .collect();
    found.sort();
    found.into_iter().rev().map(|(_, path)| path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_and_a_broken_library_are_told_apart() {
        let missing = Bundle::load(Some(Path::new("/nowhere/libkrunfw.so.5"))).unwrap_err().to_string();
        assert_eq!(missing, "kernel library /nowhere/libkrunfw.so.5: no such file");
        let f = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(f.path(), b"\x7fELF and no more").unwrap();
        let broken = Bundle::load(Some(f.path())).unwrap_err();
        assert!(matches!(&broken, BundleError::Load { reason, .. } if !reason.is_empty()), "{broken}");
    }

    #[test]
    fn the_newest_of_the_cache_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let (a, b) = (dir.path().join("a").join(SONAME), dir.path().join("b").join(SONAME));
        std::fs::write(&b, b"").unwrap();
        std::fs::write(&a, b"").unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH;
        std::fs::File::options().write(true).open(&a).unwrap().set_modified(old).unwrap();
        assert_eq!(newest_first(dir.path()), [b, a]);
        assert!(newest_first(Path::new("/nowhere")).is_empty());
    }
}
