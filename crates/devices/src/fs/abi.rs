//! The FUSE wire format, as far as it is served here (protocol 7.31 to 7.41).
//!
//! Everything is little endian, as the guests are, and is taken apart and put together field by field:
//! no structure is ever laid over bytes that a guest wrote.

use bitflags::bitflags;

use super::sys::locks::Record;

/// Protocol generation.
pub const MAJOR: u32 = 7;
/// Newest revision of the protocol known here.
pub const MINOR: u32 = 41;
/// Oldest revision served (that of kernel 5.4, the first with virtio-fs).
pub const MINOR_MIN: u32 = 31;
/// Node id of the root of a share.
pub const ROOT: u64 = 1;
/// Longest name of a directory entry, in bytes.
pub const NAME_MAX: usize = 255;
/// Longest target of a symbolic link, in bytes, without its terminator.
pub const PATH_MAX: usize = 4095;
/// Largest extended attribute, in bytes.
pub const XATTR_MAX: usize = 65536;

/// Operation codes, of those that are served.
pub mod op {
    #![allow(missing_docs)]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const GETLK: u32 = 31;
    pub const SETLK: u32 = 32;
    pub const SETLKW: u32 = 33;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SETUPMAPPING: u32 = 48;
    pub const REMOVEMAPPING: u32 = 49;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
    pub const STATX: u32 = 52;
}

bitflags! {
    /// What the two sides can do, exchanged by INIT.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct InitFlags: u64 {
        /// Several reads of one file at once.
        const ASYNC_READ = 1;
        /// POSIX locks are passed on.
        const POSIX_LOCKS = 1 << 1;
        /// OPEN truncates when asked to.
        const ATOMIC_O_TRUNC = 1 << 3;
        /// Writes beyond one page.
        const BIG_WRITES = 1 << 5;
        /// The server applies the umask.
        const DONT_MASK = 1 << 6;
        /// BSD locks are passed on.
        const FLOCK_LOCKS = 1 << 10;
        /// Pages go when size or modification time change.
        const AUTO_INVAL_DATA = 1 << 12;
        /// READDIRPLUS is served.
        const DO_READDIRPLUS = 1 << 13;
        /// The kernel chooses between READDIR and READDIRPLUS.
        const READDIRPLUS_AUTO = 1 << 14;
        /// Direct I/O of several requests at once.
        const ASYNC_DIO = 1 << 15;
        /// The kernel keeps dirty pages.
        const WRITEBACK_CACHE = 1 << 16;
        /// OPEN may be answered with ENOSYS, and is not sent again.
        const NO_OPEN_SUPPORT = 1 << 17;
        /// Lookups and listings of one directory at once.
        const PARALLEL_DIROPS = 1 << 18;
        /// ACLs are enforced by the kernel.
        const POSIX_ACL = 1 << 20;
        /// `max_pages` of the reply counts.
        const MAX_PAGES = 1 << 22;
        /// Targets of symbolic links are cached.
        const CACHE_SYMLINKS = 1 << 23;
        /// OPENDIR may be answered with ENOSYS, and is not sent again.
        const NO_OPENDIR_SUPPORT = 1 << 24;
        /// `map_alignment` of the reply counts.
        const MAP_ALIGNMENT = 1 << 26;
        /// Mount points are announced.
        const SUBMOUNTS = 1 << 27;
        /// The server clears set-id bits when told.
        const HANDLE_KILLPRIV_V2 = 1 << 28;
        /// SETXATTR carries flags of its own.
        const SETXATTR_EXT = 1 << 29;
        /// There is a second word of flags.
        const INIT_EXT = 1 << 30;
        /// Attributes say which files are to be mapped.
        const HAS_INODE_DAX = 1 << 33;
        /// Files opened with `FOPEN_DIRECT_IO` can be mapped shared.
        const DIRECT_IO_ALLOW_MMAP = 1 << 36;
        /// The guest may mount a part of the share once more with other owners (mount_setattr(2)): ids in requests
        /// that make something are those to store, in others there are none.
        const ALLOW_IDMAP = 1 << 40;
        const _ = !0;
    }
}

bitflags! {
    /// Fields that SETATTR changes.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Fattr: u32 {
        /// Permission bits.
        const MODE = 1;
        /// Owner.
        const UID = 1 << 1;
        /// Group.
        const GID = 1 << 2;
        /// Length.
        const SIZE = 1 << 3;
        /// Access time.
        const ATIME = 1 << 4;
        /// Modification time.
        const MTIME = 1 << 5;
        /// The request names an open handle.
        const FH = 1 << 6;
        /// Access time: the host's clock.
        const ATIME_NOW = 1 << 7;
        /// Modification time: the host's clock.
        const MTIME_NOW = 1 << 8;
        /// Change time.
        const CTIME = 1 << 10;
        /// Set-id bits go with the change.
        const KILL_SUIDGID = 1 << 11;
        const _ = !0;
    }
}

/// `flags` of attributes: the file is to be mapped, if INIT agreed on that.
pub const ATTR_DAX: u32 = 2;
/// `flags` of SETUPMAPPING: the guest may write there.
pub const SETUPMAPPING_WRITE: u64 = 1;
/// OPEN and CREATE reply: the page cache is bypassed.
pub const FOPEN_DIRECT_IO: u32 = 1;
/// OPEN reply: pages cached earlier stay.
pub const FOPEN_KEEP_CACHE: u32 = 2;
/// OPENDIR reply: the listing may be cached.
pub const FOPEN_CACHE_DIR: u32 = 8;
/// OPEN reply: the kernel need not send FLUSH.
pub const FOPEN_NOFLUSH: u32 = 32;
/// OPEN reply, with `FOPEN_DIRECT_IO`: several writes at once.
pub const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 64;
/// `open_flags` of OPEN and CREATE: set-id bits go with truncation.
pub const OPEN_KILL_SUIDGID: u32 = 1;
/// `write_flags` of WRITE: the data are from the page cache, and nobody looks at the count of the reply.
pub const WRITE_CACHE: u32 = 1;
/// `write_flags` of WRITE: set-id bits go.
pub const WRITE_KILL_SUIDGID: u32 = 4;
/// `getattr_flags`: the request names an open handle.
pub const GETATTR_FH: u32 = 1;
/// `fsync_flags`: data only.
pub const FSYNC_FDATASYNC: u32 = 1;
/// `lk_flags`: a BSD lock.
pub const LK_FLOCK: u32 = 1;
/// `setxattr_flags`: clear the set-group-id bit as well.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1;

/// The head of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InHeader {
    /// Length of the request, head included.
    pub len: u32,
    /// What is asked.
    pub opcode: u32,
    /// Number of the request, returned in the reply.
    pub unique: u64,
    /// The node it is about.
    pub nodeid: u64,
    /// File-system user id of the caller.
    pub uid: u32,
    /// File-system group id of the caller.
    pub gid: u32,
}

impl InHeader {
    /// Bytes on the wire.
    pub const SIZE: usize = 40;

    /// Takes the head apart.
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            len: word(0),
            opcode: word(4),
            unique: long(8),
            nodeid: long(16),
            uid: word(24),
            gid: word(28),
        }
    }
}

/// Bytes of the head of a reply.
pub const OUT_HEADER: usize = 16;

/// The head of a reply of `len` bytes in all; `errno` is 0 or positive.
pub fn out_header(len: u32, errno: i32, unique: u64) -> [u8; OUT_HEADER] {
    let mut head = [0; OUT_HEADER];
    head[..4].copy_from_slice(&len.to_le_bytes());
    head[4..8].copy_from_slice(&errno.wrapping_neg().to_le_bytes());
    head[8..].copy_from_slice(&unique.to_le_bytes());
    head
}

/// A point in time as the protocol has it; seconds before 1970 are negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    /// Seconds since 1970.
    pub sec: i64,
    /// Nanoseconds on top.
    pub nsec: u32,
}

/// What the guest learns about an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub atime: Time,
    pub mtime: Time,
    pub ctime: Time,
    pub btime: Option<Time>,
    /// Type and permission bits.
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev_major: u32,
    pub rdev_minor: u32,
    pub blksize: u32,
    /// The file is to be mapped.
    pub dax: bool,
}

impl Attr {
    /// Bytes on the wire.
    pub const SIZE: usize = 88;

    /// The file type bits of the mode.
    pub fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }
}

/// How long the guest may believe what it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Valid {
    /// The name.
    pub entry: std::time::Duration,
    /// The attributes.
    pub attr: std::time::Duration,
}

/// Bytes of an entry reply.
pub const ENTRY_SIZE: usize = 128;

/// Builds a reply. Bytes go into a buffer that is used again and again.
pub trait Put {
    /// Appends bytes.
    fn raw(&mut self, bytes: &[u8]);

    /// Appends a 16-bit word.
    fn u16(&mut self, v: u16) {
        self.raw(&v.to_le_bytes());
    }
    /// Appends a 32-bit word.
    fn u32(&mut self, v: u32) {
        self.raw(&v.to_le_bytes());
    }
    /// Appends a 64-bit word.
    fn u64(&mut self, v: u64) {
        self.raw(&v.to_le_bytes());
    }
    /// Appends `struct fuse_attr`.
    fn attr(&mut self, a: &Attr) {
        let mut b = [0u8; Attr::SIZE];
        let longs = [a.ino, a.size, a.blocks, a.atime.sec as u64, a.mtime.sec as u64, a.ctime.sec as u64];
        for (chunk, v) in b.chunks_exact_mut(8).zip(longs) {
            chunk.copy_from_slice(&v.to_le_bytes());
        }
        let words = [
            a.atime.nsec,
            a.mtime.nsec,
            a.ctime.nsec,
            a.mode,
            a.nlink,
            a.uid,
            a.gid,
            old_dev(a.rdev_major, a.rdev_minor),
            a.blksize,
            if a.dax { ATTR_DAX } else { 0 },
        ];
        for (chunk, v) in b[48..].chunks_exact_mut(4).zip(words) {
            chunk.copy_from_slice(&v.to_le_bytes());
        }
        self.raw(&b);
    }
    /// Appends `struct fuse_attr_out`.
    fn attr_out(&mut self, a: &Attr, valid: std::time::Duration) {
        self.u64(valid.as_secs());
        self.u32(valid.subsec_nanos());
        self.u32(0);
        self.attr(a);
    }
    /// Appends `struct fuse_entry_out`.
    fn entry(&mut self, nodeid: u64, a: &Attr, valid: Valid) {
        self.u64(nodeid);
        self.u64(0);
        self.u64(valid.entry.as_secs());
        self.u64(valid.attr.as_secs());
        self.u32(valid.entry.subsec_nanos());
        self.u32(valid.attr.subsec_nanos());
        self.attr(a);
    }
    /// Appends `struct fuse_lk_out`. Whose lock it is, the guest cannot know.
    fn lock(&mut self, lock: Record) {
        self.u64(lock.start);
        self.u64(lock.end);
        self.u32(lock.kind);
        self.u32(0);
    }
    /// Appends `struct fuse_open_out`.
    fn open(&mut self, fh: u64, flags: u32) {
        self.u64(fh);
        self.u32(flags);
        self.u32(0);
    }
}

impl Put for Vec<u8> {
    fn raw(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// A device number as the kernel's `new_encode_dev` has it: 12 bits of major and 20 of minor.
pub fn old_dev(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

/// The way back from [`old_dev`].
pub fn split_dev(dev: u32) -> (u32, u32) {
    ((dev >> 8) & 0xfff, (dev & 0xff) | (dev >> 12) & 0xf_ff00)
}

/// Bytes of a directory entry with a name of `len` bytes, padding included, without its entry reply.
pub fn dirent_size(len: usize) -> usize {
    (24 + len).next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_protocol() {
        let mut out = Vec::new();
        out.attr(&Attr::default());
        assert_eq!(out.len(), 88);
        out.clear();
        out.entry(1, &Attr::default(), Valid::default());
        assert_eq!(out.len(), ENTRY_SIZE);
        out.clear();
        out.attr_out(&Attr::default(), std::time::Duration::ZERO);
        assert_eq!(out.len(), 104);
        assert_eq!((dirent_size(1), dirent_size(8), dirent_size(9)), (32, 32, 40));
    }

    #[test]
    fn device_numbers_come_back() {
        for (major, minor) in [(0, 0), (8, 1), (259, 300), (4095, 0xf_ffff)] {
            assert_eq!(split_dev(old_dev(major, minor)), (major, minor));
        }
    }

    #[test]
    fn an_error_is_negative_on_the_wire() {
        let head = out_header(16, 2, 7);
        assert_eq!(head[4..8], (-2i32).to_le_bytes());
    }
}
