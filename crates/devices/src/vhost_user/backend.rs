//! The back end as the device and the transport see it: a connection that is made again when it was lost, and the
//! configuration space.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use krun_event::Wake;
use krun_virtio::{ConfigSpace, feature, mmio::CONFIG_MAX};

use super::channel::ChannelError;
use super::kind::DeviceKind;
use super::message::Protocol;
use super::session::Session;
use super::spec::{MAX_QUEUES, VhostUserError, VhostUserSpec};

/// Features that a back end may offer to the guest: those of the kind of device (virtio 1.3, section 6), and those of
/// the ring that are nobody else's business.
const FOR_GUESTS: u64 = 0x00ff_ffff
    | 0xfffc_0000_0000_0000
    | 1 << feature::RING_INDIRECT_DESC
    | 1 << feature::RING_EVENT_IDX
    | 1 << feature::VERSION_1;

/// Features of a network interface that need its control queue (virtio 1.3, section 5.1.3.1): `GUEST_OFFLOADS`, from
/// `CTRL_VQ` to `CTRL_MAC_ADDR` with `MQ` among them, `VQ_NOTF_COAL`, `NOTF_COAL`, `HASH_REPORT`, `RSS`.
const NET_CONTROL: u64 = 1 << 2 | 0x7f << 17 | 1 << 52 | 1 << 53 | 1 << 57 | 1 << 60;

/// Shared by the device, wherever it is, and the vCPUs that access its configuration.
#[derive(Debug)]
pub struct BackEnd {
    spec: VhostUserSpec,
    session: Mutex<Option<Session>>,
    config: Mutex<Vec<u8>>,
    /// What the driver has selected in the configuration of an input device. What a back end answers need not say it.
    selected: Mutex<[u8; 2]>,
    /// Whether the configuration is the back end's, and not ours.
    remote: bool,
    /// The device runs: a lost connection is its worker's to make again.
    running: AtomicBool,
    /// Set when the machine is killed: nothing is waited for any more.
    cancel: Wake,
    /// Offered to the guest.
    pub features: u64,
    /// Queues that the guest sees.
    pub queues: u16,
    /// Of those, the first ones, which the back end serves.
    pub served: u16,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is kept is valid at every moment, so a panic elsewhere changes nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BackEnd {
    /// Connects and asks for all that a device needs to be described.
    pub fn new(spec: VhostUserSpec) -> Result<Self, VhostUserError> {
        spec.validate()?;
        let cancel = Wake::new().map_err(|source| connect(&spec, source))?;
        let mut session = open(&spec, after(spec.timeout), &cancel)?;
        let mut features = session.features & FOR_GUESTS;
        if features & 1 << feature::VERSION_1 == 0 {
            return Err(lacks(&spec.path, "does not offer virtio 1.0"));
        }
        let (queues, served) = count(&spec, session.queues)?;
        features &= !beyond(spec.kind, served);
        let told = match session.protocol.contains(Protocol::CONFIG) {
            true => first_config(&spec, &mut session, queues)?,
            false => None,
        };
        let remote = told.is_some();
        let config = told.map_or_else(|| own_config(&spec, queues), Ok)?;
        Ok(Self {
            spec,
            session: Mutex::new(Some(session)),
            config: Mutex::new(config),
            selected: Mutex::default(),
            remote,
            running: AtomicBool::new(false),
            cancel,
            features,
            queues,
            served,
        })
    }

    pub fn spec(&self) -> &VhostUserSpec {
        &self.spec
    }

    /// What to set when the machine is killed.
    pub fn cancel(&self) -> &Wake {
        &self.cancel
    }

    /// When all that is asked from now on must be answered.
    pub fn deadline(&self) -> Instant {
        after(self.spec.timeout)
    }

    /// The connection; `None` when it was lost.
    pub fn session(&self) -> MutexGuard<'_, Option<Session>> {
        lock(&self.session)
    }

    /// The device starts or stops.
    pub fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::SeqCst);
    }

    /// The connection, made again if it was lost. That and what is asked next have one deadline.
    pub fn connected<'a>(&self, session: &'a mut Option<Session>) -> Result<&'a mut Session, VhostUserError> {
        let deadline = self.deadline();
        if session.as_ref().is_some_and(|s| !s.channel.is_quiet()) {
            *session = None;
        }
        if session.is_none() {
            let mut new = open(&self.spec, deadline, &self.cancel)?;
            let missing = self.features & !new.features;
            if missing != 0 || self.remote && !new.protocol.contains(Protocol::CONFIG) {
                return Err(lacks(&self.spec.path, &format!("has changed: features {missing:#x} are gone")));
            }
            if new.queues.is_some_and(|n| n < self.served.into()) {
                return Err(lacks(&self.spec.path, "has changed: it has fewer queues"));
            }
            self.refresh(&mut new).map_err(|source| back_end(&self.spec.path, source))?;
            *session = Some(new);
        }
        let lost = || lacks(&self.spec.path, "is gone");
        let session = session.as_mut().ok_or_else(lost)?;
        session.channel.allow_until(deadline);
        Ok(session)
    }

    /// Asks for the configuration again.
    pub fn refresh(&self, session: &mut Session) -> Result<(), ChannelError> {
        let len = lock(&self.config).len();
        if self.remote && len > 0 {
            let mut new = session.config(len)?;
            fit(self.spec.kind, &mut new, self.queues);
            *lock(&self.config) = new;
        }
        Ok(())
    }

    /// A driver's write as the back end is told of it. Those of input devices want to know all that is selected at
    /// once, while a driver writes it byte by byte.
    fn as_written(&self, offset: usize, data: &[u8]) -> (usize, Vec<u8>) {
        if self.spec.kind != DeviceKind::INPUT {
            return (offset, data.to_vec());
        }
        let (mut config, mut selected) = (lock(&self.config).clone(), lock(&self.selected));
        for (to, from) in config.iter_mut().zip(*selected) {
            *to = from;
        }
        for (to, from) in config.iter_mut().skip(offset).zip(data) {
            *to = *from;
        }
        for (to, from) in selected.iter_mut().zip(&config) {
            *to = *from;
        }
        (0, config)
    }

    fn write_config(&self, offset: u64, data: &[u8]) -> Result<(), VhostUserError> {
        let mut guard = self.session();
        let session = if self.running.load(Ordering::SeqCst) {
            let Some(session) = guard.as_mut() else { return Ok(()) };
            session.channel.allow_until(self.deadline());
            session
        } else {
            self.connected(&mut guard)?
        };
        let (offset, data) = self.as_written(offset as usize, data);
        let done = session.set_config(offset as u32, &data).and_then(|()| self.refresh(session));
        done.map_err(|source| back_end(&self.spec.path, source))
    }
}

impl ConfigSpace for BackEnd {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let config = lock(&self.config);
        let part = usize::try_from(offset).ok().and_then(|at| config.get(at..)).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(part) {
            *to = *from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let len = lock(&self.config).len() as u64;
        let inside = offset.checked_add(data.len() as u64).is_some_and(|end| end <= len);
        if !self.remote || !inside {
            tracing::debug!(device = self.spec.name(), offset, "write past the configuration space");
        } else if let Err(e) = self.write_config(offset, data) {
            // The guest writes as often as it likes.
            tracing::debug!(device = self.spec.name(), "the guest's write to its configuration is lost: {e}");
        }
    }
}

/// Stands in for times that are too far away to be told: a hundred years.
const FAR: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The time that is `timeout` from now.
fn after(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or_else(|| now + FAR)
}

fn lacks(path: &Path, lacks: &str) -> VhostUserError {
    VhostUserError::Lacks { path: path.to_owned(), lacks: lacks.to_owned() }
}

fn back_end(path: &Path, source: ChannelError) -> VhostUserError {
    VhostUserError::BackEnd { path: path.to_owned(), source }
}

fn connect(spec: &VhostUserSpec, source: std::io::Error) -> VhostUserError {
    VhostUserError::Connect { path: spec.path.clone(), source }
}

fn open(spec: &VhostUserSpec, deadline: Instant, cancel: &Wake) -> Result<Session, VhostUserError> {
    let session = Session::open(&spec.path, deadline, cancel.clone()).map_err(|e| connect(spec, e))?;
    session.map_err(|source| back_end(&spec.path, source))
}

/// Queues that the guest sees, and those of them that the back end serves. A driver expects some that not every back
/// end has (the events of a socket device, for one): those are there, and nothing happens in them.
fn count(spec: &VhostUserSpec, has: Option<u64>) -> Result<(u16, u16), VhostUserError> {
    let least = spec.kind.least_queues() as u16;
    let has = has.map(|n| u16::try_from(n).unwrap_or(u16::MAX).min(MAX_QUEUES));
    if has == Some(0) {
        return Err(lacks(&spec.path, "has no queues"));
    }
    let queues = spec.queues.unwrap_or_else(|| has.unwrap_or(least).max(least));
    let served = has.map_or(queues, |n| n.min(queues));
    if served < queues && queues > least {
        return Err(VhostUserError::Queues { asked: queues, most: served.max(least) });
    }
    Ok((queues, served))
}

/// Features that a device of so few queues cannot have, whatever its back end offers: some leave the control queue of a
/// network interface to the front end, and a driver would wait for it for ever.
fn beyond(kind: DeviceKind, served: u16) -> u64 {
    if kind == DeviceKind::NET && served < 3 { NET_CONTROL } else { 0 }
}

/// The back end's configuration, as much of it as it has; `None` when it tells nothing.
fn first_config(
    spec: &VhostUserSpec,
    session: &mut Session,
    queues: u16,
) -> Result<Option<Vec<u8>>, VhostUserError> {
    let mut ask = |len| match session.config(len) {
        Ok(config) => Ok(Some(config)),
        Err(ChannelError::Refused { .. }) => Ok(None),
        Err(source) => Err(back_end(&spec.path, source)),
    };
    let Some(lengths) = spec.kind.config_lengths() else {
        // Of an unknown kind: the longest that it has.
        let (mut best, mut step) = (None::<Vec<u8>>, CONFIG_MAX);
        while step > 0 {
            let len = best.as_ref().map_or(0, Vec::len) + step;
            if len <= CONFIG_MAX
                && let Some(config) = ask(len)?
            {
                best = Some(config);
            }
            step /= 2;
        }
        return Ok(best);
    };
    for &len in lengths {
        if let Some(mut config) = ask(len)? {
            fit(spec.kind, &mut config, queues);
            return Ok(Some(config));
        }
    }
    Ok(None)
}

/// The configuration where the back end leaves it to the front end.
fn own_config(spec: &VhostUserSpec, queues: u16) -> Result<Vec<u8>, VhostUserError> {
    match (spec.kind, spec.kind.config_lengths()) {
        (DeviceKind::FS, _) => {
            let Some(tag) = &spec.tag else {
                return Err(lacks(&spec.path, "does not say the tag of its share, and none was given"));
            };
            let mut config = tag.clone().into_bytes();
            config.resize(36, 0);
            config.extend(u32::from(queues - 1).to_le_bytes());
            Ok(config)
        }
        (DeviceKind::VSOCK, _) => Ok(GUEST_CID.to_le_bytes().to_vec()),
        (_, None | Some([])) => Ok(Vec::new()),
        (kind, Some(_)) => {
            Err(lacks(&spec.path, &format!("does not say the configuration of its {kind} device")))
        }
    }
}

/// Context id of the guest.
const GUEST_CID: u64 = 3;

/// Makes a configuration speak of no more queues than the guest sees.
fn fit(kind: DeviceKind, config: &mut [u8], queues: u16) {
    let (at, most) = match kind {
        // Pairs of them. With more than one comes the control queue, after the last.
        DeviceKind::NET => (8..10, (queues.saturating_sub(1) / 2).max(1)),
        DeviceKind::BLOCK => (34..36, queues),
        DeviceKind::FS => (36..40, queues.saturating_sub(1)),
        _ => return,
    };
    let Some(field) = config.get_mut(at) else { return };
    let mut value = [0; 4];
    value[..field.len()].copy_from_slice(field);
    let fitting = u32::from_le_bytes(value).min(most.into()).to_le_bytes();
    field.copy_from_slice(&fitting[..field.len()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_those_that_both_sides_have() {
        let counts = |kind, asked, has| {
            let spec = VhostUserSpec { queues: asked, ..VhostUserSpec::new(kind, "x") };
            count(&spec, has).map_err(|e| e.to_string())
        };
        let (vsock, block) = (DeviceKind::VSOCK, DeviceKind::BLOCK);
        assert_eq!(counts(vsock, None, Some(2)), Ok((3, 2)));
        assert_eq!(counts(vsock, None, None), Ok((3, 3)));
        assert_eq!(counts(block, None, Some(4)), Ok((4, 4)));
        assert_eq!(counts(block, None, Some(1 << 40)), Ok((MAX_QUEUES, MAX_QUEUES)));
        assert_eq!(counts(block, Some(2), Some(4)), Ok((2, 2)));
        assert_eq!(counts(block, Some(2), None), Ok((2, 2)));
        assert!(counts(block, Some(5), Some(4)).unwrap_err().contains("5 queues: this one can have 1 to 4"));
        assert!(counts(block, None, Some(0)).unwrap_err().contains("no queues"));
    }

    #[test]
    fn configurations_speak_of_no_queue_that_is_not_there() {
        let mut config = [0xff; 40];
        fit(DeviceKind::BLOCK, &mut config, 2);
        assert_eq!(config[32..38], [0xff, 0xff, 2, 0, 0xff, 0xff]);
        fit(DeviceKind::FS, &mut config, 2);
        assert_eq!(config[35..], [0, 1, 0, 0, 0]);
        fit(DeviceKind::BLOCK, &mut config[..20], 1);
        for (queues, pairs) in [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2)] {
            let mut config = [0xff; 12];
            fit(DeviceKind::NET, &mut config, queues);
            assert_eq!(config[7..], [0xff, pairs, 0, 0xff, 0xff], "{queues} queues");
        }
    }

    #[test]
    fn a_control_queue_that_is_not_there_is_not_offered() {
        let (ctrl_vq, mq, mac, status) = (1 << 17, 1 << 22, 1 << 5, 1 << 16);
        let hidden = beyond(DeviceKind::NET, 2);
        assert_eq!(hidden & (ctrl_vq | mq | mac | status | 1 << feature::VERSION_1), ctrl_vq | mq);
        assert_eq!(hidden & !FOR_GUESTS, 0);
        assert_eq!((beyond(DeviceKind::NET, 3), beyond(DeviceKind::BLOCK, 1)), (0, 0));
    }
}
