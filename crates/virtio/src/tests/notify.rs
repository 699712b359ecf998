//! Neither side may sleep for ever: a driver's thread and a device's thread that tell each other of
//! work only when the ring's rules say so. A barrier too few shows as a time-out here.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use krun_memory::GuestMemory;

use crate::feature;
use crate::mmio::reg;
use crate::mock::{BASE, DriverQueue, Echo, MmioDriver, memory};
use crate::queue::Queue;

const BUFFERS: u32 = 100_000;
const STUCK: Duration = Duration::from_secs(20);

/// Sends [`BUFFERS`] chains, at most `window` at a time, and sleeps only when the rules allow it.
fn run(features: u64, window: usize) {
    let mut d = MmioDriver::new(Echo::new(1));
    d.start(features);
    let (mut sent, mut received) = (0u32, 0u32);
    let (begin, mut sleeps) = (Instant::now(), 0u32);
    while received < BUFFERS {
        while sent < BUFFERS && d.queue(0).in_flight() < window {
            if !d.add(0, &[b"#", &sent.to_le_bytes()], &[5]) {
                break;
            }
            sent += 1;
        }
        d.kick(0);
        let mut got = false;
        d.queue(0).disable_interrupts();
        while let Some(used) = d.queue(0).collect() {
            // The device answers in order.
            assert_eq!(used.data[1..], received.to_le_bytes());
            (received, got) = (received + 1, true);
        }
        if !d.queue(0).enable_interrupts() && !got {
            sleeps += 1;
            assert!(d.wait_interrupt(STUCK), "asleep after {received} of {sent} buffers");
        }
    }
    let status = d.get(reg::STATUS);
    assert_eq!(status & 64, 0);
    println!("window {window}, features {features:#x}: {sleeps} sleeps, {:?}", begin.elapsed());
    d.transport().shutdown(true).unwrap();
}

#[test]
fn one_at_a_time_with_event_index() {
    run(1 << feature::RING_EVENT_IDX, 1);
}

#[test]
fn a_full_ring_with_event_index() {
    run(1 << feature::RING_EVENT_IDX | 1 << feature::RING_INDIRECT_DESC, 64);
}

#[test]
fn two_at_a_time_with_flags() {
    run(0, 2);
}

#[test]
fn a_full_ring_with_flags() {
    run(0, 64);
}

/// Both sides step at the same moment, again and again, until the time is over.
struct Meeting {
    came: AtomicU32,
    over: AtomicBool,
    deadline: Instant,
}

impl Meeting {
    fn new() -> Self {
        let deadline = Instant::now() + Duration::from_secs(1);
        Self { came: AtomicU32::new(0), over: AtomicBool::new(false), deadline }
    }

    /// Returns when both sides have come `nth` times (from 1).
    fn meet(&self, nth: u32) {
        self.came.fetch_add(1, Ordering::AcqRel);
        spin_until(|| self.came.load(Ordering::Acquire) >= 2 * nth);
    }

    /// Begins round `round`; false when there are no more. Only one side, the `host`, looks at the clock.
    fn begin(&self, round: u32, host: bool) -> bool {
        if host && Instant::now() > self.deadline {
            self.over.store(true, Ordering::Relaxed);
        }
        self.meet(2 * round + 1);
        !self.over.load(Ordering::Relaxed)
    }

    /// Ends round `round`: what either side stored before is seen by the other.
    fn end(&self, round: u32) {
        self.meet(2 * round + 2);
    }
}

/// Waits without sleep, so that both sides go on at the same moment, but leaves a busy processor to others.
fn spin_until(mut done: impl FnMut() -> bool) {
    for spins in 1u32.. {
        if done() {
            return;
        }
        if spins % 256 == 0 {
            std::thread::yield_now();
        }
        std::hint::spin_loop();
    }
}

/// The other side has more to do before it comes to the point; waits so long that the two meet there now and then.
fn skew(round: u32) {
    for _ in 0..round % 1024 {
        std::hint::black_box(round);
    }
}

fn sides(features: u64) -> (GuestMemory, DriverQueue, Queue) {
    let memory = memory(1 << 20);
    let driver = DriverQueue::new(&memory, BASE, 1 << 20, 8, features, 0);
    let queue = Queue::new(&memory, 8, 8, driver.addresses(), features).unwrap();
    (memory, driver, queue)
}

/// The driver adds a chain while the device goes to sleep: one of them must notice.
#[test]
fn a_chain_added_while_the_device_falls_asleep_is_noticed() {
    for features in [0, 1 << feature::RING_EVENT_IDX] {
        let (memory, mut driver, mut queue) = sides(features);
        let (meeting, kicked) = (&Meeting::new(), &AtomicBool::new(false));
        let mut missed = 0;
        std::thread::scope(|s| {
            s.spawn(move || {
                for round in 0.. {
                    if !meeting.begin(round, false) {
                        return;
                    }
                    driver.add(&[b"x"], &[]).unwrap();
                    kicked.store(driver.needs_kick(), Ordering::Relaxed);
                    meeting.end(round);
                    spin_until(|| driver.collect().is_some());
                }
            });
            for round in 0.. {
                queue.disable_notifications(&memory).unwrap();
                assert!(queue.pop(&memory).unwrap().is_none());
                if !meeting.begin(round, true) {
                    return;
                }
                skew(round);
                let more = queue.enable_notifications(&memory).unwrap();
                meeting.end(round);
                missed += u32::from(!more && !kicked.load(Ordering::Relaxed));
                let chain = queue.pop(&memory).unwrap().unwrap();
                queue.complete(&memory, chain, 0).unwrap();
            }
        });
        assert_eq!(missed, 0, "features {features:#x}: the device sleeps on requests");
    }
}

/// The device completes a chain while the driver goes to sleep: one of them must notice.
#[test]
fn a_chain_completed_while_the_driver_falls_asleep_is_noticed() {
    for features in [0, 1 << feature::RING_EVENT_IDX] {
        let (memory, mut driver, mut queue) = sides(features);
        let (meeting, interrupt) = (&Meeting::new(), &AtomicBool::new(false));
        let mut missed = 0;
        std::thread::scope(|s| {
            s.spawn(|| {
                for round in 0.. {
                    let mut chain = None;
                    spin_until(|| {
                        chain = queue.pop(&memory).unwrap();
                        chain.is_some()
                    });
                    if !meeting.begin(round, false) {
                        return;
                    }
                    queue.complete(&memory, chain.unwrap(), 0).unwrap();
                    interrupt.store(queue.take_interrupt(&memory).unwrap(), Ordering::Relaxed);
                    meeting.end(round);
                }
            });
            for round in 0.. {
                driver.disable_interrupts();
                driver.add(&[b"x"], &[]).unwrap();
                if !meeting.begin(round, true) {
                    return;
                }
                skew(round);
                let more = driver.enable_interrupts();
                meeting.end(round);
                missed += u32::from(!more && !interrupt.load(Ordering::Relaxed));
                driver.collect().unwrap();
            }
        });
        assert_eq!(missed, 0, "features {features:#x}: the driver sleeps on answers");
    }
}
