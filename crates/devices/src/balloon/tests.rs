//! The device with a driver of the tests' own.

use std::thread;
use std::time::Duration;

use krun_memory::{Bytes, GuestAddress};
use krun_virtio::mock::{BASE, Harness};
use krun_virtio::{DeviceError, VirtioDevice};

use super::device::{MAX_PAGES, feature};
use super::{Balloon, BalloonError, BalloonHandle, PAGE};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const HINTS: usize = 3;
const REPORTS: usize = 4;
const SOON: Duration = Duration::from_secs(20);

/// Memory of the second queue's buffers, far from rings.
const SPOT: u64 = BASE + (24 << 20);

fn balloon() -> (Harness, BalloonHandle) {
    let device = Balloon::new().unwrap();
    let handle = device.handle();
    (Harness::new(device), handle)
}

fn numbers(pages: &[u64]) -> Vec<u8> {
    pages.iter().flat_map(|at| ((at / PAGE) as u32).to_le_bytes()).collect()
}

fn config(h: &Harness) -> [u32; 4] {
    let mut bytes = [0; 16];
    h.config().read(0, &mut bytes);
    let word = |n: usize| u32::from_le_bytes(bytes[4 * n..4 * n + 4].try_into().unwrap());
    [word(0), word(1), word(2), word(3)]
}

#[test]
fn inflated_pages_go_and_others_stay() {
    let (mut h, handle) = balloon();
    h.memory().write_slice(&[7; 6 * PAGE as usize], GuestAddress(SPOT)).unwrap();
    let pages = [1u64, 2, 4].map(|n| SPOT + n * PAGE);
    h.request(INFLATE, &[&numbers(&pages)], &[]).unwrap();
    let seen = [0, 1, 2, 3, 4, 5].map(|n| h.memory().read_obj::<u8>(GuestAddress(SPOT + n * PAGE)).unwrap());
    assert_eq!(seen, [7, 0, 0, 7, 0, 7]);
    assert_eq!(handle.state().released, 3 * PAGE);
    h.request(DEFLATE, &[&numbers(&pages)], &[]).unwrap();
    // Half a number at the end is none.
    h.request(INFLATE, &[&[1, 2]], &[]).unwrap();
    h.request(INFLATE, &[], &[8]).unwrap();
}

#[test]
fn pages_that_are_no_memory_are_the_drivers_fault() {
    for page in [0, BASE - PAGE, u64::from(u32::MAX) * PAGE] {
        let (mut h, _) = balloon();
        let e = h.request(INFLATE, &[&numbers(&[page])], &[]).unwrap_err();
        assert!(matches!(e, DeviceError::Driver(_)), "{e}");
    }
    let (mut h, _) = balloon();
    let most = numbers(&vec![SPOT; MAX_PAGES as usize]);
    h.request(INFLATE, &[&most], &[]).unwrap();
    let e = h.request(INFLATE, &[&most, &[0; 4]], &[]).unwrap_err();
    assert!(e.to_string().contains("at most 4096"), "{e}");
}

#[test]
fn the_target_reaches_the_driver_and_its_answer_the_host() {
    let (mut h, handle) = balloon();
    handle.set_target(64).unwrap();
    handle.set_target(64).unwrap();
    assert_eq!(h.poll(SOON).unwrap(), 1);
    assert_eq!(h.take_config_changes(), 1);
    assert_eq!(config(&h), [64 * 256, 0, 0, 0]);
    h.config().write(4, &1234u32.to_le_bytes());
    h.config().write(0, &1u32.to_le_bytes());
    h.config().write(4, &[1]);
    h.config().write(u64::MAX, &[1; 4]);
    h.config().read(u64::MAX - 1, &mut [0; 4]);
    assert_eq!(handle.state().actual_pages, 1234);
    // A new driver starts with an empty balloon and finds the target.
    h.restart().unwrap();
    assert_eq!(config(&h), [64 * 256, 0, 0, 0]);
    assert_eq!(handle.set_target(1 << 40), Err(BalloonError::TooLarge { mib: 1 << 40 }));
    assert_eq!(handle.set_target(16 << 20), Err(BalloonError::TooLarge { mib: 16 << 20 }));
}

#[test]
fn reported_memory_goes() {
    let (mut h, handle) = balloon();
    let used = h.request(REPORTS, &[], &[2 << 20, 8192]).unwrap();
    assert_eq!(used.written, 0);
    // Buffers of the harness need not start at a page.
    assert!(handle.state().released >= (2 << 20) - PAGE, "{:?}", handle.state());
}

/// One statistic, as a driver sends it.
fn statistic(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

#[test]
fn statistics_come_when_asked_for() {
    let (mut h, handle) = balloon();
    h.add(STATS, &[&statistic(4, 1)], &[]);
    h.kick(STATS).unwrap();
    assert!(h.collect(STATS).is_none(), "the buffer is kept until statistics are wanted");
    let asked = thread::spawn(move || handle.stats(SOON));
    assert_eq!(h.poll(SOON).unwrap(), 1);
    assert!(h.collect(STATS).is_some());
    h.add(STATS, &[&statistic(4, 2)], &[]);
    h.kick(STATS).unwrap();
    assert_eq!(asked.join().unwrap().unwrap().free, Some(2));
    // A driver that sends more gets the older ones back.
    for _ in 0..20 {
        h.add(STATS, &[&statistic(4, 3)], &[]);
        h.kick(STATS).unwrap();
        assert!(h.collect(STATS).is_some());
        assert_eq!(h.held(STATS), 1);
    }
}

#[test]
fn a_guest_that_does_not_answer_is_told_apart() {
    let device = Balloon::new().unwrap();
    let handle = device.handle();
    assert_eq!(handle.stats(SOON), Err(BalloonError::NotRunning));
    let h = Harness::with_features(device, 0).unwrap();
    assert_eq!(handle.stats(SOON), Err(BalloonError::NotOffered { what: "statistics" }));
    assert!(matches!(handle.free_ranges(SOON), Err(BalloonError::NotOffered { .. })));
    drop(h.into_device());
    assert_eq!(handle.stats(SOON), Err(BalloonError::NotRunning));
    let (_h, handle) = balloon();
    assert!(matches!(handle.stats(Duration::ZERO), Err(BalloonError::Timeout { .. })));
    assert!(matches!(handle.free_ranges(Duration::ZERO), Err(BalloonError::Timeout { .. })));
}

#[test]
fn hints_are_collected_and_the_driver_gets_its_pages_back() {
    let (mut h, handle) = balloon();
    for round in 2..4u32 {
        let handle = handle.clone();
        let asked = thread::spawn(move || handle.free_ranges(SOON));
        assert_eq!(h.poll(SOON).unwrap(), 1);
        assert_eq!(config(&h)[2], round);
        // Hints before the command was taken up are from another round.
        h.request(HINTS, &[], &[4096]).unwrap();
        h.request(HINTS, &[&round.to_le_bytes()], &[]).unwrap();
        h.request(HINTS, &[], &[1 << 20]).unwrap();
        h.request(HINTS, &[], &[1 << 20]).unwrap();
        h.request(HINTS, &[&0u32.to_le_bytes()], &[]).unwrap();
        let ranges = asked.join().unwrap().unwrap();
        assert_eq!(ranges.iter().map(|(_, len)| len).sum::<u64>(), 2 << 20, "{ranges:x?}");
        assert_eq!(h.poll(SOON).unwrap(), 1);
        assert_eq!(config(&h)[2], 1);
    }
    assert_eq!(handle.state().released, 0, "hints are no leave to take memory");
}

#[test]
fn queues_count_without_gaps() {
    let device = Balloon::new().unwrap();
    let handle = device.handle();
    let mut h = Harness::with_features(device, 1 << feature::REPORTING).unwrap();
    h.request(2, &[], &[2 << 20]).unwrap();
    assert!(handle.state().released > 0);
    // Of queues without a purpose buffers come back unused.
    h.request(4, &[b"?"], &[5]).unwrap();
}

#[test]
fn offered_features_are_named() {
    assert_eq!(Balloon::new().unwrap().info().features, 0b10_1110);
}
