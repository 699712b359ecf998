//! Buffers in windows: lent, filled and copied back.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use krun_memory::{GuestAddress, GuestMemory, Memfd, Window};

use crate::bounce::{Bounce, Windows};
use crate::mock::{BASE, DriverQueue, memory};
use crate::queue::{Queue, QueueError};
use crate::ring::{DESC_NEXT, DESC_WRITE};

const AT: u64 = 1 << 33;
const LEN: u64 = 128 << 20;
const SPACE: u64 = 1 << 20;

struct Bench {
    memory: GuestMemory,
    driver: DriverQueue,
    queue: Queue,
    window: Window,
    file: Memfd,
    bounce: Arc<Bounce>,
}

/// A queue of a guest with a window that shows a memory file.
fn bench() -> Bench {
    let window = Window::new(LEN as usize).unwrap();
    let file = Memfd::new(LEN).unwrap();
    window.show(0, LEN as usize, file.file().as_fd(), 0, true).unwrap();
    let windows = Arc::new(Windows::new(vec![(GuestAddress(AT), window.mapping().clone())]));
    let ram = memory(SPACE);
    let (bounce, memory) = Bounce::new(&windows, &ram).unwrap();
    let driver = DriverQueue::new(&ram, BASE, SPACE, 8, 0, 0);
    let queue = Queue::new(&ram, 8, 8, driver.addresses(), 0).unwrap().with_bounce(Arc::clone(&bounce));
    Bench { memory, driver, queue, window, file, bounce }
}

#[test]
fn buffers_in_a_window_are_read_and_written_by_copies() {
    let Bench { memory, mut driver, mut queue, window, file, .. } = bench();
    file.file().write_all_at(b"for the device", 4094).unwrap();
    file.file().write_all_at(b"....................", 8000).unwrap();
    driver.set_descriptor(0, AT + 4094, 14, DESC_NEXT, 1);
    driver.set_descriptor(1, AT + 8000, 20, DESC_WRITE, 0);
    driver.offer(0);
    let chain = queue.pop(&memory).unwrap().unwrap();
    assert!(chain.readable()[0].0.0 > AT + LEN && chain.writable()[0].0.0 > AT + LEN);
    // What changes there now is seen no more.
    file.file().write_all_at(b"FOR", 4094).unwrap();
    let mut text = String::new();
    chain.reader(&memory).read_to_string(&mut text).unwrap();
    assert_eq!(text, "for the device");
    chain.writer(&memory).write_all(b"answer").unwrap();
    queue.complete(&memory, chain, 6).unwrap();
    let mut back = [0; 20];
    file.file().read_exact_at(&mut back, 8000).unwrap();
    assert_eq!(&back, b"answer..............", "the rest is left alone");
    // Also where somebody else wrote meanwhile; ranges in memory count as well.
    driver.set_descriptor(0, AT + 8000, 2, DESC_WRITE | DESC_NEXT, 1);
    driver.set_descriptor(1, BASE + SPACE - 4096, 3, DESC_WRITE | DESC_NEXT, 2);
    driver.set_descriptor(2, AT + 8002, 9, DESC_WRITE | DESC_NEXT, 3);
    driver.set_descriptor(3, AT + 8011, 9, DESC_WRITE, 0);
    driver.offer(0);
    let chain = queue.pop(&memory).unwrap().unwrap();
    chain.writer(&memory).write_all(b"ABxyzCDEF-not said").unwrap();
    file.file().write_all_at(b"host's", 8006).unwrap();
    queue.complete(&memory, chain, 9).unwrap();
    file.file().read_exact_at(&mut back, 8000).unwrap();
    assert_eq!(&back, b"ABCDEFhost's........");
    // What is not there any more reads as zeroes, and is not written.
    let short = tempfile(6);
    window.show(0, 4096, short.as_fd(), 0, false).unwrap();
    window.show(4096, 4096, short.as_fd(), 4096, true).unwrap();
    driver.set_descriptor(0, AT + 4094, 4, DESC_NEXT, 1);
    driver.set_descriptor(1, AT, 4, DESC_WRITE, 0);
    driver.offer(0);
    let chain = queue.pop(&memory).unwrap().unwrap();
    let mut bytes = Vec::new();
    chain.reader(&memory).read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, [0; 4]);
    chain.writer(&memory).write_all(b"lost").unwrap();
    queue.complete(&memory, chain, 4).unwrap();
    let mut kept = [0; 6];
    short.read_exact_at(&mut kept, 0).unwrap();
    assert_eq!(&kept, b"xxxxxx");
}

fn tempfile(len: usize) -> std::fs::File {
    let file = Memfd::new(4096).unwrap().file().try_clone().unwrap();
    file.write_all_at(&vec![b'x'; len], 0).unwrap();
    file
}

#[test]
fn a_chain_waits_for_room_and_one_that_never_fits_is_refused() {
    let Bench { memory, mut driver, mut queue, .. } = bench();
    let half = Bounce::SIZE as u32 / 2 + 4096;
    for head in [0, 1] {
        driver.set_descriptor(head, AT, half, DESC_WRITE, 0);
        driver.offer(head);
    }
    let first = queue.pop(&memory).unwrap().unwrap();
    assert!(!queue.take_held());
    for _ in 0..2 {
        assert!(queue.pop(&memory).unwrap().is_none(), "the other one finds no room");
        assert!(!queue.take_held());
    }
    queue.complete(&memory, first, 0).unwrap();
    assert!(queue.take_held() && !queue.take_held());
    let second = queue.pop(&memory).unwrap().unwrap();
    // One that is given up gives back what it had.
    drop(second);
    driver.set_descriptor(2, AT, Bounce::SIZE as u32, DESC_WRITE | DESC_NEXT, 3);
    driver.set_descriptor(3, AT, 1, DESC_WRITE, 0);
    driver.offer(2);
    let max = Bounce::SIZE;
    assert_eq!(queue.pop(&memory), Err(QueueError::Windows { head: 2, max }));
}

#[test]
fn queues_that_wait_do_not_wake_each_other() {
    let Bench { memory, mut driver, mut queue, bounce, .. } = bench();
    let mut others = DriverQueue::new(&memory, BASE + SPACE / 2, SPACE / 2, 8, 0, 0);
    let mut other = Queue::new(&memory, 8, 8, others.addresses(), 0).unwrap().with_bounce(bounce);
    let half = Bounce::SIZE as u32 / 2 + 4096;
    driver.set_descriptor(0, AT, half, DESC_WRITE, 0);
    driver.offer(0);
    let first = queue.pop(&memory).unwrap().unwrap();
    // The first part of each finds room.
    for driver in [&mut driver, &mut others] {
        driver.set_descriptor(1, AT, 4096, DESC_WRITE | DESC_NEXT, 2);
        driver.set_descriptor(2, AT, half, DESC_WRITE, 0);
        driver.offer(1);
    }
    for _ in 0..2 {
        assert!(queue.pop(&memory).unwrap().is_none() && other.pop(&memory).unwrap().is_none());
        assert!(!queue.take_held() && !other.take_held());
    }
    // One that is put back comes back as well.
    queue.unpop(first);
    assert!(queue.take_held() && other.take_held());
    let second = other.pop(&memory).unwrap().unwrap();
    assert!(queue.pop(&memory).unwrap().is_none() && !queue.take_held());
    other.complete(&memory, second, 0).unwrap();
    assert!(queue.take_held() && queue.pop(&memory).unwrap().is_some());
}

#[test]
fn rings_and_ranges_that_leave_a_window_are_refused() {
    let Bench { memory, mut driver, mut queue, .. } = bench();
    for (at, len) in [(AT - 1, 2), (AT + LEN - 1, 2), (AT + LEN, 1), (u64::MAX, 2)] {
        driver.set_descriptor(0, at, len, 0, 0);
        driver.offer(0);
        assert_eq!(queue.pop(&memory), Err(QueueError::Buffer { head: 0, at, len }));
    }
    let mut at = driver.addresses();
    at.used = AT;
    assert!(matches!(Queue::new(&memory, 8, 8, at, 0), Err(QueueError::OutsideMemory { .. })));
}
