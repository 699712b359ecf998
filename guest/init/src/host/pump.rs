//! Bytes on their way between the command and a port.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use crate::relay::Interest;

/// Most bytes moved at once.
const CHUNK: usize = 64 * 1024;
/// Most chunks moved before others get a turn.
const CHUNKS_PER_TURN: usize = 16;

/// How bytes are moved.
#[derive(Debug)]
enum Means {
    /// The kernel moves the pages of a pipe.
    Splice,
    /// Through this memory; the range has not been written yet.
    Copy { buffer: Vec<u8>, pending: Range<usize> },
}

/// Moves bytes from one descriptor to another, neither of which may block.
#[derive(Debug)]
pub struct Pump {
    /// `None` once it has ended, or nobody takes any more.
    from: Option<OwnedFd>,
    /// Stays open after the end of `from` where the last bytes may still wait in it.
    to: Option<OwnedFd>,
    means: Means,
    /// `to` takes nothing now.
    full: bool,
    /// Bytes that `to` took so far.
    moved: u64,
}

impl Pump {
    /// From a pipe to a port.
    pub fn splicing(from: OwnedFd, to: OwnedFd) -> Self {
        Self { from: Some(from), to: Some(to), means: Means::Splice, full: false, moved: 0 }
    }

    /// Between any two.
    pub fn copying(from: OwnedFd, to: OwnedFd) -> Self {
        let means = Means::Copy { buffer: vec![0; CHUNK], pending: 0..0 };
        Self { from: Some(from), to: Some(to), means, full: false, moved: 0 }
    }

    /// What to wait for: the source, then the destination.
    pub fn interests(&self) -> [Option<Interest<'_>>; 2] {
        let (Some(from), Some(to)) = (&self.from, &self.to) else { return [None, None] };
        let (source, destination) =
            if self.full { (None, PollFlags::OUT) } else { (Some(PollFlags::IN), PollFlags::empty()) };
        [
            source.map(|events| Interest { fd: from.as_fd(), events }),
            Some(Interest { fd: to.as_fd(), events: destination }),
        ]
    }

    /// Moves what can be moved, after these events of the source and the destination. `true`: the source
    /// has ended, or the destination takes no more.
    pub fn turn(&mut self, [source, to]: [PollFlags; 2]) -> bool {
        let (Some(from), Some(target)) = (&self.from, &self.to) else { return true };
        if to.intersects(PollFlags::HUP | PollFlags::ERR) && !to.contains(PollFlags::OUT) {
            // Closing the source tells whoever writes to it, as the end of a pipe does.
            self.end(false);
            return true;
        }
        self.full = false;
        for _ in 0..CHUNKS_PER_TURN {
            match self.means.step(from.as_fd(), target.as_fd()) {
                Step::Moved(n) => self.moved += n as u64,
                // A pipe without writers gets no more bytes.
                Step::Empty if source.contains(PollFlags::HUP) && !ready(from.as_fd()) => {
                    self.end(true);
                    return true;
                }
                Step::Empty => return false,
                Step::Full => {
                    self.full = true;
                    return false;
                }
                Step::Ended => {
                    self.end(true);
                    return true;
                }
                Step::Refused => {
                    self.end(false);
                    return true;
                }
            }
        }
        false
    }

    /// The source has nothing more for now, and nothing waits here.
    pub fn is_empty(&self) -> bool {
        let Some(from) = &self.from else { return true };
        let pending = matches!(&self.means, Means::Copy { pending, .. } if pending.start < pending.end);
        !self.full && !pending && !ready(from.as_fd())
    }

    /// Bytes that the destination took so far.
    pub fn moved(&self) -> u64 {
        self.moved
    }

    fn end(&mut self, keep: bool) {
        self.from = None;
        if !keep {
            self.to = None;
        }
    }
}

/// There is something to read. Asking by `poll` makes a terminal take in what is on its way.
fn ready(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::IN)
}

enum Step {
    Moved(usize),
    Empty,
    Full,
    Ended,
    Refused,
}

impl Means {
    fn step(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Step {
        match self {
            Self::Splice => {
                match splice(from, None, to, None, CHUNK, SpliceFlags::NONBLOCK | SpliceFlags::MOVE) {
                    // The driver does not tell an empty pipe from one that has ended.
                    Ok(0) => Step::Empty,
                    Ok(n) => Step::Moved(n),
                    Err(Errno::INTR) => Step::Moved(0),
                    Err(Errno::AGAIN) if ready(from) => Step::Full,
                    Err(Errno::AGAIN) => Step::Empty,
                    Err(_) => Step::Refused,
                }
            }
            Self::Copy { buffer, pending } => {
                if pending.start >= pending.end {
                    match rustix::io::read(from, &mut buffer[..]) {
                        Ok(0) => return Step::Ended,
                        Ok(n) => *pending = 0..n,
                        Err(Errno::AGAIN) => return Step::Empty,
                        Err(Errno::INTR) => return Step::Moved(0),
                        // A terminal whose programs have all closed it.
                        Err(_) => return Step::Ended,
                    }
                }
                match rustix::io::write(to, &buffer[pending.clone()]) {
                    Ok(n) => {
                        pending.start += n;
                        Step::Moved(n)
                    }
                    Err(Errno::INTR) => Step::Moved(0),
                    Err(Errno::AGAIN) => Step::Full,
                    Err(_) => Step::Refused,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use rustix::pipe::{PipeFlags, pipe_with};

    const NONE: [PollFlags; 2] = [PollFlags::empty(); 2];
    const SOURCE_ENDED: [PollFlags; 2] = [PollFlags::HUP, PollFlags::empty()];

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap()
    }

    /// Stands for a port: the pump's end, and the host's.
    fn port() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    }

    fn read(fd: &OwnedFd) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        let n = rustix::io::read(fd, &mut bytes[..]).unwrap();
        bytes.truncate(n);
        bytes
    }

    #[test]
    fn pages_of_a_pipe_are_moved_until_its_end() {
        let ((from, writer), (to, host)) = (pipe(), port());
        let mut pump = Pump::splicing(from, to);
        assert!(!pump.turn(NONE) && pump.is_empty());
        rustix::io::write(&writer, b"abc").unwrap();
        assert!(!pump.is_empty());
        assert!(!pump.turn([PollFlags::IN, PollFlags::empty()]));
        assert!(pump.is_empty() && pump.moved() == 3);
        assert_eq!(read(&host), b"abc");
        rustix::io::write(&writer, b"d").unwrap();
        drop(writer);
        assert!(pump.turn([PollFlags::IN | PollFlags::HUP, PollFlags::empty()]));
        assert_eq!((read(&host), pump.moved()), (b"d".to_vec(), 4));
        assert!(pump.turn(NONE) && pump.interests().iter().all(Option::is_none));
    }

    #[test]
    fn a_full_destination_is_waited_for() {
        for copying in [false, true] {
            let ((from, writer), (to, host)) = (pipe(), port());
            let mut pump = if copying { Pump::copying(from, to) } else { Pump::splicing(from, to) };
            let mut written = 0;
            while pump.interests()[0].is_some() {
                written += rustix::io::write(&writer, &[7; 4096]).unwrap_or(0);
                assert!(!pump.turn([PollFlags::IN, PollFlags::empty()]));
            }
            assert!(!pump.is_empty());
            assert_eq!(pump.interests()[1].as_ref().unwrap().events, PollFlags::OUT);
            drop(writer);
            let (mut got, mut ended) = (0, false);
            while !ended {
                got += rustix::io::read(&host, &mut [0; 1 << 16][..]).unwrap_or(0);
                ended = pump.turn([PollFlags::HUP, PollFlags::OUT]);
            }
            while let Ok(n @ 1..) = rustix::io::read(&host, &mut [0; 1 << 16][..]) {
                got += n;
            }
            assert_eq!((got, pump.moved()), (written, written as u64), "copying: {copying}");
        }
    }

    #[test]
    fn a_destination_that_is_gone_ends_the_source() {
        let ((from, writer), (to, host)) = (pipe(), port());
        let mut pump = Pump::splicing(from, to);
        drop(host);
        assert!(pump.turn([PollFlags::empty(), PollFlags::HUP]));
        assert_eq!(rustix::io::write(&writer, b"x"), Err(Errno::PIPE));
        // Also when only the attempt shows it.
        let ((from, writer), (to, reader)) = (port(), pipe());
        let mut pump = Pump::copying(from, reader);
        drop(to);
        rustix::io::write(&writer, b"x").unwrap();
        assert!(pump.turn([PollFlags::IN, PollFlags::empty()]));
        assert_eq!(rustix::io::write(&writer, b"x"), Err(Errno::PIPE));
    }

    #[test]
    fn the_end_of_a_port_is_passed_on() {
        let ((from, host), (reader, to)) = (port(), pipe());
        let mut pump = Pump::copying(from, to);
        rustix::io::write(&host, b"abc").unwrap();
        drop(host);
        assert!(pump.turn(SOURCE_ENDED));
        drop(pump);
        assert_eq!((read(&reader), read(&reader)), (b"abc".to_vec(), vec![]));
    }
}
