//! The DAX window (virtio 1.2, section 5.11.6.1): the guest's memory, into which parts of files are mapped at its request.
//! What it reads and writes there is this host's page cache, so that nothing is copied and kept twice, and each side
//! sees at once what the other one writes.
//!
//! Which part of the window shows what is the guest's to say, in pieces of 2 MiB that lie at multiples of that in the
//! window and in the file, so that a guest has this process make no more mappings than its window has such pieces, or
//! twice that. Where nothing is shown the guest finds zeroed memory.
//!
//! A file may become shorter while it is shown, and a processor that touches what it has lost cannot go on. It then
//! finds zeroes there ([`SharedMemory::mend`]), and what it writes is lost, until the file is long enough again and the
//! guest has asked for anything at all ([`Dax::lacking`]).

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use krun_memory::{Mapping, Memfd, Window};
use krun_virtio::SharedMemory;
use rustix::io::Errno;

/// Window and files are divided into pieces of so many bytes; Linux's driver does the same.
pub const CHUNK: u64 = 2 << 20;
/// The same as a power of two, for INIT.
pub const ALIGNMENT: u16 = 21;
/// Largest window.
pub const WINDOW_MAX: u64 = 16 << 30;
const PAGE: usize = 4096;
const CHUNK_BYTES: usize = CHUNK as usize;
/// Holes that are mended one by one in a window where files have lost more than their ends. Each is up to two more
/// mappings, of which a process has some 65,000; beyond, the rest of a piece goes with the first hole.
const HOLES_MAX: usize = 1024;

/// A window as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DaxSpec {
    /// Bytes, a multiple of [`CHUNK`], up to [`WINDOW_MAX`].
    pub size: u64,
    /// Files of at least so many bytes are mapped, others are read and written by requests.
    pub from: u64,
}

/// A part of a file and its place in the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Where in the window.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// Where in the file.
    pub offset: u64,
    /// The guest may write there.
    pub writable: bool,
}

/// What a piece of the window shows.
#[derive(Debug, Clone, Copy)]
struct Shown {
    node: u64,
    offset: u64,
    writable: bool,
    /// The file was found to end here, in bytes from the start of the piece; zeroed memory follows.
    end: Option<usize>,
    /// Holes that were mended one by one: only some of the pages from the end on are zeroed memory, others still show
    /// the file.
    holes: usize,
}

impl Shown {
    /// From here on nothing of the file is shown.
    fn reach(&self) -> usize {
        self.end.filter(|_| self.holes == 0).unwrap_or(CHUNK_BYTES)
    }
}

/// A piece of a file of which the end is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lacking {
    /// Where it is to be.
    pub part: Part,
    /// Whose it is.
    pub node: u64,
    /// So many bytes of it are there at least.
    pub there: u64,
}

/// A window in use. The guest's requests come from the share's thread, its processors' troubles from theirs.
#[derive(Debug)]
pub struct Dax {
    window: Window,
    from: u64,
    /// By number of the piece.
    shown: Mutex<BTreeMap<usize, Shown>>,
    /// Some of them have an end.
    lacks: AtomicBool,
    /// Nodes of which something that was written did not reach the file.
    lost: Mutex<HashSet<u64>>,
}

impl Dax {
    /// An empty window.
    ///
    /// # Errors
    /// The host has no room for it.
    pub fn new(spec: DaxSpec) -> Result<Self, krun_memory::Error> {
        let size = usize::try_from(spec.size).unwrap_or(usize::MAX);
        let window = Window::new(size)?;
        let lacks = AtomicBool::new(false);
        Ok(Self { window, from: spec.from, shown: Mutex::default(), lacks, lost: Mutex::default() })
    }

    /// Files of at least so many bytes are to be mapped.
    pub fn from(&self) -> u64 {
        self.from
    }

    /// Bytes of the window.
    pub fn size(&self) -> u64 {
        self.window.size() as u64
    }

    fn shown(&self) -> MutexGuard<'_, BTreeMap<usize, Shown>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place of `len` bytes at `at` and the numbers of the pieces there.
    fn pieces(&self, at: u64, len: u64) -> Result<(usize, usize, Range<usize>), Errno> {
        let end = at.checked_add(len).filter(|end| *end <= self.size()).ok_or(Errno::INVAL)?;
        if len == 0 || !at.is_multiple_of(CHUNK) || !len.is_multiple_of(CHUNK) {
            return Err(Errno::INVAL);
        }
        // What lies in the window fits.
        Ok((at as usize, len as usize, (at / CHUNK) as usize..(end / CHUNK) as usize))
    }

    /// As [`Dax::pieces`], for a part that a file can have.
    ///
    /// # Errors
    /// EINVAL: there is no such place, in the window or in any file.
    pub fn check(&self, part: Part) -> Result<(usize, usize, Range<usize>), Errno> {
        let in_file = part.offset.checked_add(part.len).is_some_and(|end| i64::try_from(end).is_ok());
        if !in_file || !part.offset.is_multiple_of(CHUNK) {
            return Err(Errno::INVAL);
        }
        self.pieces(part.at, part.len)
    }

    /// Shows a part of `file`, which is that of `node`.
    ///
    /// # Errors
    /// EINVAL: no such place, in the window or in any file; or the host's reason.
    pub fn show(&self, node: u64, file: BorrowedFd<'_>, part: Part) -> Result<(), Errno> {
        let (at, len, pieces) = self.check(part)?;
        let mut shown = self.shown();
        self.window.show(at, len, file, part.offset, part.writable).map_err(errno)?;
        for (piece, offset) in pieces.zip((part.offset..).step_by(CHUNK_BYTES)) {
            shown.insert(piece, Shown { node, offset, writable: part.writable, end: None, holes: 0 });
        }
        self.note(&shown);
        Ok(())
    }

    /// Shows nothing any more in `len` bytes at `at`.
    ///
    /// # Errors
    /// EINVAL: there is no such place in the window; or the host's reason.
    pub fn hide(&self, at: u64, len: u64) -> Result<(), Errno> {
        let (at, len, pieces) = self.pieces(at, len)?;
        let mut shown = self.shown();
        self.window.blank(at, len).map_err(errno)?;
        shown.retain(|piece, _| !pieces.contains(piece));
        self.note(&shown);
        Ok(())
    }

    /// Shows nothing any more.
    ///
    /// # Errors
    /// The host's reason; what was shown still is, then.
    pub fn clear(&self) -> Result<(), Errno> {
        let mut shown = self.shown();
        if shown.is_empty() {
            return Ok(());
        }
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.window.blank(0, self.window.size()).map_err(errno)?;
        shown.clear();
        self.note(&shown);
        Ok(())
    }

    fn note(&self, shown: &BTreeMap<usize, Shown>) {
        self.lacks.store(shown.values().any(|s| s.end.is_some()), Ordering::Release);
    }

    /// Whether anything is shown without its end.
    pub fn is_lacking(&self) -> bool {
        self.lacks.load(Ordering::Acquire)
    }

    /// What is shown without its end, for that was gone when it was looked for.
    pub fn lacking(&self) -> Vec<Lacking> {
        if !self.is_lacking() {
            return Vec::new();
        }
        let lacking = |(piece, s): (&usize, &Shown)| {
            let at = *piece as u64 * CHUNK;
            let part = Part { at, len: CHUNK, offset: s.offset, writable: s.writable };
            Some(Lacking { part, node: s.node, there: s.end? as u64 })
        };
        self.shown().iter().filter_map(lacking).collect()
    }

    /// Nodes of which something is shown.
    pub fn nodes(&self) -> HashSet<u64> {
        self.shown().values().map(|s| s.node).collect()
    }

    /// File `node` has so many bytes: puts zeroed memory in place of what is shown beyond. The guest need not have
    /// touched it.
    pub fn cut(&self, node: u64, size: u64) {
        let mut shown = self.shown();
        for (piece, s) in shown.iter_mut().filter(|(_, s)| s.node == node) {
            let there = pages(size.saturating_sub(s.offset)) as usize;
            let pages = there / PAGE..s.reach() / PAGE;
            if !pages.is_empty() && self.replace(*piece, s, pages) && s.end == Some(there) {
                s.holes = 0;
            }
        }
        self.note(&shown);
    }

    /// Number of pieces that show something.
    pub fn count(&self) -> usize {
        self.shown().len()
    }
}

impl SharedMemory for Dax {
    fn mapping(&self) -> &Mapping {
        self.window.mapping()
    }

    fn mend(&self) -> bool {
        let mut shown = self.shown();
        // Where a file was cut off its end is gone; a disk that is full or broken may lack any page, to readers or only
        // to who writes. Each of these takes longer to find than the one before.
        let mut any = shown.iter_mut().fold(false, |any, (piece, s)| self.mend_end(*piece, s) | any);
        let readable: &Check<'_> = &|piece, page, _| self.is_there(piece, page);
        let writable: &Check<'_> =
            &|piece, page, s| !s.writable || self.window.is_writable(piece * CHUNK_BYTES + page * PAGE, PAGE);
        let mut left = HOLES_MAX.saturating_sub(shown.values().map(|s| s.holes).sum());
        for check in [readable, writable] {
            if !any {
                any = shown
                    .iter_mut()
                    .fold(false, |any, (n, s)| self.mend_pages(*n, s, check, &mut left) | any);
            }
        }
        self.note(&shown);
        any
    }
}

/// Whether a page of a piece is as it should be.
type Check<'a> = dyn Fn(usize, usize, &Shown) -> bool + 'a;

impl Dax {
    /// Whether page `page` of piece `piece` can be read.
    fn is_there(&self, piece: usize, page: usize) -> bool {
        self.window.is_there(piece * CHUNK_BYTES + page * PAGE)
    }

    /// Puts zeroed memory in the place of `pages` of a piece.
    fn replace(&self, piece: usize, s: &mut Shown, pages: Range<usize>) -> bool {
        let (from, to) = (pages.start * PAGE, pages.end * PAGE);
        tracing::debug!(node = s.node, offset = s.offset, from, to, "no file in this part of a DAX window");
        if let Err(error) = self.window.blank(piece * CHUNK_BYTES + from, to - from) {
            tracing::warn!(%error, "nothing can be put in its place");
            return false;
        }
        s.end = Some(s.end.map_or(from, |end| end.min(from)));
        true
    }

    /// Replaces the end of a piece if it is gone.
    fn mend_end(&self, piece: usize, s: &mut Shown) -> bool {
        let end = s.reach() / PAGE;
        if end == 0 || self.is_there(piece, end - 1) {
            return false;
        }
        let pages: Vec<usize> = (0..end).collect();
        let there = pages.partition_point(|page| self.is_there(piece, *page));
        self.replace(piece, s, there..end)
    }

    /// Replaces pages of a piece that are not as they should be: up to `left` runs of them, then all that follows. What
    /// can be read of them is kept. What the guest writes there does not reach the file, which is told with the next
    /// FSYNC.
    fn mend_pages(&self, piece: usize, s: &mut Shown, check: &Check<'_>, left: &mut usize) -> bool {
        const PAGES: usize = CHUNK_BYTES / PAGE;
        let (mut any, mut page) = (false, 0);
        while let Some(first) = (page..PAGES).find(|page| !check(piece, *page, s)) {
            page = match *left {
                0 => PAGES,
                _ => (first..PAGES).find(|page| check(piece, *page, s)).unwrap_or(PAGES),
            };
            if self.keep_and_replace(piece, s, first..page) {
                any = true;
                if *left > 0 {
                    *left -= 1;
                    s.holes += 1;
                }
            }
        }
        if any && s.writable {
            self.lose(s.node);
        }
        any
    }

    /// As [`Dax::replace`], with what can be read of the pages.
    fn keep_and_replace(&self, piece: usize, s: &mut Shown, pages: Range<usize>) -> bool {
        let start = piece * CHUNK_BYTES + pages.start * PAGE;
        let range = start..start + pages.len() * PAGE;
        let copy = Memfd::new(range.len() as u64);
        let kept = copy.map_err(std::io::Error::other).and_then(|copy| {
            self.mapping().copy_to_file(range.clone(), copy.file(), 0)?;
            Ok(copy)
        });
        if !self.replace(piece, s, pages) {
            return false;
        }
        let put = kept.and_then(|copy| self.mapping().copy_from_file(range, copy.file(), 0));
        if let Err(error) = put {
            tracing::warn!(%error, "what was there cannot be kept");
        }
        true
    }

    /// What the guest writes to `node` may not reach the file.
    pub fn lose(&self, node: u64) {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).insert(node);
    }

    /// Whether something that the guest has written to `node` did not reach the file since this was asked last.
    pub fn take_lost(&self, node: u64) -> bool {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).remove(&node)
    }
}

/// Bytes of the pages that hold the first `bytes` of a piece.
pub fn pages(bytes: u64) -> u64 {
    bytes.min(CHUNK).next_multiple_of(PAGE as u64)
}

fn errno(e: std::io::Error) -> Errno {
    Errno::from_io_error(&e).unwrap_or(Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    const PIECES: u64 = 4;

    fn dax() -> Dax {
        Dax::new(DaxSpec { size: PIECES * CHUNK, from: 0 }).unwrap()
    }

    /// A file of which each piece begins and ends with its number and `mark`.
    fn file(pieces: u64, mark: u8) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pieces * CHUNK).unwrap();
        for n in 0..pieces {
            file.write_all_at(&[n as u8, mark], n * CHUNK).unwrap();
            file.write_all_at(&[mark], (n + 1) * CHUNK - 1).unwrap();
        }
        file
    }

    /// First two and last byte of each piece, as the guest sees them.
    fn seen(dax: &Dax) -> Vec<[u8; 3]> {
        let size = dax.size() as usize;
        let copy = Memfd::new(size as u64).unwrap();
        dax.mapping().copy_to_file(0..size, copy.file(), 0).unwrap();
        (0..PIECES)
            .map(|n| {
                let mut bytes = [0; 3];
                copy.file().read_exact_at(&mut bytes[..2], n * CHUNK).unwrap();
                copy.file().read_exact_at(&mut bytes[2..], (n + 1) * CHUNK - 1).unwrap();
                bytes
            })
            .collect()
    }

    #[test]
    fn a_shorter_file_is_mended_and_a_longer_one_noticed() {
        let (dax, f) = (dax(), file(2, b'f'));
        let part = Part { at: CHUNK, len: 2 * CHUNK, offset: 0, writable: true };
        dax.show(7, f.as_fd(), part).unwrap();
        assert!(!dax.mend() && dax.lacking().is_empty());
        f.set_len(CHUNK + 5 * PAGE as u64 + 1).unwrap();
        assert!(dax.mend());
        assert!(!dax.mend(), "once is enough");
        let lacking = dax.lacking();
        assert_eq!(lacking.len(), 1);
        assert_eq!((lacking[0].node, lacking[0].there), (7, 6 * PAGE as u64));
        assert_eq!(lacking[0].part, Part { at: 2 * CHUNK, len: CHUNK, offset: CHUNK, writable: true });
        // What is still there is the file's.
        f.write_all_at(b"n", CHUNK + 5 * PAGE as u64).unwrap();
        assert_eq!(seen(&dax)[1..3], [[0, b'f', b'f'], [1, b'f', 0]]);
        f.set_len(0).unwrap();
        assert!(dax.mend());
        assert_eq!(dax.lacking().iter().map(|l| l.there).collect::<Vec<_>>(), [0, 0]);
        f.set_len(2 * CHUNK).unwrap();
        f.write_all_at(b"xyz", CHUNK).unwrap();
        for l in dax.lacking() {
            dax.show(l.node, f.as_fd(), l.part).unwrap();
        }
        assert!(dax.lacking().is_empty() && !dax.mend());
        assert_eq!(seen(&dax)[2], [b'x', b'y', 0]);
        dax.clear().unwrap();
        assert_eq!((dax.count(), seen(&dax)), (0, vec![[0; 3]; 4]));
    }

    #[test]
    fn pages_that_the_disk_does_not_give_are_mended_too() {
        // Reading a hole of a mapped file takes room in this kind of file system.
        let dir = tempfile::tempdir().unwrap();
        let done = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(dir.path())
            .output();
        if !done.is_ok_and(|out| out.status.success()) {
            println!("skipped: no file system can be mounted here");
            return;
        }
        let path = dir.path().join("f");
        let f = File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        f.set_len(CHUNK).unwrap();
        for page in [0, 3, 511] {
            f.write_all_at(b"x", page * PAGE as u64).unwrap();
        }
        let full = File::create(dir.path().join("full")).unwrap();
        while std::io::Write::write(&mut &full, &[1; PAGE]).is_ok_and(|n| n > 0) {}
        let dax = dax();
        dax.show(7, f.as_fd(), Part { at: 0, len: CHUNK, offset: 0, writable: true }).unwrap();
        assert!(dax.mend() && !dax.mend());
        assert_eq!(dax.lacking()[0].there, PAGE as u64);
        assert!(dax.take_lost(7) && !dax.take_lost(7));
        assert!((0..512).all(|page| dax.is_there(0, page)));
        let copy = Memfd::new(CHUNK).unwrap();
        dax.mapping().copy_to_file(0..CHUNK_BYTES, copy.file(), 0).unwrap();
        for (page, wanted) in [(0, b'x'), (1, 0), (3, b'x'), (4, 0), (511, b'x')] {
            let mut byte = [9];
            copy.file().read_exact_at(&mut byte, page * PAGE as u64).unwrap();
            assert_eq!(byte[0], wanted, "page {page}");
        }
        // What follows the first of them goes with the file's end.
        for (pages, there) in [(4, 1), (1, 1), (0, 0)] {
            f.set_len(pages * PAGE as u64).unwrap();
            dax.cut(7, pages * PAGE as u64);
            assert!((0..512).all(|page| dax.is_there(0, page)), "{pages} pages");
            assert_eq!(dax.lacking()[0].there, there * PAGE as u64);
        }
        drop((dax, f, full));
        let _ = std::process::Command::new("umount").arg("-l").arg(dir.path()).status();
    }

    /// Numbers that are odd, at the edges, or right.
    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![
            8 => (0..PIECES + 2).prop_map(|n| n * CHUNK),
            1 => any::<u64>(),
            1 => 0..PIECES * CHUNK,
            1 => Just(u64::MAX - CHUNK + 1),
            1 => Just((1 << 63) - CHUNK),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_is_asked_for_lies_in_the_window_or_is_refused(
            steps in proptest::collection::vec((any::<bool>(), number(), number(), number(), any::<bool>()), 1..12)
        ) {
            let (dax, files) = (dax(), [file(8, b'a'), file(8, b'b')]);
            let mut model = [[0u8; 3]; PIECES as usize];
            for (n, (shows, at, len, offset, writable)) in steps.into_iter().enumerate() {
                let part = Part { at, len, offset, writable };
                let inside = len > 0 && at % CHUNK == 0 && len % CHUNK == 0
                    && at.checked_add(len).is_some_and(|end| end <= PIECES * CHUNK);
                let in_file = offset % CHUNK == 0 && offset.checked_add(len).is_some_and(|e| e < 1 << 63);
                let pieces = || at / CHUNK..(at + len) / CHUNK;
                let which = n % 2;
                if shows {
                    prop_assert_eq!(dax.show(9, files[which].as_fd(), part).is_ok(), inside && in_file);
                    if inside && in_file {
                        for piece in pieces() {
                            let number = offset / CHUNK + piece - at / CHUNK;
                            let mark = b"ab"[which];
                            model[piece as usize] = if number < 8 { [number as u8, mark, mark] } else { [0; 3] };
                        }
                    }
                } else {
                    prop_assert_eq!(dax.hide(at, len).is_ok(), inside);
                    if inside {
                        pieces().for_each(|piece| model[piece as usize] = [0; 3]);
                    }
                }
                prop_assert_eq!(seen(&dax), model.to_vec());
                prop_assert!(dax.count() <= PIECES as usize);
            }
        }
    }
}
