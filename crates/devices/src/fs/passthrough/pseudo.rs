//! File systems behind which there is no storage but the host's kernel: what looks like a file there is a
//! question to it, or a command. A share may contain them, a root `/` for one.
//!
//! Processes are reached through procfs, this one among them: its memory is a file. Reading some others
//! waits for an event, for ever perhaps. So these can be looked at and listed, and files not opened; the
//! links among them are never followed here anyway. From the milder kind files can be read. Names are commands
//! as well (a directory made is a control group, for one), so none is made, moved or removed there.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Result, Share};
use crate::fs::inodes::Key;

/// Mount ids above this are never given out again (Linux 6.8).
const MOUNT_REUSED: u64 = i32::MAX as u64;

/// What may be done to a file, by the file system that it is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// What its permissions say.
    All,
    /// It is read, not changed.
    Read,
    /// It is not opened.
    Nothing,
}

/// The rule for file systems of type `magic`.
fn rule(magic: u32) -> Rule {
    match magic {
        // proc, debugfs, tracefs, xenfs.
        0x9fa0 | 0x6462_6720 | 0x7472_6163 | 0xabba_1974 => Rule::Nothing,
        // rpc_pipefs, dlmfs, functionfs: who opens a file is a daemon, a lock's holder or a USB device to the kernel.
        0x6759_6969 | 0x76a9_f425 | 0x0a64_7361 => Rule::Nothing,
        // sysfs, cgroup, cgroup2, resctrl, configfs, securityfs, SELinux, Smack.
        0x6265_6572 | 0x0027_e0eb | 0x6367_7270 | 0x0765_5821 => Rule::Read,
        0x6265_6570 | 0x7363_6673 | 0xf97c_ff8c | 0x4341_5d53 => Rule::Read,
        // binfmt_misc, bpf, efivarfs, pstore, fusectl, nfsd.
        0x4249_4e4d | 0xcafe_4a11 | 0xde5e_81e4 | 0x6165_676c | 0x6573_5543 | 0x6e66_7364 => Rule::Read,
        _ => Rule::All,
    }
}

impl Share {
    /// The flags that are to be added when the file `fd`, which is inode `key`, is opened with `flags`.
    ///
    /// # Errors
    /// EACCES: it must not be.
    pub(super) fn may_open(&mut self, key: &Key, fd: &OwnedFd, flags: OFlags) -> Result<OFlags> {
        let writes = flags & OFlags::ACCMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC);
        match self.rule_of(key, fd)? {
            Rule::All => Ok(OFlags::empty()),
            // Should a file have nothing to read yet, nobody waits for it.
            Rule::Read if !writes => Ok(OFlags::NONBLOCK),
            Rule::Read | Rule::Nothing => Err(Errno::ACCESS),
        }
    }

    /// A descriptor of `node`, whose attributes, or names in it, are to be changed.
    ///
    /// # Errors
    /// EACCES: they must not be; or as [`Share::fd`].
    pub(super) fn fd_to_change(&mut self, node: u64) -> Result<Arc<OwnedFd>> {
        let fd = self.fd(node)?;
        let key = self.inodes.host(node)?.id.key;
        if self.rule_of(&key, &fd)? == Rule::All { Ok(fd) } else { Err(Errno::ACCESS) }
    }

    fn rule_of(&mut self, key: &Key, fd: &OwnedFd) -> Result<Rule> {
        // Of a disk, or known. Numbers that are given out again could be another file system's by now.
        if key.dev.0 != 0 || self.plain.contains(&key.mnt) {
            return Ok(Rule::All);
        }
        let rule = match rustix::fs::fstatfs(fd) {
            Ok(s) => rule(s.f_type as u32),
            // A program serves it (FUSE) and does not know the question; the kernel's own all do.
            Err(Errno::NOSYS) => Rule::All,
            Err(e) => return Err(e),
        };
        if rule == Rule::All && key.mnt > MOUNT_REUSED {
            self.plain.insert(key.mnt);
        }
        Ok(rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_that_no_test_can_mount_have_their_rule() {
        for (magic, want) in [
            // rpc_pipefs, dlmfs, functionfs, nfsd; tmpfs, ext4.
            (0x6759_6969, Rule::Nothing),
            (0x76a9_f425, Rule::Nothing),
            (0x0a64_7361, Rule::Nothing),
            (0x6e66_7364, Rule::Read),
            (0x0102_1994, Rule::All),
            (0xef53, Rule::All),
        ] {
            assert_eq!(rule(magic), want, "{magic:#x}");
        }
    }
}
