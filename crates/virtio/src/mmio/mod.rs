//! The MMIO transport, version 2 (virtio 1.2, section 4.2).
//!
//! [`MmioTransport`] is what vCPU threads write to and the keeper of the device: idle in here, or running
//! on a worker thread of its own. What they read is in a [`RegisterPage`].

mod page;
pub mod reg;
pub mod status;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use krun_event::{Failure, Poll, Wake, Worker};
use krun_memory::{GuestAddress, GuestMemory};

use crate::bounce::{Bounce, Windows};
use crate::device::{ConfigSpace, DeviceError, DeviceInfo, Interrupt, VirtioDevice};
use crate::feature;
use crate::queue::{Queue, QueueAddresses};
use crate::worker::{self, Engine, Wish};

pub use page::{RegisterPage, RegisterPages};

/// Bytes of address space of one device.
pub const MMIO_SIZE: u64 = 0x1000;

/// Most bytes of a configuration space; no kind of device has as many.
pub const CONFIG_MAX: usize = 256;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"krun");

/// What is shared with the worker. Not the lock of the registers: a vCPU that handles an interrupt must not
/// wait for another one that resets the device.
struct Shared {
    /// What the driver reads. Device status and interrupt status have no other place.
    page: RegisterPage,
    config: Arc<dyn ConfigSpace>,
    line: Box<dyn Fn() + Send + Sync>,
    fail: Box<dyn Fn(String) + Send + Sync>,
}

impl Shared {
    fn raise(&self, bits: u32) {
        if bits & Interrupt::CONFIG != 0 {
            self.page.refresh(&*self.config);
        }
        self.page.set_bits(reg::INTERRUPT_STATUS, bits);
        (self.line)();
    }

    fn broken(&self) {
        self.page.set_bits(reg::STATUS, status::NEEDS_RESET);
        self.raise(Interrupt::CONFIG);
    }

    /// The device status but for what the device itself says.
    fn status(&self) -> u32 {
        self.page.get(reg::STATUS) & !status::NEEDS_RESET
    }
}

/// What the driver wrote about one queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct QueueRegs {
    size: u32,
    ready: bool,
    at: QueueAddresses,
}

/// What the driver wrote, apart from [`QueueRegs`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Regs {
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    /// The driver accepted a feature past the 64 that exist.
    beyond: bool,
    queue_sel: u32,
    shm_sel: u32,
}

/// Where the device is.
enum State {
    Idle(Box<dyn VirtioDevice>),
    Running {
        worker: Worker<Option<Ended>>,
        wish: Arc<Wish>,
    },
    /// Shut down, or lost in a panic.
    Gone,
}

/// What a worker leaves behind: the device, and how it ended.
type Ended = (Box<dyn VirtioDevice>, Result<(), DeviceError>);

struct Inner {
    regs: Regs,
    queues: Vec<QueueRegs>,
    state: State,
}

/// A virtio device behind MMIO registers.
///
/// All methods take `&self`; vCPU threads call them at the same time. A reset (and [`Self::shutdown`])
/// waits for the device's current callback, so a device that blocks in a call to the host delays the
/// vCPU that resets it. Interrupt status, doorbells and configuration space are served meanwhile.
pub struct MmioTransport {
    info: DeviceInfo,
    /// Another process serves the queues.
    elsewhere: bool,
    /// The interrupt line itself, for such a device.
    direct: Option<Wake>,
    /// The interrupt status says "used buffer" all the time that the device runs.
    always_used: bool,
    memory: GuestMemory,
    shared: Arc<Shared>,
    doorbells: Vec<Wake>,
    shm: Vec<(u8, GuestAddress, u64)>,
    /// All windows of the machine: a driver's buffers may lie there.
    windows: Arc<Windows>,
    inner: Mutex<Inner>,
}

impl fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioTransport").field("info", &self.info).finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Puts `device` behind registers, which the driver reads in `page`. `line` pulses its interrupt line; `fail` is told of a panic on
    /// the device's thread, after which the machine cannot go on. Both are called from any thread,
    /// perhaps while a register is being written, and must not call the transport.
    ///
    /// # Errors
    /// The host's reason when no descriptor is left for the doorbells.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        page: RegisterPage,
        line: impl Fn() + Send + Sync + 'static,
        fail: impl Fn(String) + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let (info, config, elsewhere) = (device.info(), device.config(), device.serves_elsewhere());
        let doorbells = info.queue_sizes.iter().map(|_| Wake::new()).collect::<Result<_, _>>()?;
        let queues = vec![QueueRegs::default(); info.queue_sizes.len()];
        for (at, value) in [
            (reg::MAGIC, MAGIC),
            (reg::VERSION, VERSION),
            (reg::DEVICE_ID, info.id),
            (reg::VENDOR_ID, VENDOR),
        ] {
            page.set(at, value);
        }
        page.refresh(&*config);
        let transport = Self {
            info,
            elsewhere,
            direct: None,
            always_used: false,
            memory,
            shared: Arc::new(Shared { page, config, line: Box::new(line), fail: Box::new(fail) }),
            doorbells,
            shm: Vec::new(),
            windows: Arc::default(),
            inner: Mutex::new(Inner { regs: Regs::default(), queues, state: State::Idle(device) }),
        };
        transport.show(&transport.lock());
        Ok(transport)
    }

    /// Says where the machine put shared memory region `id`; one that has no place is not shown.
    pub fn place_shm(&mut self, id: u8, at: GuestAddress) {
        if let Some(region) = self.info.shm.iter().find(|r| r.id == id) {
            self.shm.push((id, at, region.size));
            self.show(&self.lock());
        }
    }

    /// Says where the windows of the machine are, so that the driver's buffers may lie there. Of no effect for a device
    /// whose queues another process serves.
    pub fn set_windows(&mut self, windows: Arc<Windows>) {
        self.windows = windows;
    }

    /// Gives the interrupt line itself to a device whose queues another process serves: what is set to pulse it. Of no
    /// effect for others.
    ///
    /// The interrupt status of such a device says "used buffer" all the time, for who sets the line cannot write
    /// there. A driver that looks into its queues when it need not finds nothing.
    pub fn set_direct_line(&mut self, line: Wake) {
        self.direct = Some(line).filter(|_| self.elsewhere);
        self.always_used |= self.direct.is_some();
    }

    /// From now on an acknowledgement of used buffers alone ([`Interrupt::USED`] written to [`reg::INTERRUPT_ACK`]) may be
    /// kept from [`Self::write`]: the interrupt status says "used buffer" all the time, so there is nothing to clear. A
    /// driver that shares the interrupt line with others looks into its queues each time, and finds nothing.
    pub fn need_no_acknowledgements(&mut self) {
        self.always_used = true;
    }

    /// The device's facts.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// One wake-up per queue, to be set when the guest writes the queue's index to
    /// [`reg::QUEUE_NOTIFY`]. A write that arrives through [`Self::write`] does the same.
    pub fn doorbells(&self) -> &[Wake] {
        &self.doorbells
    }

    /// Features offered to the driver.
    pub fn features(&self) -> u64 {
        let ring = 1 << feature::RING_INDIRECT_DESC | 1 << feature::RING_EVENT_IDX;
        self.info.features | 1 << feature::VERSION_1 | if self.elsewhere { 0 } else { ring }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The registers are plain values: a panic between two of them leaves nothing half done that a
        // reset does not set right.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A vCPU reads `data.len()` bytes at `offset`: what is in the [`RegisterPage`].
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.shared.page.read(offset, data);
    }

    /// Puts what the driver selected where it reads it.
    fn show(&self, inner: &Inner) {
        let (regs, page) = (&inner.regs, &self.shared.page);
        let queue = regs.queue_sel as usize;
        let (_, at, len) = *self.shm.iter().find(|r| u32::from(r.0) == regs.shm_sel).unwrap_or(&(
            0,
            GuestAddress(u64::MAX),
            u64::MAX,
        ));
        page.set(reg::DEVICE_FEATURES, half(self.features(), regs.device_features_sel));
        page.set(reg::QUEUE_NUM_MAX, self.info.queue_sizes.get(queue).map_or(0, |&n| u32::from(n)));
        page.set(reg::QUEUE_READY, inner.queues.get(queue).map_or(0, |q| u32::from(q.ready)));
        page.set_pair(reg::SHM_LEN, len);
        page.set_pair(reg::SHM_BASE, at.0);
    }

    /// A vCPU writes `data` at `offset`. What cannot be written is ignored.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if offset >= reg::CONFIG {
            if matches!(data.len(), 1 | 2 | 4 | 8) {
                self.shared.config.write(offset - reg::CONFIG, data);
                self.shared.page.refresh(&*self.shared.config);
            }
        } else if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        } else {
            tracing::debug!(device = self.info.name, offset, "register write of the wrong width");
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            reg::QUEUE_NOTIFY => {
                if let Some(wake) = self.doorbells.get(value as usize) {
                    // The process that serves the queue, if one does, has it too.
                    wake.wake_shared();
                }
            }
            reg::INTERRUPT_ACK => {
                let kept = if self.always_used { Interrupt::USED } else { 0 };
                self.shared.page.clear_bits(reg::INTERRUPT_STATUS, value & !kept);
            }
            reg::STATUS => {
                let mut inner = self.lock();
                self.write_status(&mut inner, value);
                // What the host changed while no driver listened.
                self.shared.page.refresh(&*self.shared.config);
                self.show(&inner);
            }
            _ => {
                let mut inner = self.lock();
                self.write_locked(offset, value, &mut inner);
                self.show(&inner);
            }
        }
    }

    fn write_locked(&self, offset: u64, value: u32, inner: &mut Inner) {
        let regs = &mut inner.regs;
        match offset {
            reg::DEVICE_FEATURES_SEL => regs.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => regs.driver_features_sel = value,
            reg::QUEUE_SEL => regs.queue_sel = value,
            reg::SHM_SEL => regs.shm_sel = value,
            reg::DRIVER_FEATURES => self.write_features(regs, value),
            _ => self.write_queue(offset, value, inner),
        }
    }

    fn write_features(&self, regs: &mut Regs, value: u32) {
        // Section 3.1.1: after the driver has said that it is there, and before features are agreed.
        let now = self.shared.status();
        if now & status::DRIVER == 0 || now & status::FEATURES_OK != 0 {
            tracing::debug!(device = self.info.name, "features written out of turn");
            return;
        }
        match regs.driver_features_sel {
            0 => set_half(&mut regs.driver_features, 0, value),
            1 => set_half(&mut regs.driver_features, 1, value),
            _ => regs.beyond |= value != 0,
        }
    }

    fn write_queue(&self, offset: u64, value: u32, inner: &mut Inner) {
        let index = inner.regs.queue_sel as usize;
        let (Some(queue), Some(&max)) = (inner.queues.get_mut(index), self.info.queue_sizes.get(index))
        else {
            tracing::debug!(device = self.info.name, offset, index, "write to no register or queue");
            return;
        };
        // Section 4.2.2.1 forbids both.
        if self.shared.status() & status::DRIVER_OK != 0 || queue.ready && offset != reg::QUEUE_READY {
            tracing::debug!(device = self.info.name, offset, index, "queue changed while in use");
            return;
        }
        match offset {
            reg::QUEUE_NUM => queue.size = value,
            reg::QUEUE_DESC => set_half(&mut queue.at.desc, 0, value),
            0x084 => set_half(&mut queue.at.desc, 1, value),
            reg::QUEUE_AVAIL => set_half(&mut queue.at.avail, 0, value),
            0x094 => set_half(&mut queue.at.avail, 1, value),
            reg::QUEUE_USED => set_half(&mut queue.at.used, 0, value),
            0x0a4 => set_half(&mut queue.at.used, 1, value),
            reg::QUEUE_READY if value == 0 => queue.ready = false,
            reg::QUEUE_READY => match Queue::new(&self.memory, queue.size, max, queue.at, 0) {
                Ok(_) => queue.ready = true,
                Err(e) => tracing::debug!(device = self.info.name, index, "queue refused: {e}"),
            },
            _ => tracing::debug!(device = self.info.name, offset, "write to no register"),
        }
    }

    /// Takes the status bits in the order of section 3.1.1, each only after the one before.
    fn write_status(&self, inner: &mut Inner, value: u32) {
        if value == 0 {
            return self.reset(inner);
        }
        let new = value & !status::NEEDS_RESET;
        let old = self.shared.status();
        if old & !new != 0 {
            tracing::debug!(device = self.info.name, old, new, "status bits cleared without a reset");
            return;
        }
        let mut now = old | new & (status::ACKNOWLEDGE | status::FAILED);
        if new & status::DRIVER != 0 && now & status::ACKNOWLEDGE != 0 {
            now |= status::DRIVER;
        }
        if new & status::FEATURES_OK != 0 && now & status::DRIVER != 0 {
            let regs = &inner.regs;
            let refused = regs.driver_features & !self.features();
            if refused == 0 && !regs.beyond && regs.driver_features & 1 << feature::VERSION_1 != 0 {
                now |= status::FEATURES_OK;
            } else {
                tracing::debug!(device = self.info.name, refused, "features refused");
            }
        }
        let ready = now & (status::FEATURES_OK | status::DRIVER_OK) == status::FEATURES_OK;
        let starts = new & status::DRIVER_OK != 0 && ready;
        if starts {
            now |= status::DRIVER_OK;
        }
        // Before the device runs: it may have something to add.
        self.shared.page.set_bits(reg::STATUS, now);
        if starts && let Err(e) = self.activate(inner) {
            tracing::warn!(device = self.info.name, "cannot start: {e}");
            self.shared.broken();
        }
    }

    /// Moves the device to a worker.
    fn activate(&self, inner: &mut Inner) -> Result<(), DeviceError> {
        let features = inner.regs.driver_features;
        let mut queues = Vec::with_capacity(inner.queues.len());
        for (queue, (q, &max)) in inner.queues.iter().zip(&self.info.queue_sizes).enumerate() {
            queues.push(match q.ready {
                true => Queue::new(&self.memory, q.size, max, q.at, features)
                    .map_err(|source| DeviceError::Queue { queue, source })?,
                false => Queue::default(),
            });
        }
        let host = |what: &str| {
            let what = what.to_owned();
            move |source| DeviceError::Host { what, source }
        };
        let mut memory = self.memory.clone();
        if !self.windows.is_empty() && !self.elsewhere {
            let made = Bounce::new(&self.windows, &memory).map_err(std::io::Error::other);
            let (bounce, with_it) = made.map_err(host("reserve memory for buffers in windows"))?;
            memory = with_it;
            queues = queues.into_iter().map(|q| q.with_bounce(Arc::clone(&bounce))).collect();
        }
        let poll = Poll::new().map_err(host("create an event set"))?;
        let State::Idle(device) = std::mem::replace(&mut inner.state, State::Gone) else {
            let source = std::io::Error::other("the device is gone");
            return Err(DeviceError::Host { what: "start the device".into(), source });
        };
        // The device is handed over once the thread exists: should none be had, it is still in here.
        let (hand_over, engine) = mpsc::channel();
        let wish = Arc::<Wish>::default();
        match self.spawn(engine, Arc::clone(&wish)) {
            Ok(worker) => {
                let shared = Arc::clone(&self.shared);
                let interrupt =
                    Interrupt::new(move |bits| shared.raise(bits)).with_direct(self.direct.clone());
                if self.always_used {
                    self.shared.page.set_bits(reg::INTERRUPT_STATUS, Interrupt::USED);
                }
                let doorbells = self.doorbells.clone();
                let engine = Engine::new(device, memory, features, queues, doorbells, poll, interrupt);
                let _ = hand_over.send(engine);
                inner.state = State::Running { worker, wish };
                Ok(())
            }
            Err(e) => {
                inner.state = State::Idle(device);
                Err(host("start the device's thread")(e))
            }
        }
    }

    fn spawn(
        &self,
        engine: mpsc::Receiver<Engine>,
        wish: Arc<Wish>,
    ) -> std::io::Result<Worker<Option<Ended>>> {
        let (shared, supervisor) = (Arc::clone(&self.shared), Arc::clone(&self.shared));
        let name = self.info.name.clone();
        let on_panic = move |failure: Failure| (supervisor.fail)(failure.to_string());
        Worker::spawn(&self.info.name, on_panic, move |stop| {
            let engine = engine.recv().ok()?;
            Some(worker::run(engine, &wish, stop, |e| {
                tracing::warn!(device = name, "stopped until the driver resets it: {e}");
                shared.broken();
            }))
        })
    }

    /// Back to where the driver found it, the device included.
    fn reset(&self, inner: &mut Inner) {
        inner.state = match std::mem::replace(&mut inner.state, State::Gone) {
            // A device that panicked is lost, and the machine was told.
            State::Running { worker, wish } => {
                // A kernel that goes down resets its devices first (Linux does since 6.12): what it
                // left with them must still arrive.
                wish.end(true);
                worker.stop().flatten().map_or(State::Gone, |(device, _)| State::Idle(device))
            }
            other => other,
        };
        inner.regs = Regs::default();
        inner.queues.fill(QueueRegs::default());
        for doorbell in &self.doorbells {
            doorbell.take_shared();
        }
        self.shared.page.set(reg::STATUS, 0);
        self.shared.page.set(reg::INTERRUPT_STATUS, 0);
    }

    /// Ends the device for good: with `drain` it first passes on what the driver had made available.
    /// Waits for its current callback. A second call does nothing.
    ///
    /// # Errors
    /// What could not be drained, or what had stopped the device before.
    pub fn shutdown(&self, drain: bool) -> Result<(), DeviceError> {
        let state = std::mem::replace(&mut self.lock().state, State::Gone);
        let State::Running { worker, wish } = state else { return Ok(()) };
        wish.end(drain);
        worker.stop().flatten().map_or(Ok(()), |(_, outcome)| outcome)
    }
}

impl Drop for MmioTransport {
    fn drop(&mut self) {
        // There is nobody left to tell how the device ended.
        let _ = self.shutdown(false);
    }
}

/// One half of a 64-bit register: `which` 0 is the low one, and there are no more than two.
fn half(value: u64, which: u32) -> u32 {
    match which {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(register: &mut u64, which: u32, value: u32) {
    let shift = 32 * which;
    *register = *register & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
}
