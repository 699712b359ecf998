//! The device: hands its queues to the back end, and watches over that.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use krun_event::{Interest, Ready, Wake};
use krun_memory::{Address, GuestMemory, GuestMemoryBackend, GuestMemoryRegion};
use krun_virtio::{ConfigSpace, Cx, DeviceError, DeviceInfo, VirtioDevice};

use super::backend::BackEnd;
use super::message::{Protocol, REGIONS_MAX, Region};
use super::requests::Asked;
use super::session::{Inflight, Ring, Session, Setup};
use super::spec::{VhostUserError, VhostUserSpec};
use crate::console::Turn;
use crate::sys::Timer;

/// The connection: it must say nothing while nothing is asked.
const CONNECTION: u64 = 0;
/// Requests of the back end.
const REQUESTS: u64 = 1;
/// The back end has used a buffer.
const CALL: u64 = 2;
/// The back end has given a ring up.
const BROKEN_RING: u64 = 3;
/// It is time to look whether the back end is back.
const RETRY: u64 = 4;
/// It is time to look whether the guest may hear of this device.
const TURN: u64 = 5;

/// Time between two attempts to find the back end again.
const RETRY_AFTER: Duration = Duration::from_millis(250);
/// How long the back end may take for what the driver wanted to get out before the end.
const DRAIN: Duration = Duration::from_secs(2);
/// Requests of the back end that are taken before others get their turn.
const ASKED_AT_ONCE: usize = 16;

/// A device whose queues another process serves.
#[derive(Debug)]
pub struct VhostUser {
    info: DeviceInfo,
    back_end: Arc<BackEnd>,
    /// When the guest may hear of what the back end has used; `None`: at once.
    turn: Option<Turn>,
    running: Option<Running>,
}

/// Speaks to a device from any thread while the VM runs.
#[derive(Debug, Clone)]
pub struct VhostUserHandle {
    cancel: Wake,
}

impl VhostUserHandle {
    /// Ends every wait for the back end, for good: the VM is killed.
    pub fn abandon(&self) {
        self.cancel.wake();
    }
}

/// What a running device needs.
#[derive(Debug)]
struct Running {
    /// Queues handed over.
    queues: Vec<u32>,
    call: Wake,
    /// The guest is still to be told that it was set.
    called: bool,
    /// The guest is still to be told of another configuration.
    changed: bool,
    broken_ring: Wake,
    /// Lets a back end that was started again go on where the one before was.
    inflight: Option<Inflight>,
    retry: Timer,
}

impl VhostUser {
    /// Connects to the back end and finds out what the device is like.
    ///
    /// # Errors
    /// A value that no device can have, or what is wrong with the back end.
    pub fn new(spec: VhostUserSpec) -> Result<Self, VhostUserError> {
        let back_end = BackEnd::new(spec)?;
        let spec = back_end.spec();
        let info = DeviceInfo {
            id: spec.kind.id(),
            name: spec.name(),
            features: back_end.features,
            queue_sizes: (0..back_end.queues.into()).map(|queue| spec.queue_size(queue)).collect(),
            shm: Vec::new(),
        };
        Ok(Self { info, back_end: Arc::new(back_end), turn: None, running: None })
    }

    /// A handle to speak to the device while it runs.
    pub fn handle(&self) -> VhostUserHandle {
        VhostUserHandle { cancel: self.back_end.cancel().clone() }
    }

    /// Keeps the back end's interrupts from the guest until the terminals of another device have their numbers there:
    /// for a console, whose messages only it and the driver see. Its interrupts then go through this process.
    ///
    /// Interrupts are all that is kept back: nothing hinders a driver that looks into the queues without one, and Linux
    /// does so whenever a device on the same line interrupts.
    pub fn after(&mut self, turn: Turn) {
        self.turn = Some(turn);
    }

    fn error(&self, source: impl std::error::Error + Send + Sync + 'static) -> DeviceError {
        let what = format!("vhost-user back end at {}", self.back_end.spec().path.display());
        DeviceError::Host { what, source: std::io::Error::other(source) }
    }

    fn host(&self) -> impl Fn(std::io::Error) -> DeviceError + use<> {
        let what = format!("set up the vhost-user device {}", self.info.name);
        move |source| DeviceError::Host { what: what.clone(), source }
    }

    /// The error with which the device ends.
    fn failed(&self, why: Failed) -> DeviceError {
        match why {
            Failed::BackEnd(e) => self.error(e),
            Failed::Device(e) => e,
        }
    }

    /// Hands the queues over: from their beginning, or from where the back end before has left them.
    fn hand_over(&mut self, cx: &mut Cx<'_>, again: bool) -> Result<(), Failed> {
        let back_end = Arc::clone(&self.back_end);
        let Some(running) = self.running.as_mut() else { return Ok(()) };
        let mut guard = back_end.session();
        // Held to the end, so that the configuration is read and written before or after.
        let result = connect_and_start(&back_end, &mut guard, running, cx, again);
        let error = match result {
            Ok(()) => {
                if let Some(session) = guard.as_ref() {
                    cx.watch(&session.channel, CONNECTION, Interest::Read).map_err(self.host())?;
                    if let Some(requests) = &session.requests {
                        cx.watch(requests, REQUESTS, Interest::Read).map_err(self.host())?;
                    }
                }
                return Ok(());
            }
            Err(e) => e,
        };
        *guard = None;
        Err(error)
    }

    /// The connection is lost, or of no more use.
    fn lost(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let back_end = Arc::clone(&self.back_end);
        if let Some(session) = back_end.session().take() {
            // Nothing depends on it: closing them has the same effect.
            let _ = cx.unwatch(&session.channel);
            let _ = session.requests.as_ref().map(|r| cx.unwatch(r));
        }
        match &self.running {
            Some(running) if running.inflight.is_some() => {
                tracing::warn!(device = self.info.name, "the back end is gone; waiting for it to come back");
                running.retry.set(RETRY_AFTER).map_err(self.host())
            }
            _ => Err(self.error(std::io::Error::other("it is gone, or broke the protocol"))),
        }
    }

    /// Looks whether the back end is there again.
    fn retry(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let Some(running) = &self.running else { return Ok(()) };
        running.retry.take();
        match self.hand_over(cx, true) {
            Ok(()) => {
                tracing::info!(device = self.info.name, "the back end is back");
                // Its last interrupts may have been lost with it.
                if let Some(running) = &mut self.running {
                    (running.called, running.changed) = (true, true);
                }
                self.tell(cx)
            }
            // Another program than before: to wait does not make it the same.
            Err(e @ Failed::BackEnd(VhostUserError::Lacks { .. })) => Err(self.failed(e)),
            Err(e) => {
                let e = self.failed(e);
                tracing::debug!(device = self.info.name, "not yet: {e}");
                self.running.as_ref().map_or(Ok(()), |r| r.retry.set(RETRY_AFTER)).map_err(self.host())
            }
        }
    }

    /// Tells the guest that the back end has used buffers or another configuration, if so and the guest may know. The
    /// latter waits too: at any interrupt the driver looks into the queues.
    fn tell(&mut self, cx: &Cx<'_>) -> Result<(), DeviceError> {
        let host = self.host();
        let Some(running) = &mut self.running else { return Ok(()) };
        running.called |= running.call.take_shared();
        if !running.called && !running.changed {
            return Ok(());
        }
        if self.turn.as_mut().map_or(Ok(true), Turn::has_come).map_err(host)? {
            if std::mem::take(&mut running.called) {
                cx.interrupt().used();
            }
            if std::mem::take(&mut running.changed) {
                cx.interrupt().config_changed();
            }
        }
        Ok(())
    }

    fn on_connection(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        // With the lock held nothing is being asked, so nothing can be on its way.
        let quiet = self.back_end.session().as_ref().is_none_or(|s| s.channel.is_quiet());
        if quiet { Ok(()) } else { self.lost(cx) }
    }

    fn on_requests(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let back_end = Arc::clone(&self.back_end);
        let mut guard = back_end.session();
        let Some(session) = guard.as_mut() else { return Ok(()) };
        let mut changed = false;
        for _ in 0..ASKED_AT_ONCE {
            match session.requests.as_mut().map_or(Ok(Asked::Nothing), super::requests::Requests::next) {
                Ok(Asked::ConfigChange) => changed = true,
                Ok(Asked::Other(request)) => {
                    tracing::debug!(
                        device = self.info.name,
                        request,
                        "the back end asks for something unknown"
                    );
                }
                Ok(Asked::Nothing) => break,
                Err(e) => {
                    tracing::debug!(device = self.info.name, "the back end asks no more: {e}");
                    if let Some(requests) = session.requests.take() {
                        let _ = cx.unwatch(&requests);
                    }
                    break;
                }
            }
        }
        if !changed {
            return Ok(());
        }
        session.channel.allow_until(back_end.deadline());
        let refreshed = back_end.refresh(session);
        drop(guard);
        match refreshed {
            Ok(()) => {
                if let Some(running) = &mut self.running {
                    running.changed = true;
                }
                self.tell(cx)
            }
            Err(e) => {
                tracing::warn!(device = self.info.name, "cannot read the changed configuration: {e}");
                self.on_connection(cx)
            }
        }
    }
}

/// Why a back end was not started.
enum Failed {
    BackEnd(VhostUserError),
    Device(DeviceError),
}

impl From<VhostUserError> for Failed {
    fn from(e: VhostUserError) -> Self {
        Self::BackEnd(e)
    }
}

impl From<DeviceError> for Failed {
    fn from(e: DeviceError) -> Self {
        Self::Device(e)
    }
}

fn connect_and_start(
    back_end: &BackEnd,
    guard: &mut Option<Session>,
    running: &mut Running,
    cx: &Cx<'_>,
    again: bool,
) -> Result<(), Failed> {
    let session = back_end.connected(guard)?;
    if running.inflight.is_some() && !session.protocol.contains(Protocol::INFLIGHT) {
        let lacks = "has changed: it does not take the notes of the one before".to_owned();
        return Err(VhostUserError::Lacks { path: back_end.spec().path.clone(), lacks }.into());
    }
    let failed = |source| VhostUserError::BackEnd { path: back_end.spec().path.clone(), source };
    let memory = shared_memory(cx.memory())?;
    let mut rings = Vec::new();
    for queue in 0..usize::from(back_end.served).min(cx.queue_count()) {
        let (size, Some(at), Some(kick)) =
            (cx.queue_size(queue), cx.queue_addresses(queue), cx.doorbell(queue))
        else {
            continue;
        };
        let base = if again { cx.used_index(queue)? } else { 0 };
        rings.push(Ring { queue: queue as u32, size, at, base, kick });
    }
    if running.inflight.is_none() {
        let size = rings.iter().map(|r| r.size).max().unwrap_or(0);
        let count = rings.last().map_or(0, |r| r.queue as u16 + 1);
        running.inflight = session.inflight(count, size).map_err(failed)?;
    }
    let setup = Setup {
        features: cx.features(),
        memory: &memory,
        rings: &rings,
        call: &running.call,
        error: &running.broken_ring,
        inflight: running.inflight.as_ref(),
    };
    session.start(&setup).map_err(failed)?;
    running.queues = rings.iter().map(|r| r.queue).collect();
    for ring in rings.iter().filter(|r| back_end.spec().kind.is_told(r.queue as usize)) {
        // Of what the driver has made available before, nobody was told.
        ring.kick.wake_shared();
    }
    Ok(())
}

/// The guest's memory, as far as it can be shown to another process: all of it, or it is an error.
pub(super) fn shared_memory(memory: &GuestMemory) -> Result<Vec<(Region, BorrowedFd<'_>)>, DeviceError> {
    let refused = |why: &str| DeviceError::Host {
        what: "show the guest's memory to another process".into(),
        source: std::io::Error::other(why.to_owned()),
    };
    let mut regions = Vec::new();
    for region in memory.iter() {
        let file = region.file_offset().filter(|_| region.flags() & libc::MAP_SHARED != 0);
        let file = file.ok_or_else(|| refused("it is private to this one"))?;
        let (at, size) = (region.start_addr().raw_value(), region.len());
        regions.push((Region { at, size, offset: file.start() }, file.file().as_fd()));
    }
    if regions.len() > REGIONS_MAX {
        return Err(refused("it has too many pieces"));
    }
    Ok(regions)
}

impl VirtioDevice for VhostUser {
    fn info(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.back_end) as Arc<dyn ConfigSpace>
    }

    fn serves_elsewhere(&self) -> bool {
        true
    }

    fn start(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let host = self.host();
        let (broken_ring, retry) = (Wake::new().map_err(&host)?, Timer::new().map_err(&host)?);
        cx.watch(&broken_ring, BROKEN_RING, Interest::Read).map_err(&host)?;
        cx.watch(&retry, RETRY, Interest::Read).map_err(&host)?;
        if let Some(turn) = &mut self.turn {
            turn.restart();
            cx.watch(turn, TURN, Interest::Read).map_err(&host)?;
        }
        let call = match cx.interrupt().direct().filter(|_| self.turn.is_none()) {
            Some(line) => line.clone(),
            None => {
                let call = Wake::new().map_err(&host)?;
                cx.watch(&call, CALL, Interest::Read).map_err(&host)?;
                call
            }
        };
        self.back_end.set_running(true);
        let queues = Vec::new();
        let (called, changed, inflight) = (false, false, None);
        self.running = Some(Running { queues, call, called, changed, broken_ring, inflight, retry });
        self.hand_over(cx, false).map_err(|e| self.failed(e))
    }

    fn on_queue(&mut self, _queue: usize, _cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn on_event(&mut self, ready: Ready, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        match ready.token {
            CONNECTION => self.on_connection(cx),
            REQUESTS => self.on_requests(cx),
            RETRY => self.retry(cx),
            BROKEN_RING => Err(DeviceError::Driver("the back end has given a queue up".into())),
            TURN => {
                if let Some(turn) = &mut self.turn {
                    turn.look();
                }
                self.tell(cx)
            }
            _ => self.tell(cx),
        }
    }

    fn drain(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let end = Instant::now() + DRAIN;
        for &queue in self.back_end.spec().kind.outputs() {
            let served = self.running.as_ref().is_some_and(|r| r.queues.contains(&(queue as u32)));
            while served && cx.outstanding(queue)? > 0 {
                let there = self.back_end.session().as_ref().is_some_and(|s| s.channel.is_wanted());
                if !there || Instant::now() >= end {
                    return Ok(());
                }
                sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }

    fn stop(&mut self) {
        let Some(running) = self.running.take() else { return };
        let mut guard = self.back_end.session();
        if let Some(session) = guard.as_mut() {
            session.channel.allow_until(self.back_end.deadline());
            if let Err(e) = session.stop(&running.queues) {
                tracing::warn!(device = self.info.name, "cannot stop the back end: {e}");
                *guard = None;
            }
        }
        self.back_end.set_running(false);
    }
}
