//! Guest memory as the host's vectored calls want it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use krun_memory::{GuestAddress, GuestMemory, GuestMemoryBackend, VolatileSlice};

/// Most pieces that one vectored call takes.
pub const MAX_PIECES: usize = 1024;

/// The pieces of guest memory of one transfer, of which what was transferred is cut off at the front.
///
/// Holds the memory: its mappings live at least as long as the value, wherever the transfer runs.
pub struct Buffers {
    pieces: Vec<libc::iovec>,
    /// First piece with something left.
    next: usize,
    /// Bytes left.
    left: usize,
    _memory: Arc<GuestMemory>,
}

// SAFETY: the pointers lead into mappings that `_memory` keeps, which any thread may use. They are passed
// to the kernel and copied by volatile access only, so no reference to guest memory is ever made.
unsafe impl Send for Buffers {}

impl Buffers {
    /// The given ranges of `memory`; `None` when one of them is not memory.
    pub fn new(memory: &Arc<GuestMemory>, ranges: &[(GuestAddress, u32)]) -> Option<Self> {
        let (mut pieces, mut left) = (Vec::with_capacity(ranges.len()), 0);
        for &(at, len) in ranges {
            for slice in GuestMemoryBackend::get_slices(&**memory, at, len as usize) {
                let slice = slice.ok()?;
                let base = slice.ptr_guard_mut().as_ptr().cast();
                pieces.push(libc::iovec { iov_base: base, iov_len: slice.len() });
                left += slice.len();
            }
        }
        Some(Self { pieces, next: 0, left, _memory: Arc::clone(memory) })
    }

    /// Bytes left.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Whether address and length of every piece are multiples of `align`.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.rest().iter().all(|p| p.iov_base.addr() % align == 0 && p.iov_len % align == 0)
    }

    /// What is left.
    pub(super) fn rest(&self) -> &[libc::iovec] {
        &self.pieces[self.next..]
    }

    /// What is left, as much as one call takes.
    pub(super) fn batch(&self) -> &[libc::iovec] {
        let rest = self.rest();
        &rest[..rest.len().min(MAX_PIECES)]
    }

    /// Cuts off the first `len` bytes.
    pub(super) fn advance(&mut self, len: usize) {
        let mut todo = len.min(self.left);
        self.left -= todo;
        while todo > 0
            && let Some(piece) = self.pieces.get_mut(self.next)
        {
            let n = todo.min(piece.iov_len);
            piece.iov_base = piece.iov_base.wrapping_byte_add(n);
            piece.iov_len -= n;
            todo -= n;
            self.next += usize::from(piece.iov_len == 0);
        }
    }

    /// Fills the front from `file` at `offset`, one call, and cuts off what was filled.
    ///
    /// # Errors
    /// The host's.
    pub fn fill_from(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let batch = self.batch();
        // SAFETY: each piece is mapped writable memory (see the type); the array lives across the call.
        let n = unsafe { libc::preadv(file.as_raw_fd(), batch.as_ptr(), count(batch), offset.cast_signed()) };
        self.transferred(n)
    }

    /// Writes the front to `file` at `offset`, one call, and cuts off what was written.
    ///
    /// # Errors
    /// The host's.
    pub fn drain_to(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let batch = self.batch();
        // SAFETY: as for `fill_from`; the kernel only reads.
        let n =
            unsafe { libc::pwritev(file.as_raw_fd(), batch.as_ptr(), count(batch), offset.cast_signed()) };
        self.transferred(n)
    }

    fn transferred(&mut self, n: isize) -> io::Result<usize> {
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        self.advance(n);
        Ok(n)
    }

    /// Stores `data` at the front and cuts it off; what does not fit is left out.
    pub fn store(&mut self, mut data: &[u8]) {
        while let Some(slice) = self.front(data.len()) {
            let (head, rest) = data.split_at(slice.len());
            slice.copy_from(head);
            self.advance(head.len());
            data = rest;
        }
    }

    /// Copies the front to `data` and cuts it off; returns how much there was.
    pub fn load(&mut self, data: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(slice) = self.front(data.len() - done) {
            let n = slice.len();
            slice.copy_to(&mut data[done..done + n]);
            self.advance(n);
            done += n;
        }
        done
    }

    /// The first piece, at most `limit` bytes of it; `None` when that is nothing.
    fn front(&self, limit: usize) -> Option<VolatileSlice<'static>> {
        let piece = self.rest().first().filter(|_| limit > 0)?;
        // SAFETY: the piece is mapped memory while `self` lives, and both callers drop the slice before
        // they return.
        Some(unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len.min(limit)) })
    }
}

fn count(batch: &[libc::iovec]) -> libc::c_int {
    // At most MAX_PIECES.
    batch.len() as libc::c_int
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use krun_memory::Bytes;
    use krun_virtio::mock;

    use super::*;

    #[test]
    fn pieces_are_filled_and_drained_in_order() {
        let memory = Arc::new(mock::memory(1 << 20));
        let at = GuestAddress(mock::BASE);
        let ranges = [(at, 3), (GuestAddress(at.0 + 100), 5), (GuestAddress(at.0 + 50), 2)];
        let mut buffers = Buffers::new(&memory, &ranges).unwrap();
        buffers.store(b"abcdef");
        assert_eq!(buffers.left(), 4);
        buffers.store(b"ghijXX");
        assert_eq!(buffers.left(), 0);
        let mut buffers = Buffers::new(&memory, &ranges).unwrap();
        let mut seen = [0; 7];
        assert_eq!(buffers.load(&mut seen), 7);
        assert_eq!(&seen, b"abcdefg");

        let file = tempfile::tempfile().unwrap();
        let mut buffers = Buffers::new(&memory, &ranges).unwrap();
        assert_eq!(buffers.drain_to(file.as_fd(), 1).unwrap(), 10);
        memory.write_slice(&[0; 200], at).unwrap();
        let mut buffers = Buffers::new(&memory, &ranges[..2]).unwrap();
        assert_eq!(buffers.fill_from(file.as_fd(), 2).unwrap(), 8);
        let mut buffers = Buffers::new(&memory, &ranges[..2]).unwrap();
        let mut seen = [0; 9];
        assert_eq!(buffers.load(&mut seen), 8);
        assert_eq!(&seen[..8], b"bcdefghi");
    }

    #[test]
    fn what_is_not_memory_is_refused() {
        let memory = Arc::new(mock::memory(4096));
        assert!(Buffers::new(&memory, &[(GuestAddress(mock::BASE + 4000), 200)]).is_none());
        assert!(Buffers::new(&memory, &[(GuestAddress(0), 1)]).is_none());
    }
}
