//! What a virtio device is.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use krun_event::{Interest, Poll, Ready, Wake};
use krun_memory::{GuestMemory, Mapping};

use crate::chain::Chain;
use crate::queue::{Queue, QueueAddresses, QueueError};

/// A shared memory region that a device offers (virtio 1.2, section 2.10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShmRegion {
    /// Region id, as the device type defines it.
    pub id: u8,
    /// Length in bytes, a multiple of the page size.
    pub size: u64,
}

/// The memory of a [`ShmRegion`], which the machine shows to the guest for as long as it runs.
pub trait SharedMemory: Send + Sync {
    /// All of it, of the region's size.
    fn mapping(&self) -> &Mapping;
    /// A virtual CPU could not get at the guest's memory, perhaps here. Puts something in place of what is gone; false
    /// if all is there. Called from any vCPU's thread.
    fn mend(&self) -> bool;
}

/// The facts about a device that do not change while it lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Virtio device id (virtio 1.2, section 5).
    pub id: u32,
    /// For logs and thread names.
    pub name: String,
    /// Device feature bits offered; the transport adds those of the ring.
    pub features: u64,
    /// Largest size of each queue, a power of two.
    pub queue_sizes: Vec<u16>,
    /// Shared memory regions.
    pub shm: Vec<ShmRegion>,
}

/// The device's configuration space. Accesses come from vCPU threads, while the device runs on its own.
///
/// The transport keeps a copy for the driver to read and renews it when the driver has written something,
/// with each step of its initialisation, and by [`Interrupt::config_changed`]. That must not be called with
/// a lock held that [`Self::read`] takes.
pub trait ConfigSpace: Send + Sync {
    /// Fills `data` from `offset`; bytes past the end read as zero.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Stores `data` at `offset`; what cannot be written is ignored.
    fn write(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }
}

/// Why a device stopped. The driver sees `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The driver broke the rules of a ring.
    #[error("queue {queue}: {source}")]
    Queue {
        /// Index of the queue.
        queue: usize,
        /// Which rule.
        source: QueueError,
    },
    /// The driver broke the rules of the device.
    #[error("driver request: {0}")]
    Driver(String),
    /// The host failed the device.
    #[error("{what}: {source}")]
    Host {
        /// What was tried, on what.
        what: String,
        /// The host's answer.
        source: std::io::Error,
    },
}

/// How a device raises its interrupts. A cheap value; clones raise the same line.
#[derive(Clone)]
pub struct Interrupt {
    raise: Arc<dyn Fn(u32) + Send + Sync>,
    direct: Option<Wake>,
}

impl Interrupt {
    /// Bit of the interrupt status: a used buffer (virtio 1.2, section 4.2.2).
    pub const USED: u32 = 1;
    /// Bit of the interrupt status: the configuration changed.
    pub const CONFIG: u32 = 2;

    /// `raise` stores the bits in the interrupt status register and pulses the line.
    pub fn new(raise: impl Fn(u32) + Send + Sync + 'static) -> Self {
        Self { raise: Arc::new(raise), direct: None }
    }

    /// With the interrupt line itself, for a device that [serves elsewhere](VirtioDevice::serves_elsewhere): setting
    /// it does what [`Self::used`] does.
    #[must_use]
    pub fn with_direct(self, line: Option<Wake>) -> Self {
        Self { direct: line, ..self }
    }

    /// What another process can set in place of [`Self::used`], where this host has such a thing.
    pub fn direct(&self) -> Option<&Wake> {
        self.direct.as_ref()
    }

    /// Tells the driver about used buffers.
    pub fn used(&self) {
        (self.raise)(Self::USED);
    }

    /// Tells the driver about a changed configuration.
    pub fn config_changed(&self) {
        (self.raise)(Self::CONFIG);
    }
}

impl std::fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interrupt")
    }
}

/// What a running device works with. Lives on the device's worker thread.
///
/// The worker calls [`VirtioDevice::on_queue`] with the driver's notifications switched off for that
/// queue and switches them on afterwards. If the device's last [`Cx::pop`] found the queue empty and a
/// chain has come since, `on_queue` is called again; a device that stopped for want of room is not, and
/// goes on from [`VirtioDevice::on_event`]. After each callback the worker raises one interrupt for all
/// chains completed, if the driver wants one.
pub struct Cx<'a> {
    pub(crate) memory: &'a GuestMemory,
    pub(crate) features: u64,
    pub(crate) queues: &'a mut [Queue],
    pub(crate) doorbells: &'a [Wake],
    pub(crate) left: &'a mut [u16],
    /// Somebody waits for the device's end.
    pub(crate) stop: &'a AtomicBool,
    pub(crate) poll: &'a Poll,
    pub(crate) interrupt: &'a Interrupt,
}

impl<'a> Cx<'a> {
    /// First token of the worker's own; a device's tokens lie below.
    pub const TOKEN_LIMIT: u64 = 1 << 32;

    /// The guest's memory. Not tied to the borrow of `self`: a reader or writer may outlive it.
    pub fn memory(&self) -> &'a GuestMemory {
        self.memory
    }

    /// Whether the driver accepted feature `bit`.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// All features that the driver accepted.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Number of queues (also those the driver did not enable).
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// Entries of `queue`, as many as the driver wants; 0 when it left the queue disabled.
    pub fn queue_size(&self, queue: usize) -> u16 {
        self.queues[queue].size()
    }

    /// Where the driver put `queue`; `None` when it left it disabled, or there is no such queue.
    pub fn queue_addresses(&self, queue: usize) -> Option<QueueAddresses> {
        self.queues.get(queue).filter(|q| q.is_enabled()).map(Queue::addresses)
    }

    /// What is set when the driver notifies `queue`, for a device that
    /// [serves elsewhere](VirtioDevice::serves_elsewhere).
    pub fn doorbell(&self, queue: usize) -> Option<&'a Wake> {
        self.doorbells.get(queue)
    }

    /// `used.idx` of `queue` as it is in the guest's memory.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] when it cannot be read.
    pub fn used_index(&self, queue: usize) -> Result<u16, DeviceError> {
        self.queues[queue].used_index(self.memory).map_err(|source| DeviceError::Queue { queue, source })
    }

    /// Chains that the driver has made available in `queue` and that did not come back, going by the guest's memory
    /// alone.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] when that cannot be read.
    pub fn outstanding(&self, queue: usize) -> Result<u16, DeviceError> {
        let q = &self.queues[queue];
        let available =
            q.available_index(self.memory).map_err(|source| DeviceError::Queue { queue, source })?;
        Ok(available.wrapping_sub(self.used_index(queue)?))
    }

    /// Takes the next chain that the driver made available; `None` when there is none, or the driver
    /// left the queue disabled. Also when the callback has taken as many as the queue holds: the worker
    /// then goes on in another callback, so that a driver that adds without end does not keep it from
    /// its other work. And when the device is to stop (a reset, the end of the VM), but for
    /// [`VirtioDevice::drain`]: whoever waits for that waits for one chain, not for a queue of them.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] when the driver broke a rule; the device gives up with it.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, DeviceError> {
        let q = &mut self.queues[queue];
        if q.is_enabled() && (self.left[queue] == 0 || self.stop.load(Ordering::Acquire)) {
            q.defer();
            return Ok(None);
        }
        let chain = q.pop(self.memory).map_err(|source| DeviceError::Queue { queue, source })?;
        self.left[queue] = self.left[queue].saturating_sub(u16::from(chain.is_some()));
        Ok(chain)
    }

    /// Gives a chain back with `written` bytes stored in its writable part.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] when the used ring cannot be written.
    pub fn complete(&mut self, queue: usize, chain: Chain, written: u32) -> Result<(), DeviceError> {
        let memory = self.memory;
        self.queues[queue]
            .complete(memory, chain, written)
            .map_err(|source| DeviceError::Queue { queue, source })
    }

    /// Gives several chains back, each with the bytes stored in it. The driver sees all of them at once.
    ///
    /// # Errors
    /// As for [`Cx::complete`].
    pub fn complete_together(
        &mut self,
        queue: usize,
        chains: impl IntoIterator<Item = (Chain, u32)>,
    ) -> Result<(), DeviceError> {
        let memory = self.memory;
        self.queues[queue]
            .complete_together(memory, chains)
            .map_err(|source| DeviceError::Queue { queue, source })
    }

    /// Takes back the last popped chain: the next [`Cx::pop`] returns it again.
    pub fn unpop(&mut self, queue: usize, chain: Chain) {
        self.left[queue] = self.left[queue].saturating_add(1);
        self.queues[queue].unpop(chain);
    }

    /// Asks the driver to notify once `chains` more chains are in `queue`, not at the first. For a queue
    /// that was found empty in this callback, and of which so many are sure to come; holds until the
    /// next callback that takes from the queue.
    pub fn notify_after(&mut self, queue: usize, chains: u16) {
        self.queues[queue].notify_after(chains);
    }

    /// Raises the interrupt now for what was completed so far, if the driver wants one.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] when the ring cannot be read.
    pub fn flush(&mut self, queue: usize) -> Result<(), DeviceError> {
        let memory = self.memory;
        let due = self.queues[queue]
            .take_interrupt(memory)
            .map_err(|source| DeviceError::Queue { queue, source })?;
        if due {
            self.interrupt.used();
        }
        Ok(())
    }

    /// How to raise the configuration interrupt.
    pub fn interrupt(&self) -> &Interrupt {
        self.interrupt
    }

    /// Asks for [`VirtioDevice::on_event`] with `token` (below [`Cx::TOKEN_LIMIT`]) while `fd` is ready.
    ///
    /// The event comes again and again until the device reads, writes or ends the watch: a device that
    /// cannot take what is ready must [`Cx::unwatch`] or [`Cx::rewatch`], or its thread will spin. One
    /// event that was collected before a watch ended may still arrive after.
    ///
    /// # Errors
    /// The host's reason; a regular file, for one, is always ready and cannot be watched.
    pub fn watch(&self, fd: &impl AsFd, token: u64, interest: Interest) -> std::io::Result<()> {
        debug_assert!(token < Self::TOKEN_LIMIT);
        self.poll.add(fd, token, interest)
    }

    /// Changes what is waited for on `fd`.
    ///
    /// # Errors
    /// `fd` is not watched.
    pub fn rewatch(&self, fd: &impl AsFd, token: u64, interest: Interest) -> std::io::Result<()> {
        self.poll.modify(fd, token, interest)
    }

    /// Ends a watch.
    ///
    /// # Errors
    /// `fd` is not watched.
    pub fn unwatch(&self, fd: &impl AsFd) -> std::io::Result<()> {
        self.poll.remove(fd)
    }
}

/// A virtio device.
///
/// ```text
///            DRIVER_OK: moved to a worker            reset, end of the VM
///   idle ────────── start ──────────▶ running ────────── stop ──────────▶ idle
///                                     │  ▲
///                                     └──┘ on_queue, on_event
/// ```
/// `start` may be followed by any number of `on_queue` and `on_event`, then one `stop`; after `stop` the
/// device is as new and may be started again. An error from a callback sets `DEVICE_NEEDS_RESET` and is
/// followed by `stop`; nothing more is called until the driver has reset the device and starts it anew.
pub trait VirtioDevice: Send {
    /// Facts; the same at every call.
    fn info(&self) -> DeviceInfo;
    /// The configuration space, shared with the transport.
    fn config(&self) -> Arc<dyn ConfigSpace>;
    /// Its shared memory regions by id: all that [`Self::info`] lists; the same at every call.
    fn shared_memory(&self) -> Vec<(u8, Arc<dyn SharedMemory>)> {
        Vec::new()
    }
    /// Whether another process serves the queues; the same at every call. The worker then neither waits for
    /// doorbells nor looks at rings: [`Self::start`] hands [`Cx::doorbell`] and [`Interrupt::direct`] on, and
    /// [`Self::on_queue`] is not called. Of the ring's features only those in [`DeviceInfo::features`] are offered.
    fn serves_elsewhere(&self) -> bool {
        false
    }
    /// The driver is ready.
    ///
    /// # Errors
    /// The device cannot work.
    fn start(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError>;
    /// The driver rang the doorbell of `queue`.
    ///
    /// # Errors
    /// The device cannot go on.
    fn on_queue(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError>;
    /// A watched descriptor is ready.
    ///
    /// # Errors
    /// The device cannot go on.
    fn on_event(&mut self, ready: Ready, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let _ = (ready, cx);
        Ok(())
    }
    /// The guest has ended in good order, or its driver resets the device: passes on what the driver had made
    /// available (output of a console, for one), blocking if the host side is slow. Called before `stop`, and
    /// not when the VM is killed.
    ///
    /// # Errors
    /// What could not be passed on.
    fn drain(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let _ = cx;
        Ok(())
    }
    /// Forgets all about the driver.
    fn stop(&mut self);
}
