//! Giving guest memory back to the host.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::{GuestMemory, GuestRegion};

/// Bytes of the pages that this host frees at once.
const PAGE: u64 = 4096;

/// Why memory was not given back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReleaseError {
    /// Part of the range is no memory of the guest. Nothing was released.
    #[error("{len:#x} bytes at {at:#x} are not all guest memory")]
    NotMemory {
        /// First address.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// The host's refusal.
    #[error("cannot give {len:#x} bytes at {at:#x} back to the host: {source}")]
    Host {
        /// First address.
        at: u64,
        /// Bytes.
        len: u64,
        /// The host's answer.
        source: io::Error,
    },
}

/// Gives the whole pages within `len` bytes at `at` back to the host; returns how many bytes those are.
///
/// The guest may go on using them: what it finds there is zeroes or, in a range that was mapped
/// copy-on-write from a file, the file's contents. Pages that the range covers only in part stay, and so do those
/// of memory in huge pages set aside by the administrator.
///
/// # Errors
/// [`ReleaseError`]; memory that the host does not take back (it is locked, say) is as it was.
pub fn release(memory: &GuestMemory, at: GuestAddress, len: u64) -> Result<u64, ReleaseError> {
    let not_memory = || ReleaseError::NotMemory { at: at.0, len };
    let end = at.checked_add(len).ok_or_else(not_memory)?.0;
    let mut parts = Vec::new();
    let mut next = at.0;
    while next < end {
        let region = memory.find_region(GuestAddress(next)).ok_or_else(not_memory)?;
        let stop = end.min(region.start_addr().0 + region.len());
        parts.push((region, next, stop));
        next = stop;
    }
    let mut released = 0;
    for (region, from, to) in parts {
        let host = |source| ReleaseError::Host { at: from, len: to - from, source };
        released += release_in(region, from, to).map_err(host)?;
    }
    Ok(released)
}

/// The whole pages of the range from `from` to `to`, which lies in `region`.
fn release_in(region: &GuestRegion, from: u64, to: u64) -> io::Result<u64> {
    // Regions start at whole pages, in the guest and in the file.
    let start = region.start_addr().0;
    let from = (from - start).next_multiple_of(PAGE);
    let to = (to - start) / PAGE * PAGE;
    // A huge page that is given back is reserved no more; if others take it, the guest's next access would end
    // this process.
    if from >= to || region.is_hugetlbfs() == Some(true) {
        return Ok(0);
    }
    let len = to - from;
    match region.file_offset() {
        Some(file) if region.flags() & libc::MAP_SHARED != 0 => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file.file().as_fd(), flags, file.start() + from, len)?;
        }
        _ => {
            // SAFETY: the range lies within the region's mapping, which the region keeps alive. Guest memory is
            // only ever read and written through volatile or atomic accesses, so that its contents may change.
            let done = unsafe {
                libc::madvise(region.as_ptr().add(from as usize).cast(), len as usize, libc::MADV_DONTNEED)
            };
            if done != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bytes, Mapping, Memfd, assemble};
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    const BASE: GuestAddress = GuestAddress(0x10_0000);

    fn filled(mapping: Mapping) -> GuestMemory {
        let len = mapping.len();
        let memory = assemble(&[(BASE, mapping)]).unwrap();
        memory.write_slice(&vec![7; len], BASE).unwrap();
        memory
    }

    fn byte(memory: &GuestMemory, offset: u64) -> u8 {
        memory.read_obj(GuestAddress(BASE.0 + offset)).unwrap()
    }

    #[test]
    fn whole_pages_of_private_memory_become_zero() {
        let memory = filled(Mapping::anonymous(0x4000).unwrap());
        assert_eq!(release(&memory, GuestAddress(BASE.0 + 1), 0x2fff).unwrap(), 0x2000);
        assert_eq!([0, 0xfff, 0x1000, 0x2fff, 0x3000].map(|o| byte(&memory, o)), [7, 7, 0, 0, 7]);
        assert_eq!(release(&memory, GuestAddress(BASE.0 + 1), 0x1000).unwrap(), 0);
        assert_eq!(release(&memory, BASE, 0).unwrap(), 0);
    }

    #[test]
    fn a_memory_file_shrinks() {
        let fd = Memfd::new(0x8000).unwrap();
        let memory = filled(fd.map(0x4000, 0x4000).unwrap());
        let blocks = || fd.file().metadata().unwrap().blocks();
        let before = blocks();
        assert_eq!(release(&memory, BASE, 0x3000).unwrap(), 0x3000);
        assert_eq!(before - blocks(), 0x3000 / 512);
        assert_eq!([0, 0x2fff, 0x3000].map(|o| byte(&memory, o)), [0, 0, 7]);
    }

    #[test]
    fn a_file_mapped_copy_on_write_shows_its_contents_again() {
        let mut file =
            std::fs::File::from(rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.write_all(&[1; 0x2000]).unwrap();
        let memory = filled(Mapping::copy_on_write(file, 0, 0x2000).unwrap());
        assert_eq!(release(&memory, BASE, 0x1000).unwrap(), 0x1000);
        assert_eq!([0, 0x1000].map(|o| byte(&memory, o)), [1, 7]);
    }

    #[test]
    fn ranges_cross_mappings_but_not_holes() {
        let map = || Mapping::anonymous(0x2000).unwrap();
        let at = |n: u64| GuestAddress(BASE.0 + n);
        let memory = assemble(&[(at(0), map()), (at(0x2000), map()), (at(0x6000), map())]).unwrap();
        memory.write_slice(&[7; 0x4000], BASE).unwrap();
        for (from, len) in [(0x1000, 0x4000), (0x5000, 0x1000), (0x6000, 0x2001), (0, u64::MAX)] {
            assert!(
                matches!(release(&memory, at(from), len), Err(ReleaseError::NotMemory { .. })),
                "{from:#x}"
            );
        }
        assert_eq!(byte(&memory, 0x1000), 7, "nothing of a bad range is released");
        assert_eq!(release(&memory, at(0x1000), 0x2000).unwrap(), 0x2000);
        assert_eq!([0xfff, 0x1000, 0x2fff, 0x3000].map(|o| byte(&memory, o)), [7, 0, 0, 7]);
    }
}
