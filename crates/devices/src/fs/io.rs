//! Where requests come from and where replies go: the two halves of a descriptor chain.

use std::io::{Read, Write};

use krun_memory::VolatileSlice;
use krun_virtio::{Reader, Slices, Writer};

/// The bytes of a request, in order.
pub trait Source<'m> {
    /// Bytes left.
    fn remaining(&self) -> usize;
    /// Fills `out` from the front; false when there are too few bytes.
    fn fill(&mut self, out: &mut [u8]) -> bool;
    /// The next `len` bytes where they lie, fewer if there are fewer.
    fn take(&mut self, len: usize) -> Slices<'m>;
}

/// Room for a reply, in order.
pub trait Sink<'m>: Sized {
    /// Bytes of room left.
    fn remaining(&self) -> usize;
    /// The room left.
    fn room(&self) -> &[VolatileSlice<'m>];
    /// Keeps the next `len` bytes and returns the rest.
    fn split_at(&mut self, len: usize) -> Self;
    /// Stores all of `data`; false when there is no room for it.
    fn put(&mut self, data: &[u8]) -> bool;
}

impl<'m> Source<'m> for Reader<'m> {
    fn remaining(&self) -> usize {
        Reader::remaining(self)
    }

    fn fill(&mut self, out: &mut [u8]) -> bool {
        self.read_exact(out).is_ok()
    }

    fn take(&mut self, len: usize) -> Slices<'m> {
        Reader::take(self, len)
    }
}

impl<'m> Sink<'m> for Writer<'m> {
    fn remaining(&self) -> usize {
        Writer::remaining(self)
    }

    fn room(&self) -> &[VolatileSlice<'m>] {
        Writer::room(self)
    }

    fn split_at(&mut self, len: usize) -> Self {
        Writer::split_at(self, len)
    }

    fn put(&mut self, data: &[u8]) -> bool {
        self.write_all(data).is_ok()
    }
}
