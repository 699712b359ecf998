//! The registers, and the life of a device behind them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use krun_memory::GuestAddress;
use proptest::prelude::*;

use crate::feature;
use crate::mmio::{MmioTransport, reg, status};
use crate::mock::{BASE, Echo, MmioDriver, memory, page};

const SOON: Duration = Duration::from_secs(10);
const RUNNING: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::yield_now();
    }
}

#[test]
fn identity() {
    let d = MmioDriver::new(Echo::new(2));
    assert_eq!(d.get(reg::MAGIC), 0x7472_6976);
    assert_eq!(d.get(reg::VERSION), 2);
    assert_eq!(d.get(reg::DEVICE_ID), 42);
    assert_eq!(d.get(reg::STATUS), 0);
    d.set(reg::DEVICE_FEATURES_SEL, 0);
    assert_eq!(d.get(reg::DEVICE_FEATURES), 0x3000_0005);
    d.set(reg::DEVICE_FEATURES_SEL, 1);
    assert_eq!(d.get(reg::DEVICE_FEATURES), 1);
    d.set(reg::DEVICE_FEATURES_SEL, 2);
    assert_eq!(d.get(reg::DEVICE_FEATURES), 0);
}

#[test]
fn writes_of_the_wrong_width_and_to_unknown_registers_do_nothing() {
    let d = MmioDriver::new(Echo::new(1));
    for len in [1, 2, 3, 8] {
        d.transport().write(reg::STATUS, &vec![1; len]);
        assert_eq!(d.get(reg::STATUS), 0);
    }
    for at in [0x018, 0x028, 0x03c, 0x048, 0x002, 0x0c0, 0x0f8] {
        let before = d.get(at);
        d.set(at, u32::MAX);
        assert_eq!(d.get(at), before, "{at:#x}");
    }
    for at in [0x018, 0x028, 0x03c, 0x048, 0x0c0, 0x0f8] {
        assert_eq!(d.get(at), 0, "{at:#x}");
    }
}

#[test]
fn configuration_space() {
    let d = MmioDriver::new(Echo::new(1));
    let before = d.get(reg::CONFIG_GENERATION);
    d.set(reg::CONFIG, 0x0403_0201);
    assert_ne!(d.get(reg::CONFIG_GENERATION), before);
    for (at, len, want) in
        [(0, 1, 0x01), (1, 2, 0x0302), (0, 4, 0x0403_0201), (0, 8, 0x0403_0201), (3, 2, 0x04), (4, 4, 0)]
    {
        let mut data = [0; 8];
        d.transport().read(reg::CONFIG + at, &mut data[..len]);
        assert_eq!(u64::from_le_bytes(data), want, "{len} bytes at {at}");
    }
}

#[test]
fn shared_memory_is_shown_where_it_was_put() {
    let get = |t: &MmioTransport, at| {
        let mut data = [0; 4];
        t.read(at, &mut data);
        u32::from_le_bytes(data)
    };
    let region = |t: &MmioTransport, id: u32| {
        t.write(reg::SHM_SEL, &id.to_le_bytes());
        [reg::SHM_LEN, 0x0b4, reg::SHM_BASE, 0x0bc].map(|at| get(t, at))
    };
    let mut t = MmioTransport::new(Box::new(Echo::new(1)), memory(0x1000), page(), || (), |_| ()).unwrap();
    assert_eq!(region(&t, 3), [u32::MAX; 4], "it has no place yet");
    t.place_shm(3, GuestAddress(0x10_2000_3000));
    assert_eq!(region(&t, 3), [0x1000, 2, 0x2000_3000, 0x10]);
    assert_eq!(region(&t, 0x103), [u32::MAX; 4]);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let d = MmioDriver::new(Echo::new(1));
    let negotiate = |bits: &[(u32, u32)]| {
        d.set(reg::STATUS, 0);
        d.set(reg::STATUS, 1);
        d.set(reg::STATUS, 3);
        for &(half, value) in bits {
            d.set(reg::DRIVER_FEATURES_SEL, half);
            d.set(reg::DRIVER_FEATURES, value);
        }
        d.set(reg::STATUS, 3 | status::FEATURES_OK);
        d.get(reg::STATUS) & status::FEATURES_OK != 0
    };
    assert!(negotiate(&[(1, 1)]));
    assert!(negotiate(&[(0, 0x3000_0005), (1, 1)]));
    assert!(!negotiate(&[(0, 0x3000_0005)]), "VERSION_1 is not optional");
    assert!(!negotiate(&[(0, 0x2), (1, 1)]), "not offered");
    assert!(!negotiate(&[(1, 3)]), "not offered");
    assert!(!negotiate(&[(1, 1), (2, 1)]), "no such half");
    // The driver may think again before it tries once more.
    d.set(reg::STATUS, 0);
    d.set(reg::STATUS, 3);
    d.set(reg::DRIVER_FEATURES_SEL, 1);
    d.set(reg::DRIVER_FEATURES, 3);
    d.set(reg::STATUS, 11);
    assert_eq!(d.get(reg::STATUS), 3);
    d.set(reg::DRIVER_FEATURES, 1);
    d.set(reg::STATUS, 11);
    assert_eq!(d.get(reg::STATUS), 11);
    // And not any more after.
    d.set(reg::DRIVER_FEATURES, 3);
    d.set(reg::STATUS, RUNNING);
    assert_eq!(d.get(reg::STATUS), RUNNING);
}

#[test]
fn status_bits_come_in_order_and_leave_by_reset_only() {
    let d = MmioDriver::new(Echo::new(1));
    for (write, want) in [
        (2, 0),
        (8, 0),
        (4, 0),
        (1, 1),
        (1 | 4, 1),
        (1 | 8, 1),
        (3, 3),
        (3 | 4, 3),
        (1, 3),
        (2, 3),
        (3 | 64, 3),
    ] {
        d.set(reg::STATUS, write);
        assert_eq!(d.get(reg::STATUS), want, "after {write:#x}");
    }
    d.set(reg::STATUS, 3 | status::FAILED);
    assert_eq!(d.get(reg::STATUS), 3 | status::FAILED);
    d.set(reg::STATUS, 0);
    assert_eq!(d.get(reg::STATUS), 0);
    // Features before there is a driver are not taken.
    d.set(reg::DRIVER_FEATURES_SEL, 1);
    d.set(reg::DRIVER_FEATURES, 1);
    d.set(reg::STATUS, 3);
    d.set(reg::STATUS, 11);
    assert_eq!(d.get(reg::STATUS), 3);
}

#[test]
fn a_queue_is_ready_only_when_it_can_be() {
    let d = MmioDriver::new(Echo::new(1));
    let max = u32::from(Echo::QUEUE_SIZE);
    let ready = |queue: u32, size: u32, desc: u64| {
        d.set(reg::QUEUE_SEL, queue);
        d.set(reg::QUEUE_READY, 0);
        d.set(reg::QUEUE_NUM, size);
        d.set(reg::QUEUE_DESC, desc as u32);
        d.set(reg::QUEUE_DESC + 4, (desc >> 32) as u32);
        d.set(reg::QUEUE_AVAIL, BASE as u32 + 0x2000);
        d.set(reg::QUEUE_USED, BASE as u32 + 0x3000);
        d.set(reg::QUEUE_READY, 1);
        d.get(reg::QUEUE_READY) == 1
    };
    assert!(ready(0, max, BASE));
    assert!(
        !ready(0, 0, BASE) && !ready(0, 3, BASE) && !ready(0, 2 * max, BASE) && !ready(0, 65_536 + 2, BASE)
    );
    assert!(!ready(0, max, BASE + 8) && !ready(0, max, 0) && !ready(0, max, BASE | 1 << 32));
    assert!(!ready(1, max, BASE) && !ready(u32::MAX, max, BASE));
    assert!(ready(0, 1, BASE));
    // A ready queue keeps its settings.
    d.set(reg::QUEUE_NUM, 3);
    d.set(reg::QUEUE_READY, 1);
    assert_eq!(d.get(reg::QUEUE_READY), 1);
    d.set(reg::QUEUE_READY, 0);
    d.set(reg::QUEUE_READY, 1);
    assert_eq!(d.get(reg::QUEUE_READY), 1, "the size of 3 was not taken");
}

#[test]
fn a_running_device_answers_and_its_queues_are_fixed() {
    for features in [0, 1 << feature::RING_EVENT_IDX, u64::MAX] {
        let mut d = MmioDriver::new(Echo::new(2));
        d.start(features);
        for round in 0..200u32 {
            let queue = (round % 2) as usize;
            assert!(d.add(queue, &[b"hello", &round.to_le_bytes()], &[5, 100]));
            d.kick(queue);
            let used = d.wait_used(queue, SOON).unwrap();
            assert_eq!(used.data, [b"hello".as_slice(), &round.to_le_bytes()].concat());
        }
        d.set(reg::QUEUE_SEL, 0);
        d.set(reg::QUEUE_READY, 0);
        d.set(reg::QUEUE_DESC, 0);
        assert_eq!(d.get(reg::QUEUE_READY), 1);
        assert_eq!(d.get(reg::STATUS), RUNNING);
        assert!(d.failures().is_empty());
        d.transport().shutdown(true).unwrap();
    }
}

#[test]
fn chains_from_before_the_start_are_served() {
    let mut d = MmioDriver::new(Echo::new(1));
    d.start(u64::MAX);
    d.reset();
    d.start_with(u64::MAX, |d| assert!(d.add(0, &[b"early"], &[5])));
    assert_eq!(d.wait_used(0, SOON).unwrap().data, b"early");
}

#[test]
fn a_device_error_needs_a_reset() {
    let mut d = MmioDriver::new(Echo::new(1));
    for _ in 0..3 {
        d.start(u64::MAX);
        assert!(d.add(0, &[&[Echo::ERROR]], &[]));
        d.kick(0);
        assert!(d.wait_interrupt(SOON));
        assert_eq!(d.get(reg::STATUS), RUNNING | status::NEEDS_RESET);
        // It stays so, whatever the driver says, and a doorbell does nothing.
        d.set(reg::STATUS, RUNNING);
        d.set(reg::QUEUE_NOTIFY, 0);
        assert_eq!(d.get(reg::STATUS), RUNNING | status::NEEDS_RESET);
    }
    d.start(u64::MAX);
    assert!(d.add(0, &[b"again"], &[5]));
    d.kick(0);
    assert_eq!(d.wait_used(0, SOON).unwrap().data, b"again");
    assert!(d.failures().is_empty());
}

#[test]
fn a_broken_ring_needs_a_reset_and_says_so_by_a_configuration_interrupt() {
    let mut d = MmioDriver::new(Echo::new(1));
    d.start(u64::MAX);
    d.queue(0).set_avail_idx(1000);
    d.set(reg::QUEUE_NOTIFY, 0);
    wait_for("an interrupt", || d.get(reg::INTERRUPT_STATUS) != 0);
    assert_eq!(d.get(reg::INTERRUPT_STATUS), 2);
    d.set(reg::INTERRUPT_ACK, 1);
    assert_eq!(d.get(reg::INTERRUPT_STATUS), 2);
    d.set(reg::INTERRUPT_ACK, 2);
    assert_eq!(d.get(reg::INTERRUPT_STATUS), 0);
    assert!(d.transport().shutdown(true).unwrap_err().to_string().contains("1000"));
    // Nothing of it is left after a reset.
    d.start(u64::MAX);
    d.reset();
    assert_eq!(d.get(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn interrupts_without_acknowledgements_of_used_buffers() {
    let mut d = MmioDriver::unacknowledged(Echo::new(1));
    assert_eq!(d.get(reg::INTERRUPT_STATUS), 0);
    for _ in 0..2 {
        d.start(u64::MAX);
        assert_eq!(d.get(reg::INTERRUPT_STATUS), 1);
        for _ in 0..3 {
            assert!(d.add(0, &[b"x"], &[1]));
            d.kick(0);
            assert_eq!(d.wait_used(0, SOON).unwrap().data, b"x");
            assert_eq!(d.get(reg::INTERRUPT_STATUS), 1);
        }
        // One of both is not swallowed, and what the configuration's part of it means is as ever.
        d.set(reg::INTERRUPT_ACK, 3);
        assert_eq!(d.get(reg::INTERRUPT_STATUS), 1);
        d.reset();
        assert_eq!(d.get(reg::INTERRUPT_STATUS), 0);
    }
}

#[test]
fn a_panic_of_the_device_ends_in_the_supervisor() {
    let mut d = MmioDriver::new(Echo::new(1));
    d.start(u64::MAX);
    assert!(d.add(0, &[&[Echo::PANIC]], &[]));
    d.kick(0);
    wait_for("a failure", || !d.failures().is_empty());
    assert_eq!(d.failures(), ["thread echo panicked: told to panic"]);
    // The registers live on; the device does not.
    d.reset();
    d.start(u64::MAX);
    assert_eq!(d.get(reg::STATUS), RUNNING | status::NEEDS_RESET);
    assert!(d.transport().shutdown(true).is_ok());
}

#[test]
fn shutdown_drains_on_request_only() {
    for drain in [false, true] {
        let mut d = MmioDriver::new(Echo::new(2));
        d.start(u64::MAX);
        assert!(d.add(1, &[&[Echo::STALL]], &[]));
        d.kick(1);
        let result = d.transport().shutdown(drain);
        assert_eq!(result.is_err(), drain, "{result:?}");
        assert!(d.transport().shutdown(true).is_ok(), "once is enough");
        d.reset();
    }
    let d = MmioDriver::new(Echo::new(1));
    assert!(d.transport().shutdown(true).is_ok(), "it never ran");
}

#[test]
fn a_thousand_resets_in_mid_flight() {
    let mut d = MmioDriver::new(Echo::new(2));
    for round in 0..1000u32 {
        d.start(u64::MAX);
        for _ in 0..round % 40 {
            d.add(round as usize % 2, &[b"x"], &[1]);
            d.kick(round as usize % 2);
        }
    }
    d.start(u64::MAX);
    assert!(d.add(0, &[b"alive"], &[5]));
    d.kick(0);
    assert_eq!(d.wait_used(0, SOON).unwrap().data, b"alive");
    assert!(d.failures().is_empty());
}

#[test]
fn vcpus_in_each_others_way() {
    let d = Arc::new(MmioDriver::new(Echo::new(2)).transport().clone());
    let deadline = Instant::now() + Duration::from_millis(300);
    std::thread::scope(|s| {
        for seed in 0..4u32 {
            let d = Arc::clone(&d);
            s.spawn(move || {
                let mut x = seed + 1;
                while Instant::now() < deadline {
                    x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let at = u64::from(x >> 8) % 0x110 / 4 * 4;
                    d.write(at, &(x >> 28).to_le_bytes());
                    d.read(at, &mut [0; 4]);
                    d.write(reg::STATUS, &[0u32, 1, 3, 11, 15][(x >> 20) as usize % 5].to_le_bytes());
                }
            });
        }
    });
    d.shutdown(true).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_accesses_are_survived(data in prop::collection::vec(any::<u8>(), 0..1000)) {
        crate::fuzz::mmio(&data);
    }
}
