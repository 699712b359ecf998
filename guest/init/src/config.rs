//! What init was asked to do, from whichever place says it.

use std::os::fd::OwnedFd;

use krun_wire::{CONFIG_PATH, INIT_PATH, InitConfig};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::failure::{Failure, show};
use crate::{cmdline, oci};

/// Default place of the image's configuration.
const IMAGE_CONFIG: &[u8] = b"/.krun_config.json";
/// Run when nothing else is known.
const DEFAULT_SHELL: &[u8] = b"/bin/sh";

/// Where an image's configuration is to be looked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ImageConfig {
    /// Nowhere.
    #[default]
    No,
    /// At its usual place, if it is there.
    IfPresent,
    /// In this file, which must exist.
    At(Vec<u8>),
}

/// [`InitConfig`] and what only the other forms of configuration can say.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// Completed step by step: a field that is empty at the end has its default.
    pub config: InitConfig,
    /// Where to look for more.
    pub image: ImageConfig,
    /// Ports for the standard streams are used if they exist, instead of what `config.stdio` says.
    pub discover_ports: bool,
    /// The command takes init's place as process 1.
    pub replace_init: bool,
    /// Groups besides the user's own.
    pub extra_groups: Vec<u32>,
}

/// Contents of a file, at most `limit` bytes.
pub fn read_file(path: &[u8], limit: usize) -> Result<Vec<u8>, Errno> {
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    read_all(&fd, limit)
}

/// Reads as much as the file's size says; files without a size (in `/proc`) until their end.
fn read_all(fd: &OwnedFd, limit: usize) -> Result<Vec<u8>, Errno> {
    let size = usize::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0);
    if size > limit {
        return Err(Errno::FBIG);
    }
    // Asking for more than the size would make a network file system ask its server for the size.
    let mut buffer = vec![0; if size == 0 { 4096 } else { size }];
    let mut len = 0;
    loop {
        match rustix::io::read(fd, &mut buffer[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
        if len == buffer.len() {
            if size != 0 {
                break;
            }
            if len >= limit {
                return Err(Errno::FBIG);
            }
            buffer.resize(len * 2, 0);
        }
    }
    buffer.truncate(len);
    Ok(buffer)
}

/// Most bytes of a configuration: arguments and environment of a program are limited by the kernel to
/// about 6 MiB.
const MAX_CONFIG: usize = 32 << 20;

/// A file of the root share, over which the exit status is reported, and the host's configuration.
///
/// # Errors
/// 125 for a configuration of another version or a damaged one.
pub fn from_host() -> (Option<OwnedFd>, Result<Option<InitConfig>, Failure>) {
    let open = |path: &str| rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    match open(CONFIG_PATH) {
        Ok(fd) => {
            let decoded = read_all(&fd, MAX_CONFIG)
                .map_err(|e| Failure::setup(format!("{CONFIG_PATH} cannot be read: {e}.")))
                .and_then(|bytes| {
                    InitConfig::decode(&bytes).map_err(|e| Failure::setup(format!("{CONFIG_PATH}: {e}.")))
                });
            (Some(fd), decoded.map(Some))
        }
        Err(Errno::NOENT) => (open(INIT_PATH).or_else(|_| open("/")).ok(), Ok(None)),
        Err(e) => {
            (open(INIT_PATH).ok(), Err(Failure::setup(format!("{CONFIG_PATH} cannot be opened: {e}."))))
        }
    }
}

/// The setup for the host's configuration, or for none: then the kernel's command line counts.
///
/// # Errors
/// 125 for a command line that makes no sense.
pub fn begin(given: Option<InitConfig>, args: &[Vec<u8>], env: &[Vec<u8>]) -> Result<Setup, Failure> {
    match given {
        Some(config) => {
            let image = match named_image(&config.env) {
                _ if !config.exec.is_empty() => ImageConfig::No,
                Some(path) => ImageConfig::At(path.to_vec()),
                None => ImageConfig::IfPresent,
            };
            Ok(Setup { config, image, ..Setup::default() })
        }
        None => {
            let line = read_file(b"/proc/cmdline", 1 << 20).ok();
            cmdline::parse(args.get(1..).unwrap_or_default(), env, line.as_deref())
        }
    }
}

/// The image's configuration that the environment names, for programs that give no command.
fn named_image(env: &[Vec<u8>]) -> Option<&[u8]> {
    env.iter().find_map(|entry| entry.strip_prefix(b"KRUN_CONFIG=")).filter(|path| !path.is_empty())
}

impl Setup {
    /// Adds what the image says, then the defaults.
    ///
    /// # Errors
    /// 125 for a file that is named and missing, or damaged.
    pub fn complete(&mut self) -> Result<(), Failure> {
        let (path, required) = match std::mem::take(&mut self.image) {
            ImageConfig::No => (None, false),
            ImageConfig::IfPresent => (Some(IMAGE_CONFIG.to_vec()), false),
            ImageConfig::At(path) => (Some(path), true),
        };
        if let Some(path) = path {
            match read_file(&path, MAX_CONFIG) {
                Ok(text) => oci::parse(&text, &path)?.complete(self),
                Err(Errno::NOENT) if !required => {}
                Err(e) => return Err(Failure::setup(format!("{} cannot be read: {e}.", show(&path)))),
            }
        }
        if self.config.exec.is_empty() {
            self.config.exec = DEFAULT_SHELL.to_vec();
        }
        if self.config.cwd.is_empty() {
            self.config.cwd = b"/".to_vec();
        }
        if self.config.hostname.is_empty() {
            self.config.hostname = b"localhost".to_vec();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_with_and_without_a_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let bytes = |p: &std::path::Path| p.as_os_str().as_encoded_bytes().to_vec();
        std::fs::write(&path, [7; 10_000]).unwrap();
        assert_eq!(read_file(&bytes(&path), 10_000).unwrap(), [7; 10_000]);
        assert_eq!(read_file(&bytes(&path), 9_999), Err(Errno::FBIG));
        let cmdline = read_file(b"/proc/self/cmdline", 1 << 20).unwrap();
        assert_eq!(cmdline, std::fs::read("/proc/self/cmdline").unwrap());
        assert_eq!(read_file(b"/does/not/exist", 1), Err(Errno::NOENT));
    }

    #[test]
    fn defaults_fill_what_is_open() {
        let mut setup =
            begin(Some(InitConfig { exec: b"x".to_vec(), ..InitConfig::default() }), &[], &[]).unwrap();
        assert_eq!(setup.image, ImageConfig::No);
        setup.complete().unwrap();
        let got = setup.config;
        assert_eq!(
            (&got.exec[..], &got.cwd[..], &got.hostname[..]),
            (&b"x"[..], &b"/"[..], &b"localhost"[..])
        );
    }

    #[test]
    fn an_image_is_looked_for_when_no_program_is_given() {
        let setup = begin(Some(InitConfig::default()), &[], &[]).unwrap();
        assert_eq!(setup.image, ImageConfig::IfPresent);
    }

    #[test]
    fn a_named_image_configuration_must_exist() {
        let mut setup = Setup { image: ImageConfig::At(b"/no/such".to_vec()), ..Setup::default() };
        let failure = setup.complete().unwrap_err();
        assert!(failure.status == 125 && failure.reason.contains("/no/such"), "{failure:?}");
    }
}
