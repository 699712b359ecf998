//! The connection to a back end: requests one after the other, each answered within a time or not at all.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use krun_event::Wake;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    recvmsg, sendmsg, shutdown, socket_with,
};

use super::message::{Flags, HEADER, Header, HeaderError, REGIONS_MAX, Request, u64_at};

/// Why a request failed. But for [`ChannelError::Refused`] the connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// No answer in time.
    #[error("{request:?}: no answer in time")]
    Timeout {
        /// What was asked.
        request: Request,
    },
    /// The machine was killed meanwhile.
    #[error("{request:?}: the machine is killed, so its answer is not waited for")]
    Cancelled {
        /// What was asked.
        request: Request,
    },
    /// It has ended, or crashed.
    #[error("{request:?}: the back end has closed the connection")]
    Closed {
        /// What was asked.
        request: Request,
    },
    /// The host's refusal.
    #[error("{request:?}: {source}")]
    Host {
        /// What was asked.
        request: Request,
        /// The host's answer.
        source: io::Error,
    },
    /// The back end says no.
    #[error("{request:?}: refused by the back end ({code:#x})")]
    Refused {
        /// What was asked.
        request: Request,
        /// Its reason, if it is one.
        code: u64,
    },
    /// The answer breaks the protocol.
    #[error("{request:?}: the answer breaks the protocol: {why}")]
    Answer {
        /// What was asked.
        request: Request,
        /// How.
        why: String,
    },
    /// An earlier request failed.
    #[error("{request:?}: the connection was given up before")]
    Broken {
        /// What was to be asked.
        request: Request,
    },
}

/// One connection.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    /// When all that is asked now must be answered.
    deadline: Instant,
    /// Set when no answer matters any more. Never cleared.
    cancel: Wake,
    /// Both sides know [`super::message::Protocol::REPLY_ACK`].
    pub acknowledges: bool,
    broken: bool,
}

impl Channel {
    /// Connects to the back end at `path`; that, too, must be done by `deadline`.
    pub fn connect(path: &Path, deadline: Instant, cancel: Wake) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                // Others wait for it already.
                Err(Errno::AGAIN) if Instant::now() < deadline && !is_set(&cancel) => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(Self::new(socket, deadline, cancel))
    }

    /// On a socket that does not block.
    pub fn new(socket: OwnedFd, deadline: Instant, cancel: Wake) -> Self {
        Self { socket, deadline, cancel, acknowledges: false, broken: false }
    }

    /// What is asked from now on must be answered by then.
    pub fn allow_until(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    /// Whether the back end is there, as far as can be seen without asking: it has not closed the connection, and said
    /// nothing that it was not asked for.
    pub fn is_quiet(&self) -> bool {
        let mut byte = [0u8];
        !self.broken
            && matches!(
                recv(&self.socket, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT),
                Err(Errno::AGAIN)
            )
    }

    /// Whether the back end is there and the machine was not killed.
    pub fn is_wanted(&self) -> bool {
        self.is_quiet() && !is_set(&self.cancel)
    }

    /// Asks something that has no answer of its own. Returns once the back end has done it, if it acknowledges.
    pub fn tell(&mut self, request: Request, payload: &[u8]) -> Result<(), ChannelError> {
        self.pass(request, payload, &[])
    }

    /// As [`Self::tell`], passing descriptors on.
    pub fn pass(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let acknowledged = self.acknowledges;
        self.guarded(request, |this| {
            this.send(request, payload, fds, acknowledged)?;
            if !acknowledged {
                return Ok(());
            }
            let (answer, _) = this.receive(request, false)?;
            match <[u8; 8]>::try_from(answer.as_slice()).map(u64::from_ne_bytes) {
                Ok(0) => Ok(()),
                Ok(code) => Err(ChannelError::Refused { request, code }),
                Err(_) => Err(length(request, answer.len(), 8)),
            }
        })
    }

    /// Asks something that is answered.
    pub fn ask(&mut self, request: Request, payload: &[u8]) -> Result<Vec<u8>, ChannelError> {
        self.guarded(request, |this| {
            this.send(request, payload, &[], false)?;
            this.receive(request, false).map(|(answer, _)| answer)
        })
    }

    /// Asks for a number.
    pub fn ask_u64(&mut self, request: Request) -> Result<u64, ChannelError> {
        let answer = self.ask(request, &[])?;
        if answer.len() == 8 {
            Ok(u64_at(&answer, 0))
        } else {
            Err(self.give_up(length(request, answer.len(), 8)))
        }
    }

    /// Asks something that is answered with a descriptor.
    pub fn ask_fd(
        &mut self,
        request: Request,
        payload: &[u8],
    ) -> Result<(Vec<u8>, Option<OwnedFd>), ChannelError> {
        self.guarded(request, |this| {
            this.send(request, payload, &[], false)?;
            this.receive(request, true)
        })
    }

    /// The connection is of no more use after `error`.
    pub fn give_up(&mut self, error: ChannelError) -> ChannelError {
        self.broken = true;
        // Whoever watches it is told.
        let _ = shutdown(&self.socket, Shutdown::Both);
        error
    }

    fn guarded<T>(
        &mut self,
        request: Request,
        f: impl FnOnce(&mut Self) -> Result<T, ChannelError>,
    ) -> Result<T, ChannelError> {
        if self.broken {
            return Err(ChannelError::Broken { request });
        }
        let result = f(self);
        match result {
            Ok(_) | Err(ChannelError::Refused { .. }) => result,
            // What comes after a failure could be the answer to anything.
            Err(e) => Err(self.give_up(e)),
        }
    }

    fn send(
        &self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        acknowledged: bool,
    ) -> Result<(), ChannelError> {
        let flags = if acknowledged { Flags::NEED_REPLY } else { Flags::empty() };
        let header = Header { request: request as u32, flags, size: payload.len() as u32 };
        let message = [&header.encode()[..], payload].concat();
        let mut sent = 0;
        while sent < message.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REGIONS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            // They belong to the first byte.
            if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                let source = io::Error::other("too many descriptors for one message");
                return Err(ChannelError::Host { request, source });
            }
            let rest = [IoSlice::new(&message[sent..])];
            match sendmsg(&self.socket, &rest, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(request, PollFlags::OUT)?,
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ChannelError::Closed { request }),
                Err(e) => return Err(ChannelError::Host { request, source: e.into() }),
            }
        }
        Ok(())
    }

    /// Takes the answer to `request`, with a descriptor if one is wanted; others are closed by the kernel.
    fn receive(&self, request: Request, with_fd: bool) -> Result<(Vec<u8>, Option<OwnedFd>), ChannelError> {
        let mut header = [0; HEADER];
        let fd = self.fill(request, &mut header, with_fd)?;
        let wrong = |why: String| ChannelError::Answer { request, why };
        let header = Header::decode(header).map_err(|e: HeaderError| wrong(e.to_string()))?;
        if !header.flags.contains(Flags::REPLY) {
            return Err(wrong("it is a request".into()));
        }
        if header.request != request as u32 {
            return Err(wrong(format!("it is one to request {}", header.request)));
        }
        let mut payload = vec![0; header.size as usize];
        self.fill(request, &mut payload, false)?;
        Ok((payload, fd))
    }

    fn fill(
        &self,
        request: Request,
        mut out: &mut [u8],
        with_fd: bool,
    ) -> Result<Option<OwnedFd>, ChannelError> {
        let mut fd = None;
        while !out.is_empty() {
            let result =
                if with_fd && fd.is_none() { self.take_with_fd(out, &mut fd) } else { self.take(out) };
            match result {
                Ok(0) | Err(Errno::CONNRESET) => return Err(ChannelError::Closed { request }),
                Ok(n) => out = &mut out[n..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(request, PollFlags::IN)?,
                Err(e) => return Err(ChannelError::Host { request, source: e.into() }),
            }
        }
        Ok(fd)
    }

    /// A read without room for descriptors: the kernel closes any that come.
    fn take(&self, out: &mut [u8]) -> rustix::io::Result<usize> {
        recv(&self.socket, out, RecvFlags::DONTWAIT).map(|(n, _)| n)
    }

    fn take_with_fd(&self, out: &mut [u8], fd: &mut Option<OwnedFd>) -> rustix::io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let n = recvmsg(&self.socket, &mut [IoSliceMut::new(out)], &mut control, flags)?.bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                *fd = fds.last().or(fd.take());
            }
        }
        Ok(n)
    }

    fn wait(&self, request: Request, events: PollFlags) -> Result<(), ChannelError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ChannelError::Timeout { request });
        }
        let time = Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(&self.socket, events), PollFd::new(&self.cancel, PollFlags::IN)];
        match poll(&mut fds, Some(&time)) {
            Ok(_) if !fds[1].revents().is_empty() => Err(ChannelError::Cancelled { request }),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(ChannelError::Host { request, source: e.into() }),
        }
    }
}

fn is_set(wake: &Wake) -> bool {
    let mut fds = [PollFd::new(wake, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|n| n > 0)
}

fn length(request: Request, len: usize, wanted: usize) -> ChannelError {
    ChannelError::Answer { request, why: format!("{len} bytes, not {wanted}") }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
