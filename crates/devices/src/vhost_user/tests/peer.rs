//! A small back end: its device gives back what it reads, and it misbehaves when it is told to.

use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::vhost_user::message::{
    CONFIG_CHANGE, F_PROTOCOL_FEATURES, Flags, HEADER, Header, InflightArea, Protocol, Request, u32_at,
    u64_at, words,
};

pub const VERSION_1: u64 = 1 << 32;

/// What goes wrong with the answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// No answer.
    Silence,
    /// The connection ends instead.
    Close,
    /// The end of it is missing, and stays so.
    Short,
    /// It ends in the middle.
    Cut,
    /// It says it is longer than it may be.
    Huge,
    /// It has more bytes than it should.
    Long,
    /// It is empty.
    Empty,
    /// It is one to something else.
    Other,
    /// It is a request.
    NoReply,
    /// Another version.
    Version,
    /// The request is refused, where that can be said.
    Refuse,
    /// Two answers.
    Twice,
    /// A number far too large.
    Most,
}

/// A back end as the test wants it.
#[derive(Debug, Clone)]
pub struct Options {
    pub features: u64,
    pub protocol: Protocol,
    pub queues: u64,
    pub config: Vec<u8>,
    pub fault: Option<(Request, Fault)>,
    /// Connections that serve no queue before one does.
    pub idle: u32,
    /// Makes all that it does with the descriptors for kicks block whoever else has them.
    pub blocks: bool,
    /// What is different from the second connection on.
    pub later: Option<Box<Options>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            features: VERSION_1 | F_PROTOCOL_FEATURES | 1 << 3 | 1 << 34,
            protocol: Protocol::all() - Protocol::INFLIGHT,
            queues: 2,
            config: (1..=12).collect(),
            fault: None,
            idle: 0,
            blocks: false,
            later: None,
        }
    }
}

/// What the test sees of it, and tells it.
#[derive(Debug, Default)]
pub struct Seen {
    /// Requests in order.
    pub requests: Mutex<Vec<u32>>,
    pub features: Mutex<u64>,
    /// Rings that were started: queue, size, base.
    pub rings: Mutex<Vec<(u32, u32, u32)>>,
    pub config: Mutex<Vec<u8>>,
    /// Bytes for the socket of its own requests.
    pub ask: Mutex<Vec<u8>>,
    /// Bytes that nobody asked for.
    pub chatter: Mutex<Vec<u8>>,
    /// End this connection.
    pub hang_up: AtomicBool,
    /// Set the descriptor that says that a ring is broken.
    pub break_ring: AtomicBool,
    stop: AtomicBool,
}

pub struct Peer {
    pub path: PathBuf,
    pub seen: Arc<Seen>,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Peer {
    pub fn new(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peer");
        let seen = Arc::new(Seen { config: Mutex::new(options.config.clone()), ..Seen::default() });
        let listener = UnixListener::bind(&path).unwrap();
        let shared = Arc::clone(&seen);
        let thread = thread::spawn(move || {
            listener.set_nonblocking(true).unwrap();
            let mut options = options;
            while !shared.stop.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((socket, _)) => {
                        shared.hang_up.store(false, Ordering::SeqCst);
                        Connection::new(socket, &options, &shared).run();
                        options.idle = options.idle.saturating_sub(1);
                        options = options.later.take().map_or(options, |later| *later);
                    }
                    Err(_) => thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Self { path, seen, thread: Some(thread), _dir: dir }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Requests since the last call.
    pub fn requests(&self) -> Vec<u32> {
        std::mem::take(&mut self.seen.requests.lock().unwrap())
    }

    /// Tells the front end that the configuration is another.
    pub fn change_config(&self, config: &[u8], flags: Flags) {
        *self.seen.config.lock().unwrap() = config.to_vec();
        let message = Header { request: CONFIG_CHANGE, flags, size: 0 }.encode();
        self.seen.ask.lock().unwrap().extend(message);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.seen.stop.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[derive(Default)]
struct Vring {
    size: u32,
    base: u32,
    addresses: [u64; 3],
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    enabled: bool,
}

struct Connection<'a> {
    socket: UnixStream,
    options: &'a Options,
    seen: &'a Seen,
    memory: Vec<(u64, u64, u64, File)>,
    rings: Vec<Vring>,
    asking: Option<UnixStream>,
}

impl<'a> Connection<'a> {
    fn new(socket: UnixStream, options: &'a Options, seen: &'a Seen) -> Self {
        let rings = (0..options.queues.min(8)).map(|_| Vring::default()).collect();
        Self { socket, options, seen, memory: Vec::new(), rings, asking: None }
    }

    fn run(&mut self) {
        while !self.seen.stop.load(Ordering::SeqCst) && !self.seen.hang_up.load(Ordering::SeqCst) {
            let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
            let _ = poll(&mut ready, Some(&Timespec { tv_sec: 0, tv_nsec: 2_000_000 }));
            if !ready[0].revents().is_empty() && self.message().is_none() {
                return;
            }
            let ask = std::mem::take(&mut *self.seen.ask.lock().unwrap());
            if let Some(socket) = &self.asking {
                let _ = rustix::io::write(socket, &ask);
            }
            let chatter = std::mem::take(&mut *self.seen.chatter.lock().unwrap());
            let _ = rustix::io::write(&self.socket, &chatter);
            if self.seen.break_ring.swap(false, Ordering::SeqCst) {
                let fd = self.rings.iter().find_map(|r| r.error.as_ref()).unwrap();
                let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
            }
            if self.options.idle == 0 {
                (0..self.rings.len()).for_each(|n| self.serve(n));
            }
        }
    }

    fn receive(&self, out: &mut [u8], fds: &mut Vec<OwnedFd>) -> Option<()> {
        let mut at = 0;
        while at < out.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let rest = &mut [IoSliceMut::new(&mut out[at..])];
            let n = recvmsg(&self.socket, rest, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?.bytes;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(more) = message {
                    fds.extend(more);
                }
            }
            at += n;
            if n == 0 {
                return None;
            }
        }
        Some(())
    }

    /// Takes one message and answers it; `None` at the end of the connection.
    fn message(&mut self) -> Option<()> {
        let (mut header, mut fds) = ([0; HEADER], Vec::new());
        self.receive(&mut header, &mut fds)?;
        let header = Header::decode(header).unwrap();
        let mut payload = vec![0; header.size as usize];
        self.receive(&mut payload, &mut fds)?;
        self.seen.requests.lock().unwrap().push(header.request);
        let mut fd = None;
        let answer = self.handle(header.request, &payload, fds, &mut fd);
        let acknowledged = header.flags.contains(Flags::NEED_REPLY).then(|| vec![0; 8]);
        let Some(answer) = answer.or(acknowledged) else { return Some(()) };
        let fault = self.options.fault.filter(|(r, _)| *r as u32 == header.request).map(|(_, f)| f);
        self.answer(header.request, answer, fd, fault)
    }

    fn answer(
        &self,
        request: u32,
        mut payload: Vec<u8>,
        fd: Option<OwnedFd>,
        fault: Option<Fault>,
    ) -> Option<()> {
        if payload.is_empty() {
            // Nothing is to be answered.
            return if fault == Some(Fault::Close) { None } else { Some(()) };
        }
        let mut header = Header { request, flags: Flags::REPLY, size: 0 };
        match fault {
            Some(Fault::Silence) => return Some(()),
            Some(Fault::Close) => return None,
            Some(Fault::Long) => payload.extend([0; 8]),
            Some(Fault::Empty) => payload.clear(),
            Some(Fault::Other) => header.request += 1,
            Some(Fault::NoReply) => header.flags = Flags::empty(),
            Some(Fault::Refuse) if request == Request::GetConfig as u32 => payload.clear(),
            Some(Fault::Refuse) => payload[0] = 1,
            Some(Fault::Most) => payload.fill(0xff),
            _ => {}
        }
        header.size = payload.len() as u32;
        let mut message = [&header.encode()[..], &payload].concat();
        match fault {
            Some(Fault::Huge) => message[8..12].fill(0xff),
            Some(Fault::Version) => message[4] ^= 3,
            Some(Fault::Short | Fault::Cut) => message.truncate(message.len() - 1),
            Some(Fault::Twice) => message.extend(message.clone()),
            _ => {}
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let part = [std::io::IoSlice::new(&message)];
        sendmsg(&self.socket, &part, &mut control, SendFlags::NOSIGNAL).ok()?;
        (fault != Some(Fault::Cut)).then_some(())
    }

    /// The payload of the answer; `None` when it has none of its own, empty when even an acknowledgement is too much.
    fn handle(
        &mut self,
        request: u32,
        payload: &[u8],
        mut fds: Vec<OwnedFd>,
        fd: &mut Option<OwnedFd>,
    ) -> Option<Vec<u8>> {
        let number = |n: u64| Some(n.to_ne_bytes().to_vec());
        let is = |r: Request| r as u32 == request;
        let ring = u32_at(payload, 0) as usize;
        if is(Request::GetFeatures) {
            return number(self.options.features);
        } else if is(Request::GetProtocolFeatures) {
            // Bits that no front end knows are offered too.
            return number(self.options.protocol.bits() | 1 << 63);
        } else if is(Request::GetQueueNum) {
            return number(self.options.queues);
        } else if is(Request::SetFeatures) {
            *self.seen.features.lock().unwrap() = u64_at(payload, 0);
        } else if is(Request::SetOwner) || is(Request::SetProtocolFeatures) {
            return Some(Vec::new());
        } else if is(Request::SetMemTable) {
            let row = |at: usize| [0, 8, 24].map(|n| u64_at(payload, at + n));
            let rows = (8..payload.len()).step_by(32).map(row).zip(fds.drain(..));
            self.memory = rows.map(|([at, size, offset], fd)| (at, size, offset, File::from(fd))).collect();
        } else if is(Request::SetBackendReqFd) {
            self.asking = fds.pop().map(UnixStream::from);
        } else if is(Request::GetConfig) {
            return Some(self.config(payload));
        } else if is(Request::SetConfig) {
            let at = ring;
            self.seen.config.lock().unwrap()[at..at + payload.len() - 12].copy_from_slice(&payload[12..]);
        } else if is(Request::GetInflightFd) {
            let file = rustix::fs::memfd_create("inflight", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            let area = InflightArea { size: 4096, ..InflightArea::decode(payload) };
            *fd = Some(file);
            return Some(area.encode().to_vec());
        } else if let Some(ring) = self.rings.get_mut(ring) {
            let value = u32_at(payload, 4);
            if is(Request::SetVringNum) {
                ring.size = value;
            } else if is(Request::SetVringBase) {
                ring.base = value;
            } else if is(Request::SetVringAddr) {
                ring.addresses = [8, 16, 24].map(|at| u64_at(payload, at));
            } else if is(Request::SetVringCall) {
                ring.call = fds.pop();
            } else if is(Request::SetVringErr) {
                ring.error = fds.pop();
            } else if is(Request::SetVringKick) {
                ring.kick = fds.pop();
                if let Some(kick) = ring.kick.take_if(|_| self.options.blocks) {
                    rustix::fs::fcntl_setfl(&kick, rustix::fs::OFlags::empty()).unwrap();
                    rustix::io::write(&kick, &(u64::MAX - 1).to_ne_bytes()).unwrap();
                }
            } else if is(Request::SetVringEnable) {
                ring.enabled = value == 1;
                if ring.enabled {
                    self.seen.rings.lock().unwrap().push((u32_at(payload, 0), ring.size, ring.base));
                }
            } else if is(Request::GetVringBase) {
                ring.kick = None;
                return Some(words::<2, 8>(&[u32_at(payload, 0), ring.base]).to_vec());
            }
        }
        None
    }

    fn config(&self, payload: &[u8]) -> Vec<u8> {
        let (at, len) = (u32_at(payload, 0) as usize, u32_at(payload, 4) as usize);
        let config = self.seen.config.lock().unwrap();
        match config.get(at..at + len) {
            Some(part) => [&payload[..12], part].concat(),
            None => words::<3, 12>(&[0, 0, 0]).to_vec(),
        }
    }

    fn at(&self, address: u64) -> (&File, u64) {
        let region = self.memory.iter().find(|(at, size, ..)| (*at..at + size).contains(&address)).unwrap();
        (&region.3, address - region.0 + region.2)
    }

    fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let (file, offset) = self.at(address);
        let mut bytes = [0; N];
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        let (file, offset) = self.at(address);
        file.write_all_at(bytes, offset).unwrap();
    }

    /// Gives back what the chains of a queue hold, once it was kicked.
    fn serve(&mut self, n: usize) {
        let ring = &self.rings[n];
        let Some(kick) = ring.kick.as_ref().filter(|_| ring.enabled) else { return };
        if rustix::io::read(kick, &mut [0u8; 8]).is_err() {
            return;
        }
        let [desc, used, avail] = ring.addresses;
        let (size, mut base) = (ring.size as u16, ring.base as u16);
        while base != u16::from_le_bytes(self.read(avail + 2)) {
            let slot = u64::from(base % size);
            let head = u16::from_le_bytes(self.read(avail + 4 + 2 * slot));
            let written = self.echo(desc, head);
            self.write(used + 4 + 8 * slot, &[u32::from(head).to_le_bytes(), written.to_le_bytes()].concat());
            base = base.wrapping_add(1);
            self.write(used + 2, &base.to_le_bytes());
        }
        self.rings[n].base = base.into();
        if let Some(call) = &self.rings[n].call {
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
    }

    fn echo(&self, table: u64, head: u16) -> u32 {
        let (mut bytes, mut index, mut written) = (Vec::new(), head, 0);
        loop {
            let d: [u8; 16] = self.read(table + 16 * u64::from(index));
            let (at, len) = (u64_at(&d, 0), u32_at(&d, 8) as usize);
            let (flags, next) = (u16::from_le_bytes([d[12], d[13]]), u16::from_le_bytes([d[14], d[15]]));
            if flags & 2 == 0 {
                for n in 0..len as u64 {
                    bytes.push(self.read::<1>(at + n)[0]);
                }
            } else {
                let part: Vec<u8> = bytes.drain(..len.min(bytes.len())).collect();
                self.write(at, &part);
                written += part.len() as u32;
            }
            if flags & 1 == 0 {
                return written;
            }
            index = next;
        }
    }
}

/// Waits until something is so.
pub fn until(what: &str, mut f: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !f() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}
