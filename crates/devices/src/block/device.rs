//! The device: requests in, jobs to the engine, answers back.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use krun_event::{Interest, Ready, Wake};
use krun_memory::{Bytes, GuestAddress, GuestMemory};
use krun_virtio::{Chain, ConfigSpace, Cx, DeviceError, DeviceInfo, VirtioDevice};

use super::config::Config;
use super::engine::Engine;
use super::image::{self, Image};
use super::request::{self, Action, Rules, status};
use super::{BlockError, BlockSpec, SyncMode};

/// Size of each request queue.
pub const QUEUE_SIZE: u16 = 256;

/// Feature bits (virtio 1.2, section 5.2.3).
mod feature {
    pub const SEG_MAX: u32 = 2;
    pub const RO: u32 = 5;
    pub const BLK_SIZE: u32 = 6;
    pub const FLUSH: u32 = 9;
    pub const CONFIG_WCE: u32 = 11;
    pub const MQ: u32 = 12;
    pub const DISCARD: u32 = 13;
    pub const WRITE_ZEROES: u32 = 14;
}

/// Jobs are done.
const DONE: u64 = 0;
/// The size may have changed.
const RESIZED: u64 = 1;

/// A request whose job runs.
struct Pending {
    queue: usize,
    chain: Chain,
    status_at: GuestAddress,
}

/// What lives from the driver's start to its reset.
struct Running {
    engine: Engine,
    memory: Arc<GuestMemory>,
    /// By index, which is the job's number. What the driver can have in flight bounds it.
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    done: Vec<(u64, io::Result<()>)>,
}

/// What a [`BlockHandle`] shares with its device.
struct Shared {
    spec: BlockSpec,
    image: Arc<dyn Image>,
    config: Arc<Config>,
    resized: Wake,
    /// One change of size at a time.
    resizing: Mutex<()>,
}

/// The disk.
pub struct Block {
    shared: Arc<Shared>,
    running: Option<Running>,
}

/// Reaches a disk while its machine runs.
#[derive(Clone)]
pub struct BlockHandle {
    shared: Arc<Shared>,
}

impl BlockHandle {
    /// The disk's id.
    pub fn id(&self) -> &str {
        &self.shared.spec.id
    }

    /// Looks up the size of the image's file, which somebody has changed, and tells the guest. Returns it
    /// in bytes.
    ///
    /// # Errors
    /// [`BlockError::Resize`] for an image that is not raw, [`BlockError::Open`] with the host's reason.
    pub fn refresh(&self) -> Result<u64, BlockError> {
        let Shared { spec, image, config, resized, resizing } = &*self.shared;
        let _turn = resizing.lock().unwrap_or_else(PoisonError::into_inner);
        let path = || spec.path.clone();
        let size = image
            .refresh()
            .map_err(|source| BlockError::Open { path: path(), source })?
            .ok_or_else(|| BlockError::Resize { path: path() })?;
        if config.set_size(size) {
            resized.wake();
        }
        Ok(size)
    }
}

impl std::fmt::Debug for BlockHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockHandle({})", self.shared.spec.path.display())
    }
}

impl Block {
    /// Virtio device id.
    pub const ID: u32 = 2;

    /// Opens and locks the image.
    ///
    /// # Errors
    /// See [`BlockError`].
    pub fn new(spec: BlockSpec) -> Result<Self, BlockError> {
        if !(1..=BlockSpec::MAX_QUEUES).contains(&spec.queues) {
            return Err(BlockError::Queues { asked: spec.queues });
        }
        let image = image::open(&spec)?;
        Self::with_image(spec, image)
    }

    pub(super) fn with_image(spec: BlockSpec, image: Arc<dyn Image>) -> Result<Self, BlockError> {
        let config = Arc::new(Config::new(image.size(), image.block_size(), spec.queues));
        let resized = Wake::new().map_err(|source| BlockError::Host { what: "create an event", source })?;
        let shared = Shared { spec, image, config, resized, resizing: Mutex::default() };
        Ok(Self { shared: Arc::new(shared), running: None })
    }

    /// A handle that outlives the machine.
    pub fn handle(&self) -> BlockHandle {
        BlockHandle { shared: Arc::clone(&self.shared) }
    }

    fn rules(&self, cx: &Cx<'_>) -> Rules {
        let Shared { spec, config, .. } = &*self.shared;
        let no_flush = spec.sync == SyncMode::None;
        // A driver that cannot flush, or does not want to, gets a disk without a cache (5.2.5.2).
        let cached = match cx.has_feature(feature::CONFIG_WCE) {
            true => config.writeback(),
            false => cx.has_feature(feature::FLUSH),
        };
        Rules { size: config.size(), read_only: spec.read_only, durable: !cached && !no_flush, no_flush }
    }

    /// Takes all requests of a queue.
    fn take(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let rules = self.rules(cx);
        let Some(running) = &mut self.running else { return Ok(()) };
        while let Some(chain) = cx.pop(queue)? {
            let request = request::parse(&chain, &running.memory, &rules)?;
            let status_at = request.status_at;
            let answer = match request.action {
                Action::Answer(answer) => answer,
                Action::Id => {
                    let mut writer = chain.writer(cx.memory());
                    let _status = writer.split_at((chain.writable_len() - 1) as usize);
                    let mut id = self.shared.spec.id.clone().into_bytes();
                    id.resize(BlockSpec::SERIAL, 0);
                    id.truncate(writer.remaining());
                    match writer.write_all(&id) {
                        Ok(()) => status::OK,
                        Err(_) => status::IOERR,
                    }
                }
                Action::Run(job) => {
                    let slot = running.free.pop().unwrap_or_else(|| {
                        running.pending.push(None);
                        running.pending.len() - 1
                    });
                    match running.engine.submit(slot as u64, job) {
                        Ok(()) => {
                            running.pending[slot] = Some(Pending { queue, chain, status_at });
                            continue;
                        }
                        Err(e) => {
                            tracing::warn!("disk {}: {e}", self.shared.spec.path.display());
                            running.free.push(slot);
                            status::IOERR
                        }
                    }
                }
            };
            complete(cx, queue, chain, status_at, answer)?;
        }
        running.engine.kick().map_err(|source| self.shared.failed(source))
    }

    /// Answers what is done.
    fn answer(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let Some(running) = &mut self.running else { return Ok(()) };
        running.engine.reap(&mut running.done).map_err(|source| self.shared.failed(source))?;
        for (id, result) in running.done.drain(..) {
            let slot = id as usize;
            let Some(pending) = running.pending.get_mut(slot).and_then(Option::take) else { continue };
            running.free.push(slot);
            let answer = match result {
                Ok(()) => status::OK,
                Err(e) => {
                    tracing::warn!("disk {}: {e}", self.shared.spec.path.display());
                    status::IOERR
                }
            };
            complete(cx, pending.queue, pending.chain, pending.status_at, answer)?;
        }
        Ok(())
    }
}

impl Shared {
    fn failed(&self, source: io::Error) -> DeviceError {
        DeviceError::Host { what: format!("disk {}", self.spec.path.display()), source }
    }
}

fn complete(
    cx: &mut Cx<'_>,
    queue: usize,
    chain: Chain,
    status_at: GuestAddress,
    answer: u8,
) -> Result<(), DeviceError> {
    cx.memory()
        .write_obj(answer, status_at)
        .map_err(|e| DeviceError::Driver(format!("the status byte cannot be stored: {e}")))?;
    let written = chain.writable_len();
    cx.complete(queue, chain, written)
}

impl VirtioDevice for Block {
    fn info(&self) -> DeviceInfo {
        let spec = &self.shared.spec;
        let mut bits = vec![feature::SEG_MAX, feature::BLK_SIZE, feature::FLUSH];
        match spec.read_only {
            true => bits.push(feature::RO),
            false => bits.extend([feature::DISCARD, feature::WRITE_ZEROES, feature::CONFIG_WCE]),
        }
        if spec.queues > 1 {
            bits.push(feature::MQ);
        }
        DeviceInfo {
            id: Self::ID,
            name: format!("disk {}", spec.id),
            features: bits.iter().fold(0, |all, bit| all | 1 << bit),
            queue_sizes: vec![QUEUE_SIZE; spec.queues.into()],
            shm: Vec::new(),
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::<Config>::clone(&self.shared.config)
    }

    fn start(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let Shared { spec, image, config, resized, .. } = &*self.shared;
        // Section 5.2.5.2: with one and without the other there is no cache at first.
        if cx.has_feature(feature::CONFIG_WCE) && !cx.has_feature(feature::FLUSH) {
            config.set_writeback(false);
        }
        let jobs = u32::from(QUEUE_SIZE) * u32::from(spec.queues);
        let fail = |source| self.shared.failed(source);
        let engine = Engine::new("disk", Arc::clone(image), jobs, spec.threads_only).map_err(fail)?;
        cx.watch(engine.wake(), DONE, Interest::Read).map_err(fail)?;
        cx.watch(resized, RESIZED, Interest::Read).map_err(fail)?;
        let memory = Arc::new(cx.memory().clone());
        let (pending, free, done) = (Vec::new(), Vec::new(), Vec::new());
        self.running = Some(Running { engine, memory, pending, free, done });
        Ok(())
    }

    fn on_queue(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        self.take(queue, cx)
    }

    fn on_event(&mut self, ready: Ready, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        if ready.token == RESIZED {
            self.shared.resized.take();
            cx.interrupt().config_changed();
            return Ok(());
        }
        self.answer(cx)
    }

    fn drain(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        for queue in 0..cx.queue_count() {
            self.take(queue, cx)?;
        }
        while let Some(running) = self.running.as_ref().filter(|r| r.engine.in_flight() > 0) {
            running.engine.wait().map_err(|source| self.shared.failed(source))?;
            self.answer(cx)?;
        }
        Ok(())
    }

    fn stop(&mut self) {
        // Waits for what is in flight; the answers have nobody to go to.
        self.running = None;
        self.shared.config.set_writeback(true);
        if let Err(e) = self.shared.image.settle() {
            tracing::warn!("disk {}: {e}", self.shared.spec.path.display());
        }
    }
}
