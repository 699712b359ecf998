//! Descriptor chains as a device sees them.

use std::io;

use krun_memory::{ByteValued, GuestAddress, GuestMemory, GuestMemoryBackend, VolatileSlice};
use smallvec::SmallVec;

use crate::bounce::Loan;

/// Pieces of guest memory in order; up to eight need no allocation.
pub type Slices<'m> = SmallVec<[VolatileSlice<'m>; 8]>;

/// A validated descriptor chain: a readable part, then a writable part, at most `u32::MAX` bytes in all.
///
/// Give it back with [`Queue::complete`](crate::Queue::complete) or
/// [`Queue::unpop`](crate::Queue::unpop); one that is merely dropped is lost to the driver until it
/// resets the device, which is what a device does with the chains it holds when it is stopped.
#[derive(Debug)]
#[must_use = "a chain that is not completed is lost to the driver"]
pub struct Chain {
    /// Index of its first descriptor.
    pub head: u16,
    /// Non-empty ranges, the readable ones first.
    ranges: SmallVec<[(GuestAddress, u32); 8]>,
    /// Number of readable ranges.
    split: usize,
    /// What was lent in place of ranges in windows.
    loans: Vec<Loan>,
}

impl PartialEq for Chain {
    fn eq(&self, other: &Self) -> bool {
        (self.head, &self.ranges, self.split) == (other.head, &other.ranges, other.split)
    }
}

impl Eq for Chain {}

impl Chain {
    pub(crate) fn new(head: u16) -> Self {
        Self { head, ranges: SmallVec::new(), split: 0, loans: Vec::new() }
    }

    /// Appends a range; false when a readable one follows a writable one.
    pub(crate) fn push(&mut self, at: u64, len: u32, writable: bool) -> bool {
        if !writable {
            if self.split != self.ranges.len() {
                return false;
            }
            self.split += 1;
        }
        self.ranges.push((GuestAddress(at), len));
        true
    }

    /// Keeps what was lent for one of the ranges.
    pub(crate) fn borrow(&mut self, loan: Loan) {
        self.loans.push(loan);
    }

    /// A device gets the chain.
    pub(crate) fn hand_out(&mut self) {
        self.loans.iter_mut().for_each(Loan::hand_out);
    }

    /// The device is done with the chain, in whose writable part it stored `written` bytes: as much of what was lent for
    /// it is copied to where it belongs, and all of it given back.
    pub(crate) fn settle(&mut self, written: u32) {
        let mut left = written;
        // They are in the order of the ranges.
        let mut loans = self.loans.iter().filter(|loan| loan.writable).peekable();
        for (at, len) in self.writable() {
            if let Some(loan) = loans.next_if(|loan| loan.address() == at.0) {
                loan.settle(left);
            }
            left = left.saturating_sub(*len);
        }
        self.loans.clear();
    }

    /// The part that the driver wrote for the device.
    pub fn reader<'m>(&self, memory: &'m GuestMemory) -> Reader<'m> {
        Reader { slices: slices(memory, self.readable()), next: 0, done: 0 }
    }

    /// The part that the device writes for the driver.
    pub fn writer<'m>(&self, memory: &'m GuestMemory) -> Writer<'m> {
        Writer { slices: slices(memory, self.writable()), next: 0, done: 0 }
    }

    /// Guest ranges of the readable part; none is empty.
    pub fn readable(&self) -> &[(GuestAddress, u32)] {
        &self.ranges[..self.split]
    }

    /// Guest ranges of the writable part; none is empty.
    pub fn writable(&self) -> &[(GuestAddress, u32)] {
        &self.ranges[self.split..]
    }

    /// Bytes of the readable part.
    pub fn readable_len(&self) -> u32 {
        self.readable().iter().map(|r| r.1).sum()
    }

    /// Bytes of the writable part.
    pub fn writable_len(&self) -> u32 {
        self.writable().iter().map(|r| r.1).sum()
    }
}

/// The ranges were checked when the chain was popped, so nothing is left out here unless the caller
/// passes another memory; what that lacks is cut off.
fn slices<'m>(memory: &'m GuestMemory, ranges: &[(GuestAddress, u32)]) -> Slices<'m> {
    let mut out = Slices::new();
    for &(at, len) in ranges {
        for piece in GuestMemoryBackend::get_slices(memory, at, len as usize) {
            let Ok(piece) = piece else {
                debug_assert!(false, "a chain is used with the memory it was popped from");
                return out;
            };
            out.push(piece);
        }
    }
    out
}

fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(VolatileSlice::len).sum()
}

/// Cuts the first `len` bytes off `slices[*next..]` and moves `next` on; fewer if there are fewer.
fn cut<'m>(slices: &mut Slices<'m>, next: &mut usize, len: usize) -> Slices<'m> {
    let mut out = Slices::new();
    let mut left = len;
    while left > 0
        && let Some(first) = slices.get_mut(*next)
    {
        let n = first.len().min(left);
        let Ok((head, tail)) = first.split_at(n) else { break };
        out.push(head);
        left -= n;
        if tail.is_empty() {
            *next += 1;
        } else {
            *first = tail;
        }
    }
    out
}

/// Reads a chain's readable part in order. Each byte is read from guest memory once.
#[derive(Debug)]
pub struct Reader<'m> {
    slices: Slices<'m>,
    next: usize,
    done: usize,
}

impl<'m> Reader<'m> {
    /// Bytes left.
    pub fn remaining(&self) -> usize {
        total(&self.slices[self.next..])
    }

    /// Bytes taken so far.
    pub fn consumed(&self) -> usize {
        self.done
    }

    /// Splits off the next `len` bytes (for a scatter-gather system call); fewer if fewer are left.
    ///
    /// Where [`io::Read`] is in scope write `Reader::take(&mut reader, len)`; its method of this name is another.
    pub fn take(&mut self, len: usize) -> Slices<'m> {
        let out = cut(&mut self.slices, &mut self.next, len);
        self.done += total(&out);
        out
    }

    /// Reads one plain value, in the guest's byte order (little-endian).
    ///
    /// # Errors
    /// `UnexpectedEof` when the chain ends before it.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> io::Result<T> {
        let mut value = T::default();
        io::Read::read_exact(self, value.as_mut_slice())?;
        Ok(value)
    }
}

impl io::Read for Reader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        for piece in self.take(out.len()) {
            let n = piece.copy_to(&mut out[filled..filled + piece.len()]);
            filled += n;
        }
        Ok(filled)
    }
}

/// Fills a chain's writable part in order.
#[derive(Debug)]
pub struct Writer<'m> {
    slices: Slices<'m>,
    next: usize,
    done: usize,
}

impl<'m> Writer<'m> {
    /// Bytes of room left.
    pub fn remaining(&self) -> usize {
        total(self.room())
    }

    /// Bytes stored so far by this writer: what [`Queue::complete`](crate::Queue::complete) wants. After
    /// [`Writer::split_at`] the sum of both, provided the first is full.
    pub fn written(&self) -> u32 {
        // A chain is at most u32::MAX bytes long.
        self.done as u32
    }

    /// A writer for what follows after the next `len` bytes; `self` keeps those `len`.
    pub fn split_at(&mut self, len: usize) -> Writer<'m> {
        let kept = cut(&mut self.slices, &mut self.next, len);
        let rest = std::mem::replace(&mut self.slices, kept);
        let next = std::mem::take(&mut self.next);
        Writer { slices: rest, next, done: 0 }
    }

    /// The room that is left as slices (for a scatter-gather system call); follow with [`Writer::advance`].
    pub fn room(&self) -> &[VolatileSlice<'m>] {
        &self.slices[self.next..]
    }

    /// Counts `len` bytes of the room as stored.
    pub fn advance(&mut self, len: usize) {
        let stored = total(&cut(&mut self.slices, &mut self.next, len));
        debug_assert_eq!(stored, len, "more stored than there was room for");
        self.done += stored;
    }

    /// Stores one plain value, in the guest's byte order (little-endian).
    ///
    /// # Errors
    /// `WriteZero` when it does not fit; part of it may be stored.
    pub fn write_obj<T: ByteValued>(&mut self, value: &T) -> io::Result<()> {
        io::Write::write_all(self, value.as_slice())
    }
}

impl io::Write for Writer<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut stored = 0;
        for piece in cut(&mut self.slices, &mut self.next, data.len()) {
            piece.copy_from(&data[stored..stored + piece.len()]);
            stored += piece.len();
        }
        self.done += stored;
        Ok(stored)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
