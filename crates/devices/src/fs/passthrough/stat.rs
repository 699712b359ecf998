//! Attributes and identity of an inode in one call.

use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, Statx, StatxFlags, StatxTimestamp, statx};

use super::Result;
use crate::fs::abi::{Attr, Time};
use crate::fs::inodes::{Identity, Key};

/// What the host says about an inode.
#[derive(Debug, Clone, Copy)]
pub struct Stat {
    /// Which inode it is.
    pub id: Identity,
    /// Its attributes, with the host's inode number.
    pub attr: Attr,
}

/// `STATX_MNT_ID` and `STATX_MNT_ID_UNIQUE`: ids that are given out again, and (Linux 6.8) ids that are not.
const MNT_ID: u32 = 0x1000 | 0x4000;

impl Stat {
    /// Of an open descriptor.
    ///
    /// # Errors
    /// The host's reason.
    pub fn of(fd: &impl AsFd) -> Result<Self> {
        Self::call(fd, c"", AtFlags::EMPTY_PATH)
    }

    /// Of `name`, one component, in `dir`; a symbolic link is not followed.
    ///
    /// # Errors
    /// The host's reason.
    pub fn at(dir: &impl AsFd, name: &CStr) -> Result<Self> {
        Self::call(dir, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT)
    }

    fn call(fd: &impl AsFd, name: &CStr, flags: AtFlags) -> Result<Self> {
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::from_bits_retain(MNT_ID);
        Ok(Self::new(&statx(fd, name, flags, mask)?))
    }

    fn new(s: &Statx) -> Self {
        let has = |bit: u32| s.stx_mask & bit != 0;
        let mode = u32::from(s.stx_mode);
        let born = has(StatxFlags::BTIME.bits()).then(|| time(s.stx_btime));
        Self {
            id: Identity {
                key: Key {
                    dev: (s.stx_dev_major, s.stx_dev_minor),
                    ino: s.stx_ino,
                    mnt: if has(MNT_ID) { s.stx_mnt_id } else { 0 },
                },
                kind: mode & libc::S_IFMT,
                born,
            },
            attr: Attr {
                ino: s.stx_ino,
                size: s.stx_size,
                blocks: s.stx_blocks,
                atime: time(s.stx_atime),
                mtime: time(s.stx_mtime),
                ctime: time(s.stx_ctime),
                btime: born,
                mode,
                nlink: s.stx_nlink,
                uid: s.stx_uid,
                gid: s.stx_gid,
                rdev_major: s.stx_rdev_major,
                rdev_minor: s.stx_rdev_minor,
                blksize: s.stx_blksize,
                dax: false,
            },
        }
    }
}

fn time(t: StatxTimestamp) -> Time {
    Time { sec: t.tv_sec, nsec: t.tv_nsec }
}
