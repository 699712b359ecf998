//! A device whose queues another process serves.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use krun_event::{Interest, Ready, Wake};

use crate::device::{ConfigSpace, Cx, DeviceError, DeviceInfo, VirtioDevice};
use crate::feature;
use crate::mmio::reg;
use crate::mock::MmioDriver;

struct NoConfig;

impl ConfigSpace for NoConfig {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
}

/// What the device would pass on.
#[derive(Default)]
struct Given {
    doorbell: Option<Wake>,
    line: Option<Wake>,
    desc: u64,
    counts: [u16; 2],
}

struct Elsewhere {
    given: Arc<Mutex<Given>>,
    look: Wake,
}

impl VirtioDevice for Elsewhere {
    fn info(&self) -> DeviceInfo {
        let features = 1 << feature::RING_EVENT_IDX;
        DeviceInfo { id: 1, name: "elsewhere".into(), features, queue_sizes: vec![4, 4], shm: Vec::new() }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(NoConfig)
    }

    fn serves_elsewhere(&self) -> bool {
        true
    }

    fn start(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let mut given = self.given.lock().unwrap();
        given.doorbell = cx.doorbell(1).cloned();
        given.line = cx.interrupt().direct().cloned();
        given.desc = cx.queue_addresses(1).map_or(0, |at| at.desc);
        assert!(cx.doorbell(2).is_none() && cx.queue_addresses(2).is_none());
        cx.watch(&self.look, 0, Interest::Read)
            .map_err(|source| DeviceError::Host { what: "x".into(), source })
    }

    fn on_queue(&mut self, _: usize, _: &mut Cx<'_>) -> Result<(), DeviceError> {
        panic!("nothing is served here")
    }

    fn on_event(&mut self, _: Ready, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        self.look.take();
        self.given.lock().unwrap().counts = [cx.outstanding(1)?, cx.used_index(1)?];
        cx.interrupt().used();
        Ok(())
    }

    fn stop(&mut self) {}
}

fn device() -> (Elsewhere, Arc<Mutex<Given>>, Wake) {
    let (given, look) = (Arc::<Mutex<Given>>::default(), Wake::new().unwrap());
    (Elsewhere { given: Arc::clone(&given), look: look.clone() }, given, look)
}

#[test]
fn rings_and_doorbells_are_left_alone() {
    let (device, given, look) = device();
    let mut d = MmioDriver::direct(device);
    // Available before it starts: no callback comes of it.
    let features = d.start_with(u64::MAX, |d| assert!(d.add(1, &[b"x"], &[])));
    assert_eq!(features, 1 << feature::RING_EVENT_IDX | 1 << feature::VERSION_1);
    d.set(reg::QUEUE_NOTIFY, 1);
    look.wake();
    assert!(d.wait_interrupt(Duration::from_secs(20)));
    let given = given.lock().unwrap();
    assert_eq!(given.counts, [1, 0]);
    assert_ne!(given.desc, 0);
    // The notification is there for whoever takes it.
    assert!(given.doorbell.as_ref().unwrap().take());
}

#[test]
fn others_set_the_line_and_the_status_says_so_already() {
    let (device, given, look) = device();
    let mut d = MmioDriver::direct(device);
    assert_eq!(d.get(reg::INTERRUPT_STATUS), 0);
    for _ in 0..2 {
        d.start(u64::MAX);
        look.wake();
        assert!(d.wait_interrupt(Duration::from_secs(20)));
        assert_eq!(d.get(reg::INTERRUPT_STATUS), 1);
        given.lock().unwrap().line.as_ref().unwrap().wake();
        assert!(d.wait_interrupt(Duration::from_secs(20)));
        assert_eq!(d.get(reg::INTERRUPT_STATUS), 1);
        d.reset();
        assert_eq!(d.get(reg::INTERRUPT_STATUS), 0);
    }
}

/// Without such a line the device raises its interrupts, and the status is as for any other.
#[test]
fn without_a_line_the_status_is_acknowledged() {
    let (device, given, look) = device();
    let mut d = MmioDriver::new(device);
    d.start(u64::MAX);
    look.wake();
    assert!(d.wait_interrupt(Duration::from_secs(20)));
    assert_eq!(d.get(reg::INTERRUPT_STATUS), 0);
    assert!(given.lock().unwrap().line.is_none());
}
