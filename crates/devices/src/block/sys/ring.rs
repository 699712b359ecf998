//! Transfers by io_uring.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use krun_event::Wake;

use super::Buffers;

/// Limit of a ring's size.
const MAX_ENTRIES: u32 = 4096;

/// A request that the kernel has, or is about to get.
enum Request {
    Read { buffers: Buffers, offset: u64 },
    Write { buffers: Buffers, offset: u64, durable: bool },
    Sync,
}

/// A ring for one file. It owns the buffers of each request until the kernel is done with it.
pub struct Ring {
    /// Before `slots`: the kernel lets go of the buffers first.
    ring: IoUring,
    file: Arc<File>,
    /// By index, which is the request's number in the ring.
    slots: Vec<Option<(u64, Request)>>,
    free: Vec<usize>,
}

impl Ring {
    /// A ring for up to `requests` at once, which sets `wake` when some are done.
    ///
    /// # Errors
    /// The host has no io_uring, does not permit it, or lacks an operation.
    pub fn new(file: Arc<File>, requests: u32, wake: &Wake) -> io::Result<Self> {
        let entries = requests.clamp(1, MAX_ENTRIES).next_power_of_two();
        let ring = IoUring::new(entries)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if ![opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE]
            .iter()
            .all(|c| probe.is_supported(*c))
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        ring.submitter().register_eventfd(wake.as_raw_fd())?;
        let entries = entries as usize;
        let slots = std::iter::repeat_with(|| None).take(entries).collect();
        Ok(Self { ring, file, slots, free: (0..entries).rev().collect() })
    }

    /// Whether another request can be taken.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Fills `buffers` from the file at `offset`. There must be room.
    pub fn read(&mut self, id: u64, buffers: Buffers, offset: u64) {
        self.add(id, Request::Read { buffers, offset });
    }

    /// Writes `buffers` to the file at `offset`, on stable storage before it is done if `durable`. There
    /// must be room.
    pub fn write(&mut self, id: u64, buffers: Buffers, offset: u64, durable: bool) {
        self.add(id, Request::Write { buffers, offset, durable });
    }

    /// Brings what was written before on stable storage. There must be room.
    pub fn sync(&mut self, id: u64) {
        self.add(id, Request::Sync);
    }

    fn add(&mut self, id: u64, request: Request) {
        debug_assert!(self.has_room());
        if let Some(slot) = self.free.pop() {
            self.slots[slot] = Some((id, request));
            self.queue(slot);
        }
    }

    /// Puts the request of `slot` in the submission queue.
    fn queue(&mut self, slot: usize) {
        let Some((_, request)) = &self.slots[slot] else { return };
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = match request {
            Request::Read { buffers, offset } => {
                let batch = buffers.batch();
                opcode::Readv::new(fd, batch.as_ptr(), batch.len() as u32).offset(*offset).build()
            }
            Request::Write { buffers, offset, durable } => {
                let batch = buffers.batch();
                let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(fd, batch.as_ptr(), batch.len() as u32)
                    .offset(*offset)
                    .rw_flags(flags)
                    .build()
            }
            Request::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        let entry: squeue::Entry = entry.user_data(slot as u64);
        // SAFETY: the entry points to the request's own array of pieces, on the heap, and that to guest
        // memory that the request holds. The request stays in its slot until the kernel reports it done,
        // and `drop` waits for that or keeps it for ever. The file is open while `self` lives.
        let queued = unsafe { self.ring.submission().push(&entry) };
        // There are as many slots as entries and each has at most one entry.
        debug_assert!(queued.is_ok());
    }

    /// Passes new requests to the kernel.
    ///
    /// # Errors
    /// The host's; the requests stay and can be submitted again.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Appends what is done to `out`. A request that was done in part is queued again for the rest.
    pub fn reap(&mut self, out: &mut Vec<(u64, io::Result<()>)>) {
        loop {
            let next = self.ring.completion().next();
            let Some(entry) = next else { return };
            let slot = entry.user_data() as usize;
            let Some((id, request)) = self.slots.get_mut(slot).and_then(Option::as_mut) else { continue };
            match request.outcome(entry.result()) {
                None => self.queue(slot),
                Some(outcome) => {
                    out.push((*id, outcome));
                    self.slots[slot] = None;
                    self.free.push(slot);
                }
            }
        }
    }
}

impl Request {
    /// The end of it, or `None` if something is left to do.
    fn outcome(&mut self, result: i32) -> Option<io::Result<()>> {
        let done = match usize::try_from(result) {
            Ok(n) => n,
            Err(_) => match io::Error::from_raw_os_error(-result) {
                e if e.kind() == io::ErrorKind::Interrupted || e.raw_os_error() == Some(libc::EAGAIN) => {
                    return None;
                }
                e => return Some(Err(e)),
            },
        };
        let (buffers, offset, nothing) = match self {
            Self::Sync => return Some(Ok(())),
            Self::Read { buffers, offset } => (buffers, offset, io::ErrorKind::UnexpectedEof),
            Self::Write { buffers, offset, .. } => (buffers, offset, io::ErrorKind::WriteZero),
        };
        if done == 0 && buffers.left() > 0 {
            return Some(Err(nothing.into()));
        }
        buffers.advance(done);
        *offset += done as u64;
        (buffers.left() == 0).then_some(Ok(()))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut done = Vec::new();
        loop {
            self.reap(&mut done);
            if self.free.len() == self.slots.len() {
                return;
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    // What the kernel may still write to must never be given back.
                    tracing::error!("io_uring cannot be waited for, memory is kept: {e}");
                    std::mem::forget(std::mem::take(&mut self.slots));
                    return;
                }
            }
        }
    }
}
