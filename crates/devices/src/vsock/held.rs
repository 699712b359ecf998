//! What the guest has sent on a connection and the host's socket has not taken.

use std::collections::VecDeque;

use krun_memory::VolatileSlice;

use super::spec::SocketType;

/// Messages without contents that are held at most. Credit bounds all others, but these cost none.
const MOST_EMPTY: usize = 1024;

/// A message, complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Bytes.
    pub len: u32,
    /// It ends a record.
    pub end_of_record: bool,
}

/// Bytes in order, and where messages end in them, if there are messages.
#[derive(Debug)]
pub struct Held {
    /// Bytes held at most, which credit sees to.
    most: usize,
    bytes: VecDeque<u8>,
    /// A mark for each complete message. None has more bytes than its message, one of an empty message apart.
    marks: VecDeque<u8>,
    empty: usize,
    /// Bytes of the last message, which is not complete.
    partial: u32,
}

/// Memory that a connection may take for bytes of the guest's, if credit gives it room for `room` of them.
pub fn cost(kind: SocketType, room: u32) -> u64 {
    match kind {
        SocketType::Stream => u64::from(room),
        SocketType::SeqPacket => 2 * u64::from(room) + MOST_EMPTY as u64,
    }
}

/// Makes room for `more` bytes: twice as many each time, but not above `most` without need.
fn grow(bytes: &mut VecDeque<u8>, more: usize, most: usize) {
    let needed = bytes.len() + more;
    if needed > bytes.capacity() {
        let capacity = (2 * bytes.capacity()).min(most).max(needed);
        bytes.reserve_exact(capacity - bytes.len());
    }
}

impl Message {
    /// As it is kept: length and flag in groups of seven bits, the lowest first, the top bit set in all but the last.
    fn mark(self) -> impl Iterator<Item = u8> {
        let mut rest = Some(u64::from(self.len) << 1 | u64::from(self.end_of_record));
        std::iter::from_fn(move || {
            let value = rest?;
            rest = (value > 0x7f).then_some(value >> 7);
            Some((value & 0x7f) as u8 | if rest.is_some() { 0x80 } else { 0 })
        })
    }

    /// The first of `marks`, and how many bytes it has.
    fn from_marks(marks: &VecDeque<u8>) -> Option<(Self, usize)> {
        let (mut value, mut size) = (0u64, 0);
        for (shift, byte) in (0..u64::BITS).step_by(7).zip(marks) {
            value |= u64::from(byte & 0x7f) << shift;
            size += 1;
            if byte & 0x80 == 0 {
                break;
            }
        }
        // The length had 32 bits.
        (size > 0).then_some((Self { len: (value >> 1) as u32, end_of_record: value & 1 != 0 }, size))
    }
}

impl Held {
    /// For at most `room` bytes.
    pub fn new(room: u32) -> Self {
        let most = room as usize;
        Self { most, bytes: VecDeque::new(), marks: VecDeque::new(), empty: 0, partial: 0 }
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.marks.is_empty()
    }

    /// Whether there is a part of a message that is not complete.
    pub fn is_partial(&self) -> bool {
        self.partial > 0
    }

    /// Whether there is something that the socket could take.
    pub fn is_waiting(&self) -> bool {
        !self.marks.is_empty() || self.bytes.len() > self.partial as usize
    }

    /// Keeps all but the first `skip` bytes.
    pub fn push(&mut self, data: &[VolatileSlice<'_>], mut skip: usize) {
        let len: usize = data.iter().map(VolatileSlice::len).sum();
        grow(&mut self.bytes, len.saturating_sub(skip), self.most);
        let mut chunk = [0; 4096];
        for piece in data {
            let mut at = skip.min(piece.len());
            skip -= at;
            while at < piece.len()
                && let Ok(part) = piece.subslice(at, chunk.len().min(piece.len() - at))
            {
                let n = part.copy_to(&mut chunk[..]);
                self.bytes.extend(&chunk[..n]);
                at += n;
            }
        }
    }

    /// Keeps a part of a message. False when that would be one message too many.
    pub fn push_part(&mut self, data: &[VolatileSlice<'_>], is_end: bool, end_of_record: bool) -> bool {
        let before = self.bytes.len();
        self.push(data, 0);
        // What is held is bounded by credit, which has 32 bits.
        self.partial += (self.bytes.len() - before) as u32;
        if is_end {
            let message = Message { len: std::mem::take(&mut self.partial), end_of_record };
            self.empty += usize::from(message.len == 0);
            grow(&mut self.marks, message.mark().count(), self.most + MOST_EMPTY);
            self.marks.extend(message.mark());
        }
        self.empty <= MOST_EMPTY
    }

    /// The first message, and its bytes.
    pub fn first(&self) -> Option<(Message, &[u8], &[u8])> {
        let (message, _) = Message::from_marks(&self.marks)?;
        let (a, b) = self.bytes.as_slices();
        let a = &a[..a.len().min(message.len as usize)];
        Some((message, a, &b[..message.len as usize - a.len()]))
    }

    /// Drops the first message; how many bytes it had.
    pub fn pop(&mut self) -> usize {
        let Some((message, size)) = Message::from_marks(&self.marks) else { return 0 };
        self.marks.drain(..size);
        self.empty -= usize::from(message.len == 0);
        self.bytes.drain(..message.len as usize);
        message.len as usize
    }

    /// The first bytes, where there are no messages; none when nothing is held.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    /// Drops the first `n` bytes.
    pub fn advance(&mut self, n: usize) {
        self.bytes.drain(..n);
    }

    /// Drops all, and gives memory back; how many bytes there were.
    pub fn clear(&mut self) -> usize {
        let most = self.most;
        std::mem::replace(self, Self { most, ..Self::new(0) }).bytes.len()
    }

    /// Drops what is no complete message; how many bytes there were.
    pub fn drop_partial(&mut self) -> usize {
        let partial = std::mem::take(&mut self.partial) as usize;
        self.bytes.truncate(self.bytes.len() - partial);
        partial
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROOM: u32 = 256 << 10;

    impl Held {
        fn memory(&self) -> u64 {
            (self.bytes.capacity() + self.marks.capacity()) as u64
        }

        /// Keeps a message, if it is not one too many.
        fn message(&mut self, mut bytes: Vec<u8>, end_of_record: bool) -> bool {
            self.push_part(&[VolatileSlice::from(&mut bytes[..])], true, end_of_record)
        }

        /// Takes the first message.
        fn take(&mut self) -> Option<(Vec<u8>, bool)> {
            let (message, a, b) = self.first()?;
            let taken = ([a, b].concat(), message.end_of_record);
            assert_eq!(self.pop(), taken.0.len());
            Some(taken)
        }
    }

    #[test]
    fn many_small_messages_cost_little_and_come_back() {
        // Length 64 is the first with a mark of two bytes.
        for len in [1, 2, 63, 64, 65] {
            let mut held = Held::new(ROOM);
            for n in 0..MOST_EMPTY {
                assert!(held.message(Vec::new(), n % 3 == 0));
            }
            for n in 0..ROOM as usize / len {
                assert!(held.message(vec![n as u8; len], n % 2 == 0));
            }
            assert!(held.memory() <= cost(SocketType::SeqPacket, ROOM), "{len}: {}", held.memory());
            for n in 0..MOST_EMPTY {
                assert_eq!(held.take(), Some((Vec::new(), n % 3 == 0)));
            }
            for n in 0..ROOM as usize / len {
                assert_eq!(held.take(), Some((vec![n as u8; len], n % 2 == 0)));
            }
            assert!(held.take().is_none() && held.is_empty());
            held.clear();
            assert_eq!((held.memory(), held.most), (0, ROOM as usize));
        }
    }

    #[test]
    fn a_stream_takes_no_more_memory_than_it_has_room_for() {
        let mut held = Held::new(ROOM);
        let mut chunk = [7; 5000];
        for _ in 0..ROOM / 5000 {
            held.push(&[VolatileSlice::from(&mut chunk[..])], 0);
            held.advance(1);
        }
        let rest = ROOM as usize - held.bytes.len();
        held.push(&[VolatileSlice::from(&mut vec![7; rest + 9][..])], 9);
        assert_eq!((held.bytes.len(), held.memory()), (ROOM as usize, cost(SocketType::Stream, ROOM)));
    }

    #[test]
    fn marks_keep_any_length() {
        for len in [0, 1, 63, 64, 8191, 8192, 1 << 20, u32::MAX] {
            for end_of_record in [false, true] {
                let message = Message { len, end_of_record };
                let marks: VecDeque<u8> = message.mark().chain([0xff, 0xff]).collect();
                assert!(len == 0 || marks.len() - 2 <= len as usize);
                assert_eq!(Message::from_marks(&marks), Some((message, marks.len() - 2)));
            }
        }
        assert_eq!(Message::from_marks(&VecDeque::new()), None);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Part(usize, bool, bool),
        Take,
        DropPartial,
    }

    fn step() -> impl Strategy<Value = Step> {
        let len = prop_oneof![0..4usize, 50..80usize, 0..3000usize];
        prop_oneof![
            6 => (len, any::<bool>(), any::<bool>()).prop_map(|(len, is_end, record)| Step::Part(len, is_end, record)),
            2 => Just(Step::Take),
            1 => Just(Step::DropPartial),
        ]
    }

    proptest! {
        #[test]
        fn messages_are_kept_apart_within_the_bound(steps in prop::collection::vec(step(), 1..200)) {
            let room = 20_000;
            let mut held = Held::new(room);
            let (mut whole, mut partial, mut bytes) = (VecDeque::new(), Vec::new(), 0);
            for (n, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Part(len, is_end, record) if bytes + len <= room as usize => {
                        let mut part = vec![n as u8; len];
                        prop_assert!(held.push_part(&[VolatileSlice::from(&mut part[..])], is_end, record));
                        partial.extend(part);
                        bytes += len;
                        if is_end {
                            whole.push_back((std::mem::take(&mut partial), record));
                        }
                    }
                    Step::Part(..) => {}
                    Step::Take => {
                        let expected = whole.pop_front();
                        bytes -= expected.as_ref().map_or(0, |(message, _)| message.len());
                        prop_assert_eq!(held.take(), expected);
                    }
                    Step::DropPartial => {
                        prop_assert_eq!(held.drop_partial(), partial.len());
                        bytes -= partial.len();
                        partial.clear();
                    }
                }
                prop_assert_eq!(held.is_waiting(), !whole.is_empty());
                prop_assert_eq!(held.is_partial(), !partial.is_empty());
                prop_assert!(held.memory() <= cost(SocketType::SeqPacket, room));
            }
        }
    }
}
