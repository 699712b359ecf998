//! Images that have a format, by the crate imago.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::file::File as Storage;
use imago::format::builder::FormatDriverBuilder as Builder;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::vmdk::Vmdk;
use imago::{DenyImplicitOpenGate, FormatAccess, StorageOpenOptions};

use super::image::{Image, SECTOR, open_file};
use super::sys::Buffers;
use super::{BlockError, BlockSpec, DiskFormat};

/// Bytes copied at a time: imago works on slices, which guest memory is never lent as.
const CHUNK: usize = 1 << 20;
/// Most files of a backing chain.
const MAX_CHAIN: usize = 64;

type Access = FormatAccess<Storage>;

/// A qcow2 or VMDK image.
pub struct Formatted {
    /// Held exclusively where mappings go away (discard), shared otherwise.
    access: RwLock<Access>,
    size: u64,
    read_only: bool,
}

impl Formatted {
    /// Opens the image in `file`, and its backing chain if that is allowed.
    pub fn open(spec: &BlockSpec, file: std::fs::File) -> Result<Self, BlockError> {
        let chain = Chain { direct: spec.direct_io, allowed: spec.backing };
        let access = chain.open(&spec.path, file, spec.format, !spec.read_only, 1)?;
        let size = access.size() / SECTOR * SECTOR;
        Ok(Self { access: RwLock::new(access), size, read_only: spec.read_only })
    }

    fn shared(&self) -> io::Result<RwLockReadGuard<'_, Access>> {
        self.access.read().map_err(|_| broken())
    }

    fn exclusive(&self) -> io::Result<RwLockWriteGuard<'_, Access>> {
        self.access.write().map_err(|_| broken())
    }
}

/// A panic in the middle of a change of the image: nothing more is done to it.
fn broken() -> io::Error {
    io::Error::other("the image is not used any more after a mistake in its driver")
}

/// How the files of a chain are opened.
struct Chain {
    direct: bool,
    /// Whether the image may name other files.
    allowed: bool,
}

impl Chain {
    fn open(
        &self,
        path: &Path,
        file: std::fs::File,
        format: DiskFormat,
        writable: bool,
        depth: usize,
    ) -> Result<Access, BlockError> {
        let fail = |source| BlockError::Format { path: path.to_owned(), format, source };
        let options = StorageOpenOptions::new().filename(path).write(writable).direct(self.direct);
        let storage = Storage::from_open_file(file, options).map_err(fail)?;
        Ok(match format {
            DiskFormat::Raw => FormatAccess::new(Raw::open_image(storage, writable).map_err(fail)?),
            DiskFormat::Vmdk => {
                let mut image = Vmdk::<Storage>::open_image(storage, false).map_err(fail)?;
                let gate = Extents { dir: directory(path), direct: self.direct };
                image.open_implicit_dependencies_gated(gate).map_err(fail)?;
                FormatAccess::new(image)
            }
            DiskFormat::Qcow2 => {
                let mut image = Qcow2::<Storage>::open_image(storage, writable).map_err(fail)?;
                image.set_backing(self.backing(path, &image, depth)?);
                // An external data file is left to fail: its name would come from the image as well.
                image.open_implicit_dependencies_gated(DenyImplicitOpenGate::default()).map_err(fail)?;
                FormatAccess::new(image)
            }
        })
    }

    /// Opens what the image is based on. Its format is what the image says, never a guess.
    fn backing(
        &self,
        path: &Path,
        image: &Qcow2<Storage>,
        depth: usize,
    ) -> Result<Option<Access>, BlockError> {
        let Some(name) = image.implicit_backing_file().cloned() else { return Ok(None) };
        if !self.allowed {
            return Err(BlockError::Backing { path: path.to_owned(), file: name });
        }
        if depth >= MAX_CHAIN {
            return Err(BlockError::Chain { path: path.to_owned(), limit: MAX_CHAIN });
        }
        let format = match image.implicit_backing_format().map(String::as_str) {
            Some("raw" | "file") => DiskFormat::Raw,
            Some("qcow2") => DiskFormat::Qcow2,
            Some("vmdk") => DiskFormat::Vmdk,
            _ => return Err(BlockError::BackingFormat { path: path.to_owned(), file: name }),
        };
        let base = directory(path).join(name.strip_prefix("file:").unwrap_or(&name));
        let file = open_file(&base, false, self.direct)?;
        self.open(&base, file, format, false, depth + 1).map(Some)
    }
}

fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Opens the extents of a VMDK image: files beside it and nothing else.
struct Extents {
    dir: PathBuf,
    direct: bool,
}

impl ImplicitOpenGate<Storage> for Extents {
    fn open_format<F: Builder<Storage>>(&mut self, _builder: F) -> io::Result<Access> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Storage> {
        let path = options.get_filename().unwrap_or(Path::new("")).to_owned();
        if directory(&path).canonicalize()? != self.dir.canonicalize()? {
            let text = format!("extent {} is not in the directory of its descriptor", path.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let file = open_file(&path, false, self.direct).map_err(io::Error::other)?;
        Storage::from_open_file(file, options.write(false).direct(self.direct))
    }
}

impl Image for Formatted {
    fn size(&self) -> u64 {
        self.size
    }

    fn refresh(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }

    fn block_size(&self) -> u32 {
        SECTOR as u32
    }

    fn read(&self, buffers: &mut Buffers, mut offset: u64) -> io::Result<()> {
        let access = self.shared()?;
        let mut chunk = vec![0; buffers.left().min(CHUNK)];
        while buffers.left() > 0 {
            let n = buffers.left().min(CHUNK);
            access.read(&mut chunk[..n], offset)?;
            buffers.store(&chunk[..n]);
            offset += n as u64;
        }
        Ok(())
    }

    fn write(&self, buffers: &mut Buffers, mut offset: u64) -> io::Result<()> {
        let access = self.shared()?;
        let mut chunk = vec![0; buffers.left().min(CHUNK)];
        while buffers.left() > 0 {
            let n = buffers.load(&mut chunk);
            access.write(&chunk[..n], offset)?;
            offset += n as u64;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let access = self.shared()?;
        access.flush()?;
        access.sync()
    }

    fn settle(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.shared()?.flush() }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.exclusive()?.discard_to_any(offset, len) {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            return self.exclusive()?.discard_to_zero(offset, len);
        }
        self.shared()?.write_zeroes(offset, len)
    }
}
