//! A request of the guest, checked in form: what is here has lengths that fit and names that are one
//! path component. Whether node ids and handles mean anything is for the share to say.

use std::ffi::CStr;

use rustix::io::Errno;

use super::abi::{self, Fattr, InHeader, NAME_MAX, PATH_MAX, Time, XATTR_MAX, op};
use super::dax::Part;
use super::sys::locks::Record;

/// Largest request taken into memory, bulk data of WRITE aside: the biggest extended attribute, its
/// name and the fixed parts.
pub const BODY_MAX: usize = XATTR_MAX + NAME_MAX + 64;

/// Bytes of the fixed part of a WRITE after the head; the data follow.
pub const WRITE_IN: usize = 40;

/// A field or name that does not have the form it must have.
pub type Parsed<T> = Result<T, Errno>;

/// The part of a request after its head, read from front to back.
#[derive(Debug, Clone, Copy)]
pub struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    /// Starts at the front of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u32(&mut self) -> Parsed<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Parsed<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn bytes(&mut self, len: usize) -> Parsed<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(head)
    }

    fn text(&mut self) -> Parsed<&'a CStr> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = &self.0[text.count_bytes() + 1..];
        Ok(text)
    }

    /// A name that is one path component.
    fn name(&mut self) -> Parsed<&'a CStr> {
        let name = self.text()?;
        component(name.to_bytes())?;
        Ok(name)
    }
}

/// Whether `name` may be a directory entry: not empty, no slash, neither `.` nor `..`, not too long.
///
/// # Errors
/// EINVAL, or ENAMETOOLONG.
pub fn component(name: &[u8]) -> Parsed<()> {
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
        return Err(Errno::INVAL);
    }
    if name.len() > NAME_MAX {
        return Err(Errno::NAMETOOLONG);
    }
    Ok(())
}

/// SETATTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SetAttr {
    pub valid: Fattr,
    pub fh: Option<u64>,
    pub size: u64,
    pub atime: Time,
    pub mtime: Time,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// GETLK, SETLK, SETLKW.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Lock {
    pub fh: u64,
    pub owner: u64,
    pub record: Record,
    /// A BSD lock on the whole file.
    pub is_flock: bool,
    /// It is waited for.
    pub waits: bool,
}

/// The pairs of a BATCH_FORGET.
#[derive(Debug, Clone, Copy)]
pub struct Forgets<'a>(&'a [u8]);

impl Forgets<'_> {
    /// Node ids and how many lookups of each are given back.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        pairs(self.0)
    }
}

/// Pairs of long words.
fn pairs(bytes: &[u8]) -> impl Iterator<Item = (u64, u64)> + '_ {
    bytes.chunks_exact(16).filter_map(|pair| {
        let mut pair = Body::new(pair);
        Some((pair.u64().ok()?, pair.u64().ok()?))
    })
}

/// The pairs of a REMOVEMAPPING.
#[derive(Debug, Clone, Copy)]
pub struct Places<'a>(&'a [u8]);

impl Places<'_> {
    /// Where in the window, and how many bytes.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        pairs(self.0)
    }
}

/// A request. Field names are those of the protocol.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub enum Request<'a> {
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    Destroy,
    Forget {
        nlookup: u64,
    },
    BatchForget(Forgets<'a>),
    Interrupt,
    Lookup {
        name: &'a CStr,
    },
    GetAttr {
        fh: Option<u64>,
    },
    Statx {
        fh: Option<u64>,
    },
    SetAttr(SetAttr),
    ReadLink,
    Symlink {
        name: &'a CStr,
        target: &'a CStr,
    },
    MkNod {
        name: &'a CStr,
        mode: u32,
        rdev: u32,
    },
    MkDir {
        name: &'a CStr,
        mode: u32,
    },
    Unlink {
        name: &'a CStr,
    },
    RmDir {
        name: &'a CStr,
    },
    Rename {
        new_dir: u64,
        flags: u32,
        from: &'a CStr,
        to: &'a CStr,
    },
    Link {
        old: u64,
        name: &'a CStr,
    },
    Open {
        flags: u32,
        kill_priv: bool,
    },
    Create {
        name: &'a CStr,
        flags: u32,
        mode: u32,
        kill_priv: bool,
    },
    TmpFile {
        flags: u32,
        mode: u32,
    },
    Read {
        fh: u64,
        offset: u64,
        size: u32,
    },
    /// The data follow in the chain.
    Write {
        fh: u64,
        offset: u64,
        size: u32,
        /// All or an error.
        whole: bool,
        kill_priv: bool,
    },
    StatFs,
    Release {
        fh: u64,
    },
    Fsync {
        fh: u64,
        data_only: bool,
    },
    Flush {
        fh: u64,
        owner: u64,
    },
    GetLock(Lock),
    SetLock(Lock),
    SetXattr {
        name: &'a CStr,
        value: &'a [u8],
        flags: u32,
        kill_sgid: bool,
    },
    GetXattr {
        name: &'a CStr,
        size: u32,
    },
    ListXattr {
        size: u32,
    },
    RemoveXattr {
        name: &'a CStr,
    },
    OpenDir,
    ReadDir {
        fh: u64,
        offset: u64,
        size: u32,
        plus: bool,
    },
    ReleaseDir {
        fh: u64,
    },
    FsyncDir {
        fh: u64,
        data_only: bool,
    },
    Access {
        mask: u32,
    },
    Ioctl {
        cmd: u32,
        arg: u64,
    },
    Fallocate {
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    Lseek {
        fh: u64,
        offset: u64,
        whence: u32,
    },
    CopyFileRange {
        fh_in: u64,
        off_in: u64,
        fh_out: u64,
        off_out: u64,
        len: u64,
    },
    SetupMapping(Part),
    RemoveMapping(Places<'a>),
    SyncFs,
    /// Known or not, it is not served.
    Unserved,
}

impl<'a> Request<'a> {
    /// Takes apart what follows the head. `setxattr_ext`: the longer form of SETXATTR was agreed.
    ///
    /// # Errors
    /// EINVAL for a request that is too short or a name that is none; ENAMETOOLONG; E2BIG.
    pub fn parse(head: &InHeader, body: &'a [u8], setxattr_ext: bool) -> Parsed<Self> {
        let b = &mut Body::new(body);
        Ok(match head.opcode {
            op::INIT => Self::init(b)?,
            op::DESTROY => Self::Destroy,
            op::FORGET => Self::Forget { nlookup: b.u64()? },
            op::BATCH_FORGET => Self::batch_forget(b)?,
            op::INTERRUPT => Self::Interrupt,
            op::LOOKUP => Self::Lookup { name: b.name()? },
            op::GETATTR | op::STATX => {
                let (flags, _, fh) = (b.u32()?, b.u32()?, b.u64()?);
                let fh = (flags & abi::GETATTR_FH != 0).then_some(fh);
                if head.opcode == op::STATX { Self::Statx { fh } } else { Self::GetAttr { fh } }
            }
            op::SETATTR => Self::set_attr(b)?,
            op::READLINK => Self::ReadLink,
            op::SYMLINK => {
                let (name, target) = (b.name()?, b.text()?);
                match target.count_bytes() {
                    0 => return Err(Errno::NOENT),
                    n if n > PATH_MAX => return Err(Errno::NAMETOOLONG),
                    _ => Self::Symlink { name, target },
                }
            }
            op::MKNOD => {
                let (mode, rdev, _umask, _) = (b.u32()?, b.u32()?, b.u32()?, b.u32()?);
                Self::MkNod { name: b.name()?, mode, rdev }
            }
            op::MKDIR => {
                let (mode, _umask) = (b.u32()?, b.u32()?);
                Self::MkDir { name: b.name()?, mode }
            }
            op::UNLINK => Self::Unlink { name: b.name()? },
            op::RMDIR => Self::RmDir { name: b.name()? },
            op::RENAME => Self::Rename { new_dir: b.u64()?, flags: 0, from: b.name()?, to: b.name()? },
            op::RENAME2 => {
                let (new_dir, flags, _) = (b.u64()?, b.u32()?, b.u32()?);
                Self::Rename { new_dir, flags, from: b.name()?, to: b.name()? }
            }
            op::LINK => Self::Link { old: b.u64()?, name: b.name()? },
            op::OPEN => {
                let (flags, more) = (b.u32()?, b.u32()?);
                Self::Open { flags, kill_priv: more & abi::OPEN_KILL_SUIDGID != 0 }
            }
            op::CREATE => {
                let (flags, mode, _umask, more) = (b.u32()?, b.u32()?, b.u32()?, b.u32()?);
                Self::Create { name: b.name()?, flags, mode, kill_priv: more & abi::OPEN_KILL_SUIDGID != 0 }
            }
            op::TMPFILE => Self::TmpFile { flags: b.u32()?, mode: b.u32()? },
            op::READ => Self::Read { fh: b.u64()?, offset: b.u64()?, size: b.u32()? },
            op::WRITE => {
                let (fh, offset, size, flags) = (b.u64()?, b.u64()?, b.u32()?, b.u32()?);
                let (whole, kill_priv) = (abi::WRITE_CACHE, abi::WRITE_KILL_SUIDGID);
                let is = |flag| flags & flag != 0;
                Self::Write { fh, offset, size, whole: is(whole), kill_priv: is(kill_priv) }
            }
            op::SETXATTR => Self::set_xattr(b, setxattr_ext)?,
            op::GETXATTR => {
                let (size, _) = (b.u32()?, b.u32()?);
                Self::GetXattr { name: b.text()?, size }
            }
            op::LISTXATTR => Self::ListXattr { size: b.u32()? },
            op::REMOVEXATTR => Self::RemoveXattr { name: b.text()? },
            op::ACCESS => Self::Access { mask: b.u32()? },
            op::IOCTL => {
                let (_fh, _flags, cmd, arg) = (b.u64()?, b.u32()?, b.u32()?, b.u64()?);
                Self::Ioctl { cmd, arg }
            }
            op::SETUPMAPPING => {
                let (_fh, offset, len, flags, at) = (b.u64()?, b.u64()?, b.u64()?, b.u64()?, b.u64()?);
                Self::SetupMapping(Part { at, len, offset, writable: flags & abi::SETUPMAPPING_WRITE != 0 })
            }
            op::REMOVEMAPPING => {
                let count = b.u32()?;
                Self::RemoveMapping(Places(Self::list(b, count)?))
            }
            op::STATFS => Self::StatFs,
            op::SYNCFS => Self::SyncFs,
            op::OPENDIR => Self::OpenDir,
            _ => Self::on_handle(head.opcode, b)?,
        })
    }

    /// Requests that begin with a handle.
    fn on_handle(opcode: u32, b: &mut Body<'a>) -> Parsed<Self> {
        Ok(match opcode {
            op::RELEASE => Self::Release { fh: b.u64()? },
            op::RELEASEDIR => Self::ReleaseDir { fh: b.u64()? },
            op::FLUSH => {
                let (fh, _, _) = (b.u64()?, b.u32()?, b.u32()?);
                Self::Flush { fh, owner: b.u64()? }
            }
            op::GETLK => Self::GetLock(Self::lock(b, false)?),
            op::SETLK | op::SETLKW => Self::SetLock(Self::lock(b, opcode == op::SETLKW)?),
            op::FSYNC => Self::Fsync { fh: b.u64()?, data_only: b.u32()? & abi::FSYNC_FDATASYNC != 0 },
            op::FSYNCDIR => Self::FsyncDir { fh: b.u64()?, data_only: b.u32()? & abi::FSYNC_FDATASYNC != 0 },
            op::READDIR | op::READDIRPLUS => {
                let (fh, offset, size) = (b.u64()?, b.u64()?, b.u32()?);
                Self::ReadDir { fh, offset, size, plus: opcode == op::READDIRPLUS }
            }
            op::FALLOCATE => {
                Self::Fallocate { fh: b.u64()?, offset: b.u64()?, length: b.u64()?, mode: b.u32()? }
            }
            op::LSEEK => Self::Lseek { fh: b.u64()?, offset: b.u64()?, whence: b.u32()? },
            op::COPY_FILE_RANGE => {
                let (fh_in, off_in, _node) = (b.u64()?, b.u64()?, b.u64()?);
                let (fh_out, off_out, len, flags) = (b.u64()?, b.u64()?, b.u64()?, b.u64()?);
                if flags != 0 {
                    return Err(Errno::INVAL);
                }
                Self::CopyFileRange { fh_in, off_in, fh_out, off_out, len }
            }
            _ => Self::Unserved,
        })
    }

    fn lock(b: &mut Body<'a>, waits: bool) -> Parsed<Lock> {
        let (fh, owner) = (b.u64()?, b.u64()?);
        let (start, end, kind, _pid) = (b.u64()?, b.u64()?, b.u32()?, b.u32()?);
        let is_flock = b.u32()? & abi::LK_FLOCK != 0;
        Ok(Lock { fh, owner, record: Record { kind, start, end }, is_flock, waits })
    }

    fn init(b: &mut Body<'a>) -> Parsed<Self> {
        let (major, minor, max_readahead, low) = (b.u32()?, b.u32()?, b.u32()?, b.u32()?);
        let mut flags = u64::from(low);
        if flags & abi::InitFlags::INIT_EXT.bits() != 0 {
            flags |= u64::from(b.u32()?) << 32;
        }
        Ok(Self::Init { major, minor, max_readahead, flags })
    }

    fn batch_forget(b: &mut Body<'a>) -> Parsed<Self> {
        let (count, _) = (b.u32()?, b.u32()?);
        Ok(Self::BatchForget(Forgets(Self::list(b, count)?)))
    }

    /// So many pairs of long words.
    fn list(b: &mut Body<'a>, count: u32) -> Parsed<&'a [u8]> {
        let len = usize::try_from(count).ok().and_then(|n| n.checked_mul(16)).ok_or(Errno::INVAL)?;
        b.bytes(len)
    }

    fn set_attr(b: &mut Body<'a>) -> Parsed<Self> {
        let valid = Fattr::from_bits_retain(b.u32()?);
        let (_, fh, size, _owner) = (b.u32()?, b.u64()?, b.u64()?, b.u64()?);
        let (atime, mtime, _ctime) = (b.u64()?, b.u64()?, b.u64()?);
        let (atime_ns, mtime_ns, _ctime_ns) = (b.u32()?, b.u32()?, b.u32()?);
        let (mode, _, uid, gid) = (b.u32()?, b.u32()?, b.u32()?, b.u32()?);
        Ok(Self::SetAttr(SetAttr {
            valid,
            fh: valid.contains(Fattr::FH).then_some(fh),
            size,
            atime: Time { sec: atime as i64, nsec: atime_ns },
            mtime: Time { sec: mtime as i64, nsec: mtime_ns },
            mode,
            uid,
            gid,
        }))
    }

    fn set_xattr(b: &mut Body<'a>, ext: bool) -> Parsed<Self> {
        let (size, flags) = (b.u32()?, b.u32()?);
        let more = if ext { (b.u32()?, b.u32()?).0 } else { 0 };
        let name = b.text()?;
        let size = size as usize;
        if size > XATTR_MAX {
            return Err(Errno::TOOBIG);
        }
        Ok(Self::SetXattr {
            name,
            value: b.bytes(size)?,
            flags,
            kill_sgid: more & abi::SETXATTR_ACL_KILL_SGID != 0,
        })
    }

    /// Whether the request is answered at all.
    pub fn wants_reply(opcode: u32) -> bool {
        !matches!(opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT)
    }

    /// Whether the request would change the share.
    pub fn changes(&self) -> bool {
        match self {
            Self::SetAttr(_)
            | Self::Symlink { .. }
            | Self::MkNod { .. }
            | Self::MkDir { .. }
            | Self::Unlink { .. }
            | Self::RmDir { .. }
            | Self::Rename { .. }
            | Self::Link { .. }
            | Self::Create { .. }
            | Self::TmpFile { .. }
            | Self::Write { .. }
            | Self::SetXattr { .. }
            | Self::RemoveXattr { .. }
            | Self::Fallocate { .. }
            | Self::CopyFileRange { .. } => true,
            Self::Open { flags, .. } => opens_for_writing(*flags),
            Self::Access { mask } => mask & 2 != 0,
            _ => false,
        }
    }

    /// Whether the host must clear set-id bits as it would for a caller without privilege.
    pub fn kills_priv(&self) -> bool {
        match self {
            Self::Write { kill_priv, .. } | Self::Open { kill_priv, .. } | Self::Create { kill_priv, .. } => {
                *kill_priv
            }
            Self::SetAttr(s) => s.valid.contains(Fattr::KILL_SUIDGID) && s.valid.contains(Fattr::SIZE),
            Self::SetXattr { kill_sgid, .. } => *kill_sgid,
            _ => false,
        }
    }
}

/// Whether open flags ask for more than reading.
pub fn opens_for_writing(flags: u32) -> bool {
    let flags = flags as i32;
    flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(opcode: u32) -> InHeader {
        InHeader { len: 0, opcode, unique: 1, nodeid: 1, uid: 0, gid: 0 }
    }

    #[test]
    fn names_are_single_components() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"/", b"../x", b"a\0b"] {
            assert_eq!(component(bad), Err(Errno::INVAL), "{bad:?}");
        }
        assert_eq!(component(&[b'x'; 256]), Err(Errno::NAMETOOLONG));
        for good in [&b"a"[..], b"...", b".x", b"\xff\xfe", &[b'x'; 255]] {
            assert_eq!(component(good), Ok(()), "{good:?}");
        }
    }

    #[test]
    fn a_name_without_an_end_is_refused() {
        assert_eq!(Request::parse(&head(op::LOOKUP), b"abc", false).err(), Some(Errno::INVAL));
    }

    #[test]
    fn a_count_beyond_the_request_is_refused() {
        let mut body = u32::MAX.to_le_bytes().to_vec();
        body.extend([0; 4 + 64]);
        assert_eq!(Request::parse(&head(op::BATCH_FORGET), &body, false).err(), Some(Errno::INVAL));
    }

    #[test]
    fn a_value_longer_than_the_request_is_refused() {
        let mut body = 100u32.to_le_bytes().to_vec();
        body.extend([0; 4]);
        body.extend(b"user.a\0short");
        assert_eq!(Request::parse(&head(op::SETXATTR), &body, false).err(), Some(Errno::INVAL));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_parsed_or_refused(opcode in 0u32..60, body in proptest::collection::vec(any::<u8>(), 0..200), ext: bool) {
            let parsed = Request::parse(&head(opcode), &body, ext);
            if let Ok(Request::Lookup { name } | Request::Unlink { name } | Request::MkDir { name, .. }) = parsed {
                prop_assert!(component(name.to_bytes()).is_ok());
            }
            if let Ok(Request::BatchForget(list)) = parsed {
                prop_assert!(list.iter().count() * 16 <= body.len());
            }
        }
    }
}
