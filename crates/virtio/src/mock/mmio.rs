//! A driver that sees the device through its registers only, in the order in which Linux uses them.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use krun_event::Wake;
use krun_memory::GuestMemory;

use super::queue::{DriverQueue, Used};
use super::{BASE, QUEUE_SPACE, queue_memory};
use crate::device::{Interrupt, VirtioDevice};
use crate::feature;
use crate::mmio::{MmioTransport, RegisterPage, RegisterPages, reg, status};

/// An interrupt line that counts its pulses.
#[derive(Debug, Default)]
struct Line {
    pulses: Mutex<u64>,
    more: Condvar,
}

/// Registers for one device.
pub(crate) fn page() -> RegisterPage {
    RegisterPages::new(1).ok().and_then(|pages| pages.page(0)).unwrap()
}

/// A device behind its transport, and a driver.
pub struct MmioDriver {
    transport: Arc<MmioTransport>,
    memory: GuestMemory,
    queues: Vec<DriverQueue>,
    line: Arc<Line>,
    /// The line that others set.
    direct: Option<Wake>,
    unacknowledged: bool,
    seen: u64,
    failures: Arc<Mutex<Vec<String>>>,
}

impl MmioDriver {
    /// Puts `device` behind a transport; nothing is negotiated yet.
    pub fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::with_line(device, None, false)
    }

    /// As [`Self::new`], with a machine that swallows acknowledgements of used buffers.
    pub fn unacknowledged(device: impl VirtioDevice + 'static) -> Self {
        Self::with_line(device, None, true)
    }

    /// As [`Self::new`], with an interrupt line that the device can hand to another process.
    pub fn direct(device: impl VirtioDevice + 'static) -> Self {
        Self::with_line(device, Some(Wake::new().unwrap()), false)
    }

    fn with_line(device: impl VirtioDevice + 'static, direct: Option<Wake>, unacknowledged: bool) -> Self {
        let memory = queue_memory(device.info().queue_sizes.len(), device.serves_elsewhere());
        let (line, failures) = (Arc::<Line>::default(), Arc::<Mutex<Vec<String>>>::default());
        let (pulse, fail) = (Arc::clone(&line), Arc::clone(&failures));
        let transport = MmioTransport::new(
            Box::new(device),
            memory.clone(),
            page(),
            move || {
                *pulse.pulses.lock().unwrap() += 1;
                pulse.more.notify_all();
            },
            move |why| fail.lock().unwrap().push(why),
        );
        let mut transport = transport.unwrap();
        if let Some(line) = &direct {
            transport.set_direct_line(line.clone());
        }
        if unacknowledged {
            transport.need_no_acknowledgements();
        }
        let transport = Arc::new(transport);
        Self { transport, memory, queues: Vec::new(), line, direct, unacknowledged, seen: 0, failures }
    }

    /// The transport.
    pub fn transport(&self) -> &Arc<MmioTransport> {
        &self.transport
    }

    /// The driver's side of `queue`.
    pub fn queue(&mut self, queue: usize) -> &mut DriverQueue {
        &mut self.queues[queue]
    }

    /// What the transport told the machine's supervisor.
    pub fn failures(&self) -> Vec<String> {
        self.failures.lock().unwrap().clone()
    }

    /// Reads a register.
    pub fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn set(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn set64(&self, offset: u64, value: u64) {
        self.set(offset, value as u32);
        self.set(offset + 4, (value >> 32) as u32);
    }

    fn add_status(&self, bit: u32) {
        self.set(reg::STATUS, self.get(reg::STATUS) | bit);
    }

    /// Resets, accepts those of the offered features that are in `wanted`, sets up all queues and
    /// starts the device. Returns the accepted features.
    pub fn start(&mut self, wanted: u64) -> u64 {
        self.start_with(wanted, |_| ())
    }

    /// As [`Self::start`], with something done between the set-up of the queues and the start.
    pub fn start_with(&mut self, wanted: u64, before: impl FnOnce(&mut Self)) -> u64 {
        self.reset();
        assert_eq!(self.get(reg::MAGIC), u32::from_le_bytes(*b"virt"));
        assert_eq!(self.get(reg::VERSION), 2);
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        let offered = [1, 0].iter().fold(0, |bits, &half| {
            self.set(reg::DEVICE_FEATURES_SEL, half);
            bits << 32 | u64::from(self.get(reg::DEVICE_FEATURES))
        });
        let features = offered & wanted | 1 << feature::VERSION_1;
        for half in [1, 0] {
            self.set(reg::DRIVER_FEATURES_SEL, half);
            self.set(reg::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.add_status(status::FEATURES_OK);
        assert_ne!(self.get(reg::STATUS) & status::FEATURES_OK, 0, "features refused");
        self.set_up_queues(features);
        before(self);
        self.add_status(status::DRIVER_OK);
        features
    }

    fn set_up_queues(&mut self, features: u64) {
        self.queues.clear();
        for i in 0.. {
            self.set(reg::QUEUE_SEL, i);
            let size = self.get(reg::QUEUE_NUM_MAX);
            if size == 0 {
                break;
            }
            assert_eq!(self.get(reg::QUEUE_READY), 0);
            let base = BASE + QUEUE_SPACE * u64::from(i);
            let queue = DriverQueue::new(&self.memory, base, QUEUE_SPACE, size as u16, features, 0);
            let at = queue.addresses();
            self.set(reg::QUEUE_NUM, size);
            self.set64(reg::QUEUE_DESC, at.desc);
            self.set64(reg::QUEUE_AVAIL, at.avail);
            self.set64(reg::QUEUE_USED, at.used);
            self.set(reg::QUEUE_READY, 1);
            assert_eq!(self.get(reg::QUEUE_READY), 1, "queue refused");
            self.queues.push(queue);
        }
    }

    /// Resets the device.
    pub fn reset(&mut self) {
        self.set(reg::STATUS, 0);
        assert_eq!(self.get(reg::STATUS), 0, "the device is reset");
    }

    /// Adds a chain; true when there was room for it.
    pub fn add(&mut self, queue: usize, out: &[&[u8]], room: &[u32]) -> bool {
        self.queues[queue].add(out, room).is_some()
    }

    /// Notifies the device if it wants to be.
    pub fn kick(&mut self, queue: usize) {
        if self.queues[queue].needs_kick() {
            self.set(reg::QUEUE_NOTIFY, queue as u32);
        }
    }

    /// Takes the next chain that came back, waiting for an interrupt when there is none yet; `None`
    /// after `timeout` without.
    pub fn wait_used(&mut self, queue: usize, timeout: Duration) -> Option<Used> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(used) = self.queues[queue].collect() {
                return Some(used);
            }
            if !self.wait_interrupt(deadline.saturating_duration_since(Instant::now())) {
                return None;
            }
        }
    }

    /// Waits for a pulse of the interrupt line that was not seen yet and acknowledges the interrupt.
    pub fn wait_interrupt(&mut self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut pulses = self.line.pulses.lock().unwrap();
        while *pulses == self.seen {
            let mut left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            if let Some(direct) = &self.direct {
                if direct.take() {
                    *pulses += 1;
                    break;
                }
                left = left.min(Duration::from_millis(1));
            }
            pulses = self.line.more.wait_timeout(pulses, left).unwrap().0;
        }
        self.seen = *pulses;
        drop(pulses);
        let bits = self.get(reg::INTERRUPT_STATUS);
        if !self.unacknowledged || bits != Interrupt::USED {
            self.set(reg::INTERRUPT_ACK, bits);
        }
        true
    }
}
