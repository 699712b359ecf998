//! The device.

use std::io::Read;
use std::sync::Arc;

use krun_event::{Interest, Ready};
use krun_memory::{GuestAddress, ReleaseError, release};
use krun_virtio::{Chain, ConfigSpace, Cx, DeviceError, DeviceInfo, VirtioDevice};

use super::state::{HINT_DONE, HINT_STOP, Shared};
use super::stats::{self, MemoryStats};
use super::{BalloonHandle, PAGE};

/// Feature bits (virtio 1.2, section 5.5.3).
pub(super) mod feature {
    pub const STATS: u32 = 1;
    pub const DEFLATE_ON_OOM: u32 = 2;
    pub const FREE_PAGE_HINT: u32 = 3;
    pub const REPORTING: u32 = 5;
}

/// What a queue is for. The first two are always there, the others with their features, and numbered without
/// gaps: so do drivers count that accept only some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Hints,
    Reports,
}

const QUEUE_SIZE: u16 = 128;
/// Statistics: one buffer goes back and forth.
const STATS_QUEUE_SIZE: u16 = 8;
/// Most page numbers in one request, each of which may cost a call to the host. Drivers send 256 to 1024; whoever
/// waits for the device waits for one request.
pub(super) const MAX_PAGES: u32 = 1 << 12;

const WAKE: u64 = 0;

/// The balloon device.
#[derive(Debug)]
pub struct Balloon {
    shared: Arc<Shared>,
    /// By queue.
    roles: Vec<Role>,
    /// The statistics buffer, which the driver gets back when the host wants a new one.
    held: Option<Chain>,
    /// The host refused to take memory back, and that was said.
    warned: bool,
}

impl Balloon {
    /// Virtio device id.
    pub const ID: u32 = 5;

    /// Creates one that asks for nothing.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { shared: Arc::new(Shared::new()?), roles: Vec::new(), held: None, warned: false })
    }

    /// The host's side of it.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle::new(Arc::clone(&self.shared))
    }

    /// Gives `len` bytes at `at` back to the host.
    fn release(&mut self, cx: &Cx<'_>, at: u64, len: u64) -> Result<(), DeviceError> {
        match release(cx.memory(), GuestAddress(at), len) {
            Ok(bytes) => {
                let state = &mut self.shared.lock().state;
                state.released = state.released.saturating_add(bytes);
            }
            Err(e @ ReleaseError::NotMemory { .. }) => return Err(DeviceError::Driver(e.to_string())),
            // Then it stays where it is: locked memory, for one. The guest need not know.
            Err(e) if !self.warned => {
                tracing::warn!("balloon: {e}");
                self.warned = true;
            }
            Err(_) => {}
        }
        Ok(())
    }

    /// Page numbers of pages that the guest gives up.
    fn inflate(&mut self, chain: &Chain, cx: &Cx<'_>) -> Result<(), DeviceError> {
        let mut reader = chain.reader(cx.memory());
        let count = chain.readable_len() / 4;
        if count > MAX_PAGES {
            let text = format!("{count} page numbers in one request, at most {MAX_PAGES}");
            return Err(DeviceError::Driver(text));
        }
        // Neighbours are released together, whether they come upwards or downwards.
        let mut run: Option<(u64, u64)> = None;
        for _ in 0..count {
            let Ok(number) = reader.read_obj::<u32>() else { break };
            let at = u64::from(u32::from_le(number)) * PAGE;
            run = match run {
                Some((from, len)) if from + len == at => Some((from, len + PAGE)),
                Some((from, len)) if at + PAGE == from => Some((at, len + PAGE)),
                Some((from, len)) => {
                    self.release(cx, from, len)?;
                    Some((at, PAGE))
                }
                None => Some((at, PAGE)),
            };
        }
        match run {
            Some((from, len)) => self.release(cx, from, len),
            None => Ok(()),
        }
    }

    /// Free memory that the guest reports by itself.
    fn report(&mut self, chain: &Chain, cx: &Cx<'_>) -> Result<(), DeviceError> {
        chain.writable().iter().try_for_each(|(at, len)| self.release(cx, at.0, u64::from(*len)))
    }

    /// Statistics; the buffer is kept, and an older one goes back.
    fn take_stats(&mut self, chain: Chain, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let mut bytes = [0; stats::MAX_BYTES];
        let len = chain.reader(cx.memory()).read(&mut bytes).unwrap_or(0);
        {
            let mut inner = self.shared.lock();
            inner.stats = MemoryStats::parse(&bytes[..len]);
            inner.stats_round += 1;
            inner.stats_wanted = false;
        }
        self.shared.changed.notify_all();
        match self.held.replace(chain) {
            Some(older) => cx.complete(queue, older, 0),
            None => Ok(()),
        }
    }

    /// A command that the driver takes up or ends, or free memory it hints at.
    fn hint(&self, chain: &Chain, cx: &Cx<'_>) {
        let command = chain.reader(cx.memory()).read_obj::<u32>().ok().map(u32::from_le);
        let mut inner = self.shared.lock();
        let wanted = inner.state.hint_command;
        match command {
            Some(HINT_STOP) if inner.hints.active => {
                inner.hints.active = false;
                inner.hints.complete = true;
                self.shared.changed.notify_all();
            }
            Some(id) => inner.hints.active = id == wanted && id > HINT_DONE,
            None => {}
        }
        if inner.hints.active {
            for (at, len) in chain.writable() {
                inner.hints.push(at.0, u64::from(*len));
            }
        }
    }

    /// Passes on what the host asked for meanwhile.
    fn attend(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let (notify, stats) = {
            let mut inner = self.shared.lock();
            (std::mem::take(&mut inner.notify), inner.stats_wanted)
        };
        if notify {
            cx.interrupt().config_changed();
        }
        let queue = self.roles.iter().position(|role| *role == Role::Stats);
        match (stats, queue) {
            (true, Some(queue)) => match self.held.take() {
                Some(chain) => cx.complete(queue, chain, 0),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }
}

impl VirtioDevice for Balloon {
    fn info(&self) -> DeviceInfo {
        use feature::{DEFLATE_ON_OOM, FREE_PAGE_HINT, REPORTING, STATS};
        DeviceInfo {
            id: Self::ID,
            name: "balloon".into(),
            features: 1 << STATS | 1 << DEFLATE_ON_OOM | 1 << FREE_PAGE_HINT | 1 << REPORTING,
            queue_sizes: vec![QUEUE_SIZE, QUEUE_SIZE, STATS_QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE],
            shm: Vec::new(),
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.shared) as Arc<dyn ConfigSpace>
    }

    fn start(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let optional = [
            (feature::STATS, Role::Stats),
            (feature::FREE_PAGE_HINT, Role::Hints),
            (feature::REPORTING, Role::Reports),
        ];
        self.roles = vec![Role::Inflate, Role::Deflate];
        self.roles.extend(optional.iter().filter(|(bit, _)| cx.has_feature(*bit)).map(|(_, role)| *role));
        let accepted = optional.iter().filter(|(bit, _)| cx.has_feature(*bit)).map(|(bit, _)| 1 << bit).sum();
        cx.watch(&self.shared.wake, WAKE, Interest::Read)
            .map_err(|source| DeviceError::Host { what: "watch the balloon's requests".into(), source })?;
        // The driver looks at the target by itself when it starts.
        self.shared.lock().features = Some(accepted);
        Ok(())
    }

    fn on_queue(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let role = self.roles.get(queue).copied();
        while let Some(chain) = cx.pop(queue)? {
            match role {
                Some(Role::Inflate) => self.inflate(&chain, cx)?,
                Some(Role::Reports) => self.report(&chain, cx)?,
                Some(Role::Hints) => self.hint(&chain, cx),
                Some(Role::Stats) => {
                    self.take_stats(chain, queue, cx)?;
                    continue;
                }
                // Pages that come back need nothing: the host provides them when they are touched.
                Some(Role::Deflate) | None => {}
            }
            cx.complete(queue, chain, 0)?;
        }
        Ok(())
    }

    fn on_event(&mut self, ready: Ready, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        if ready.token == WAKE {
            self.shared.wake.take();
            self.attend(cx)?;
        }
        Ok(())
    }

    fn stop(&mut self) {
        (self.roles, self.held) = (Vec::new(), None);
        {
            let mut inner = self.shared.lock();
            // The target is the host's and stays; all else was the driver's.
            inner.state.actual_pages = 0;
            inner.features = None;
            inner.stats_wanted = false;
        }
        self.shared.changed.notify_all();
    }
}
