//! Each rule of the ring, kept and broken.

use std::io::{Read, Write};

use krun_memory::{Bytes, GuestAddress, GuestMemory, Mapping};

use crate::chain::Reader;
use crate::feature;
use crate::mock::{BASE, Buffer, DriverQueue, memory};
use crate::queue::{Queue, QueueAddresses, QueueError, QueueState, RingPart};
use crate::ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE};

const INDIRECT: u64 = 1 << feature::RING_INDIRECT_DESC;
const EVENT: u64 = 1 << feature::RING_EVENT_IDX;
const SPACE: u64 = 1 << 20;
const SIZE: u16 = 8;
/// Somewhere in the memory that the driver's heap does not reach in these tests.
const SPOT: u64 = BASE + SPACE - 0x10000;

fn pair(features: u64, start: u16) -> (GuestMemory, DriverQueue, Queue) {
    let memory = memory(SPACE);
    let driver = DriverQueue::new(&memory, BASE, SPACE, SIZE, features, start);
    let queue = Queue::new(&memory, SIZE.into(), SIZE, driver.addresses(), features).unwrap();
    let queue = queue.with_state(QueueState { next_avail: start, next_used: start });
    (memory, driver, queue)
}

/// What a pop says to one raw descriptor 0.
fn pop_raw(features: u64, at: u64, len: u32, flags: u16, next: u16) -> Result<(), QueueError> {
    let (memory, mut driver, mut queue) = pair(features, 0);
    driver.set_descriptor(0, at, len, flags, next);
    driver.offer(0);
    let before = queue.state();
    let result = queue.pop(&memory);
    assert_eq!(queue.state() == before, result.is_err(), "an error moves nothing");
    result.map(|chain| assert!(chain.is_some()))
}

#[test]
fn a_chain_goes_there_and_back() {
    for features in [0, INDIRECT, EVENT, INDIRECT | EVENT] {
        let (memory, mut driver, mut queue) = pair(features, 65_530);
        for round in 0..20u8 {
            assert!(queue.pop(&memory).unwrap().is_none());
            let head = driver.add(&[&[round; 5], b"abc"], &[3, 10]).unwrap();
            let chain = queue.pop(&memory).unwrap().unwrap();
            assert_eq!((chain.head, chain.readable_len(), chain.writable_len()), (head, 8, 13));
            let mut data = Vec::new();
            chain.reader(&memory).read_to_end(&mut data).unwrap();
            assert_eq!(data, [round, round, round, round, round, b'a', b'b', b'c']);
            let mut writer = chain.writer(&memory);
            writer.write_all(b"hello").unwrap();
            let written = writer.written();
            queue.complete(&memory, chain, written).unwrap();
            let used = driver.collect().unwrap();
            assert_eq!((used.head, used.data.as_slice()), (head, b"hello".as_slice()));
            assert!(driver.collect().is_none());
        }
        assert_eq!(queue.state().next_used, 65_530u16.wrapping_add(20));
    }
}

#[test]
fn set_up_checks_size_alignment_and_place() {
    let memory = memory(SPACE);
    let good = QueueAddresses { desc: BASE, avail: BASE + 0x1000, used: BASE + 0x2000 };
    let new = |size, at| Queue::new(&memory, size, 256, at, 0).map(|_| ());
    assert_eq!(new(256, good), Ok(()));
    for size in [0, 3, 512, 65_536, u32::MAX] {
        assert_eq!(new(size, good), Err(QueueError::Size { size, max: 256 }));
    }
    for (part, align, at) in [
        (RingPart::Descriptors, 16, QueueAddresses { desc: BASE + 8, ..good }),
        (RingPart::Available, 2, QueueAddresses { avail: BASE + 1, ..good }),
        (RingPart::Used, 4, QueueAddresses { used: BASE + 2, ..good }),
    ] {
        assert!(
            matches!(new(8, at), Err(QueueError::Misaligned { part: p, align: a, .. }) if (p, a) == (part, align))
        );
    }
    let end = BASE + SPACE;
    for (part, at, len) in [
        (RingPart::Descriptors, QueueAddresses { desc: end - 112, ..good }, 128),
        (RingPart::Descriptors, QueueAddresses { desc: u64::MAX - 15, ..good }, 128),
        (RingPart::Available, QueueAddresses { avail: end - 20, ..good }, 22),
        (RingPart::Used, QueueAddresses { used: 0, ..good }, 70),
    ] {
        assert!(
            matches!(new(8, at), Err(QueueError::OutsideMemory { part: p, len: l, .. }) if (p, l) == (part, len)),
            "{at:?}"
        );
    }
    assert_eq!(new(8, QueueAddresses { avail: end - 22, ..good }), Ok(()), "up to the last byte");
}

#[test]
fn a_disabled_queue_is_quiet() {
    let memory = memory(0x1000);
    let mut queue = Queue::default();
    assert_eq!(queue.pop(&memory), Ok(None));
    assert_eq!(queue.take_interrupt(&memory), Ok(false));
    assert_eq!(queue.enable_notifications(&memory), Ok(false));
    assert_eq!(queue.disable_notifications(&memory), Ok(()));
    assert!(!queue.is_enabled());
}

#[test]
fn buffers_must_be_guest_memory() {
    for (at, len) in [(0, 16), (BASE - 1, 2), (BASE + SPACE - 1, 2), (u64::MAX - 3, 16), (BASE, u32::MAX)] {
        assert_eq!(pop_raw(0, at, len, 0, 0), Err(QueueError::Buffer { head: 0, at, len }));
    }
    assert_eq!(pop_raw(0, BASE + SPACE - 1, 1, 0, 0), Ok(()));
}

#[test]
fn an_empty_buffer_is_left_out_wherever_it_is() {
    let (memory, mut driver, mut queue) = pair(0, 0);
    let empty = Buffer { at: u64::MAX, len: 0, writable: true };
    let full = Buffer { at: SPOT, len: 4, writable: false };
    driver.add_buffers(&[empty, full, empty]).unwrap();
    let chain = queue.pop(&memory).unwrap().unwrap();
    assert_eq!(chain.readable(), [(GuestAddress(SPOT), 4)]);
    assert!(chain.writable().is_empty());
}

#[test]
fn descriptor_indices_are_bounded() {
    let index = SIZE;
    let want = Err(QueueError::Index { head: 0, index, size: SIZE.into() });
    assert_eq!(pop_raw(0, SPOT, 1, DESC_NEXT, index), want);
    let (memory, mut driver, mut queue) = pair(0, 0);
    driver.offer(0xffff);
    let size = SIZE.into();
    assert_eq!(queue.pop(&memory), Err(QueueError::Index { head: 0xffff, index: 0xffff, size }));
}

#[test]
fn loops_end() {
    assert_eq!(pop_raw(0, SPOT, 1, DESC_NEXT, 0), Err(QueueError::Loop { head: 0, limit: SIZE.into() }));
    let (memory, mut driver, mut queue) = pair(INDIRECT, 0);
    driver.write_descriptor(SPOT, SPOT, 1, DESC_NEXT, 1);
    driver.write_descriptor(SPOT + 16, SPOT, 1, DESC_NEXT, 0);
    driver.set_descriptor(0, SPOT, 32, DESC_INDIRECT, 0);
    driver.offer(0);
    assert_eq!(queue.pop(&memory), Err(QueueError::Loop { head: 0, limit: 2 }));
}

#[test]
fn readable_comes_before_writable() {
    let (memory, mut driver, mut queue) = pair(0, 0);
    let b = |writable| Buffer { at: SPOT, len: 1, writable };
    let head = driver.add_buffers(&[b(false), b(true), b(false)]).unwrap();
    assert_eq!(queue.pop(&memory), Err(QueueError::Order { head }));
}

#[test]
fn a_chain_is_shorter_than_4_gib() {
    let len = 1 << 31;
    let memory = {
        let mapping = Mapping::anonymous(len as usize + 0x10000).unwrap();
        krun_memory::assemble(&[(GuestAddress(BASE), mapping)]).unwrap()
    };
    let mut driver = DriverQueue::new(&memory, BASE, 0x10000, SIZE, 0, 0);
    let mut queue = Queue::new(&memory, SIZE.into(), SIZE, driver.addresses(), 0).unwrap();
    let b = |len| Buffer { at: BASE + 0x10000, len, writable: true };
    driver.add_buffers(&[b(len), b(len - 1)]).unwrap();
    assert_eq!(queue.pop(&memory).unwrap().unwrap().writable_len(), u32::MAX);
    let head = driver.add_buffers(&[b(len), b(len)]).unwrap();
    assert_eq!(queue.pop(&memory), Err(QueueError::Length { head }));
}

#[test]
fn more_available_than_there_are_entries() {
    for start in [0, 65_530] {
        let (memory, mut driver, mut queue) = pair(0, start);
        let avail = start.wrapping_add(SIZE + 1);
        driver.set_avail_idx(avail);
        let want = Err(QueueError::Overrun { avail, used: start, size: SIZE });
        assert_eq!(queue.pop(&memory), want);
        // Nor may the index go backwards, which looks like a leap forwards.
        driver.set_avail_idx(start.wrapping_sub(1));
        assert!(matches!(queue.pop(&memory), Err(QueueError::Overrun { .. })));
    }
}

#[test]
fn a_chain_offered_again_and_again_is_not_taken_for_ever() {
    let (memory, mut driver, mut queue) = pair(0, 0);
    driver.set_descriptor(0, SPOT, 1, 0, 0);
    let mut held = Vec::new();
    for _ in 0..SIZE {
        driver.offer(0);
        held.push(queue.pop(&memory).unwrap().unwrap());
    }
    driver.offer(0);
    assert!(matches!(queue.pop(&memory), Err(QueueError::Overrun { .. })));
    // One is given back: one more fits.
    queue.complete(&memory, held.pop().unwrap(), 0).unwrap();
    assert!(queue.pop(&memory).unwrap().is_some());
}

#[test]
fn indirect_tables_have_rules() {
    let head = 0;
    assert_eq!(pop_raw(0, SPOT, 16, DESC_INDIRECT, 0), Err(QueueError::IndirectRefused { head }));
    let nested = Err(QueueError::IndirectNested { head });
    assert_eq!(pop_raw(INDIRECT, SPOT, 16, DESC_INDIRECT | DESC_NEXT, 1), nested);
    let max = u32::from(Queue::INDIRECT_LIMIT) * 16;
    for len in [0, 8, 17, max + 16, u32::MAX] {
        let want = Err(QueueError::IndirectLength { head, len, max });
        assert_eq!(pop_raw(INDIRECT, SPOT, len, DESC_INDIRECT, 0), want);
    }
    let (part, at, len) = (RingPart::Indirect, BASE + SPACE - 16, 32);
    let want = Err(QueueError::OutsideMemory { part, at, len });
    assert_eq!(pop_raw(INDIRECT, at, 32, DESC_INDIRECT, 0), want);
    // The write flag of the table's descriptor means nothing; an empty descriptor inside is none.
    assert_eq!(pop_raw(INDIRECT, SPOT, 16, DESC_INDIRECT | DESC_WRITE, 0), Ok(()));

    let (memory, mut driver, mut queue) = pair(INDIRECT, 0);
    driver.write_descriptor(SPOT, SPOT, 16, DESC_INDIRECT, 0);
    driver.set_descriptor(0, SPOT, 16, DESC_INDIRECT, 0);
    driver.offer(0);
    assert_eq!(queue.pop(&memory), nested.map(|()| None));
    driver.write_descriptor(SPOT, SPOT, 16, DESC_NEXT, 1);
    assert_eq!(queue.pop(&memory), Err(QueueError::Index { head, index: 1, size: 1 }));
}

#[test]
fn an_indirect_table_may_end_a_chain_and_lie_anywhere() {
    let (memory, mut driver, mut queue) = pair(INDIRECT, 0);
    let table = SPOT + 3;
    driver.write_descriptor(table, SPOT + 0x100, 7, DESC_WRITE, 0);
    driver.set_descriptor(0, SPOT + 0x200, 5, DESC_NEXT, 1);
    driver.set_descriptor(1, table, 16, DESC_INDIRECT, 0);
    driver.offer(0);
    let chain = queue.pop(&memory).unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (5, 7));
}

#[test]
fn an_indirect_table_may_be_longer_than_the_queue() {
    let (memory, mut driver, mut queue) = pair(INDIRECT, 0);
    let b = Buffer { at: SPOT, len: 1, writable: false };
    driver.add_buffers(&vec![b; usize::from(Queue::INDIRECT_LIMIT)]).unwrap();
    let chain = queue.pop(&memory).unwrap().unwrap();
    assert_eq!(chain.readable_len(), u32::from(Queue::INDIRECT_LIMIT));
}

#[test]
fn rings_and_buffers_may_cross_from_one_mapping_to_the_next() {
    let page = |i: u64| (GuestAddress(BASE + i * 4096), Mapping::anonymous(4096).unwrap());
    let memory = krun_memory::assemble(&[page(0), page(1), page(2)]).unwrap();
    let base = BASE + 4096 - 64;
    let mut driver = DriverQueue::new(&memory, base, 8192 - 64, SIZE, 0, 0);
    let mut queue = Queue::new(&memory, SIZE.into(), SIZE, driver.addresses(), 0).unwrap();
    let at = BASE + 8192 - 2;
    memory.write_slice(b"seam", GuestAddress(at)).unwrap();
    let buffer = |writable| Buffer { at, len: 4, writable };
    for _ in 0..3 * SIZE {
        driver.add_buffers(&[buffer(false), buffer(true)]).unwrap();
        let chain = queue.pop(&memory).unwrap().unwrap();
        let mut reader = chain.reader(&memory);
        assert_eq!(reader.read_obj::<u32>().unwrap(), u32::from_le_bytes(*b"seam"));
        let mut writer = chain.writer(&memory);
        assert_eq!(writer.room().len(), 2);
        writer.write_obj(&u32::from_le_bytes(*b"seam")).unwrap();
        queue.complete(&memory, chain, 4).unwrap();
        assert_eq!(driver.collect().unwrap().data, b"seam");
    }
}

#[test]
fn unpop_gives_the_same_chain_again() {
    let (memory, mut driver, mut queue) = pair(0, 65_535);
    let (first, second) = (driver.add(&[b"1"], &[]).unwrap(), driver.add(&[b"2"], &[]).unwrap());
    let one = queue.pop(&memory).unwrap().unwrap();
    let two = queue.pop(&memory).unwrap().unwrap();
    assert_eq!((one.head, two.head, queue.in_use()), (first, second, 2));
    queue.unpop(two);
    assert_eq!(queue.pop(&memory).unwrap().unwrap().head, second);
    assert_eq!(queue.in_use(), 2);
}

#[test]
fn a_completion_needs_a_chain() {
    let (memory, mut driver, mut queue) = pair(0, 0);
    driver.add(&[b"1"], &[]).unwrap();
    let chain = queue.pop(&memory).unwrap().unwrap();
    let mut other = Queue::new(&memory, SIZE.into(), SIZE, driver.addresses(), 0).unwrap();
    assert_eq!(other.complete(&memory, chain, 0), Err(QueueError::NotTaken { head: 0 }));
}

#[test]
fn interrupts_without_event_index() {
    let (memory, mut driver, mut queue) = pair(0, 0);
    let mut one = |driver: &mut DriverQueue| {
        driver.add(&[b"x"], &[]).unwrap();
        let chain = queue.pop(&memory).unwrap().unwrap();
        queue.complete(&memory, chain, 0).unwrap();
        let due = queue.take_interrupt(&memory).unwrap();
        assert!(!queue.take_interrupt(&memory).unwrap(), "once is enough");
        driver.collect().unwrap();
        due
    };
    assert!(one(&mut driver));
    driver.disable_interrupts();
    assert!(!one(&mut driver));
    driver.enable_interrupts();
    assert!(one(&mut driver));
}

#[test]
fn interrupts_with_event_index_at_every_start() {
    for start in [0, 1, 32_767, 32_768, 65_533, 65_535] {
        let (memory, mut driver, mut queue) = pair(EVENT, start);
        // An interrupt for the third completion from here, and for no other.
        driver.disable_interrupts();
        driver.set_used_event(start.wrapping_add(2));
        let due: Vec<bool> = (0..5)
            .map(|_| {
                driver.add(&[b"x"], &[]).unwrap();
                let chain = queue.pop(&memory).unwrap().unwrap();
                queue.complete(&memory, chain, 0).unwrap();
                driver.collect().unwrap();
                queue.take_interrupt(&memory).unwrap()
            })
            .collect();
        assert_eq!(due, [false, false, true, false, false], "from {start}");
    }
}

#[test]
fn an_interrupt_after_a_whole_round_of_indices() {
    let (memory, mut driver, mut queue) = pair(EVENT, 7);
    driver.disable_interrupts();
    driver.set_used_event(100);
    // The index comes back to where it was last announced; by the two indices nothing has happened.
    for _ in 0..=u16::MAX {
        driver.add(&[b"x"], &[]).unwrap();
        let chain = queue.pop(&memory).unwrap().unwrap();
        queue.complete(&memory, chain, 0).unwrap();
        driver.collect().unwrap();
    }
    assert_eq!(queue.state().next_used, 7);
    assert!(queue.take_interrupt(&memory).unwrap());
}

#[test]
fn the_driver_is_asked_to_notify_only_when_the_queue_is_empty() {
    for features in [0, EVENT] {
        for start in [0, 65_535] {
            let (memory, mut driver, mut queue) = pair(features, start);
            driver.add(&[b"1"], &[]).unwrap();
            assert!(driver.needs_kick());
            queue.disable_notifications(&memory).unwrap();
            driver.add(&[b"2"], &[]).unwrap();
            assert!(!driver.needs_kick(), "features {features:#x}");
            while queue.pop(&memory).unwrap().is_some() {}
            assert!(!queue.enable_notifications(&memory).unwrap());
            driver.add(&[b"3"], &[]).unwrap();
            assert!(driver.needs_kick());
            // A chain that comes between the last look and the wish is found.
            queue.disable_notifications(&memory).unwrap();
            while queue.pop(&memory).unwrap().is_some() {}
            driver.add(&[b"4"], &[]).unwrap();
            assert!(!driver.needs_kick());
            assert!(queue.enable_notifications(&memory).unwrap());
            // A device that stopped before the queue was empty is not called for what it left.
            queue.disable_notifications(&memory).unwrap();
            assert!(!queue.enable_notifications(&memory).unwrap());
        }
    }
}

#[test]
fn a_notification_may_be_asked_for_later() {
    for start in [0, 65_533] {
        let (memory, mut driver, mut queue) = pair(EVENT, start);
        assert!(queue.pop(&memory).unwrap().is_none());
        queue.notify_after(3);
        assert!(!queue.enable_notifications(&memory).unwrap());
        let kicks: Vec<bool> = (0..4)
            .map(|_| {
                driver.add(&[b"x"], &[]).unwrap();
                driver.needs_kick()
            })
            .collect();
        assert_eq!(kicks, [false, false, true, false], "from {start}");
        // It holds once; and what has come already counts.
        while queue.pop(&memory).unwrap().is_some() {}
        queue.notify_after(2);
        driver.add(&[b"x"], &[]).unwrap();
        assert!(!queue.enable_notifications(&memory).unwrap());
        while queue.pop(&memory).unwrap().is_some() {}
        queue.notify_after(2);
        driver.add(&[b"x"], &[]).unwrap();
        driver.add(&[b"x"], &[]).unwrap();
        assert!(queue.enable_notifications(&memory).unwrap());
    }
}

#[test]
fn readers_and_writers_cut_where_they_are_told() {
    let (memory, mut driver, mut queue) = pair(0, 0);
    driver.add(&[b"abc", b"defg"], &[2, 6]).unwrap();
    let chain = queue.pop(&memory).unwrap().unwrap();
    let mut reader = chain.reader(&memory);
    assert_eq!(Reader::take(&mut reader, 4).iter().map(|s| s.len()).collect::<Vec<_>>(), [3, 1]);
    let mut rest = [0; 2];
    reader.read_exact(&mut rest).unwrap();
    assert_eq!((&rest, reader.consumed(), reader.remaining()), (b"ef", 6, 1));
    assert_eq!(Reader::take(&mut reader, 100).len(), 1);
    assert!(reader.read_obj::<u8>().is_err());

    let mut head = chain.writer(&memory);
    let mut body = head.split_at(3);
    assert_eq!((head.remaining(), body.remaining()), (3, 5));
    body.write_all(b"vwxyz").unwrap();
    assert!(body.write_all(b"!").is_err());
    head.room()[0].copy_from(b"rs");
    head.advance(2);
    head.write_all(b"t").unwrap();
    assert_eq!((head.written(), body.written()), (3, 5));
    queue.complete(&memory, chain, 8).unwrap();
    assert_eq!(driver.collect().unwrap().data, b"rstvwxyz");
}
