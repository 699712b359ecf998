//! Devices that take their time, and drivers that do not stop.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use crate::device::{ConfigSpace, Cx, DeviceError, DeviceInfo, VirtioDevice};
use crate::mmio::reg;
use crate::mock::{Harness, MmioDriver};

struct NoConfig;

impl ConfigSpace for NoConfig {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(7);
    }
}

/// A device made of a closure for `on_queue`.
struct Act<F>(F);

impl<F: FnMut(&mut Cx<'_>) -> Result<(), DeviceError> + Send> VirtioDevice for Act<F> {
    fn info(&self) -> DeviceInfo {
        let (name, queue_sizes) = ("act".into(), vec![4]);
        DeviceInfo { id: 1, name, features: 0, queue_sizes, shm: Vec::new() }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(NoConfig)
    }

    fn start(&mut self, _: &mut Cx<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn on_queue(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        assert_eq!(queue, 0);
        (self.0)(cx)
    }

    fn stop(&mut self) {}
}

#[test]
fn interrupts_are_served_while_a_reset_waits() {
    let (entered, has_entered) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let mut d = MmioDriver::new(Act(move |cx: &mut Cx<'_>| {
        let Some(chain) = cx.pop(0)? else { return Ok(()) };
        cx.complete(0, chain, 0)?;
        cx.flush(0)?;
        entered.send(()).unwrap();
        released.recv().unwrap();
        Ok(())
    }));
    d.start(u64::MAX);
    d.add(0, &[b"x"], &[]);
    d.kick(0);
    has_entered.recv_timeout(Duration::from_secs(10)).unwrap();
    let transport = Arc::clone(d.transport());
    let reset = std::thread::spawn(move || transport.write(reg::STATUS, &[0; 4]));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!reset.is_finished(), "a reset waits for the callback");
    assert_eq!(d.get(reg::INTERRUPT_STATUS), 1);
    d.set(reg::INTERRUPT_ACK, 1);
    d.set(reg::QUEUE_NOTIFY, 0);
    assert_eq!(d.get(reg::CONFIG), 0x0707_0707);
    release.send(()).unwrap();
    reset.join().unwrap();
    assert_eq!((d.get(reg::STATUS), d.get(reg::INTERRUPT_STATUS)), (0, 0));
}

#[test]
fn a_callback_takes_no_more_than_the_queue_holds() {
    let (calls, taken) = (Arc::new(AtomicU32::new(0)), Arc::new(Mutex::new(Vec::new())));
    let (count, list) = (Arc::clone(&calls), Arc::clone(&taken));
    let mut h = Harness::new(Act(move |cx: &mut Cx<'_>| {
        count.fetch_add(1, Ordering::Relaxed);
        let mut n = 0;
        while let Some(chain) = cx.pop(0)? {
            // Looked at and put back: that does not count.
            cx.unpop(0, chain);
            let chain = cx.pop(0)?.unwrap();
            cx.complete(0, chain, 0)?;
            n += 1;
        }
        list.lock().unwrap().push(n);
        Ok(())
    }));
    for _ in 0..4 {
        h.add(0, &[b"x"], &[]);
    }
    h.kick(0).unwrap();
    assert_eq!(*taken.lock().unwrap(), [4]);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
}

#[test]
fn a_driver_that_never_stops_adding_does_not_delay_a_reset() {
    // The device plays the greedy driver itself: it offers each chain again as soon as it has it.
    let stop = Arc::new(AtomicBool::new(false));
    let (seen, over) = (Arc::new(AtomicU32::new(0)), Arc::clone(&stop));
    let count = Arc::clone(&seen);
    let avail = Arc::new(AtomicU32::new(0));
    let at = Arc::clone(&avail);
    let mut d = MmioDriver::new(Act(move |cx: &mut Cx<'_>| {
        use krun_memory::{Bytes, GuestAddress};
        while let Some(chain) = cx.pop(0)? {
            cx.complete(0, chain, 0)?;
            if over.load(Ordering::Relaxed) {
                return Ok(());
            }
            let idx = GuestAddress(u64::from(at.load(Ordering::Relaxed)) + 2);
            let now: u16 = cx.memory().read_obj(idx).unwrap();
            cx.memory().write_obj(now.wrapping_add(1), idx).unwrap();
            count.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }));
    d.start(u64::MAX);
    avail.store(d.queue(0).addresses().avail as u32, Ordering::Relaxed);
    d.add(0, &[b"x"], &[]);
    d.kick(0);
    while seen.load(Ordering::Relaxed) < 100 {
        std::thread::yield_now();
    }
    let (done, is_done) = mpsc::channel();
    let transport = Arc::clone(d.transport());
    let reset = std::thread::spawn(move || {
        transport.write(reg::STATUS, &[0; 4]);
        done.send(()).unwrap();
    });
    let result = is_done.recv_timeout(Duration::from_secs(10));
    stop.store(true, Ordering::Relaxed);
    reset.join().unwrap();
    assert!(result.is_ok(), "the reset waited for the driver to stop");
}

#[test]
fn a_device_in_a_long_callback_gets_no_more_chains_once_it_is_to_stop() {
    for end in
        [|d: &MmioDriver| d.set(reg::STATUS, 0), |d: &MmioDriver| d.transport().shutdown(false).unwrap()]
    {
        let (entered, has_entered) = mpsc::channel();
        let (left, has_left) = mpsc::channel();
        let mut d = MmioDriver::new(Act(move |cx: &mut Cx<'_>| {
            entered.send(()).unwrap();
            let start = Instant::now();
            while start.elapsed() < Duration::from_secs(10) {
                let Some(chain) = cx.pop(0)? else {
                    left.send(()).unwrap();
                    return Ok(());
                };
                cx.unpop(0, chain);
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        }));
        d.start(u64::MAX);
        d.add(0, &[b"x"], &[]);
        d.kick(0);
        has_entered.recv_timeout(Duration::from_secs(10)).unwrap();
        end(&d);
        assert!(has_left.try_recv().is_ok(), "it went on taking chains");
    }
}
