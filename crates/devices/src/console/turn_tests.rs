//! Several devices: each waits for the terminals of the one before it.

use super::*;

fn two() -> (Guest, Guest) {
    let first = Console::new(ConsoleSpec { ports: vec![console(), input("in").0, console()] }).unwrap();
    let mut second = Console::new(ConsoleSpec { ports: vec![input("other").0, console()] }).unwrap();
    second.after(first.numbered().next().unwrap());
    (Guest::of(first), Guest::of(second))
}

const ADDED: [(u32, u16, u16); 2] = [(0, PORT_ADD, 0), (1, PORT_ADD, 0)];

#[test]
fn ports_are_told_of_after_the_terminals_of_the_device_before() {
    let (mut first, mut second) = two();
    // The order in which drivers come does not matter.
    second.control(u32::MAX, DEVICE_READY, 1);
    assert_eq!(second.events(), []);
    first.control(u32::MAX, DEVICE_READY, 1);
    assert_eq!(first.events().len(), 3);
    for id in [0, 1, 2] {
        first.control(id, PORT_READY, 1);
    }
    first.events();
    // The stream does not count.
    for id in [1, 0, 2] {
        assert_eq!((second.poll(), second.events()), (0, vec![]));
        first.control(id, PORT_OPEN, 1);
    }
    assert_eq!(second.h.poll(SOON).unwrap(), 1);
    assert_eq!(second.events(), ADDED);
    // Another driver takes both over, this time the other way round.
    first.h.restart().unwrap();
    second.h.restart().unwrap();
    second.fill(CONTROL_RX);
    second.control(u32::MAX, DEVICE_READY, 1);
    assert_eq!((second.poll(), second.events()), (0, vec![]));
}

#[test]
fn a_device_that_nobody_serves_holds_no_other_up_for_ever() {
    let (_first, mut second) = two();
    second.control(u32::MAX, DEVICE_READY, 1);
    assert_eq!(second.events(), []);
    assert_eq!(second.h.poll(Duration::from_secs(20)).unwrap(), 1);
    assert_eq!(second.events(), ADDED);
}

#[test]
fn a_driver_without_the_control_protocol_numbers_its_terminal_at_once() {
    let first = Console::new(ConsoleSpec { ports: vec![console(), console()] }).unwrap();
    let mut turn = first.numbered().next().unwrap();
    assert!(!turn.has_come().unwrap());
    let _driver = Harness::with_features(first, 1 << F_SIZE).unwrap();
    assert!(turn.has_come().unwrap());
}
