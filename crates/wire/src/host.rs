//! What a program on this machine and process 1 of the emulated host say to each other.
//!
//! Both sides talk over the console port named [`CONTROL_PORT`], in frames like all control messages.
//! The command's streams have ports of their own: those of [`crate::STDIO_PORTS`]. A terminal's input and
//! output are the first two of them.

use serde::{Deserialize, Serialize};

use crate::Error;

/// Name of the port.
pub const CONTROL_PORT: &str = "krun-host";
/// Entry of init's environment that makes it the process 1 of an emulated host. The kernel turns such a
/// word of its command line into it.
pub const ROLE: &str = "krun_role=host";
/// 9p tag of this machine's root, exported for reading.
pub const ROOT_TAG: &str = "root";
/// Where a command for [`HostRoot::Initial`] is found in the initial RAM disk. Such a machine has no ports:
/// nothing that arrives from outside may change how it runs. It prints to its serial console.
pub const COMMAND_PATH: &str = "/command.krun";
/// Comes before the exit status, in decimal digits and a line feed, as the last that init prints there.
pub const EXIT_MARK: &[u8] = b"\x1ekrun exit ";
/// Largest part of an encoded [`HostCommand`] in one message, in bytes.
const PART: usize = 32 * 1024;

/// One command for the emulated host, and what it must find there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCommand {
    /// Program and arguments; the program is looked up in `PATH` of `env` when it has no slash.
    pub argv: Vec<Vec<u8>>,
    /// `KEY=VALUE` entries.
    pub env: Vec<Vec<u8>>,
    /// Working directory, absolute.
    pub cwd: Vec<u8>,
    /// The command gets a terminal of this size.
    pub terminal: Option<WindowSize>,
    /// With a terminal: standard error is not it, but has its port.
    pub error_apart: bool,
    /// What the root is.
    pub root: HostRoot,
    /// Directories of this machine that are writable there, at the same path.
    pub exports: Vec<Export>,
    /// Host name; empty leaves the kernel's.
    pub hostname: Vec<u8>,
    /// The time of day now: seconds since 1970 and nanoseconds. A resumed machine has an old one.
    pub time: Option<(u64, u32)>,
    /// Random bytes: machines that were resumed from the same state would draw the same numbers.
    pub entropy: Vec<u8>,
}

/// The emulated host's root.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostRoot {
    /// This machine's root, read-only.
    #[default]
    Shared,
    /// The initial RAM disk, writable.
    Initial,
}

/// A directory of this machine that can be written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// 9p tag.
    pub tag: String,
    /// Absolute path, without symbolic links.
    pub path: Vec<u8>,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in each.
    pub cols: u16,
}

/// To the emulated host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHostRole {
    /// Part of an encoded command; more follow.
    Part(Vec<u8>),
    /// The last part of it: start the command.
    Run(Vec<u8>),
    /// Send a signal to the command.
    Signal(i32),
    /// The terminal has changed its size.
    Resize(WindowSize),
}

/// From the emulated host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHostRole {
    /// Booted and waiting for a command.
    Ready,
    /// The command was started.
    Started,
    /// The command ended. All that it wrote to files is with the host; the machine may be ended once its
    /// output is there too.
    Exit {
        /// Its status; 128+n: by signal n.
        status: i32,
        /// Bytes that were written to the ports of standard output and error. They may still be on their
        /// way: nothing tells process 1 how far they got.
        sent: [u64; 2],
    },
    /// The command could not be started.
    Failed {
        /// 125, 126 or 127.
        status: i32,
        /// For the user, in one or two sentences.
        reason: String,
    },
}

impl HostCommand {
    /// Its bytes, as [`HostCommand::decode`] reads them.
    pub fn encode(&self) -> Vec<u8> {
        // Serialising plain data into a growing vector has no way to fail.
        postcard::to_extend(self, Vec::new()).unwrap_or_default()
    }

    /// The messages that start this command.
    pub fn messages(&self) -> Vec<ToHostRole> {
        let mut parts: Vec<_> =
            self.encode().chunks(PART).map(|part| ToHostRole::Part(part.to_vec())).collect();
        if let Some(ToHostRole::Part(last)) = parts.pop() {
            parts.push(ToHostRole::Run(last));
        }
        parts
    }

    /// Reads all parts of [`HostCommand::messages`], one after the other.
    ///
    /// # Errors
    /// Damaged or truncated contents.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        postcard::from_bytes(bytes).map_err(Error::Decode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FrameReader, encode_frame};

    #[test]
    fn a_command_of_any_size_survives_the_journey() {
        let small = HostCommand {
            argv: vec![b"/bin/\xff".to_vec(), vec![]],
            env: vec![b"K=\x80".to_vec()],
            terminal: Some(WindowSize { rows: 24, cols: 80 }),
            exports: vec![Export { tag: "rw0".into(), path: b"/a,b".to_vec() }],
            time: Some((1, 2)),
            ..HostCommand::default()
        };
        let large = HostCommand { argv: vec![vec![0xff; 128 * 1024]; 9], ..small.clone() };
        for (command, parts) in [(small, 1), (large, 9 * 4 + 1)] {
            let messages = command.messages();
            assert_eq!(messages.len(), parts);
            let (mut reader, mut bytes, mut done) = (FrameReader::default(), Vec::new(), false);
            for message in messages {
                reader.push(&encode_frame(&message));
                match reader.next().unwrap().unwrap() {
                    ToHostRole::Part(part) if !done => bytes.extend(part),
                    ToHostRole::Run(part) if !done => {
                        bytes.extend(part);
                        done = true;
                    }
                    other => panic!("{other:?}"),
                }
            }
            assert!(done);
            assert_eq!(HostCommand::decode(&bytes), Ok(command));
            bytes.pop();
            assert!(HostCommand::decode(&bytes).is_err());
        }
    }
}
