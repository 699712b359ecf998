//! What to run.

use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use krun_wire::host::{Export, HostCommand, WindowSize};

use crate::Error;
use crate::qemu::{WRITABLE_SLOTS, slot_tag};

/// Random bytes given to the emulated host.
const ENTROPY: usize = 32;

/// One of the command's standard streams.
#[derive(Debug, Default)]
pub enum Stream {
    /// This process's.
    #[default]
    Inherit,
    /// Nothing to read; what is written is dropped.
    Null,
    /// This descriptor. It is closed after the end.
    Fd(OwnedFd),
}

impl Stream {
    /// It is no terminal, so it does not go with the others.
    fn is_apart(&self) -> bool {
        match self {
            Self::Inherit => !std::io::stderr().is_terminal(),
            Self::Fd(fd) => !rustix::termios::isatty(fd),
            Self::Null => true,
        }
    }

    /// The descriptor: for `Inherit` a copy of this process's standard stream `number`.
    pub(crate) fn open(self, number: usize) -> Result<Option<OwnedFd>, Error> {
        let copy = |fd| {
            let copied = rustix::io::fcntl_dupfd_cloexec(fd, 3);
            copied.map(Some).map_err(Error::host("duplicating a standard stream"))
        };
        match self {
            Self::Null => Ok(None),
            Self::Fd(fd) => Ok(Some(fd)),
            Self::Inherit => match number {
                0 => copy(std::io::stdin().as_fd()),
                1 => copy(std::io::stdout().as_fd()),
                _ => copy(std::io::stderr().as_fd()),
            },
        }
    }
}

/// A command for the emulated host.
#[derive(Debug, Default)]
pub struct Command {
    /// Program and arguments. A program without a slash is looked up in `PATH` of `env`.
    pub argv: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Working directory, absolute.
    pub cwd: PathBuf,
    /// Directories of this machine that can be written there. At most [`WRITABLE_SLOTS`] that are not
    /// inside each other.
    pub writable: Vec<PathBuf>,
    /// Standard input, or what is typed on the terminal.
    pub stdin: Stream,
    /// Standard output, or what the terminal shows.
    pub stdout: Stream,
    /// Standard error. With a terminal it is that terminal too, unless this is something else than one.
    pub stderr: Stream,
    /// The command gets a terminal of this size as its streams.
    pub terminal: Option<WindowSize>,
}

impl Command {
    /// A command with this process's environment, working directory and streams.
    pub fn new(argv: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            env: std::env::vars_os().collect(),
            cwd: std::env::current_dir().unwrap_or_else(|_| "/".into()),
            ..Self::default()
        }
    }

    /// The message for the emulated host.
    pub(crate) fn message(&self, exports: &[PathBuf]) -> HostCommand {
        let bytes = |s: &OsStr| s.as_bytes().to_vec();
        let entry = |(key, value): &(OsString, OsString)| [key.as_bytes(), b"=", value.as_bytes()].concat();
        let export = |(slot, path): (usize, &PathBuf)| Export {
            tag: slot_tag(slot),
            path: path.as_os_str().as_bytes().to_vec(),
        };
        HostCommand {
            argv: self.argv.iter().map(|a| bytes(a)).collect(),
            env: self.env.iter().map(entry).collect(),
            cwd: bytes(self.cwd.as_os_str()),
            terminal: self.terminal,
            exports: exports.iter().enumerate().map(export).collect(),
            hostname: rustix::system::uname().nodename().to_bytes().to_vec(),
            error_apart: self.terminal.is_some() && self.stderr.is_apart(),
            entropy: entropy(),
            ..HostCommand::default()
        }
    }

    /// The writable directories without those inside others, in the order of their slots.
    pub(crate) fn exports(&self) -> Result<Vec<PathBuf>, Error> {
        let mut paths = Vec::new();
        for path in &self.writable {
            paths.push(real_directory(path)?);
        }
        paths.sort();
        // In this order a directory comes right before what lies in it.
        paths.dedup_by(|inner, outer| inner.starts_with(outer));
        if paths.len() > WRITABLE_SLOTS {
            return Err(Error::TooManyWritable { limit: WRITABLE_SLOTS, given: paths.len() });
        }
        Ok(paths)
    }
}

fn real_directory(path: &Path) -> Result<PathBuf, Error> {
    let refuse = |why: String| Error::Writable { path: path.to_owned(), why };
    let real = path.canonicalize().map_err(|e| refuse(e.to_string()))?;
    if !real.is_dir() {
        return Err(refuse("not a directory".into()));
    }
    Ok(real)
}

fn entropy() -> Vec<u8> {
    let mut bytes = vec![0; ENTROPY];
    let got = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    bytes.truncate(got);
    bytes
}

/// A path in a comma-separated option of QEMU: commas are doubled.
pub(crate) fn escaped(path: &Path) -> OsString {
    let mut bytes = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        bytes.push(byte);
        if byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_paths_are_doubled() {
        assert_eq!(escaped(Path::new("/a,b,,c")), OsString::from("/a,,b,,,,c"));
        let odd = OsString::from_vec(b"/\xff".to_vec());
        assert_eq!(escaped(Path::new(&odd)), odd);
    }

    #[test]
    fn directories_inside_others_need_no_slot() {
        let home = tempfile::tempdir().unwrap();
        let real = home.path().canonicalize().unwrap();
        let dirs: Vec<PathBuf> = ["a", "a/b", "a b", "c", "d"].iter().map(|d| home.path().join(d)).collect();
        for dir in &dirs {
            std::fs::create_dir(dir).unwrap();
        }
        let mut command = Command { writable: dirs, ..Command::default() };
        let expected: Vec<_> = ["a", "a b", "c", "d"].iter().map(|d| real.join(d)).collect();
        assert_eq!(command.exports().unwrap(), expected);
        for n in 0..WRITABLE_SLOTS {
            let dir = home.path().join(format!("n{n}"));
            std::fs::create_dir(&dir).unwrap();
            command.writable.push(dir);
        }
        let text = command.exports().unwrap_err().to_string();
        assert!(
            text.contains(&format!("write to {WRITABLE_SLOTS} directories")) && text.contains("10 were"),
            "{text}"
        );
        command.writable = vec![home.path().join("missing")];
        assert!(command.exports().unwrap_err().to_string().contains("missing: No such file"));
        command.writable = vec!["/proc/self/stat".into()];
        assert!(command.exports().unwrap_err().to_string().contains("not a directory"));
    }

    #[test]
    fn bytes_reach_the_message_as_they_are() {
        let odd = OsString::from_vec(b"\xff=\x80".to_vec());
        let command = Command { argv: vec![odd.clone()], env: vec![("K".into(), odd)], ..Command::default() };
        let message = command.message(&["/w".into(), "/x,y".into()]);
        assert_eq!((&message.argv[0][..], &message.env[0][..]), (&b"\xff=\x80"[..], &b"K=\xff=\x80"[..]));
        assert_eq!((message.exports[1].tag.as_str(), &message.exports[1].path[..]), ("rw1", &b"/x,y"[..]));
        assert_eq!(message.entropy.len(), ENTROPY);
        assert!(!message.hostname.is_empty() && !message.error_apart);
    }
}
