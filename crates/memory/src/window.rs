//! A window: addresses that a guest sees and into which files are mapped while it runs.
//!
//! What is mapped there can go away at any time: another program makes the file shorter, its disk has an error. The guest's
//! processor then leaves the guest, but this process would be ended by a signal. So nothing here reads or writes a
//! window directly; data go through calls of the host that say so instead (`EFAULT`).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::{Error, Mapping};

/// Bytes of a page of this host, at the least.
const PAGE: usize = 4096;

/// A range of addresses for files. Where there is none, the guest finds memory of its own, zeroed at first.
#[derive(Debug, Clone)]
pub struct Window {
    mapping: Mapping,
}

fn outside() -> io::Error {
    io::Error::from(io::ErrorKind::InvalidInput)
}

impl Window {
    /// A window of `size` bytes without any file.
    ///
    /// # Errors
    /// [`Error::Map`] with the host's reason.
    pub fn new(size: usize) -> Result<Self, Error> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let mapping = Mapping::build(size, "a window for files", None, flags)?;
        Ok(Self { mapping: Mapping { changes: true, ..mapping } })
    }

    /// What is shown to the guest.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Length in bytes.
    pub fn size(&self) -> usize {
        self.mapping.len()
    }

    /// Maps `len` bytes of `file` from `offset` at `at`, shared with all that have the file open. What was there before
    /// is gone.
    ///
    /// # Errors
    /// The range is not in the window or not of whole pages, or the host's reason; all is as it was then.
    pub fn show(
        &self,
        at: usize,
        len: usize,
        file: BorrowedFd<'_>,
        offset: u64,
        writable: bool,
    ) -> io::Result<()> {
        let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let offset = i64::try_from(offset).map_err(|_| outside())?;
        self.place(at, len, prot, libc::MAP_SHARED, file.as_raw_fd(), offset)
    }

    /// Takes away what `len` bytes at `at` show.
    ///
    /// # Errors
    /// As for [`Window::show`].
    pub fn blank(&self, at: usize, len: usize) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        self.place(at, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    }

    fn place(&self, at: usize, len: usize, prot: i32, flags: i32, file: i32, offset: i64) -> io::Result<()> {
        let fits = at.checked_add(len).is_some_and(|end| end <= self.size());
        if !fits || len == 0 || !at.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(outside());
        }
        let target = self.mapping.as_ptr().wrapping_add(at);
        // SAFETY: the range lies within the window's own mapping, which lives as long as this value. Nobody holds a
        // reference into it: it is read and written by the guest and by calls of the host only.
        let got = unsafe { libc::mmap(target.cast(), len, prot, flags | libc::MAP_FIXED, file, offset) };
        if got == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Whether all of `len` bytes at `at` can be written: each page is there, and the disk has room for it. It is had
    /// then. True as well where the host cannot tell (before Linux 5.14).
    pub fn is_writable(&self, at: usize, len: usize) -> bool {
        if at.checked_add(len).is_none_or(|end| end > self.size()) {
            return false;
        }
        let address = self.mapping.as_ptr().wrapping_add(at);
        // SAFETY: the range lies within the mapping; pages are made present, and no byte is changed.
        let done = unsafe { libc::madvise(address.cast(), len, libc::MADV_POPULATE_WRITE) };
        done == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EFAULT)
    }

    /// Whether the page at `at` can be read: a file reaches that far, and its disk gives it.
    pub fn is_there(&self, at: usize) -> bool {
        let Some(at) = (at / PAGE).checked_mul(PAGE).filter(|at| *at < self.size()) else { return false };
        let address = self.mapping.as_ptr().wrapping_add(at);
        // The host reads the set of signals before it finds that there is no such operation.
        const NO_OPERATION: libc::c_long = -1;
        // SAFETY: eight bytes within the mapping are read, by the host, which answers EFAULT where it cannot. Nothing
        // is changed.
        let done = unsafe {
            libc::syscall(libc::SYS_rt_sigprocmask, NO_OPERATION, address, std::ptr::null::<u8>(), 8usize)
        };
        done == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EFAULT)
    }
}

impl Mapping {
    /// Copies `range` to `file` at `to`. Pages that cannot be read become zeroes there; false if there were any.
    ///
    /// # Errors
    /// The range is not in the mapping, or `file` does not take it.
    pub fn copy_to_file(&self, range: Range<usize>, file: &File, to: u64) -> io::Result<bool> {
        let zero = [0u8; PAGE];
        self.copy(range, to, |at, len, to| {
            // SAFETY: the range lies within the mapping; the host reads it and answers EFAULT where it cannot.
            let n = unsafe { libc::pwrite(file.as_fd().as_raw_fd(), at.cast_const().cast(), len, to) };
            if n >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EFAULT) {
                return n;
            }
            let part = len.min(PAGE - at.addr() % PAGE);
            // SAFETY: `zero` is at least as long.
            match unsafe { libc::pwrite(file.as_fd().as_raw_fd(), zero.as_ptr().cast(), part, to) } {
                n if n > 0 => -FAULT - n,
                n => n,
            }
        })
    }

    /// Copies from `file` at `from` to `range`. Pages that cannot be written stay as they are; false if there were any.
    ///
    /// # Errors
    /// The range is not in the mapping, or `file` ends before.
    pub fn copy_from_file(&self, range: Range<usize>, file: &File, from: u64) -> io::Result<bool> {
        self.copy(range, from, |at, len, from| {
            // SAFETY: the range lies within the mapping, which is only ever written by the guest and by calls like
            // this one; the host answers EFAULT where it cannot write.
            let n = unsafe { libc::pread(file.as_fd().as_raw_fd(), at.cast(), len, from) };
            match io::Error::last_os_error().raw_os_error() {
                Some(libc::EFAULT) if n < 0 => -FAULT - len.min(PAGE - at.addr() % PAGE) as isize,
                _ => n,
            }
        })
    }

    /// Calls `call` for what is left of `range` until nothing is. It returns bytes done, or -1, or minus [`FAULT`] and
    /// the bytes that were skipped.
    fn copy(
        &self,
        range: Range<usize>,
        offset: u64,
        call: impl Fn(*mut u8, usize, i64) -> isize,
    ) -> io::Result<bool> {
        if range.start > range.end || range.end > self.len() {
            return Err(outside());
        }
        let (mut done, mut whole) = (0, true);
        while done < range.len() {
            let at = self.as_ptr().wrapping_add(range.start + done);
            let to =
                offset.checked_add(done as u64).and_then(|to| i64::try_from(to).ok()).ok_or_else(outside)?;
            match call(at, range.len() - done, to) {
                n if n < -FAULT => {
                    whole = false;
                    done += (-FAULT - n).unsigned_abs();
                }
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                n if n > 0 => done += n.unsigned_abs(),
                _ => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
        }
        Ok(whole)
    }
}

/// Lower than what any call returns.
const FAULT: isize = 1 << 40;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memfd;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    const LEN: usize = 4 * PAGE;

    fn file(len: usize) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![b'x'; len]).unwrap();
        file
    }

    fn bytes(window: &Window) -> (Vec<u8>, bool) {
        let copy = Memfd::new(LEN as u64).unwrap();
        copy.file().write_all_at(&[b'?'; LEN], 0).unwrap();
        let whole = window.mapping().copy_to_file(0..LEN, copy.file(), 0).unwrap();
        let mut out = vec![0; LEN];
        copy.file().read_exact_at(&mut out, 0).unwrap();
        (out, whole)
    }

    #[test]
    fn files_come_and_go() {
        let window = Window::new(LEN).unwrap();
        assert!(window.mapping().may_change() && !Mapping::anonymous(PAGE).unwrap().may_change());
        let f = file(LEN);
        window.show(PAGE, PAGE, f.as_fd(), 0, true).unwrap();
        let (seen, whole) = bytes(&window);
        assert!(whole && seen[..PAGE].iter().all(|b| *b == 0));
        assert!(seen[PAGE..2 * PAGE].iter().all(|b| *b == b'x') && seen[2 * PAGE..].iter().all(|b| *b == 0));
        // Both see what the other one writes.
        let data = Memfd::new(LEN as u64).unwrap();
        data.file().write_all_at(b"new", 0).unwrap();
        assert!(window.mapping().copy_from_file(PAGE..PAGE + 3, data.file(), 0).unwrap());
        let mut back = [0; 4];
        f.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(&back, b"newx");
        f.write_all_at(b"host", 0).unwrap();
        assert_eq!(&bytes(&window).0[PAGE..PAGE + 4], b"host");
        window.blank(0, LEN).unwrap();
        assert_eq!(bytes(&window), (vec![0; LEN], true));
    }

    #[test]
    fn ranges_outside_and_odd_ones_are_refused() {
        let (window, f) = (Window::new(LEN).unwrap(), file(LEN));
        for (at, len) in [
            (0, LEN + PAGE),
            (LEN, PAGE),
            (PAGE, LEN),
            (usize::MAX - PAGE + 1, PAGE),
            (PAGE, usize::MAX - PAGE + 1),
            (1, PAGE),
            (0, 1),
            (0, 0),
        ] {
            assert!(window.show(at, len, f.as_fd(), 0, false).is_err(), "{at:#x} {len:#x}");
            assert!(window.blank(at, len).is_err(), "{at:#x} {len:#x}");
        }
        for offset in [1, u64::MAX, 1 << 63] {
            assert!(window.show(0, PAGE, f.as_fd(), offset, false).is_err(), "{offset:#x}");
        }
        let m = window.mapping();
        assert!(m.copy_to_file(0..LEN + 1, &f, 0).is_err() && m.copy_from_file(0..LEN + 1, &f, 0).is_err());
        assert!(!window.is_there(LEN) && !window.is_there(usize::MAX));
    }

    #[test]
    fn a_file_that_lost_its_end_does_not_end_this_process() {
        let (window, f) = (Window::new(LEN).unwrap(), file(LEN));
        window.show(0, LEN, f.as_fd(), 0, true).unwrap();
        assert!(window.is_there(0) && window.is_there(LEN - 1));
        f.set_len(PAGE as u64 + 1).unwrap();
        assert!(window.is_writable(0, 2 * PAGE) && !window.is_writable(PAGE, 2 * PAGE));
        assert!(window.is_there(PAGE) && !window.is_there(2 * PAGE) && !window.is_there(LEN - 1));
        let (seen, whole) = bytes(&window);
        assert!(
            !whole && seen[..=PAGE].iter().all(|b| *b == b'x') && seen[PAGE + 1..].iter().all(|b| *b == 0)
        );
        // The first page takes what it is given, and the others do not.
        let data = Memfd::new(LEN as u64).unwrap();
        data.file().write_all_at(&[b'y'; LEN], 0).unwrap();
        assert!(!window.mapping().copy_from_file(100..LEN - 100, data.file(), 0).unwrap());
        let seen = bytes(&window).0;
        assert_eq!((seen[99], seen[100], seen[2 * PAGE - 1], seen[2 * PAGE]), (b'x', b'y', b'y', 0));
        assert_eq!(f.metadata().unwrap().len(), PAGE as u64 + 1);
    }

    #[test]
    fn what_is_shown_for_reading_is_not_written() {
        let (window, f) = (Window::new(LEN).unwrap(), file(LEN));
        window.show(0, LEN, f.as_fd(), 0, false).unwrap();
        let data = Memfd::new(LEN as u64).unwrap();
        assert!(!window.mapping().copy_from_file(0..LEN, data.file(), 0).unwrap());
        assert!(bytes(&window).0.iter().all(|b| *b == b'x'));
    }
}
