//! What the host and the guest's init say to each other.
//!
//! Init finds a virtual file, [`CONFIG_PATH`], in its root and decodes [`InitConfig`] from it. While
//! the guest runs, both ends exchange [`ToGuest`] and [`ToHost`] messages over the console port named
//! [`CONTROL_PORT`], each framed by its length. Strings are bytes: Linux paths, arguments and
//! environment values need not be UTF-8.

mod frame;
pub mod host;

use serde::{Deserialize, Serialize};

pub use frame::{FrameReader, MAX_FRAME, encode_frame};

/// Where init itself appears in the root.
pub const INIT_PATH: &str = "/init.krun";
/// Where init's configuration appears in the root.
pub const CONFIG_PATH: &str = "/.krun_init.bin";
/// Name of the console port for control messages.
pub const CONTROL_PORT: &str = "krun-control";
/// Names of the console ports that carry the workload's standard streams when they are no terminal.
pub const STDIO_PORTS: [&str; 3] = ["krun-stdin", "krun-stdout", "krun-stderr"];
/// FUSE ioctl (on any file of the root share, the status in its argument) that reports the exit status.
pub const EXIT_CODE_IOCTL: u32 = 0x7602;
/// First bytes of an encoded [`InitConfig`]; the last byte is the format's version.
pub const CONFIG_MAGIC: [u8; 8] = *b"krunini\x02";

/// Exit status when init could not set the guest up.
pub const EXIT_SETUP: i32 = 125;
/// Exit status when the command was found but could not be executed.
pub const EXIT_NOT_EXECUTABLE: i32 = 126;
/// Exit status when the command was not found.
pub const EXIT_NOT_FOUND: i32 = 127;

/// Everything init needs to know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitConfig {
    /// Program; looked up in `PATH` of `env` when it has no slash. Empty: take it from the image's
    /// `/.krun_config.json`, else `/bin/sh`.
    pub exec: Vec<u8>,
    /// Arguments after `argv[0]`.
    pub args: Vec<Vec<u8>>,
    /// `KEY=VALUE` entries.
    pub env: Vec<Vec<u8>>,
    /// Working directory; empty means `/`.
    pub cwd: Vec<u8>,
    /// Whom to run the command as; `None`: root.
    pub user: Option<User>,
    /// Host name; empty: that of the image's `/.krun_config.json` if it is used, else `localhost`.
    pub hostname: Vec<u8>,
    /// Resource limits to set before the command starts.
    pub rlimits: Vec<Rlimit>,
    /// How standard streams reach the host.
    pub stdio: Stdio,
    /// Shares to mount, in order.
    pub mounts: Vec<Mount>,
    /// Empty file systems in memory, mounted after the shares. `/dev/shm` is always one, and `/run` and
    /// `/tmp` are when the root is mounted read-only.
    pub tmpfs: Vec<Tmpfs>,
    /// A block device to switch to as root, once init has read this file.
    pub block_root: Option<BlockRoot>,
    /// Interfaces to configure by DHCP.
    pub dhcp: Vec<Vec<u8>>,
    /// Print timings of init's steps on the kernel log.
    pub verbose: bool,
}

/// Who runs the command. Names are looked up in the guest's `/etc/passwd` and `/etc/group`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Name or number.
    pub user: Vec<u8>,
    /// Name or number; `None`: the user's primary group (0 for a number that has no entry).
    pub group: Option<Vec<u8>>,
}

/// One resource limit (`setrlimit(2)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_*` number of Linux's generic ABI.
    pub resource: u32,
    /// Soft limit; `u64::MAX` is infinity.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is infinity.
    pub hard: u64,
}

/// How the command's standard streams reach the host.
///
/// Streams with a port are pipes in the guest, which init connects with the ports: they can be opened
/// again through `/dev/stdout`, writing to one whose reader on the host is gone raises `SIGPIPE`, and
/// the host must announce a port as open before it tells the guest the port's name, since a port that
/// is not open reads as end of file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stdio {
    /// What the kernel gave init: `/dev/console`, as the controlling terminal.
    #[default]
    Console,
    /// A terminal becomes the controlling one of the command's session.
    Terminal {
        /// Its number: n in `/dev/hvcN`.
        number: u32,
        /// Bit n set: stream n has a port of [`STDIO_PORTS`] and does not use the terminal.
        ports: u8,
    },
    /// Every stream whose bit is set has a port of [`STDIO_PORTS`]; others are `/dev/null`.
    Ports(u8),
}

/// A virtio-fs share to mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// virtio-fs tag.
    pub tag: String,
    /// Absolute mount point, created if missing.
    pub path: Vec<u8>,
    /// Mount it read-only.
    pub read_only: bool,
}

/// A file system in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    /// Absolute mount point, created if missing.
    pub path: Vec<u8>,
    /// Mount options, separated by commas, such as `size=64m,mode=1777,noexec`.
    pub options: Vec<u8>,
}

/// A block device that becomes the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRoot {
    /// Device path, such as `/dev/vda1`.
    pub device: Vec<u8>,
    /// File system; empty: every one the kernel has is tried.
    pub fstype: Vec<u8>,
    /// Mount options.
    pub options: Vec<u8>,
}

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// Send a signal to the command.
    Signal(i32),
    /// End the command (TERM, after a grace period KILL) and power off.
    Shutdown {
        /// Milliseconds between TERM and KILL.
        grace_ms: u32,
    },
}

/// Guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// The command was started. Init opens the control port a few milliseconds after the start, so a
    /// command that ends sooner is not announced.
    Started {
        /// Its process id in the guest.
        pid: i32,
    },
    /// Set-up failed or the command could not be started: why, in one or two sentences.
    Failed {
        /// 125, 126 or 127.
        status: i32,
        /// For the user.
        reason: String,
    },
}

/// Bytes that are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not an init configuration, or one of another version.
    #[error("not an init configuration of version {}", CONFIG_MAGIC[7])]
    Magic,
    /// Damaged or truncated contents.
    #[error("damaged message: {0}")]
    Decode(postcard::Error),
    /// A frame longer than [`MAX_FRAME`].
    #[error("a frame of {0} bytes exceeds the limit of {MAX_FRAME}")]
    FrameTooLong(u64),
}

impl InitConfig {
    /// The bytes for [`CONFIG_PATH`].
    pub fn encode(&self) -> Vec<u8> {
        let start = CONFIG_MAGIC.to_vec();
        // Serialising plain data into a growing vector has no way to fail.
        postcard::to_extend(self, start).unwrap_or_default()
    }

    /// Reads what [`InitConfig::encode`] wrote.
    ///
    /// # Errors
    /// [`Error::Magic`] for other data, [`Error::Decode`] for damaged data.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let body = bytes.strip_prefix(&CONFIG_MAGIC).ok_or(Error::Magic)?;
        postcard::from_bytes(body).map_err(Error::Decode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_survives_the_journey() {
        let c = InitConfig {
            exec: b"/bin/\xff".to_vec(),
            args: vec![b"a b\"c".to_vec(), vec![]],
            env: vec![b"K=\x80".to_vec()],
            user: Some(User { user: b"daemon".to_vec(), group: None }),
            rlimits: vec![Rlimit { resource: 7, soft: 1024, hard: u64::MAX }],
            stdio: Stdio::Ports(0b111),
            ..InitConfig::default()
        };
        assert_eq!(InitConfig::decode(&c.encode()), Ok(c));
    }

    #[test]
    fn other_versions_and_damage_are_told_apart() {
        let mut bytes = InitConfig::default().encode();
        assert_eq!(InitConfig::decode(b"krunini\x01"), Err(Error::Magic));
        bytes.pop();
        assert!(matches!(InitConfig::decode(&bytes), Err(Error::Decode(_))));
    }
}
