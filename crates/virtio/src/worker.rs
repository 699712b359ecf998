//! Runs a device: the callbacks' order, the driver's notifications and the interrupts around them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use krun_event::{Interest, Poll, Ready, Wake};
use krun_memory::GuestMemory;

use crate::device::{Cx, DeviceError, Interrupt, VirtioDevice};
use crate::queue::Queue;

/// Callbacks for queues that keep filling before other events get their turn.
const ROUNDS: usize = 8;

/// A started device with all that its callbacks need. No thread in it: [`run`] is the thread's body,
/// and tests call it step by step.
pub(crate) struct Engine {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    features: u64,
    queues: Vec<Queue>,
    doorbells: Vec<Wake>,
    /// Another process serves the queues.
    elsewhere: bool,
    /// Queues for which a callback is due.
    due: Vec<bool>,
    /// Chains that the current callback may still take from each queue.
    left: Vec<u16>,
    stop: Arc<AtomicBool>,
    poll: Poll,
    interrupt: Interrupt,
}

impl Engine {
    pub(crate) fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        features: u64,
        queues: Vec<Queue>,
        doorbells: Vec<Wake>,
        poll: Poll,
        interrupt: Interrupt,
    ) -> Self {
        let (due, left) = (vec![false; queues.len()], vec![0; queues.len()]);
        let (stop, elsewhere) = (Arc::default(), device.serves_elsewhere());
        Self { device, memory, features, queues, doorbells, elsewhere, due, left, stop, poll, interrupt }
    }

    /// Gives the device back.
    #[cfg(any(test, feature = "mock"))]
    pub(crate) fn into_device(self) -> Box<dyn VirtioDevice> {
        self.device
    }

    #[cfg(any(test, feature = "mock"))]
    pub(crate) fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn call(
        &mut self,
        f: impl FnOnce(&mut dyn VirtioDevice, &mut Cx<'_>) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Self { device, memory, features, queues, doorbells, left, stop, poll, interrupt, .. } = self;
        for (left, queue) in left.iter_mut().zip(queues.iter()) {
            *left = queue.size();
        }
        let mut cx = Cx { memory, features: *features, queues, doorbells, left, stop, poll, interrupt };
        f(device.as_mut(), &mut cx)?;
        if self.elsewhere { Ok(()) } else { self.settle() }
    }

    /// After a callback: one interrupt for all that was completed, then the driver's notifications on
    /// where they may be off, and a mark where chains came meanwhile.
    fn settle(&mut self) -> Result<(), DeviceError> {
        let mut wanted = false;
        for (queue, q) in self.queues.iter_mut().enumerate() {
            wanted |=
                q.take_interrupt(&self.memory).map_err(|source| DeviceError::Queue { queue, source })?;
        }
        if wanted {
            self.interrupt.used();
        }
        for (queue, q) in self.queues.iter_mut().enumerate() {
            let more = q
                .enable_notifications(&self.memory)
                .map_err(|source| DeviceError::Queue { queue, source })?;
            self.due[queue] |= more | q.take_held();
        }
        Ok(())
    }

    /// Starts the device and marks the queues that were filled before.
    pub(crate) fn start(&mut self) -> Result<(), DeviceError> {
        self.call(|device, cx| device.start(cx))?;
        if self.elsewhere {
            return Ok(());
        }
        for (queue, q) in self.queues.iter_mut().enumerate() {
            let waiting =
                q.is_waiting(&self.memory).map_err(|source| DeviceError::Queue { queue, source })?;
            self.due[queue] |= waiting;
        }
        Ok(())
    }

    /// The driver rang the doorbell of `queue`.
    pub(crate) fn ring(&mut self, queue: usize) {
        if !self.elsewhere && self.queues.get(queue).is_some_and(Queue::is_enabled) {
            self.due[queue] = true;
        }
    }

    pub(crate) fn is_due(&self) -> bool {
        self.due.contains(&true)
    }

    /// One callback for each queue that is due.
    pub(crate) fn serve(&mut self) -> Result<(), DeviceError> {
        for queue in 0..self.queues.len() {
            if !std::mem::take(&mut self.due[queue]) {
                continue;
            }
            self.queues[queue]
                .disable_notifications(&self.memory)
                .map_err(|source| DeviceError::Queue { queue, source })?;
            self.call(|device, cx| device.on_queue(queue, cx))?;
        }
        Ok(())
    }

    /// A descriptor that the device watches is ready.
    pub(crate) fn event(&mut self, ready: Ready) -> Result<(), DeviceError> {
        self.call(|device, cx| device.on_event(ready, cx))
    }

    /// The guest has ended in good order, or resets the device. Chains are taken again, as many as the queues
    /// hold.
    pub(crate) fn drain(&mut self) -> Result<(), DeviceError> {
        self.stop = Arc::default();
        self.call(|device, cx| device.drain(cx))
    }

    /// Appends what is ready to `out`.
    pub(crate) fn wait(
        &mut self,
        out: &mut Vec<Ready>,
        timeout: Option<Duration>,
    ) -> Result<(), DeviceError> {
        let fail = |source| DeviceError::Host { what: "wait for events".into(), source };
        self.poll.wait(out, timeout).map_err(fail)
    }

    fn watch_own(&self, wake: &Wake, token: u64) -> Result<(), DeviceError> {
        let fail = |source| DeviceError::Host { what: "watch a doorbell".into(), source };
        self.poll.add(wake, token, Interest::Read).map_err(fail)
    }
}

/// What asks a worker for its end.
const STOP: u64 = Cx::TOKEN_LIMIT;
/// Doorbell of the first queue; the others follow.
const DOORBELL: u64 = STOP + 1;

/// How a worker is to end.
#[derive(Debug, Default)]
pub(crate) struct Wish {
    drain: AtomicBool,
    stop: Arc<AtomicBool>,
}

impl Wish {
    /// The end is wanted, with a drain or without. The worker's `stop` is to be set next.
    pub(crate) fn end(&self, drain: bool) {
        self.drain.store(drain, Ordering::Release);
        self.stop.store(true, Ordering::Release);
    }
}

/// The worker's body: runs the device until `stop` is set, or it fails, which is told to `on_error` at
/// once. Either way the device is stopped and given back. The outcome is that of the drain, if `wish`
/// says that one is wanted.
pub(crate) fn run(
    mut engine: Engine,
    wish: &Wish,
    stop: &Wake,
    on_error: impl FnOnce(&DeviceError),
) -> (Box<dyn VirtioDevice>, Result<(), DeviceError>) {
    engine.stop = Arc::clone(&wish.stop);
    let outcome = match until_stopped(&mut engine, stop) {
        Ok(()) if wish.drain.load(Ordering::Acquire) => engine.drain(),
        Ok(()) => Ok(()),
        Err(e) => {
            on_error(&e);
            Err(e)
        }
    };
    let mut device = engine.device;
    device.stop();
    (device, outcome)
}

fn until_stopped(engine: &mut Engine, stop: &Wake) -> Result<(), DeviceError> {
    engine.watch_own(stop, STOP)?;
    for (queue, wake) in engine.doorbells.iter().enumerate().filter(|_| !engine.elsewhere) {
        engine.watch_own(wake, DOORBELL + queue as u64)?;
    }
    engine.start()?;
    let mut ready = Vec::new();
    loop {
        for _ in 0..ROUNDS {
            if !engine.is_due() {
                break;
            }
            engine.serve()?;
        }
        let timeout = engine.is_due().then_some(Duration::ZERO);
        ready.clear();
        engine.wait(&mut ready, timeout)?;
        if ready.iter().any(|r| r.token == STOP) {
            return Ok(());
        }
        for &r in &ready {
            if r.token < Cx::TOKEN_LIMIT {
                engine.event(r)?;
            } else {
                let queue = (r.token - DOORBELL) as usize;
                // Cleared before the queue is looked at: a ring after this wakes the thread again.
                engine.doorbells[queue].take();
                engine.ring(queue);
            }
        }
    }
}
