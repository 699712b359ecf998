//! Bytes that a guest will find in its memory, wherever they are now.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// An immutable run of bytes: a file, or memory.
#[derive(Clone)]
pub enum Data {
    /// A regular file of this length.
    File(Arc<File>, u64),
    /// Bytes of our own.
    Bytes(Arc<[u8]>),
    /// Bytes of a loaded library, which stays loaded.
    Static(&'static [u8]),
}

impl std::fmt::Debug for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self {
            Self::File(..) => "file",
            Self::Bytes(_) => "bytes",
            Self::Static(_) => "library",
        };
        write!(f, "{kind} of {} bytes", self.len())
    }
}

impl From<Vec<u8>> for Data {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes.into())
    }
}

impl Data {
    /// Opens a regular file.
    ///
    /// # Errors
    /// The host's reason, or that it is no regular file.
    pub fn open(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;
        // Without O_NONBLOCK opening a FIFO would wait for a writer.
        let flags = rustix::fs::OFlags::NONBLOCK.bits();
        let file = File::options().read(true).custom_flags(flags as i32).open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Self::File(Arc::new(file), meta.len()))
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::File(_, len) => *len,
            Self::Bytes(b) => b.len() as u64,
            Self::Static(b) => b.len() as u64,
        }
    }

    fn memory(&self) -> Option<&[u8]> {
        match self {
            Self::File(..) => None,
            Self::Bytes(b) => Some(b),
            Self::Static(b) => Some(b),
        }
    }

    /// Fills `into` from `offset`.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] past the end, or the host's reason.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match (self, self.memory()) {
            (Self::File(file, _), _) => file.read_exact_at(into, offset),
            (_, Some(bytes)) => {
                let from = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)?.get(..into.len()));
                into.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// `N` bytes from `offset`, `None` past the end or when they cannot be read.
    pub fn array<const N: usize>(&self, offset: u64) -> Option<[u8; N]> {
        let mut out = [0u8; N];
        self.read_at(offset, &mut out).ok().map(|()| out)
    }

    /// All of it, as bytes in memory.
    ///
    /// # Errors
    /// The host's reason.
    pub fn load(&self) -> io::Result<Self> {
        let Self::File(_, len) = self else {
            return Ok(self.clone());
        };
        let len = usize::try_from(*len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        bytes.resize(len, 0);
        self.read_at(0, &mut bytes)?;
        Ok(bytes.into())
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, when they are in memory.
    pub fn bytes(&self) -> &[u8] {
        self.memory().unwrap_or_default()
    }
}

/// A run of bytes and the guest physical address where it belongs.
#[derive(Debug, Clone)]
pub struct Segment {
    /// Guest physical address.
    pub at: u64,
    /// Where the bytes are.
    pub data: Data,
    /// First byte within `data`.
    pub offset: u64,
    /// Bytes to take.
    pub len: u64,
    /// Bytes it covers in the guest; those past `len` are zero.
    pub room: u64,
}

impl Segment {
    /// First address behind it, unless that is past the address space.
    pub fn end(&self) -> Option<u64> {
        self.at.checked_add(self.room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_end_at_the_end() {
        let d = Data::from(vec![1, 2, 3]);
        assert_eq!(d.array::<2>(1), Some([2, 3]));
        assert_eq!(d.array::<2>(2), None);
        assert_eq!(d.array::<1>(u64::MAX), None);
    }

    #[test]
    fn only_regular_files_are_opened() {
        assert_eq!(Data::open(Path::new("/dev/null")).unwrap_err().to_string(), "not a regular file");
        assert!(Data::open(Path::new("/")).is_err());
        let f = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(f.path(), b"abc").unwrap();
        let d = Data::open(f.path()).unwrap();
        assert_eq!((d.len(), d.array::<3>(0)), (3, Some(*b"abc")));
        assert_eq!(d.load().unwrap().bytes(), b"abc");
    }
}
