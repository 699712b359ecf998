//! Runs a device without a thread, so that a test decides when each callback happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use krun_event::{Poll, Wake};
use krun_memory::GuestMemory;

use super::queue::{DriverQueue, Used};
use super::{BASE, QUEUE_SPACE, queue_memory};
use crate::device::{ConfigSpace, Cx, DeviceError, DeviceInfo, Interrupt, VirtioDevice};
use crate::feature;
use crate::queue::Queue;
use crate::worker::Engine;

/// A device, started, and a driver for it.
pub struct Harness {
    /// `None` only while the device is restarted.
    engine: Option<Engine>,
    info: DeviceInfo,
    config: Arc<dyn ConfigSpace>,
    memory: GuestMemory,
    features: u64,
    drivers: Vec<DriverQueue>,
    used: Arc<AtomicU32>,
    changed: Arc<AtomicU32>,
}

impl Harness {
    /// Starts `device` with all features it offers and those of the ring.
    pub fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::with_features(device, u64::MAX).expect("the device starts")
    }

    /// Starts `device` with those of the offered features that are in `wanted`.
    ///
    /// # Errors
    /// What the device's start says.
    pub fn with_features(device: impl VirtioDevice + 'static, wanted: u64) -> Result<Self, DeviceError> {
        let (info, config) = (device.info(), device.config());
        let ring = 1 << feature::RING_INDIRECT_DESC | 1 << feature::RING_EVENT_IDX;
        let features = (info.features | ring) & wanted | 1 << feature::VERSION_1;
        let memory = queue_memory(info.queue_sizes.len(), device.serves_elsewhere());
        let (used, changed) = (Arc::default(), Arc::default());
        let drivers = Vec::new();
        let mut this = Self { engine: None, info, config, memory, features, drivers, used, changed };
        this.start(Box::new(device))?;
        Ok(this)
    }

    fn start(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), DeviceError> {
        let mut queues = Vec::new();
        self.drivers.clear();
        for (i, &size) in self.info.queue_sizes.iter().enumerate() {
            let base = BASE + QUEUE_SPACE * i as u64;
            let driver = DriverQueue::new(&self.memory, base, QUEUE_SPACE, size, self.features, 0);
            let at = driver.addresses();
            queues
                .push(Queue::new(&self.memory, size.into(), size, at, self.features).expect("a valid queue"));
            self.drivers.push(driver);
        }
        let (used, changed) = (Arc::clone(&self.used), Arc::clone(&self.changed));
        let interrupt = Interrupt::new(move |bits| {
            if bits & Interrupt::USED != 0 {
                used.fetch_add(1, Ordering::SeqCst);
            }
            if bits & Interrupt::CONFIG != 0 {
                changed.fetch_add(1, Ordering::SeqCst);
            }
        });
        let poll = Poll::new().expect("a poll");
        let memory = self.memory.clone();
        let doorbells = queues.iter().map(|_| Wake::new().expect("a doorbell")).collect();
        let engine = Engine::new(device, memory, self.features, queues, doorbells, poll, interrupt);
        self.engine.insert(engine).start()
    }

    fn engine(&mut self) -> &mut Engine {
        self.engine.as_mut().expect("the device is here")
    }

    /// Stops the device, as a reset does, and starts it with fresh rings.
    ///
    /// # Errors
    /// What the device's start says.
    pub fn restart(&mut self) -> Result<(), DeviceError> {
        let device = self.stop();
        self.start(device)
    }

    fn stop(&mut self) -> Box<dyn VirtioDevice> {
        let mut device = self.engine.take().expect("the device is here").into_device();
        device.stop();
        device
    }

    /// Stops the device, as a reset does, and gives it back.
    pub fn into_device(mut self) -> Box<dyn VirtioDevice> {
        self.stop()
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The device's configuration space.
    pub fn config(&self) -> &dyn ConfigSpace {
        self.config.as_ref()
    }

    /// The features that the driver has accepted.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The driver's side of `queue`.
    pub fn driver(&mut self, queue: usize) -> &mut DriverQueue {
        &mut self.drivers[queue]
    }

    /// Makes a chain available on `queue` without notifying; see [`DriverQueue::add`].
    pub fn add(&mut self, queue: usize, out: &[&[u8]], room: &[u32]) -> u16 {
        self.drivers[queue].add(out, room).expect("room in the queue")
    }

    /// Notifies the device and lets it work until no queue is due.
    ///
    /// # Errors
    /// The device's.
    pub fn kick(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.engine().ring(queue);
        self.settle()
    }

    fn settle(&mut self) -> Result<(), DeviceError> {
        while self.engine().is_due() {
            self.engine().serve()?;
        }
        Ok(())
    }

    /// Takes the next chain that came back on `queue`.
    pub fn collect(&mut self, queue: usize) -> Option<Used> {
        self.drivers[queue].collect()
    }

    /// Adds a chain, notifies, and takes the answer.
    ///
    /// # Errors
    /// The device's.
    ///
    /// # Panics
    /// The device keeps the chain.
    pub fn request(&mut self, queue: usize, out: &[&[u8]], room: &[u32]) -> Result<Used, DeviceError> {
        let head = self.add(queue, out, room);
        self.kick(queue)?;
        let used = self.collect(queue).expect("an answer");
        assert_eq!(used.head, head, "the answer is to another request");
        Ok(used)
    }

    /// Waits up to `timeout` for the descriptors that the device watches, passes each event on, and
    /// returns their number.
    ///
    /// # Errors
    /// The device's.
    pub fn poll(&mut self, timeout: Duration) -> Result<usize, DeviceError> {
        let mut ready = Vec::new();
        self.engine().wait(&mut ready, Some(timeout))?;
        for &r in &ready {
            assert!(r.token < Cx::TOKEN_LIMIT, "a device's token is below the limit");
            self.engine().event(r)?;
        }
        self.settle()?;
        Ok(ready.len())
    }

    /// Calls the device's drain.
    ///
    /// # Errors
    /// The device's.
    pub fn drain(&mut self) -> Result<(), DeviceError> {
        self.engine().drain()
    }

    /// Chains of `queue` that the device holds.
    pub fn held(&mut self, queue: usize) -> u16 {
        self.engine().queues()[queue].in_use()
    }

    /// Interrupts for used buffers since the last call.
    pub fn take_interrupts(&self) -> u32 {
        self.used.swap(0, Ordering::SeqCst)
    }

    /// Interrupts for a changed configuration since the last call.
    pub fn take_config_changes(&self) -> u32 {
        self.changed.swap(0, Ordering::SeqCst)
    }
}
