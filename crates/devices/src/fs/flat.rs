//! Requests and room for replies outside of a queue, for tests and fuzzing.

use krun_memory::VolatileSlice;
use krun_virtio::Slices;

use super::io::{Sink, Source};

/// Splits the first `len` bytes off.
fn cut<'m>(slices: &mut Vec<VolatileSlice<'m>>, len: usize) -> Vec<VolatileSlice<'m>> {
    let (mut head, mut tail, mut left) = (Vec::new(), Vec::new(), len);
    for slice in slices.drain(..) {
        match slice.split_at(left.min(slice.len())) {
            Ok((a, b)) => {
                left -= a.len();
                head.extend((!a.is_empty()).then_some(a));
                tail.extend((!b.is_empty()).then_some(b));
            }
            Err(_) => tail.push(slice),
        }
    }
    *slices = tail;
    head
}

fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(VolatileSlice::len).sum()
}

/// A request in pieces.
#[derive(Debug)]
pub struct FlatSource<'m>(Vec<VolatileSlice<'m>>);

impl<'m> FlatSource<'m> {
    /// The request that `pieces` make up.
    pub fn new(pieces: Vec<VolatileSlice<'m>>) -> Self {
        Self(pieces)
    }
}

impl<'m> Source<'m> for FlatSource<'m> {
    fn remaining(&self) -> usize {
        total(&self.0)
    }

    fn fill(&mut self, out: &mut [u8]) -> bool {
        let mut at = 0;
        for piece in cut(&mut self.0, out.len()) {
            at += piece.copy_to(&mut out[at..at + piece.len()]);
        }
        at == out.len()
    }

    fn take(&mut self, len: usize) -> Slices<'m> {
        cut(&mut self.0, len).into_iter().collect()
    }
}

/// Room in pieces.
#[derive(Debug)]
pub struct FlatSink<'m>(Vec<VolatileSlice<'m>>);

impl<'m> FlatSink<'m> {
    /// The room that `pieces` make up.
    pub fn new(pieces: Vec<VolatileSlice<'m>>) -> Self {
        Self(pieces)
    }
}

impl<'m> Sink<'m> for FlatSink<'m> {
    fn remaining(&self) -> usize {
        total(&self.0)
    }

    fn room(&self) -> &[VolatileSlice<'m>] {
        &self.0
    }

    fn split_at(&mut self, len: usize) -> Self {
        let head = cut(&mut self.0, len);
        Self(std::mem::replace(&mut self.0, head))
    }

    fn put(&mut self, data: &[u8]) -> bool {
        if data.len() > total(&self.0) {
            return false;
        }
        let mut at = 0;
        for piece in cut(&mut self.0, data.len()) {
            piece.copy_from(&data[at..at + piece.len()]);
            at += piece.len();
        }
        true
    }
}
