//! What runs in the guest.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use krun_wire::{InitConfig, Rlimit, User};

/// The workload: a program with its arguments, environment and identity. Strings are bytes, as Linux
/// has them; they need not be UTF-8.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Command {
    /// Program; looked up in the guest's `PATH` when it has no slash. Empty: what the root's
    /// `/.krun_config.json` says, else `/bin/sh`.
    pub program: OsString,
    /// Arguments after `argv[0]`.
    pub args: Vec<OsString>,
    /// `KEY=VALUE` entries.
    pub env: Vec<OsString>,
    /// Working directory in the guest; `None`: `/`.
    pub cwd: Option<PathBuf>,
    /// User and group, by name or number; `None`: root.
    pub user: Option<(OsString, Option<OsString>)>,
    /// Host name of the guest; `None`: the kernel's.
    pub hostname: Option<OsString>,
    /// Resource limits.
    pub limits: Vec<Limit>,
}

/// A resource limit, as in `setrlimit(2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// `RLIMIT_*` number.
    pub resource: u32,
    /// Soft limit; `u64::MAX` is infinity.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is infinity.
    pub hard: u64,
}

/// A resource limit that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the limit \"{text}\" {why}; write RESOURCE=SOFT:HARD, such as RLIMIT_NOFILE=1024:4096 or 7=1024:unlimited"
)]
pub struct LimitError {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub why: &'static str,
}

/// Linux's generic numbers, in order from 0.
const RESOURCES: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

impl std::str::FromStr for Limit {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<Self, LimitError> {
        let fail = |why| LimitError { text: text.to_owned(), why };
        let (name, values) = text.split_once('=').ok_or_else(|| fail("has no '='"))?;
        let (soft, hard) = values.split_once(':').unwrap_or((values, values));
        let bare = name.to_ascii_uppercase();
        let bare = bare.strip_prefix("RLIMIT_").unwrap_or(&bare);
        let resource = match bare.parse::<u32>() {
            Ok(number) if (number as usize) < RESOURCES.len() => number,
            Ok(_) => return Err(fail("has a resource number above 15")),
            Err(_) => RESOURCES
                .iter()
                .position(|known| *known == bare)
                .map(|at| at as u32)
                .ok_or_else(|| fail("names no resource of setrlimit(2)"))?,
        };
        let value = |v: &str| match v {
            "unlimited" | "infinity" | "-1" => Ok(u64::MAX),
            _ => v.parse().map_err(|_| fail("has a value that is no number")),
        };
        let (soft, hard) = (value(soft)?, value(hard)?);
        if soft > hard {
            return Err(fail("has a soft limit above the hard one"));
        }
        Ok(Self { resource, soft, hard })
    }
}

impl Command {
    /// A program without arguments and with an empty environment.
    pub fn new(program: impl Into<OsString>) -> Self {
        Self { program: program.into(), ..Self::default() }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: Into<OsString>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds one environment variable.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        let mut entry = key.as_ref().to_owned();
        entry.push("=");
        entry.push(value.as_ref());
        self.env.push(entry);
        self
    }

    /// Fills in what init needs of it.
    pub(crate) fn apply(&self, to: &mut InitConfig) {
        let bytes = |s: &OsString| s.clone().into_vec();
        to.exec = bytes(&self.program);
        to.args = self.args.iter().map(bytes).collect();
        to.env = self.env.iter().map(bytes).collect();
        to.cwd = self.cwd.as_ref().map_or_else(Vec::new, |p| p.as_os_str().as_bytes().to_vec());
        to.user = self.user.as_ref().map(|(u, g)| User { user: bytes(u), group: g.as_ref().map(bytes) });
        to.hostname = self.hostname.as_ref().map_or_else(Vec::new, bytes);
        to.rlimits =
            self.limits.iter().map(|l| Rlimit { resource: l.resource, soft: l.soft, hard: l.hard }).collect();
    }

    /// The first string with a NUL byte in it, which no program can be given.
    pub(crate) fn string_with_nul(&self) -> Option<&OsStr> {
        let cwd = self.cwd.iter().map(|p| p.as_os_str());
        std::iter::once(self.program.as_os_str())
            .chain(self.args.iter().chain(&self.env).map(OsString::as_os_str))
            .chain(cwd)
            .find(|s| s.as_bytes().contains(&0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_by_name_and_number() {
        let want = Limit { resource: 7, soft: 1024, hard: 4096 };
        for text in ["7=1024:4096", "RLIMIT_NOFILE=1024:4096", "nofile=1024:4096"] {
            assert_eq!(text.parse(), Ok(want));
        }
        let one = Limit { resource: 4, soft: u64::MAX, hard: u64::MAX };
        assert_eq!("core=unlimited".parse(), Ok(one));
    }

    #[test]
    fn each_bad_limit_says_why() {
        for (text, why) in [
            ("nofile", "has no '='"),
            ("nofiles=1:2", "names no resource of setrlimit(2)"),
            ("16=1:2", "has a resource number above 15"),
            ("7=x:2", "has a value that is no number"),
            ("7=3:2", "has a soft limit above the hard one"),
        ] {
            assert_eq!(text.parse::<Limit>().unwrap_err().why, why);
        }
    }

    #[test]
    fn bytes_pass_unchanged() {
        let command = Command::new(OsString::from_vec(vec![0xff])).env("K", OsString::from_vec(vec![0x80]));
        let mut config = InitConfig::default();
        command.apply(&mut config);
        assert_eq!((config.exec, config.env), (vec![0xff], vec![b"K=\x80".to_vec()]));
    }

    #[test]
    fn nul_is_found() {
        assert_eq!(Command::new("a").args(["b\0"]).string_with_nul(), Some(OsStr::new("b\0")));
        assert_eq!(Command::new("a").args(["b"]).string_with_nul(), None);
    }
}
