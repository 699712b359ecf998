//! Random work of a driver and a device, and random rings.

use std::collections::HashMap;
use std::io::{Read, Write};

use proptest::prelude::*;

use crate::chain::Chain;
use crate::mock::{BASE, DriverQueue, memory};
use crate::queue::{Queue, QueueState};

#[derive(Debug, Clone)]
enum Step {
    Add { out: Vec<u8>, pieces: usize, room: Vec<u32> },
    Pop,
    Complete { which: usize, written: usize },
    Unpop,
    Collect,
    Interrupts(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let add = (prop::collection::vec(any::<u8>(), 0..300), 1..4usize, prop::collection::vec(0..200u32, 0..4));
    prop_oneof![
        4 => add.prop_map(|(out, pieces, room)| Step::Add { out, pieces, room }),
        4 => Just(Step::Pop),
        4 => (any::<usize>(), any::<usize>()).prop_map(|(which, written)| Step::Complete { which, written }),
        1 => Just(Step::Unpop),
        4 => Just(Step::Collect),
        1 => any::<bool>().prop_map(Step::Interrupts),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// What the driver sends arrives whole and in order; what the device stores comes back whole,
    /// whatever the order of completion; no kick and no interrupt is lost.
    #[test]
    fn data_stays_intact(
        features in prop::sample::select(vec![0u64, 1 << 28, 1 << 29, 3 << 28]),
        start in prop_oneof![Just(0u16), 65_400..=65_535u16, any::<u16>()],
        size in prop::sample::select(vec![1u16, 2, 8, 64]),
        steps in prop::collection::vec(step(), 1..300),
    ) {
        let memory = memory(1 << 20);
        let mut driver = DriverQueue::new(&memory, BASE, 1 << 20, size, features, start);
        let mut queue = Queue::new(&memory, size.into(), size, driver.addresses(), features).unwrap()
            .with_state(QueueState { next_avail: start, next_used: start });
        let (mut sent, mut waiting) = (HashMap::new(), std::collections::VecDeque::new());
        let mut held: Vec<Chain> = Vec::new();
        let mut answers: HashMap<u16, Vec<u8>> = HashMap::new();
        // The chain popped last, while it is held.
        let mut last = None;
        // Whether each side sleeps until it is told.
        let (mut device_sleeps, mut driver_sleeps) = (true, false);
        for (round, step) in steps.into_iter().enumerate() {
            match step {
                Step::Add { out, pieces, room } => {
                    let parts: Vec<&[u8]> = out.chunks(out.len().div_ceil(pieces).max(1)).collect();
                    if parts.is_empty() && room.is_empty() { continue; }
                    if let Some(head) = driver.add(&parts, &room) {
                        sent.insert(head, (out, room.iter().sum::<u32>()));
                        waiting.push_back(head);
                        let kick = driver.needs_kick();
                        prop_assert!(kick || !device_sleeps, "a lost notification");
                        if kick { device_sleeps = false; }
                    }
                }
                Step::Pop => match queue.pop(&memory).unwrap() {
                    Some(chain) => {
                        device_sleeps = false;
                        prop_assert_eq!(Some(chain.head), waiting.pop_front());
                        let mut data = Vec::new();
                        chain.reader(&memory).read_to_end(&mut data).unwrap();
                        prop_assert_eq!(&data, &sent[&chain.head].0);
                        prop_assert_eq!(chain.writable_len(), sent[&chain.head].1);
                        last = Some(chain.head);
                        held.push(chain);
                    }
                    None => {
                        prop_assert!(waiting.is_empty());
                        prop_assert!(!queue.enable_notifications(&memory).unwrap());
                        device_sleeps = true;
                    }
                },
                Step::Complete { which, written } => if !held.is_empty() {
                    let chain = held.swap_remove(which % held.len());
                    if last == Some(chain.head) { last = None; }
                    let mut writer = chain.writer(&memory);
                    let data: Vec<u8> = (0..written % (writer.remaining() + 1)).map(|i| (i + round) as u8).collect();
                    writer.write_all(&data).unwrap();
                    answers.insert(chain.head, data);
                    let written = writer.written();
                    queue.complete(&memory, chain, written).unwrap();
                    let due = queue.take_interrupt(&memory).unwrap();
                    prop_assert!(due || !driver_sleeps, "a lost interrupt");
                    if due { driver_sleeps = false; }
                },
                Step::Unpop => if let Some(i) = held.iter().position(|c| Some(c.head) == last) {
                    let chain = held.swap_remove(i);
                    let head = chain.head;
                    queue.unpop(chain);
                    let again = queue.pop(&memory).unwrap().unwrap();
                    prop_assert_eq!(again.head, head);
                    held.push(again);
                },
                Step::Collect => match driver.collect() {
                    Some(used) => {
                        prop_assert_eq!(Some(&used.data), answers.get(&used.head));
                        answers.remove(&used.head);
                        sent.remove(&used.head);
                    }
                    None => if !driver.enable_interrupts() { driver_sleeps = true; },
                },
                Step::Interrupts(on) => {
                    if on { driver.enable_interrupts(); } else { driver.disable_interrupts(); driver_sleeps = false; }
                }
            }
        }
        prop_assert_eq!(driver.in_flight(), sent.len());
    }

    #[test]
    fn any_ring_is_survived(data in prop::collection::vec(any::<u8>(), 0..2000)) {
        crate::fuzz::queue(&data);
    }

    /// As above, with the well-formed descriptors far more frequent.
    #[test]
    fn any_nearly_good_ring_is_survived(
        head in any::<[u8; 5]>(),
        steps in prop::collection::vec((0..9u8, prop::collection::vec(any::<u8>(), 0..9)), 0..200),
    ) {
        let mut data = head.to_vec();
        for (op, rest) in steps {
            data.push(op);
            data.extend(rest);
        }
        crate::fuzz::queue(&data);
    }
}
