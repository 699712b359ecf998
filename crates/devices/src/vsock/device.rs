//! The device: connections put together with the guest's queues.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use krun_event::{Interest, Ready, Wake};
use krun_virtio::{Chain, ConfigSpace, Cx, DeviceError, DeviceInfo, Reader, VirtioDevice};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::buffers::Buffers;
use super::connection::{Connection, Fate, Key};
use super::connector::Connector;
use super::listener::Listener;
use super::packet::{HOST_CID, Header, op};
use super::spec::{Direction, SocketType, VsockError, VsockSpec};
use super::table::Table;
use crate::sys::{Timer, descriptors_for_guests};

/// Queues, by their index: to the guest, and from it. The third, for events, is never used: only the migration of a guest
/// causes some.
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

/// Tokens: the timer, then the listeners, then the connections.
const TIMER: u64 = 0;
pub(super) const FIRST_LISTENER: u64 = 1;
const FIRST_CONNECTION: u64 = 1 << 31;

/// RSTs that wait for a buffer of the guest's. With so many, no more packets are taken from it until some are gone.
const MAX_RESETS: usize = 1 << 16;
/// Packets of one connection after which another has its turn.
const BURST: usize = 64;
/// How long the end waits for programs of the host that have not taken all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// While they take nothing.
    pub(super) idle: Duration,
    /// In all.
    pub(super) all: Duration,
}

const PATIENCE: Patience = Patience { idle: Duration::from_secs(2), all: Duration::from_secs(10) };

/// `le64 guest_cid` (virtio 1.2, section 5.10.4).
#[derive(Debug)]
pub(super) struct Config {
    pub(super) cid: u64,
}

impl ConfigSpace for Config {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.cid.to_le_bytes();
        let from = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = from.get(i).copied().unwrap_or(0);
        }
    }
}

/// Feature VIRTIO_VSOCK_F_STREAM, which drivers that know no features take for granted.
const F_STREAM: u32 = 0;
/// Feature VIRTIO_VSOCK_F_SEQPACKET.
const F_SEQPACKET: u32 = 1;

/// Whether the guest's driver has such sockets.
pub(super) fn serves(cx: &Cx<'_>, kind: SocketType) -> bool {
    kind == SocketType::Stream || cx.has_feature(F_SEQPACKET)
}

/// The end of a connection.
pub(super) fn reset(cid: u64, connection: &Connection) -> Header {
    let Key { host_port, guest_port } = connection.key();
    Header {
        src_cid: HOST_CID,
        dst_cid: cid,
        src_port: host_port,
        dst_port: guest_port,
        kind: connection.kind().kind(),
        op: op::RST,
        ..Header::default()
    }
}

/// Speaks to a device from any thread while the VM runs.
#[derive(Debug, Clone)]
pub struct VsockHandle {
    cancel: Wake,
}

impl VsockHandle {
    /// Ends every wait for programs of the host, for good: the VM is killed.
    pub fn abandon(&self) {
        self.cancel.wake();
    }
}

/// A virtio socket device.
#[derive(Debug)]
pub struct Vsock {
    pub(super) config: Arc<Config>,
    /// By port of the host.
    pub(super) connectors: BTreeMap<u32, Connector>,
    pub(super) listeners: Vec<Listener>,
    pub(super) table: Table,
    /// RSTs due to the guest, apart from connections, which are gone by then.
    pub(super) resets: VecDeque<Header>,
    /// Room for the headers of packets that are delivered together.
    packets: Vec<Header>,
    /// Connections whose watch may have to change.
    pub(super) touched: Vec<u32>,
    pub(super) timer: Timer,
    pub(super) timing: bool,
    pub(super) patience: Patience,
    /// Sockets of connections have numbers below this.
    pub(super) top: RawFd,
    /// Set when the VM is killed.
    cancel: Wake,
}

impl Vsock {
    /// Virtio device id.
    pub const ID: u32 = 19;

    /// Checks `spec` and creates its sockets.
    ///
    /// # Errors
    /// [`VsockSpec::validate`]'s, a socket that cannot be created, or no descriptor is left.
    pub fn new(spec: VsockSpec) -> Result<Self, VsockError> {
        spec.validate()?;
        let failed = |what: &'static str| move |source| VsockError::Host { what: what.into(), source };
        let timer = Timer::new().map_err(failed("creating a timer"))?;
        let cancel = Wake::new().map_err(failed("creating an event counter"))?;
        let (mut connectors, mut listeners) = (BTreeMap::new(), Vec::new());
        for port in spec.ports {
            match port.direction {
                Direction::FromGuest => {
                    connectors.insert(port.port, Connector::new(port.path));
                }
                Direction::FromHost => listeners.push(Listener::bind(&port)?),
            }
        }
        Ok(Self {
            config: Arc::new(Config { cid: spec.cid.into() }),
            connectors,
            listeners,
            table: Table::new(spec.max_connections),
            resets: VecDeque::new(),
            packets: Vec::new(),
            touched: Vec::new(),
            timer,
            timing: false,
            patience: PATIENCE,
            top: RawFd::MAX,
            cancel,
        })
    }

    /// What other threads may ask of the device.
    pub fn handle(&self) -> VsockHandle {
        VsockHandle { cancel: self.cancel.clone() }
    }

    /// Takes the guest's packets.
    fn take(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        while self.resets.len() < MAX_RESETS
            && let Some(chain) = cx.pop(TX)?
        {
            self.packet(&chain, cx);
            cx.complete(TX, chain, 0)?;
        }
        Ok(())
    }

    fn packet(&mut self, chain: &Chain, cx: &Cx<'_>) {
        let mut reader = chain.reader(cx.memory());
        let Some(header) = Header::read(&mut reader) else {
            tracing::debug!("vsock: a packet of {} bytes is none", chain.readable_len());
            return;
        };
        if header.src_cid != self.config.cid {
            tracing::debug!("vsock: a packet from context id {}, not the guest's", header.src_cid);
            return;
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let kind = SocketType::of_kind(header.kind).filter(|kind| serves(cx, *kind));
        let Some(kind) = kind.filter(|_| header.dst_cid == HOST_CID) else {
            return self.refuse(&header);
        };
        match self.table.find(&key) {
            Some(id) => self.known(id, kind, &header, &mut reader, cx),
            None if header.op == op::REQUEST => self.request(key, kind, &header),
            None => self.refuse(&header),
        }
    }

    pub(super) fn refuse(&mut self, header: &Header) {
        self.resets.extend(header.refusal());
    }

    /// A packet of a connection.
    fn known(&mut self, id: u32, kind: SocketType, header: &Header, reader: &mut Reader<'_>, cx: &Cx<'_>) {
        let Some(connection) = self.table.get_mut(id) else { return };
        if header.op == op::REQUEST && connection.is_over() {
            // The guest has forgotten it and uses its port again.
            let key = connection.key();
            self.remove(id, cx);
            return self.request(key, kind, header);
        }
        if connection.kind() != kind {
            return self.refuse(header);
        }
        match connection.receive(header, reader) {
            Fate::Stays => self.touch(id),
            Fate::Finished => {
                connection.drain();
                self.table.free_key(id);
                self.refuse(header);
                self.touch(id);
            }
            Fate::Refused => {
                self.refuse(header);
                self.remove(id, cx);
            }
            Fate::Dropped => self.remove(id, cx),
        }
    }

    /// Something changed for a connection.
    pub(super) fn touch(&mut self, id: u32) {
        self.table.line_up(id);
        self.touched.push(id);
    }

    fn remove(&mut self, id: u32, cx: &Cx<'_>) {
        if let Some(mut connection) = self.table.remove(id) {
            connection.unwatch(cx);
        }
    }

    /// Fills the guest's buffers with what is due.
    fn deliver(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let mut burst = 0;
        let mut packets = std::mem::take(&mut self.packets);
        loop {
            let (most, bytes) = match self.table.first() {
                _ if !self.resets.is_empty() => (1, 0),
                Some((_, connection)) => connection.appetite(),
                None => break,
            };
            let buffers = Buffers::take(cx, RX, most, bytes)?;
            if buffers.is_empty() {
                break;
            }
            packets.clear();
            self.next_packets(&buffers, &mut packets, &mut burst);
            buffers.give_back(cx, &packets)?;
        }
        self.packets = packets;
        Ok(())
    }

    /// Packets for the first of `buffers`; none when nothing is due.
    fn next_packets(&mut self, buffers: &Buffers<'_>, packets: &mut Vec<Header>, burst: &mut usize) {
        if let Some(reset) = self.resets.pop_front() {
            return packets.push(reset);
        }
        while packets.is_empty()
            && let Some((id, connection)) = self.table.first()
        {
            connection.next_packets(buffers, packets);
            for header in &mut *packets {
                (header.src_cid, header.dst_cid) = (HOST_CID, self.config.cid);
                header.kind = connection.kind().kind();
            }
            *burst += packets.len();
            if packets.is_empty() || *burst >= BURST || !connection.wants_turn() {
                *burst = 0;
                self.table.next();
                self.touched.push(id);
            }
        }
    }

    /// After every event: what is due goes to the guest, and sockets are watched for what is wanted now.
    fn finish(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let was_stopped = self.resets.len() >= MAX_RESETS;
        self.deliver(cx)?;
        if was_stopped {
            self.take(cx)?;
            self.deliver(cx)?;
        }
        // Each round but the last ends a connection.
        while self.settle(cx) {
            self.deliver(cx)?;
        }
        Ok(())
    }

    /// Watches what is wanted now of the connections that something changed for. Whether some of them ended, and the guest
    /// is to be told.
    fn settle(&mut self, cx: &Cx<'_>) -> bool {
        let before = self.resets.len();
        while let Some(id) = self.touched.pop() {
            let Some(connection) = self.table.get_mut(id) else { continue };
            if connection.is_done() {
                self.remove(id, cx);
            } else if connection.is_broken() {
                self.resets.push_back(reset(self.config.cid, connection));
                self.remove(id, cx);
            } else if let Err(e) = connection.settle(cx, FIRST_CONNECTION + u64::from(id)) {
                tracing::warn!("vsock: a connection is dropped as its socket cannot be watched: {e}");
                self.resets.push_back(reset(self.config.cid, connection));
                self.remove(id, cx);
            }
        }
        self.resets.len() > before
    }

    /// Waits until a socket takes something of what is held; false when none does, it is `end`, or the VM is killed.
    fn wait_for_room(&mut self, end: Instant) -> bool {
        let sockets = self.table.iter_mut().filter(|c| c.is_holding());
        let mut fds = vec![PollFd::new(&self.cancel, PollFlags::IN)];
        fds.extend(
            sockets.filter_map(|c| c.socket().map(|s| PollFd::from_borrowed_fd(s.as_fd(), PollFlags::OUT))),
        );
        let holding = fds.len() - 1;
        let left = end.saturating_duration_since(Instant::now()).min(self.patience.idle);
        let Ok(timeout) = Timespec::try_from(left) else { return false };
        if holding == 0 {
            return false;
        }
        let goes_on = match poll(&mut fds, Some(&timeout)) {
            Ok(n) => n > 0 && !left.is_zero() && fds[0].revents().is_empty(),
            Err(e) => e == Errno::INTR && !left.is_zero(),
        };
        if !goes_on {
            tracing::warn!("vsock: {holding} connections end with data that no program of the host took");
        }
        goes_on
    }
}

impl VirtioDevice for Vsock {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: Self::ID,
            name: "vsock".into(),
            features: 1 << F_STREAM | 1 << F_SEQPACKET,
            queue_sizes: QUEUE_SIZES.to_vec(),
            shm: Vec::new(),
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as Arc<dyn ConfigSpace>
    }

    fn start(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        self.top = descriptors_for_guests().0;
        cx.watch(&self.timer, TIMER, Interest::Read)
            .map_err(|source| DeviceError::Host { what: "watching a timer".into(), source })?;
        (0..self.listeners.len()).try_for_each(|index| self.watch_listener(index, cx))
    }

    fn on_queue(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        if queue == TX {
            self.take(cx)?;
        }
        self.finish(cx)
    }

    fn on_event(&mut self, ready: Ready, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        match ready.token {
            TIMER => self.retry(cx)?,
            token if token < FIRST_CONNECTION => self.accept((token - FIRST_LISTENER) as usize, cx),
            token => {
                let id = (token - FIRST_CONNECTION) as u32;
                if let Some(connection) = self.table.get_mut(id) {
                    connection.ready(ready.readable, ready.writable);
                    self.touch(id);
                }
            }
        }
        self.finish(cx)
    }

    fn drain(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        // What the guest is told now it does not hear.
        self.resets.clear();
        self.take(cx)?;
        let end = Instant::now() + self.patience.all;
        while self.wait_for_room(end) {
            for connection in self.table.iter_mut().filter(|c| c.is_holding()) {
                connection.flush();
            }
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.table.clear();
        self.resets.clear();
        self.touched.clear();
        self.connectors.values_mut().for_each(Connector::clear);
        self.listeners.iter_mut().for_each(|l| l.paused = false);
        self.timing = false;
    }
}
