//! The device with a driver and sources of the tests' own.

use std::io::{self, PipeReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use krun_virtio::mock::Harness;
use krun_virtio::{DeviceError, VirtioDevice};

use super::{AxisInfo, DeviceIds, Evdev, Input, InputConfig, InputEvent, InputSender, InputSource, Queue};

const EVENTS: usize = 0;
const STATUS: usize = 1;
const SOON: Duration = Duration::from_secs(20);

fn key(code: u16, value: u32) -> InputEvent {
    InputEvent { kind: 1, code, value }
}

fn device() -> (Harness, InputSender) {
    let (queue, sender) = Queue::new().unwrap();
    let ids = DeviceIds { bus: 6, vendor: 0x1234, product: 2, version: 3 };
    let axis = AxisInfo { min: u32::MAX, max: 100, fuzz: 1, flat: 2, resolution: 3 };
    let config = InputConfig {
        serial: vec![b's'; 200],
        ids,
        properties: vec![2, 0, 0],
        ..InputConfig::new("a keyboard").with(1, [1, 30, 700, 5000]).with(2, []).with_axis(1, axis)
    };
    (Harness::new(Input::new(config, Box::new(queue))), sender)
}

fn ask(h: &Harness, select: u8, subsel: u8) -> Vec<u8> {
    h.config().write(0, &[select]);
    h.config().write(1, &[subsel]);
    let mut all = [0xee; 150];
    h.config().read(0, &mut all);
    assert_eq!(all[..2], [select, subsel]);
    assert!(all[3..8].iter().chain(&all[136..]).all(|b| *b == 0));
    all[8..8 + usize::from(all[2])].to_vec()
}

#[test]
fn questions_are_answered() {
    let (h, _) = device();
    assert_eq!(ask(&h, 1, 0), b"a keyboard");
    assert_eq!(ask(&h, 2, 0), [b's'; 128]);
    assert_eq!(ask(&h, 3, 0), [6, 0, 0x34, 0x12, 2, 0, 3, 0]);
    assert_eq!(ask(&h, 0x10, 0), [2]);
    let keys = ask(&h, 0x11, 1);
    assert_eq!((keys.len(), keys[0], keys[3], keys[87]), (88, 2, 1 << 6, 1 << 4));
    assert_eq!(ask(&h, 0x11, 3), [2]);
    assert_eq!(ask(&h, 0x12, 1)[..8], [255, 255, 255, 255, 100, 0, 0, 0]);
    for (select, subsel) in [(0, 0), (1, 1), (4, 0), (0x11, 2), (0x11, 255), (0x12, 0), (255, 255)] {
        assert_eq!(ask(&h, select, subsel), [0u8; 0], "{select} {subsel}");
    }
    h.config().write(0, &[1, 0]);
    h.config().write(2, &[9]);
    h.config().write(0, &[9; 4]);
    let mut size = [0];
    h.config().read(2, &mut size);
    assert_eq!(size, [10]);
    h.config().read(u64::MAX, &mut size);
    assert_eq!(size, [0]);
}

#[test]
fn events_wait_for_room_and_come_in_order() {
    let (mut h, sender) = device();
    let events: Vec<_> = (0..10).map(|n| key(n, u32::MAX - u32::from(n))).collect();
    sender.send(&events).unwrap();
    h.add(EVENTS, &[], &[8]);
    h.kick(EVENTS).unwrap();
    let mut got = vec![InputEvent::from_bytes(h.collect(EVENTS).unwrap().data.try_into().unwrap())];
    assert_eq!(h.poll(Duration::ZERO).unwrap(), 0, "without room the source is left alone");
    for _ in 0..20 {
        h.add(EVENTS, &[], &[8]);
    }
    h.kick(EVENTS).unwrap();
    while let Some(used) = h.collect(EVENTS) {
        got.push(InputEvent::from_bytes(used.data.try_into().unwrap()));
    }
    assert_eq!(got, events);
    sender.send(&[key(7, 1)]).unwrap();
    assert_eq!(h.poll(SOON).unwrap(), 1);
    assert_eq!(h.collect(EVENTS).unwrap().data, key(7, 1).to_bytes());
    assert_eq!(h.poll(Duration::ZERO).unwrap(), 0);
    h.restart().unwrap();
    sender.send(&[key(8, 1)]).unwrap();
    h.add(EVENTS, &[], &[8]);
    h.kick(EVENTS).unwrap();
    assert_eq!(h.collect(EVENTS).unwrap().data, key(8, 1).to_bytes());
}

#[test]
fn lights_reach_the_host_and_nothing_grows_without_end() {
    let (mut h, sender) = device();
    let light = InputEvent { kind: 0x11, code: 1, value: 1 };
    h.request(STATUS, &[&light.to_bytes()], &[]).unwrap();
    h.request(STATUS, &[b"short"], &[]).unwrap();
    h.request(STATUS, &[], &[8]).unwrap();
    assert_eq!((sender.receive(), sender.receive()), (Some(light), None));
    for n in 0..5000u32 {
        h.request(STATUS, &[&key(0, n).to_bytes()], &[]).unwrap();
    }
    assert_eq!(sender.receive().unwrap().value, 5000 - 4096);
    sender.send(&vec![key(1, 1); 4096]).unwrap();
    assert!(sender.send(&[key(1, 1)]).is_err());
}

#[test]
fn a_buffer_too_small_is_the_drivers_fault() {
    let (mut h, sender) = device();
    sender.send(&[key(1, 1)]).unwrap();
    h.add(EVENTS, &[], &[7]);
    assert!(matches!(h.kick(EVENTS), Err(DeviceError::Driver(_))));
}

/// Ready for ever, without an event.
struct Broken(PipeReader);

impl InputSource for Broken {
    fn ready(&self) -> io::Result<BorrowedFd<'_>> {
        Ok(self.0.as_fd())
    }
    fn next(&mut self) -> io::Result<Option<InputEvent>> {
        Ok(None)
    }
}

#[test]
fn a_broken_source_does_not_keep_the_thread_busy() {
    let (reader, mut writer) = io::pipe().unwrap();
    writer.write_all(b"x").unwrap();
    let mut h = Harness::new(Input::new(InputConfig::default(), Box::new(Broken(reader))));
    h.add(EVENTS, &[], &[8]);
    h.kick(EVENTS).unwrap();
    let rounds = (0..1000).take_while(|_| h.poll(Duration::ZERO).unwrap() > 0).count();
    assert!((1..100).contains(&rounds), "{rounds}");
}

#[test]
fn other_files_are_no_input_devices() {
    for path in ["/dev/null", "/proc/self/stat"] {
        let e = Evdev::new(std::fs::File::open(path).unwrap().into()).unwrap_err();
        assert!(e.to_string().starts_with("not an input device (/dev/input/event*): "), "{e}");
    }
}

#[test]
fn facts() {
    let (queue, _) = Queue::new().unwrap();
    let info = Input::new(InputConfig::default(), Box::new(queue)).info();
    assert_eq!((info.id, info.queue_sizes.len(), info.features), (18, 2, 0));
}
