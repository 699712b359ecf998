//! What a device shall be, and why it cannot.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use krun_virtio::Queue;

use super::channel::ChannelError;
use super::kind::DeviceKind;

/// Most queues of a device.
pub const MAX_QUEUES: u16 = 64;
/// Most bytes of the path of a unix socket (unix(7)), without the zero after it.
const PATH_MAX: usize = 107;
/// Most bytes of a tag of a share (virtio 1.3, section 5.11.4).
const TAG_MAX: usize = 36;

/// A device whose other half is another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VhostUserSpec {
    /// What it is.
    pub kind: DeviceKind,
    /// Unix socket on which the back end listens.
    pub path: PathBuf,
    /// For messages; `None`: after the kind.
    pub name: Option<String>,
    /// How many queues; `None`: as many as the back end says, or as a driver of this kind expects.
    pub queues: Option<u16>,
    /// Most entries of each queue, powers of two; the last one counts for all queues after it. Empty: what suits back
    /// ends of this kind.
    pub sizes: Vec<u16>,
    /// Tag of a share, for back ends that leave it to the front end.
    pub tag: Option<String>,
    /// Within this time the back end must answer all that belongs together: at the start of the machine, at the
    /// start and the stop of the device.
    pub timeout: Duration,
}

impl VhostUserSpec {
    /// A device with what suits its kind.
    pub fn new(kind: DeviceKind, path: impl Into<PathBuf>) -> Self {
        Self {
            kind,
            path: path.into(),
            name: None,
            queues: None,
            sizes: Vec::new(),
            tag: None,
            timeout: Duration::from_secs(10),
        }
    }

    /// Checks what can be checked without the back end.
    ///
    /// # Errors
    /// The first value that no device can have.
    pub fn validate(&self) -> Result<(), VhostUserError> {
        let path = self.path.as_os_str();
        if path.is_empty() || path.len() > PATH_MAX {
            return Err(VhostUserError::Path { path: self.path.clone() });
        }
        if let Some(asked) = self.queues.filter(|n| !(1..=MAX_QUEUES).contains(n)) {
            return Err(VhostUserError::Queues { asked, most: MAX_QUEUES });
        }
        let fits = |n: &u16| n.is_power_of_two() && *n <= Queue::SIZE_LIMIT;
        if let Some(&size) = self.sizes.iter().find(|n| !fits(n)) {
            return Err(VhostUserError::QueueSize { size });
        }
        if self.name.as_ref().is_some_and(|name| name.contains('\0')) {
            return Err(VhostUserError::Name);
        }
        match &self.tag {
            Some(tag) if tag.is_empty() || tag.len() > TAG_MAX => {
                Err(VhostUserError::Tag { tag: tag.clone() })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn queue_size(&self, queue: usize) -> u16 {
        let own = self.sizes.get(queue).or(self.sizes.last());
        own.copied().unwrap_or_else(|| self.kind.queue_size(queue))
    }

    pub(super) fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| format!("vhost-user-{}", self.kind))
    }
}

/// Why a device cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VhostUserError {
    /// No path of a socket.
    #[error("{path:?} is no path of a unix socket: it has 1 to {PATH_MAX} bytes")]
    Path {
        /// What was asked for.
        path: PathBuf,
    },
    /// More queues than there can be.
    #[error("a vhost-user device of {asked} queues: this one can have 1 to {most}")]
    Queues {
        /// What was asked for.
        asked: u16,
        /// The limit: this front end's, or the back end's.
        most: u16,
    },
    /// No size of a queue.
    #[error("a queue of {size} entries: must be a power of two up to {}", Queue::SIZE_LIMIT)]
    QueueSize {
        /// What was asked for.
        size: u16,
    },
    /// A name with a NUL byte in it.
    #[error("the name of a vhost-user device has a NUL byte in it")]
    Name,
    /// No tag of a share.
    #[error("the tag {tag:?} of a share must have 1 to {TAG_MAX} bytes")]
    Tag {
        /// What was asked for.
        tag: String,
    },
    /// Nobody listens.
    #[error("cannot connect to the vhost-user back end at {}: {source}", path.display())]
    Connect {
        /// Where.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The conversation failed.
    #[error("vhost-user back end at {}: {source}", path.display())]
    BackEnd {
        /// Where.
        path: PathBuf,
        /// How.
        source: ChannelError,
    },
    /// The back end cannot do what is needed.
    #[error("the vhost-user back end at {} {lacks}", path.display())]
    Lacks {
        /// Where.
        path: PathBuf,
        /// What.
        lacks: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_checked() {
        let spec = VhostUserSpec::new(DeviceKind::CONSOLE, "/run/x");
        spec.validate().unwrap();
        let text = |spec: VhostUserSpec| spec.validate().unwrap_err().to_string();
        assert!(text(VhostUserSpec { path: "".into(), ..spec.clone() }).contains("no path"));
        assert!(text(VhostUserSpec { path: "x".repeat(108).into(), ..spec.clone() }).contains("107"));
        assert!(text(VhostUserSpec { queues: Some(0), ..spec.clone() }).contains("0 queues"));
        assert!(text(VhostUserSpec { queues: Some(65), ..spec.clone() }).contains("65 queues"));
        for size in [0, 3, 0xffff] {
            let text = text(VhostUserSpec { sizes: vec![64, size], ..spec.clone() });
            assert!(text.contains("power of two"), "{text}");
        }
        assert!(text(VhostUserSpec { tag: Some("x".repeat(37)), ..spec.clone() }).contains("tag"));
        assert!(text(VhostUserSpec { name: Some("a\0".into()), ..spec.clone() }).contains("NUL"));
        let sized = VhostUserSpec { sizes: vec![16, 32], ..spec.clone() };
        assert_eq!([0, 1, 2].map(|q| sized.queue_size(q)), [16, 32, 32]);
        assert_eq!([0, 2].map(|q| spec.queue_size(q)), [128, 64]);
        assert_eq!(spec.name(), "vhost-user-console");
    }
}
