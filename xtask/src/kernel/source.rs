//! Where the kernel's source comes from.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian's package with the source that is used by default.
pub const DEBIAN_PACKAGE: &str = "linux-source-6.12";

/// The first version that has what the fragments and the bundle expect.
const OLDEST: (u32, u32) = (6, 12);

/// A source tree, packed or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// An archive that tar can read, with one folder at its top.
    Tarball(PathBuf),
    /// A tree; it is copied and stays as it is.
    Tree(PathBuf),
}

impl Source {
    /// The source at `given`, or Debian's.
    ///
    /// # Errors
    /// There is none, or it is no Linux source of a sufficient version.
    pub fn find(given: Option<&Path>) -> Result<Self, String> {
        let Some(path) = given else {
            let path = PathBuf::from(format!("/usr/src/{DEBIAN_PACKAGE}.tar.xz"));
            return if path.is_file() {
                Ok(Self::Tarball(path))
            } else {
                Err(format!("{} is missing; it is in Debian's package {DEBIAN_PACKAGE}", path.display()))
            };
        };
        let path = fs::canonicalize(path).map_err(|e| format!("kernel source {}: {e}", path.display()))?;
        if path.is_file() {
            return Ok(Self::Tarball(path));
        }
        check_version(&path)?;
        Ok(Self::Tree(path))
    }

    /// Text that changes with the source: of a tarball the digest of its contents; of a tree its place,
    /// version and commit. Edits within a tree that has no git history are not seen.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn identity(&self) -> Result<String, String> {
        match self {
            Self::Tarball(path) => digest_of(path),
            Self::Tree(path) => {
                let (version, patch) = check_version(path)?;
                let commit = |args: &[&str]| {
                    let out = Command::new("git").arg("-C").arg(path).args(args).output();
                    out.map(|o| o.stdout).unwrap_or_default()
                };
                let mut state = commit(&["rev-parse", "HEAD"]);
                state.extend(commit(&["diff", "HEAD"]));
                Ok(format!("{} {version}.{patch} {}", path.display(), super::sha256(&state)?))
            }
        }
    }

    /// Puts a tree that may be changed at `to`, which does not exist yet.
    ///
    /// # Errors
    /// The messages of tar or cp, or too old a version.
    pub fn unpack(&self, to: &Path) -> Result<(u32, u32), String> {
        fs::create_dir_all(to).map_err(|e| format!("cannot create {}: {e}", to.display()))?;
        let mut command = match self {
            Self::Tarball(path) => {
                let mut tar = Command::new("tar");
                tar.arg("-xf").arg(path).arg("-C").arg(to).arg("--strip-components=1");
                tar
            }
            Self::Tree(path) => {
                let mut cp = Command::new("cp");
                cp.args(["-a", "--reflink=auto"]).arg(path.join(".")).arg(to);
                cp
            }
        };
        let out = command.output().map_err(|e| format!("cannot unpack the kernel source: {e}"))?;
        if !out.status.success() {
            return Err(format!(
                "cannot unpack the kernel source: {}",
                String::from_utf8_lossy(&out.stderr).trim()
            ));
        }
        check_version(to)
    }

    /// Whether our patches must apply: they are made for Debian's source.
    pub fn is_debian(&self) -> bool {
        matches!(self, Self::Tarball(path) if path.starts_with("/usr/src"))
    }
}

/// Major and minor version of the tree at `dir`.
fn check_version(dir: &Path) -> Result<(u32, u32), String> {
    let path = dir.join("Makefile");
    let text = fs::read_to_string(&path).map_err(|e| format!("no Linux source in {}: {e}", dir.display()))?;
    let version =
        parse_version(&text).ok_or_else(|| format!("{} is not Linux's Makefile", path.display()))?;
    if version < OLDEST {
        return Err(format!(
            "{} is Linux {}.{}; {}.{} or later is needed",
            dir.display(),
            version.0,
            version.1,
            OLDEST.0,
            OLDEST.1
        ));
    }
    Ok(version)
}

fn parse_version(makefile: &str) -> Option<(u32, u32)> {
    let field = |name: &str| {
        makefile.lines().find_map(|l| l.strip_prefix(name)?.trim().strip_prefix('=')?.trim().parse().ok())
    };
    Some((field("VERSION")?, field("PATCHLEVEL")?))
}

/// Digest of a large file, remembered in the cache under its name, size and time.
fn digest_of(path: &Path) -> Result<String, String> {
    let meta = fs::metadata(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let key = format!("{} {} {}.{}", path.display(), meta.size(), meta.mtime(), meta.mtime_nsec());
    let memory = super::home()?.join("source-digest");
    if let Ok(text) = fs::read_to_string(&memory)
        && let Some(known) = text.strip_prefix(&format!("{key}\n"))
    {
        return Ok(known.to_owned());
    }
    let out = Command::new("sha256sum")
        .arg("--")
        .arg(path)
        .output()
        .map_err(|e| format!("cannot run sha256sum: {e}"))?;
    let digest = super::digest(&out.stdout)?;
    // Only to save half a second next time.
    let _ = fs::create_dir_all(super::home()?);
    let _ = fs::write(&memory, format!("{key}\n{digest}"));
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_the_makefile() {
        assert_eq!(parse_version("# SPDX\nVERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 117\n"), Some((6, 12)));
        assert_eq!(parse_version("VERSION=7\nPATCHLEVEL=0\n"), Some((7, 0)));
        assert_eq!(parse_version("all:\n\techo\n"), None);
    }

    #[test]
    fn a_tree_must_be_a_recent_linux() {
        let dir = tempfile::tempdir().unwrap();
        let find = || Source::find(Some(dir.path()));
        assert!(find().unwrap_err().contains("no Linux source"));
        fs::write(dir.path().join("Makefile"), "all:\n").unwrap();
        assert!(find().unwrap_err().contains("not Linux's Makefile"));
        fs::write(dir.path().join("Makefile"), "VERSION = 6\nPATCHLEVEL = 6\n").unwrap();
        assert!(find().unwrap_err().contains("6.12 or later"));
        fs::write(dir.path().join("Makefile"), "VERSION = 6\nPATCHLEVEL = 18\n").unwrap();
        let tree = find().unwrap();
        let first = tree.identity().unwrap();
        assert_eq!(first, tree.identity().unwrap());
        fs::write(dir.path().join("Makefile"), "VERSION = 6\nPATCHLEVEL = 19\n").unwrap();
        assert_ne!(first, tree.identity().unwrap());
        assert!(Source::find(Some(&dir.path().join("gone"))).is_err());
    }

    #[test]
    fn a_tree_is_copied_whole() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        fs::create_dir(&from).unwrap();
        fs::write(from.join("Makefile"), "VERSION = 6\nPATCHLEVEL = 12\n").unwrap();
        fs::write(from.join(".hidden"), "").unwrap();
        let to = dir.path().join("to");
        assert_eq!(Source::Tree(from.clone()).unpack(&to).unwrap(), (6, 12));
        assert!(to.join(".hidden").exists());
        assert!(Source::Tarball(from.join("Makefile")).unpack(&dir.path().join("x")).is_err());
    }
}
