//! The device.

use std::sync::Arc;
use std::time::Duration;

use krun_event::{Interest, Ready};
use krun_virtio::{ConfigSpace, Cx, DeviceError, DeviceInfo, VirtioDevice};

use super::config::Config;
use super::pair::{Outcome, Pair};
use super::peer::{self, Peer};
use super::spec::{NetError, NetSpec, Offloads};
use super::{control, feature};
use crate::sys::Timer;

/// Entries of a queue for frames to the guest. A large frame takes some 16 of Linux's buffers, so 256 would hold 16 frames,
/// and then the device would have to stop until the guest notifies it of more.
const RECEIVE_SIZE: u16 = 1024;
/// Entries of the other queues.
const QUEUE_SIZE: u16 = 256;
/// Token of the timer; those below are pairs.
const RETRY: u64 = 1 << 16;
/// Time before the first attempt to connect again, and the most between two.
const PAUSE: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];

/// A network device.
pub struct Net {
    config: Arc<Config>,
    /// At least one.
    pairs: Vec<Pair>,
    /// Those that the driver uses, from the first.
    active: usize,
    offloads: Offloads,
    /// What the driver accepted.
    features: u64,
    /// Made when a connection is lost.
    timer: Option<Timer>,
    pause: Duration,
    /// The peer may come back.
    hope: bool,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net")
            .field("peer", &self.name())
            .field("pairs", &self.pairs.len())
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
        let most = spec.pairs.clamp(1, NetSpec::MAX_PAIRS);
        Ok(Self::with_peers(mac, peer::open(spec.peer, most)?, spec.offloads))
    }

    /// With a pair of queues for each peer, of which there is at least one; all are the same peer's.
    pub(super) fn with_peers(mac: [u8; 6], peers: Vec<Box<dyn Peer>>, offloads: Offloads) -> Self {
        let pairs: Vec<_> = peers.into_iter().enumerate().map(|(n, peer)| Pair::new(n, peer)).collect();
        Self {
            config: Arc::new(Config::new(mac, pairs.len() as u16)),
            pairs,
            active: 1,
            offloads: offloads.consistent(),
            features: 0,
            timer: None,
            pause: PAUSE[0],
            hope: true,
        }
    }

    fn name(&self) -> String {
        self.pairs[0].peer.name()
    }

    fn has(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    /// Index of the control queue, if the driver knows it. Without several pairs it follows the first one.
    fn control(&self) -> Option<usize> {
        let pairs = if self.has(feature::MQ) { self.pairs.len() } else { 1 };
        self.has(feature::CTRL_VQ).then_some(2 * pairs)
    }

    fn is_closed(&self) -> bool {
        self.pairs[0].peer.fd().is_none()
    }

    /// Goes on unless the peer is gone, or else tells the guest, and tries to connect again if that is possible.
    fn settle(&mut self, outcome: Outcome, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let Outcome::Lost(why) = outcome else { return Ok(()) };
        let name = self.name();
        self.hope = true;
        for pair in &mut self.pairs {
            self.hope &= pair.close(cx)?;
        }
        let next = if self.hope { "; connecting again" } else { "" };
        tracing::warn!("network: {name} is lost: {why}{next}");
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

    /// Time to try again. Only a peer with one pair comes back.
    fn retry(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        if let Some(timer) = &self.timer {
            timer.take();
        }
        if !self.is_closed() {
            return Ok(());
        }
        let peer = &mut self.pairs[0].peer;
        let result = peer.connect();
        if let Err(e) = result.and_then(|()| peer.set_features(self.features)) {
            peer.close();
            tracing::debug!("network: {} cannot be connected: {e}", self.name());
            self.pause = (self.pause * 2).min(PAUSE[1]);
            return self.set_timer(cx);
        }
        tracing::info!("network: {} is connected again", self.name());
        self.set_link(true, cx);
        (0..2).try_for_each(|queue| self.on_pair(queue, cx))
    }

    /// The driver uses so many pairs from now on; false if the peer does not follow, and nothing changes.
    fn set_pairs(&mut self, wanted: usize, cx: &mut Cx<'_>) -> Result<bool, DeviceError> {
        let old = self.active;
        if let Err(e) = self.switch_pairs(wanted, cx)? {
            tracing::warn!("network: {} does not use {wanted} queues: {e}", self.name());
            if let Err(e) = self.switch_pairs(old, cx)? {
                tracing::warn!("network: {} stays with {} queues: {e}", self.name(), self.active);
            }
        }
        // What the driver put there before; a pair that was left alone for a moment is watched again.
        (2 * old.min(wanted)..2 * self.active).try_for_each(|queue| self.on_pair(queue, cx))?;
        Ok(self.active == wanted)
    }

    /// Switches pairs on or off until so many are; the peer's refusal ends that halfway.
    fn switch_pairs(&mut self, wanted: usize, cx: &mut Cx<'_>) -> Result<std::io::Result<()>, DeviceError> {
        while self.active != wanted {
            let more = self.active < wanted;
            let index = if more { self.active } else { self.active - 1 };
            if !more {
                // While the peer still takes it.
                self.on_pair(2 * index + 1, cx)?;
            }
            if self.is_closed() {
                // Nothing comes or goes anyway.
                self.active = wanted;
                break;
            }
            let pair = &mut self.pairs[index];
            pair.unwatch(cx);
            if let Err(e) = pair.peer.set_active(more) {
                return Ok(Err(e));
            }
            if more {
                self.active += 1;
            } else {
                self.active -= 1;
                // A slow peer has left it.
                pair.discard(cx)?;
            }
        }
        Ok(Ok(()))
    }

    fn on_pair(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let active = queue / 2 < self.active;
        let Some(pair) = self.pairs.get_mut(queue / 2) else { return Ok(()) };
        let outcome = match (queue.is_multiple_of(2), active) {
            (true, true) => pair.receive(cx)?,
            // Buffers stay where they are.
            (true, false) => Outcome::Fine,
            (false, true) => pair.transmit(self.features, cx)?,
            // Linux uses a queue for a moment after it has switched it off, and a frame that does not come back from there
            // is not sent again elsewhere.
            (false, false) => pair.discard(cx).map(|()| Outcome::Fine)?,
        };
        self.settle(outcome, cx)
    }
}

impl VirtioDevice for Net {
    fn info(&self) -> DeviceInfo {
        let own = 1 << feature::MAC | 1 << feature::MRG_RXBUF | 1 << feature::STATUS;
        let mut queue_sizes = [RECEIVE_SIZE, QUEUE_SIZE].repeat(self.pairs.len());
        let mut several = 0;
        if self.pairs.len() > 1 {
            several = 1 << feature::CTRL_VQ | 1 << feature::MQ;
            queue_sizes.push(QUEUE_SIZE);
        }
        DeviceInfo {
            id: Self::ID,
            name: "net".into(),
            features: own | several | u64::from(self.offloads.bits()),
            queue_sizes,
            shm: Vec::new(),
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as Arc<dyn ConfigSpace>
    }

    fn start(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        self.features = cx.features() & self.info().features;
        for (n, pair) in self.pairs.iter_mut().enumerate() {
            pair.start(cx.has_feature(feature::MRG_RXBUF), cx.queue_size(2 * n));
        }
        if self.is_closed() {
            return self.set_timer(cx);
        }
        let outcome = match self.pairs[0].peer.set_features(self.features) {
            Ok(()) => Outcome::Fine,
            Err(e) => Outcome::Lost(e),
        };
        self.settle(outcome, cx)
        // The driver's first buffers bring the first look at the peer.
    }

    fn on_queue(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        if self.control() != Some(queue) {
            return self.on_pair(queue, cx);
        }
        let max = if self.has(feature::MQ) { self.pairs.len() as u16 } else { 0 };
        control::serve(queue, max, cx, |wanted, cx| self.set_pairs(wanted.into(), cx))
    }

    fn on_event(&mut self, ready: Ready, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        if ready.token == RETRY {
            return self.retry(cx);
        }
        let pair = usize::try_from(ready.token).ok().and_then(|n| self.pairs[..self.active].get_mut(n));
        let Some(pair) = pair else { return Ok(()) };
        let outcome = pair.ready((ready.readable, ready.writable), self.features, cx)?;
        self.settle(outcome, cx)
    }

    fn drain(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        // The last words of connections. A peer that is slow is not waited for.
        (0..self.active).try_for_each(|n| self.on_pair(2 * n + 1, cx))
    }

    fn stop(&mut self) {
        for (n, pair) in self.pairs.iter_mut().enumerate() {
            pair.stop();
            if (1..self.active).contains(&n)
                && pair.peer.fd().is_some()
                && let Err(e) = pair.peer.set_active(false)
            {
                tracing::warn!("network: {} keeps a queue: {e}", pair.peer.name());
            }
        }
        (self.active, self.timer) = (1, None);
    }
}
