//! Guest memory: host mappings, volatile access on checked ranges, sharing through a memfd.
//!
//! A [`Mapping`] is a range of this process's address space that a guest sees somewhere in its
//! physical address space. [`GuestMemory`] is the set of those mappings by guest physical address;
//! devices reach the guest through it and never through slices.

mod huge;
mod release;
mod window;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
pub use vm_memory::bitmap::BitmapSlice;
pub use vm_memory::{
    Address, ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryRegion, GuestUsize, Le16, Le32, Le64, MmapRegion, ReadVolatile, VolatileMemory,
    VolatileMemoryError, VolatileSlice, WriteVolatile,
};

pub use huge::HUGE_PAGE;
pub use release::{ReleaseError, release};
pub use window::Window;

/// All memory of a guest by guest physical address. Cloning shares the mappings.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
/// One mapping at its guest physical address.
pub type GuestRegion = vm_memory::GuestRegionMmap<()>;

/// What can go wrong when guest memory is set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host refused an anonymous shared file of this size.
    #[error("cannot create a memory file of {size} bytes: {source}")]
    Memfd {
        /// Bytes asked for.
        size: u64,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The host refused the mapping.
    #[error("cannot map {size} bytes of {what}: {source}")]
    Map {
        /// Bytes asked for.
        size: usize,
        /// What was to be mapped.
        what: &'static str,
        /// The host's answer.
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The host has too few huge pages.
    #[error(transparent)]
    HugePages(#[from] huge::HugePagesError),
    /// The range ends past the file, where touching it would end this process.
    #[error("{size} bytes at {offset:#x} end past a file of {len} bytes")]
    PastEnd {
        /// First byte of the range.
        offset: u64,
        /// Its length.
        size: usize,
        /// Length of the file.
        len: u64,
    },
    /// Two mappings overlap, or one ends past the address space.
    #[error("guest memory layout at {at:#x}: {why}")]
    Layout {
        /// Guest physical address of the offending region.
        at: u64,
        /// What is wrong with it.
        why: String,
    },
}

/// A range of host memory that can be shown to a guest. Unmapped when the last reference goes.
#[derive(Debug, Clone)]
pub struct Mapping {
    region: Arc<MmapRegion<()>>,
    /// It belongs to a [`Window`].
    changes: bool,
}

/// A file in memory that backs guest RAM and can be passed to another process.
#[derive(Debug, Clone)]
pub struct Memfd {
    file: Arc<File>,
    size: u64,
    huge: bool,
}

impl Memfd {
    /// Creates a sparse file of `size` bytes; pages are allocated when first touched.
    ///
    /// # Errors
    /// [`Error::Memfd`] with the host's reason.
    pub fn new(size: u64) -> Result<Self, Error> {
        Self::create(size, false)
    }

    /// Creates a file of `size` bytes, a multiple of [`HUGE_PAGE`], of huge pages that the administrator has set
    /// aside (Linux: Documentation/admin-guide/mm/hugetlbpage.rst). They are reserved when it is mapped.
    ///
    /// # Errors
    /// [`Error::Memfd`] with the host's reason.
    pub fn of_huge_pages(size: u64) -> Result<Self, Error> {
        Self::create(size, true)
    }

    fn create(size: u64, huge: bool) -> Result<Self, Error> {
        let fail = |e: rustix::io::Errno| Error::Memfd { size, source: e.into() };
        let pages = if huge { MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { MemfdFlags::empty() };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | pages;
        let fd: OwnedFd = memfd_create("krun-ram", flags).map_err(fail)?;
        ftruncate(&fd, size).map_err(fail)?;
        // A process that it is passed to could make it shorter, and then touching the guest's memory would end this one.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(fail)?;
        Ok(Self { file: Arc::new(File::from(fd)), size, huge })
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file itself, to be passed on.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the host the pages of `len` bytes at `offset` back; they are zero from then on.
    ///
    /// # Errors
    /// The host's reason.
    pub fn punch(&self, offset: u64, len: u64) -> std::io::Result<()> {
        Ok(fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?)
    }

    /// Maps `size` bytes from `offset`, shared.
    ///
    /// # Errors
    /// [`Error::PastEnd`] when the range ends past the file, [`Error::HugePages`] when the host lacks those,
    /// [`Error::Map`] when it refuses otherwise.
    pub fn map(&self, offset: u64, size: usize) -> Result<Mapping, Error> {
        check_range(offset, size, self.size)?;
        let at = FileOffset::from_arc(Arc::clone(&self.file), offset);
        if !self.huge {
            return Mapping::build(size, "guest RAM", Some(at), libc::MAP_SHARED | libc::MAP_NORESERVE);
        }
        // Reserved now: a page that cannot be had later would end this process.
        let mapping = Mapping::build_with(size, "guest RAM in huge pages", Some(at), libc::MAP_SHARED, true);
        mapping.map_err(|e| huge::shortage(size as u64).map_or(e, Error::HugePages))
    }
}

fn check_range(offset: u64, size: usize, len: u64) -> Result<(), Error> {
    match offset.checked_add(size as u64) {
        Some(end) if end <= len => Ok(()),
        _ => Err(Error::PastEnd { offset, size, len }),
    }
}

impl Mapping {
    fn build(size: usize, what: &'static str, file: Option<FileOffset>, flags: i32) -> Result<Self, Error> {
        Self::build_with(size, what, file, flags, false)
    }

    fn build_with(
        size: usize,
        what: &'static str,
        file: Option<FileOffset>,
        flags: i32,
        huge: bool,
    ) -> Result<Self, Error> {
        let mut builder = vm_memory::mmap::MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .with_hugetlbfs(huge);
        if let Some(file) = file {
            builder = builder.with_file_offset(file);
        }
        let region = builder.build().map_err(|source| Error::Map { size, what, source })?;
        Ok(Self { region: Arc::new(region), changes: false })
    }

    /// Anonymous zeroed memory that this process alone sees.
    ///
    /// # Errors
    /// [`Error::Map`] with the host's reason.
    pub fn anonymous(size: usize) -> Result<Self, Error> {
        Self::build(
            size,
            "anonymous memory",
            None,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        )
    }

    /// A copy-on-write view of `size` bytes of `file` from the page-aligned `offset`: nothing is
    /// read until touched and nothing is written back.
    ///
    /// # Errors
    /// [`Error::PastEnd`] when the range ends past the file, [`Error::Map`] when the host refuses.
    pub fn copy_on_write(file: File, offset: u64, size: usize) -> Result<Self, Error> {
        let len = file.metadata().map_or(0, |m| m.len());
        check_range(offset, size, len)?;
        Self::build(
            size,
            "a file",
            Some(FileOffset::new(file, offset)),
            libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        )
    }

    /// First byte in this process. Valid while this value or a clone lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.region.as_ptr()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.region.size()
    }

    /// Whether it belongs to a [`Window`]: reading or writing it directly may end this process.
    pub fn may_change(&self) -> bool {
        self.changes
    }

    /// The 32 bits at `offset`, to be shared with other threads and with a guest; `None` when `offset` is
    /// no multiple of 4, or they end past the mapping.
    pub fn word(&self, offset: usize) -> Option<&AtomicU32> {
        self.region.get_atomic_ref(offset).ok()
    }

    /// Whether the mapping is empty (never, in practice).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The file behind it and the offset of the first byte; `None` for anonymous memory.
    pub fn file_offset(&self) -> Option<&FileOffset> {
        self.region.file_offset()
    }

    /// The mapping as seen at `at` in guest physical space.
    ///
    /// # Errors
    /// [`Error::Layout`] when it would end past the address space.
    pub fn at(&self, at: GuestAddress) -> Result<GuestRegion, Error> {
        GuestRegion::with_arc(Arc::clone(&self.region), at)
            .ok_or_else(|| Error::Layout { at: at.0, why: "ends past the 64-bit address space".into() })
    }
}

/// Joins mappings, sorted by address, into one guest memory.
///
/// # Errors
/// [`Error::Layout`] when they overlap or are out of order.
pub fn assemble(regions: &[(GuestAddress, Mapping)]) -> Result<GuestMemory, Error> {
    let first = regions.first().map_or(0, |r| r.0.0);
    let list = regions.iter().map(|(at, m)| m.at(*at)).collect::<Result<Vec<_>, _>>()?;
    GuestMemory::from_regions(list).map_err(|e| Error::Layout { at: first, why: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memfd_mappings_share_pages() {
        let fd = Memfd::new(8192).unwrap();
        let whole = assemble(&[(GuestAddress(0), fd.map(0, 8192).unwrap())]).unwrap();
        let upper = assemble(&[(GuestAddress(0x10_0000), fd.map(4096, 4096).unwrap())]).unwrap();
        whole.write_obj(7u32, GuestAddress(4100)).unwrap();
        assert_eq!(upper.read_obj::<u32>(GuestAddress(0x10_0004)).unwrap(), 7);
    }

    #[test]
    fn a_memfd_keeps_its_length() {
        // Not every host has huge pages; none need to be set aside for a file that is not mapped.
        let huge = Memfd::of_huge_pages(HUGE_PAGE).ok();
        for fd in [Some(Memfd::new(HUGE_PAGE).unwrap()), huge].into_iter().flatten() {
            for len in [0, 2 * HUGE_PAGE] {
                assert_eq!(ftruncate(fd.file(), len), Err(rustix::io::Errno::PERM), "huge: {}", fd.huge);
            }
            let seals = fcntl_add_seals(fd.file(), SealFlags::WRITE);
            assert_eq!(seals, Err(rustix::io::Errno::PERM));
            assert_eq!(fd.file().metadata().unwrap().len(), HUGE_PAGE);
        }
    }

    #[test]
    fn a_mapping_past_the_file_is_refused() {
        assert!(matches!(Memfd::new(4096).unwrap().map(4096, 4096), Err(Error::PastEnd { .. })));
    }

    #[test]
    fn words_are_those_of_the_memory() {
        use std::sync::atomic::Ordering;
        let m = Mapping::anonymous(4096).unwrap();
        m.word(4092).unwrap().store(7, Ordering::SeqCst);
        let memory = assemble(&[(GuestAddress(0), m.clone())]).unwrap();
        assert_eq!(memory.read_obj::<u32>(GuestAddress(4092)).unwrap(), 7);
        assert!(m.word(4093).is_none() && m.word(4096).is_none() && m.word(usize::MAX - 3).is_none());
    }

    #[test]
    fn overlap_is_refused() {
        let m = Mapping::anonymous(8192).unwrap();
        let r = assemble(&[(GuestAddress(0), m.clone()), (GuestAddress(4096), m)]);
        assert!(matches!(r, Err(Error::Layout { .. })));
    }

    #[test]
    fn copy_on_write_leaves_the_file_alone() {
        use std::io::{Seek, SeekFrom, Write};
        let mut f = File::from(memfd_create("t", MemfdFlags::CLOEXEC).unwrap());
        f.write_all(&[1u8; 4096]).unwrap();
        let m = Mapping::copy_on_write(f.try_clone().unwrap(), 0, 4096).unwrap();
        let g = assemble(&[(GuestAddress(0), m)]).unwrap();
        g.write_obj(9u8, GuestAddress(3)).unwrap();
        f.seek(SeekFrom::Start(0)).unwrap();
        let mut back = [0u8; 4];
        std::io::Read::read_exact(&mut f, &mut back).unwrap();
        assert_eq!(back, [1; 4]);
    }
}
