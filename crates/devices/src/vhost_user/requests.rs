//! What a back end asks of the front end, on a socket of its own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::message::{CONFIG_CHANGE, Flags, HEADER, Header};

/// Our end of that socket.
#[derive(Debug)]
pub struct Requests {
    socket: UnixStream,
    /// A message of which the rest has not come.
    partial: Vec<u8>,
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked {
    /// The configuration has changed.
    ConfigChange,
    /// Something else, which was refused.
    Other(u32),
    /// Nothing whole yet.
    Nothing,
}

fn invalid(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Requests {
    /// Our end, and the back end's.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((Self { socket: ours, partial: Vec::new() }, theirs.into()))
    }

    /// Takes the next request and answers it if an answer is wanted. Never blocks.
    ///
    /// An error means that the socket is of no more use: the back end has closed it, or breaks the protocol.
    pub fn next(&mut self) -> io::Result<Asked> {
        let Some(header) = self.message()? else { return Ok(Asked::Nothing) };
        self.partial.clear();
        let asked = match header.request {
            CONFIG_CHANGE => Asked::ConfigChange,
            other => Asked::Other(other),
        };
        if header.flags.contains(Flags::NEED_REPLY) {
            self.answer(header.request, u64::from(asked != Asked::ConfigChange))?;
        }
        Ok(asked)
    }

    /// The header of the next message, once all of it is there.
    fn message(&mut self) -> io::Result<Option<Header>> {
        if !self.fill(HEADER)? {
            return Ok(None);
        }
        let head = self.partial.first_chunk().ok_or_else(|| invalid("no header"))?;
        let header = Header::decode(*head).map_err(invalid)?;
        if header.flags.contains(Flags::REPLY) {
            return Err(invalid("an answer, and nothing was asked"));
        }
        Ok(self.fill(HEADER + header.size as usize)?.then_some(header))
    }

    /// Reads until there are `len` bytes; false when there are not so many yet.
    fn fill(&mut self, len: usize) -> io::Result<bool> {
        while self.partial.len() < len {
            let at = self.partial.len();
            self.partial.resize(len, 0);
            // Descriptors that come with it are closed by the kernel.
            let result = recv(&self.socket, &mut self.partial[at..], RecvFlags::DONTWAIT);
            self.partial.truncate(at + result.map_or(0, |(n, _)| n));
            match result {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    fn answer(&self, request: u32, code: u64) -> io::Result<()> {
        let header = Header { request, flags: Flags::REPLY, size: 8 };
        let message = [&header.encode()[..], &code.to_ne_bytes()].concat();
        // A back end that does not read its answers gets no more of them.
        match send(&self.socket, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)? {
            n if n == message.len() => Ok(()),
            _ => Err(invalid("answers are not read")),
        }
    }
}

impl AsFd for Requests {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn header(request: u32, flags: Flags, size: u32) -> [u8; HEADER] {
        Header { request, flags, size }.encode()
    }

    #[test]
    fn requests_come_in_pieces_and_are_answered() {
        let (mut ours, theirs) = Requests::pair().unwrap();
        let mut theirs = UnixStream::from(theirs);
        assert_eq!(ours.next().unwrap(), Asked::Nothing);
        let message = header(CONFIG_CHANGE, Flags::NEED_REPLY, 0);
        theirs.write_all(&message[..5]).unwrap();
        assert_eq!(ours.next().unwrap(), Asked::Nothing);
        theirs.write_all(&message[5..]).unwrap();
        assert_eq!(ours.next().unwrap(), Asked::ConfigChange);
        let mut answer = [0; HEADER + 8];
        theirs.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..HEADER], header(CONFIG_CHANGE, Flags::REPLY, 8));
        assert_eq!(answer[HEADER..], [0; 8]);
        theirs.write_all(&header(3, Flags::NEED_REPLY, 2)).unwrap();
        assert_eq!(ours.next().unwrap(), Asked::Nothing);
        theirs.write_all(b"ab").unwrap();
        theirs.write_all(&header(CONFIG_CHANGE, Flags::empty(), 0)).unwrap();
        assert_eq!(ours.next().unwrap(), Asked::Other(3));
        theirs.read_exact(&mut answer).unwrap();
        assert_ne!(answer[HEADER..], [0; 8]);
        assert_eq!(ours.next().unwrap(), Asked::ConfigChange);
        assert_eq!(ours.next().unwrap(), Asked::Nothing);
        drop(theirs);
        assert!(ours.next().is_err());
    }

    #[test]
    fn what_is_no_request_ends_it() {
        for bytes in [header(2, Flags::REPLY, 0), header(2, Flags::empty(), 5000), [0; HEADER]] {
            let (mut ours, theirs) = Requests::pair().unwrap();
            UnixStream::from(theirs).write_all(&bytes).unwrap();
            assert!(ours.next().is_err(), "{bytes:?}");
        }
        // Answers that nobody reads.
        let (mut ours, theirs) = Requests::pair().unwrap();
        let mut theirs = UnixStream::from(theirs);
        let ended = (0..1 << 20).any(|_| {
            theirs.write_all(&header(2, Flags::NEED_REPLY, 0)).unwrap();
            ours.next().is_err()
        });
        assert!(ended);
    }
}
