//! The command's standard streams: between the caller's descriptors and the machine's ports.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use crate::Error;

/// Most bytes moved at once.
const CHUNK: usize = 64 * 1024;
/// What a pipe, terminal or socket that is ready takes without blocking, in bytes.
const SMALL: usize = 4096;

/// Ends threads that wait: they see when it is dropped.
#[derive(Debug)]
pub struct Stop {
    _writer: OwnedFd,
    reader: OwnedFd,
}

impl Stop {
    pub fn new() -> Result<Self, Error> {
        let (reader, writer) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(Error::host("creating a pipe"))?;
        Ok(Self { _writer: writer, reader })
    }

    fn watch(&self) -> Result<OwnedFd, Error> {
        self.reader.try_clone().map_err(Error::host("duplicating a pipe"))
    }
}

/// How much of an output has arrived here.
#[derive(Debug, Default)]
pub struct Arrived {
    /// Bytes, and whether there will be no more.
    state: Mutex<(u64, bool)>,
    changed: Condvar,
}

impl Arrived {
    fn add(&self, bytes: u64, ended: bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = (state.0 + bytes, state.1 || ended);
        self.changed.notify_all();
    }

    /// Waits until this many bytes have arrived, or no more will.
    pub fn wait_for(&self, bytes: u64) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(state, |(arrived, ended)| *arrived < bytes && !*ended));
    }
}

/// Waits for `fd`. `None`: it is time to stop.
fn wait(fd: BorrowedFd<'_>, events: PollFlags, stop: &OwnedFd) -> Option<PollFlags> {
    let mut fds = [PollFd::from_borrowed_fd(fd, events), PollFd::new(stop, PollFlags::empty())];
    loop {
        match poll(&mut fds, None) {
            Err(Errno::INTR) => {}
            Err(_) => return None,
            Ok(_) if !fds[1].revents().is_empty() => return None,
            Ok(_) => return Some(fds[0].revents()),
        }
    }
}

/// Writes all of `bytes`. `false`: nobody takes them any more, or it is time to stop.
fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8], most: usize, stop: &OwnedFd) -> bool {
    while !bytes.is_empty() {
        if wait(to, PollFlags::OUT, stop).is_none() {
            return false;
        }
        match rustix::io::write(to, &bytes[..bytes.len().min(most)]) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return false,
        }
    }
    true
}

/// Reads into `buffer`; 0 at the end, at an error, or when it is time to stop.
fn read(from: BorrowedFd<'_>, buffer: &mut [u8], stop: &OwnedFd) -> usize {
    loop {
        if wait(from, PollFlags::IN, stop).is_none() {
            return 0;
        }
        match rustix::io::read(from, &mut *buffer) {
            Ok(n) => return n,
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return 0,
        }
    }
}

fn is_file(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::RegularFile)
}

/// Passes `from` on to the command until its end. The port must stay open after that: QEMU takes a
/// closed socket as lost together with what is still in it.
pub fn input(from: Option<OwnedFd>, port: UnixStream, stop: &Stop) -> Result<Option<JoinHandle<()>>, Error> {
    let Some(from) = from else {
        let _ = port.shutdown(Shutdown::Write);
        return Ok(None);
    };
    let stop = stop.watch()?;
    port.set_nonblocking(true).map_err(Error::host("preparing a socket"))?;
    spawn("krun-lab-in", move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            let n = read(from.as_fd(), &mut buffer, &stop);
            if n == 0 || !write_all(port.as_fd(), &buffer[..n], CHUNK, &stop) {
                break;
            }
        }
        let _ = port.shutdown(Shutdown::Write);
    })
    .map(Some)
}

/// Passes the command's output on to `to`. When nobody takes it, the command is told by the port's end.
pub fn output(
    port: UnixStream,
    to: Option<OwnedFd>,
    arrived: Arc<Arrived>,
    stop: &Stop,
) -> Result<JoinHandle<()>, Error> {
    let stop = stop.watch()?;
    spawn("krun-lab-out", move || {
        let most = to.as_ref().map_or(CHUNK, |fd| if is_file(fd.as_fd()) { CHUNK } else { SMALL });
        let mut buffer = vec![0; CHUNK];
        loop {
            let n = read(port.as_fd(), &mut buffer, &stop);
            if n == 0 {
                break;
            }
            arrived.add(n as u64, false);
            if let Some(to) = &to
                && !write_all(to.as_fd(), &buffer[..n], most, &stop)
            {
                break;
            }
        }
        arrived.add(0, true);
        let _ = port.shutdown(Shutdown::Both);
    })
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Error> {
    std::thread::Builder::new().name(name.into()).spawn(run).map_err(Error::host("starting a thread"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn input_ends_and_leaves_the_port_open() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (from, mut typed) = UnixStream::pair().unwrap();
        let stop = Stop::new().unwrap();
        let thread = input(Some(from.into()), near.try_clone().unwrap(), &stop).unwrap().unwrap();
        typed.write_all(b"abc").unwrap();
        drop(typed);
        let mut got = Vec::new();
        far.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"abc");
        thread.join().unwrap();
        // The other direction still works: it was not closed.
        far.write_all(b"x").unwrap();
        drop(near);
    }

    #[test]
    fn an_output_that_nobody_takes_ends_the_port() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (to, reader) = UnixStream::pair().unwrap();
        drop(reader);
        let stop = Stop::new().unwrap();
        let thread = output(near, Some(to.into()), Arc::default(), &stop).unwrap();
        far.write_all(b"abc").unwrap();
        thread.join().unwrap();
        assert_eq!(far.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn a_blocked_output_and_an_idle_input_can_be_stopped() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (to, _reader) = UnixStream::pair().unwrap();
        let stop = Stop::new().unwrap();
        let out = output(near, Some(to.into()), Arc::default(), &stop).unwrap();
        far.set_nonblocking(true).unwrap();
        for _ in 0..100 {
            let _ = far.write(&[0; CHUNK]);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let (idle, _typed) = UnixStream::pair().unwrap();
        let (port, _far) = UnixStream::pair().unwrap();
        let input = input(Some(idle.into()), port, &stop).unwrap().unwrap();
        assert!(!out.is_finished() && !input.is_finished());
        drop(stop);
        out.join().unwrap();
        input.join().unwrap();
    }
}
