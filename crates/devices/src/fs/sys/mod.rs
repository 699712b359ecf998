//! System calls that have no safe wrapper elsewhere.
#![allow(unsafe_code)]

mod caller;
pub mod locks;

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use krun_memory::VolatileSlice;
use rustix::io::Errno;

pub use caller::Caller;

/// Pieces handed to the host in one call: a transfer of 1 MiB in single pages and its neighbours.
const PIECES: usize = 260;

fn last() -> Errno {
    Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

/// One scatter-gather list on the stack: pieces that lie side by side become one.
struct List {
    items: [libc::iovec; PIECES],
    len: usize,
    bytes: usize,
}

impl List {
    /// Takes pieces from the front of `slices` until `limit` bytes or the list is full.
    fn new(slices: &[VolatileSlice<'_>], skip: usize, limit: usize) -> Self {
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let mut list = Self { items: [none; PIECES], len: 0, bytes: 0 };
        let mut skip = skip;
        for slice in slices {
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            let len = (slice.len() - skip).min(limit - list.bytes);
            if len == 0 {
                break;
            }
            // In bounds: `skip` is less than the slice's length.
            let base = slice.ptr_guard_mut().as_ptr().wrapping_add(skip);
            skip = 0;
            match list.len.checked_sub(1).map(|i| &mut list.items[i]) {
                Some(l) if l.iov_base.cast::<u8>().wrapping_add(l.iov_len) == base => l.iov_len += len,
                _ if list.len == PIECES => break,
                _ => {
                    list.items[list.len] = libc::iovec { iov_base: base.cast(), iov_len: len };
                    list.len += 1;
                }
            }
            list.bytes += len;
        }
        list
    }
}

/// Moves up to `limit` bytes between `slices` and the file at `offset` with `call`, in as many calls as
/// it takes. What was moved before an error counts as success, unless it must be the `whole`.
fn transfer(
    slices: &[VolatileSlice<'_>],
    offset: u64,
    limit: usize,
    whole: bool,
    call: impl Fn(&List, i64) -> isize,
) -> Result<usize, Errno> {
    let mut done = 0;
    while done < limit {
        let at = offset.checked_add(done as u64).and_then(|at| i64::try_from(at).ok()).ok_or(Errno::INVAL)?;
        let list = List::new(slices, done, limit - done);
        if list.bytes == 0 {
            break;
        }
        match usize::try_from(call(&list, at)) {
            Ok(0) if whole => return Err(Errno::IO),
            Ok(0) => break,
            Ok(n) => {
                done += n;
                // Trying on tells why it was not more.
                if n < list.bytes && !whole {
                    break;
                }
            }
            Err(_) => match last() {
                Errno::INTR => {}
                e if done == 0 || whole => return Err(e),
                _ => break,
            },
        }
    }
    Ok(done)
}

/// Reads up to `limit` bytes of `fd` from `offset` straight into guest memory. Fewer at the end of the file.
///
/// # Errors
/// The host's reason, or EINVAL for an offset that no file has.
pub fn read_into(
    fd: BorrowedFd<'_>,
    slices: &[VolatileSlice<'_>],
    offset: u64,
    limit: usize,
) -> Result<usize, Errno> {
    transfer(slices, offset, limit, false, |list, at| {
        // SAFETY: the list's entries lie within `slices`, which are mapped and writable while they are
        // borrowed, and no Rust reference to those bytes exists; the guest may race, as it always may.
        unsafe { libc::preadv(fd.as_raw_fd(), list.items.as_ptr(), list.len as i32, at) }
    })
}

/// Writes up to `limit` bytes straight from guest memory to `fd` at `offset`. With `whole`, fewer are an error, and it
/// tells why.
///
/// # Errors
/// The host's reason, or EINVAL for an offset that no file has.
pub fn write_from(
    fd: BorrowedFd<'_>,
    slices: &[VolatileSlice<'_>],
    offset: u64,
    limit: usize,
    whole: bool,
) -> Result<usize, Errno> {
    transfer(slices, offset, limit, whole, |list, at| {
        // SAFETY: the list's entries lie within `slices`, which are mapped while they are borrowed; the
        // kernel only reads them.
        unsafe { libc::pwritev(fd.as_raw_fd(), list.items.as_ptr(), list.len as i32, at) }
    })
}

/// Reads directory entries as the host stores them; 0 at the end.
///
/// # Errors
/// The host's reason.
pub fn getdents(fd: BorrowedFd<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most `out.len()` bytes to `out`.
    let n = unsafe { libc::syscall(libc::SYS_getdents64, fd.as_raw_fd(), out.as_mut_ptr(), out.len()) };
    usize::try_from(n).map_err(|_| last())
}

/// Gives the calling thread a mount namespace of its own.
#[cfg(test)]
pub fn private_mounts() -> Result<(), Errno> {
    // SAFETY: only mounts, umask, root and working directory of this thread are detached; memory and
    // descriptors stay shared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
}

/// Closes `fd` and says what the host says to that.
///
/// # Errors
/// The host's reason; the descriptor is gone all the same.
pub fn close(fd: OwnedFd) -> Result<(), Errno> {
    // SAFETY: the descriptor was owned and is not used again.
    match unsafe { libc::close(fd.into_raw_fd()) } {
        0 => Ok(()),
        _ => Err(last()),
    }
}

/// Longest opaque part of a file handle.
const HANDLE_MAX: usize = 128;

/// The kernel's `struct file_handle` with room for its opaque part.
#[repr(C)]
struct RawHandle {
    bytes: u32,
    kind: i32,
    data: [u8; HANDLE_MAX],
}

/// A name of an inode that outlives descriptors, valid on its file system for as long as the inode lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHandle {
    kind: i32,
    data: Box<[u8]>,
}

impl FileHandle {
    /// The handle of the inode behind `fd`, which may be an `O_PATH` descriptor.
    ///
    /// # Errors
    /// EOPNOTSUPP where the file system has none, or the host's reason.
    pub fn of(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let mut raw = RawHandle { bytes: HANDLE_MAX as u32, kind: 0, data: [0; HANDLE_MAX] };
        let mut mount = 0i32;
        // SAFETY: the path is a constant empty string, `raw` has the layout of `struct file_handle` with
        // `bytes` bytes behind its head, and the kernel writes no more than that.
        let r = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                fd.as_raw_fd(),
                c"".as_ptr(),
                &raw mut raw,
                &raw mut mount,
                libc::AT_EMPTY_PATH,
            )
        };
        if r != 0 {
            return Err(last());
        }
        let len = (raw.bytes as usize).min(HANDLE_MAX);
        Ok(Self { kind: raw.kind, data: raw.data[..len].into() })
    }

    /// Opens the inode as `O_PATH`; `mount` is any real descriptor on its file system.
    ///
    /// # Errors
    /// ESTALE when it is gone, EPERM without `CAP_DAC_READ_SEARCH`, or the host's reason.
    pub fn open(&self, mount: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        let mut raw = RawHandle { bytes: self.data.len() as u32, kind: self.kind, data: [0; HANDLE_MAX] };
        raw.data[..self.data.len()].copy_from_slice(&self.data);
        // SAFETY: `raw` has the layout of `struct file_handle` and `bytes` valid bytes; it is only read.
        let r = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_raw_fd(),
                &raw mut raw,
                libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC,
            )
        };
        match i32::try_from(r) {
            // SAFETY: a fresh descriptor that nobody else owns.
            Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(last()),
        }
    }
}

/// A descriptor's name in `/proc/self/fd`, without allocating.
#[derive(Debug, Clone, Copy)]
pub struct FdName {
    text: [u8; 12],
    at: usize,
}

impl FdName {
    /// The decimal number of `fd`.
    pub fn new(fd: &impl AsFd) -> Self {
        let mut n = fd.as_fd().as_raw_fd().unsigned_abs();
        let mut name = Self { text: [0; 12], at: 11 };
        loop {
            name.at -= 1;
            name.text[name.at] = b'0' + (n % 10) as u8;
            n /= 10;
            if n == 0 {
                return name;
            }
        }
    }

    /// As a path relative to the directory of descriptors.
    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.text[self.at..]).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    #[test]
    fn descriptor_names() {
        let f = tempfile::tempfile().unwrap();
        assert_eq!(FdName::new(&f).as_c_str().to_str().unwrap(), f.as_raw_fd().to_string());
    }

    #[test]
    fn neighbours_are_joined_and_long_lists_are_split() {
        let mut f = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        f.write_all(&data).unwrap();
        f.seek(SeekFrom::Start(0)).unwrap();
        let mut mem = vec![0u8; 2000];
        // Every other byte: 1000 pieces, more than one list holds.
        let whole = VolatileSlice::from(&mut mem[..]);
        let pieces: Vec<_> = (0..1000).map(|i| whole.subslice(i * 2, 1).unwrap()).collect();
        assert_eq!(read_into(f.as_fd(), &pieces, 0, 5000).unwrap(), 1000);
        assert_eq!(List::new(&[whole.subslice(0, 5).unwrap(), whole.subslice(5, 7).unwrap()], 2, 100).len, 1);
        let got: Vec<u8> = mem.iter().step_by(2).copied().collect();
        assert_eq!(got, data);
    }

    #[test]
    fn an_offset_that_no_file_has_is_refused() {
        let f = tempfile::tempfile().unwrap();
        let mut mem = [0u8; 8];
        let s = [VolatileSlice::from(&mut mem[..])];
        assert_eq!(read_into(f.as_fd(), &s, u64::MAX, 8), Err(Errno::INVAL));
        assert_eq!(write_from(f.as_fd(), &s, 1 << 63, 8, false), Err(Errno::INVAL));
    }
}
