//! The device.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use krun_event::{Interest, Ready};
use krun_virtio::{ConfigSpace, Cx, DeviceError, DeviceInfo, VirtioDevice};

use super::config::Config;
use super::feature;
use super::peer::{self, Peer};
use super::receive::{self, Receive};
use super::spec::{NetError, NetSpec, Offloads};
use super::transmit::{self, Transmit};
use crate::sys::Timer;

/// Entries of each queue.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Tokens.
const PEER: u64 = 0;
const RETRY: u64 = 1;
/// Time before the first attempt to connect again, and the most between two.
const PAUSE: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];

/// A network device.
pub struct Net {
    config: Arc<Config>,
    peer: Box<dyn Peer>,
    offloads: Offloads,
    /// What the driver accepted.
    features: u64,
    rx: Receive,
    tx: Transmit,
    /// The guest has no room for what the peer has.
    starved: bool,
    /// The peer is slow.
    full: bool,
    /// What the peer's descriptor is watched for.
    watch: Option<Interest>,
    /// Made when a connection is lost.
    timer: Option<Timer>,
    pause: Duration,
    /// The peer may come back.
    hope: bool,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net")
            .field("peer", &self.peer.name())
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Net {
    /// Virtio device id.
    pub const ID: u32 = 1;

    /// Connects to the peer.
    ///
    /// # Errors
    /// The peer cannot be reached, and why.
    pub fn new(spec: NetSpec) -> Result<Self, NetError> {
        let mac = spec.mac;
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(NetError::Mac { mac });
        }
        Ok(Self::with_peer(mac, peer::open(spec.peer)?, spec.offloads))
    }

    pub(super) fn with_peer(mac: [u8; 6], peer: Box<dyn Peer>, offloads: Offloads) -> Self {
        Self {
            config: Arc::new(Config::new(mac)),
            peer,
            offloads: offloads.consistent(),
            features: 0,
            rx: Receive::default(),
            tx: Transmit::default(),
            starved: true,
            full: false,
            watch: None,
            timer: None,
            pause: PAUSE[0],
            hope: true,
        }
    }

    fn receive(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        if self.peer.fd().is_none() {
            return Ok(());
        }
        let stopped = self.rx.run(self.peer.as_mut(), cx)?;
        self.starved = matches!(stopped, receive::Stopped::Starved);
        match stopped {
            receive::Stopped::Lost(why) => self.lost(&why, cx),
            _ => self.watch(cx),
        }
    }

    fn transmit(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        if self.peer.fd().is_none() {
            return self.tx.discard(cx);
        }
        let stopped = self.tx.run(self.peer.as_mut(), self.features, cx)?;
        self.full = matches!(stopped, transmit::Stopped::Full);
        match stopped {
            transmit::Stopped::Lost(why) => {
                self.lost(&why, cx)?;
                self.tx.discard(cx)
            }
            _ => self.watch(cx),
        }
    }

    /// Watches the peer for what can be done then.
    fn watch(&mut self, cx: &Cx<'_>) -> Result<(), DeviceError> {
        let wanted = match (self.starved, self.full) {
            (false, false) => Some(Interest::Read),
            (false, true) => Some(Interest::Both),
            (true, true) => Some(Interest::Write),
            (true, false) => None,
        };
        let Some(fd) = self.peer.fd().filter(|_| wanted != self.watch) else { return Ok(()) };
        match (self.watch, wanted) {
            (None, Some(interest)) => cx.watch(&fd, PEER, interest),
            (Some(_), Some(interest)) => cx.rewatch(&fd, PEER, interest),
            (_, None) => cx.unwatch(&fd),
        }
        .map_err(|source| DeviceError::Host { what: format!("watch {}", self.peer.name()), source })?;
        self.watch = wanted;
        Ok(())
    }

    /// The peer is gone: tells the guest, and tries to connect again if that is possible.
    fn lost(&mut self, why: &io::Error, cx: &Cx<'_>) -> Result<(), DeviceError> {
        if let Some(fd) = self.peer.fd().filter(|_| self.watch.is_some()) {
            let _ = cx.unwatch(&fd);
        }
        (self.watch, self.full) = (None, false);
        self.tx.reset();
        self.hope = self.peer.close();
        let next = if self.hope { "; connecting again" } else { "" };
        tracing::warn!("network: {} is lost: {why}{next}", self.peer.name());
        self.set_link(false, cx);
        self.pause = PAUSE[0];
        self.set_timer(cx)
    }

    fn set_link(&self, up: bool, cx: &Cx<'_>) {
        if self.config.set_link(up) {
            cx.interrupt().config_changed();
        }
    }

    fn set_timer(&mut self, cx: &Cx<'_>) -> Result<(), DeviceError> {
        if !self.hope {
            return Ok(());
        }
        let fail = |source| DeviceError::Host { what: "set a network's timer".into(), source };
        let timer = match &self.timer {
            Some(timer) => timer,
            None => {
                let timer = Timer::new().map_err(fail)?;
                cx.watch(&timer, RETRY, Interest::Read).map_err(fail)?;
                self.timer.insert(timer)
            }
        };
        timer.set(self.pause).map_err(fail)
    }

    /// Time to try again.
    fn retry(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        if let Some(timer) = &self.timer {
            timer.take();
        }
        if self.peer.fd().is_some() {
            return Ok(());
        }
        let result = self.peer.connect();
        if let Err(e) = result.and_then(|()| self.peer.set_features(self.features)) {
            self.peer.close();
            tracing::debug!("network: {} cannot be connected: {e}", self.peer.name());
            self.pause = (self.pause * 2).min(PAUSE[1]);
            return self.set_timer(cx);
        }
        tracing::info!("network: {} is connected again", self.peer.name());
        self.set_link(true, cx);
        self.receive(cx)
    }
}

impl VirtioDevice for Net {
    fn info(&self) -> DeviceInfo {
        let own = 1 << feature::MAC | 1 << feature::MRG_RXBUF | 1 << feature::STATUS;
        DeviceInfo {
            id: Self::ID,
            name: "net".into(),
            features: own | u64::from(self.offloads.bits()),
            queue_sizes: vec![QUEUE_SIZE; 2],
            shm: Vec::new(),
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as Arc<dyn ConfigSpace>
    }

    fn start(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let offered = self.info().features;
        self.features =
            (0..u64::BITS).filter(|bit| cx.has_feature(*bit)).fold(0, |all, bit| all | 1 << bit) & offered;
        self.rx.reset(cx.has_feature(feature::MRG_RXBUF), cx.queue_size(receive::QUEUE));
        if self.peer.fd().is_none() {
            return self.set_timer(cx);
        }
        if let Err(e) = self.peer.set_features(self.features) {
            return self.lost(&e, cx);
        }
        // The driver's first buffers bring the first look at the peer.
        self.watch(cx)
    }

    fn on_queue(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        if queue == receive::QUEUE { self.receive(cx) } else { self.transmit(cx) }
    }

    fn on_event(&mut self, ready: Ready, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        match ready.token {
            RETRY => self.retry(cx),
            _ => {
                if ready.readable && !self.starved {
                    self.receive(cx)?;
                }
                if ready.writable && self.full {
                    self.transmit(cx)?;
                }
                Ok(())
            }
        }
    }

    fn drain(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        // The last words of connections. A peer that is slow is not waited for.
        self.transmit(cx)
    }

    fn stop(&mut self) {
        self.rx.reset(false, 0);
        self.tx.reset();
        (self.starved, self.full, self.watch, self.timer) = (true, false, None, None);
    }
}
