use proptest::prelude::*;

use super::*;

const ANY: u32 = u32::MAX;

fn facts() -> Vec<PortFacts> {
    vec![
        PortFacts { name: String::new(), console: true, connected: true },
        PortFacts { name: "krun-stdin".into(), console: false, connected: true },
        PortFacts { name: "none".into(), console: false, connected: false },
    ]
}

fn control() -> Control {
    Control::new(facts(), |_| Some(TerminalSize { cols: 80, rows: 25 }))
}

fn bytes(id: u32, event: u16, value: u16) -> [u8; HEADER] {
    let mut m = [0; HEADER];
    m[..4].copy_from_slice(&id.to_le_bytes());
    m[4..6].copy_from_slice(&event.to_le_bytes());
    m[6..].copy_from_slice(&value.to_le_bytes());
    m
}

/// All messages due: id, event, value, payload.
fn told(c: &mut Control) -> Vec<(u32, u16, u16, Vec<u8>)> {
    std::iter::from_fn(|| c.next_message())
        .map(|m| {
            let word = |at: usize| u16::from_le_bytes([m[at], m[at + 1]]);
            (u32::from_le_bytes([m[0], m[1], m[2], m[3]]), word(4), word(6), m[HEADER..].to_vec())
        })
        .collect()
}

#[test]
fn the_handshake_of_linux() {
    let mut c = control();
    assert!(!c.has_message());
    assert_eq!(c.receive(bytes(ANY, DEVICE_READY, 1)), Ok(None));
    let add = |id| (id, PORT_ADD, 0, vec![]);
    assert_eq!(told(&mut c), [add(0), add(1), add(2)]);
    assert_eq!(c.receive(bytes(0, PORT_READY, 1)), Ok(None));
    assert_eq!(
        told(&mut c),
        [(0, CONSOLE_PORT, 1, vec![]), (0, RESIZE, 0, vec![80, 0, 25, 0]), (0, PORT_OPEN, 1, vec![])]
    );
    assert_eq!(c.receive(bytes(0, PORT_OPEN, 1)), Ok(Some(Change::Opened(0))));
    assert_eq!(c.receive(bytes(1, PORT_READY, 1)), Ok(None));
    let name = |id, name: &str| (id, PORT_NAME, 1, name.as_bytes().to_vec());
    // Connected before it has a name: whoever finds it by name does not read an end of file.
    assert_eq!(told(&mut c), [(1, PORT_OPEN, 1, vec![]), name(1, "krun-stdin")]);
    assert_eq!(c.receive(bytes(2, PORT_READY, 1)), Ok(None));
    assert_eq!(told(&mut c), [(2, PORT_OPEN, 0, vec![]), name(2, "none")]);
    assert_eq!(c.receive(bytes(1, PORT_OPEN, 0)), Ok(Some(Change::Closed(1))));
    assert!(!c.has_message());
}

#[test]
fn terminals_are_settled_when_each_is_open_or_failed_or_gone() {
    let console = |name: &str| PortFacts { name: name.into(), console: true, connected: true };
    let stream = PortFacts { name: "s".into(), console: false, connected: true };
    let mut c = Control::new([console(""), stream, console("a"), console("b")], |_| None);
    let _ = c.receive(bytes(ANY, DEVICE_READY, 1));
    let steps = [(1, PORT_OPEN, 1), (0, PORT_READY, 1), (0, PORT_OPEN, 1), (2, PORT_READY, 0)];
    for (id, event, value) in steps {
        assert!(!c.are_terminals_settled());
        let _ = c.receive(bytes(id, event, value));
    }
    assert!(!c.are_terminals_settled());
    c.remove(3);
    assert!(c.are_terminals_settled());
    // Closed later is not unsettled.
    let _ = c.receive(bytes(0, PORT_OPEN, 0));
    assert!(c.are_terminals_settled());
}

fn ready() -> Control {
    let mut c = control();
    for id in 0..3 {
        c.receive(bytes(id, PORT_READY, 1)).unwrap();
    }
    told(&mut c);
    c
}

#[test]
fn sizes_are_told_once_and_the_last_one_counts() {
    let mut c = ready();
    c.resize(0, TerminalSize { cols: 80, rows: 25 });
    assert!(!c.has_message(), "the same size");
    c.resize(0, TerminalSize { cols: 100, rows: 30 });
    c.resize(0, TerminalSize { cols: 0x1234, rows: 0x56 });
    c.resize(1, TerminalSize { cols: 1, rows: 1 });
    c.resize(9, TerminalSize { cols: 1, rows: 1 });
    assert_eq!(told(&mut c), [(0, RESIZE, 0, vec![0x34, 0x12, 0x56, 0])]);
}

#[test]
fn a_size_before_the_port_is_ready_is_part_of_the_greeting() {
    let mut c = control();
    c.resize(0, TerminalSize { cols: 10, rows: 20 });
    assert!(!c.has_message());
    c.receive(bytes(0, PORT_READY, 1)).unwrap();
    assert_eq!(told(&mut c)[1], (0, RESIZE, 0, vec![10, 0, 20, 0]));
}

#[test]
fn close_and_remove() {
    let mut c = ready();
    c.close(1);
    c.close(1);
    assert_eq!(told(&mut c), [(1, PORT_OPEN, 0, vec![])]);
    c.close(0);
    c.resize(0, TerminalSize { cols: 3, rows: 3 });
    c.remove(0);
    c.remove(0);
    assert_eq!(told(&mut c), [(0, PORT_REMOVE, 0, vec![])], "what else was due is pointless");
    c.receive(bytes(ANY, DEVICE_READY, 1)).unwrap();
    assert_eq!(told(&mut c).iter().map(|m| (m.0, m.1)).collect::<Vec<_>>(), [(1, PORT_ADD), (2, PORT_ADD)]);
}

#[test]
fn a_port_closed_before_the_greeting_is_greeted_as_closed() {
    let mut c = control();
    c.close(1);
    c.receive(bytes(1, PORT_READY, 1)).unwrap();
    assert_eq!(told(&mut c)[0], (1, PORT_OPEN, 0, vec![]));
}

#[test]
fn nonsense_is_refused() {
    let mut c = ready();
    for m in [
        bytes(ANY, DEVICE_READY, 0),
        bytes(3, PORT_READY, 1),
        bytes(ANY, PORT_OPEN, 1),
        bytes(0, PORT_ADD, 1),
        bytes(0, CONSOLE_PORT, 1),
        bytes(0, 8, 1),
        bytes(1, u16::MAX, 0),
        bytes(1, PORT_READY, 0),
    ] {
        assert!(c.receive(m).is_err(), "{m:?}");
    }
    assert!(!c.has_message());
}

#[derive(Debug, Clone)]
enum Step {
    Receive([u8; HEADER]),
    Resize(usize, u16, u16),
    Close(usize),
    Remove(usize),
    Tell,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        any::<[u8; HEADER]>().prop_map(Step::Receive),
        (0..4u32, 0..9u16, 0..3u16).prop_map(|(i, e, v)| Step::Receive(bytes(i, e, v))),
        (0..4usize, any::<u16>(), any::<u16>()).prop_map(|(p, c, r)| Step::Resize(p, c, r)),
        (0..4usize).prop_map(Step::Close),
        (0..4usize).prop_map(Step::Remove),
        Just(Step::Tell),
    ]
}

proptest! {
    /// Whatever the driver says: at most five messages are due per port, no port that was removed is
    /// spoken of (but for its removal, once), and none is called open after it was closed.
    #[test]
    fn never_says_more_than_it_knows(steps in proptest::collection::vec(step(), 0..60)) {
        let mut c = control();
        let (mut removed, mut closed) = ([0; 3], [false; 3]);
        for s in steps {
            match s {
                Step::Receive(m) => { let _ = c.receive(m); }
                Step::Resize(p, cols, rows) => c.resize(p, TerminalSize { cols, rows }),
                Step::Close(p) => {
                    c.close(p);
                    if let Some(f) = closed.get_mut(p) { *f = true; }
                }
                Step::Remove(p) => {
                    c.remove(p);
                    if let Some(f) = removed.get_mut(p) { *f = 1.max(*f); }
                }
                Step::Tell => {
                    let all = told(&mut c);
                    prop_assert!(all.len() <= 15);
                    for (id, event, value, _) in all {
                        let id = id as usize;
                        prop_assert!(id < 3);
                        if removed[id] > 0 {
                            prop_assert_eq!(event, PORT_REMOVE);
                        }
                        if event == PORT_OPEN && closed[id] {
                            prop_assert_eq!(value, 0);
                        }
                    }
                    prop_assert!(!c.has_message());
                }
            }
        }
    }
}
