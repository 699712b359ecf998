use std::sync::atomic::Ordering;
use std::time::Duration;

use krun_virtio::mmio::{reg, status};
use krun_virtio::mock::{self, MmioDriver};
use krun_virtio::{DeviceError, VirtioDevice};

use super::peer::{Options, Peer, VERSION_1, until};
use super::{WAIT, echo, needs_reset, spec, wait_for_reset_wish};
use crate::console::Numbered;
use crate::vhost_user::device::shared_memory;
use crate::vhost_user::message::{F_PROTOCOL_FEATURES, Flags, Protocol, Request};
use crate::vhost_user::{DeviceKind, VhostUser, VhostUserSpec};

fn config(driver: &MmioDriver) -> [u8; 12] {
    let mut bytes = [0; 12];
    driver.transport().read(reg::CONFIG, &mut bytes);
    bytes
}

#[test]
fn a_device_is_what_its_back_end_says() {
    let peer = Peer::new(Options::default());
    let device = VhostUser::new(spec(&peer)).unwrap();
    let info = device.info();
    assert_eq!((info.id, info.name.as_str()), (3, "vhost-user-console"));
    // Neither the protocol's own bit nor one of a ring that nobody here knows.
    assert_eq!(info.features, VERSION_1 | 1 << 3);
    assert_eq!(info.queue_sizes, [128, 128, 64, 64]);
    let mut bytes = [0xff; 16];
    device.config().read(8, &mut bytes);
    assert_eq!(bytes[..6], [9, 10, 11, 12, 0, 0]);
    assert_eq!(peer.requests(), [3, 1, 15, 16, 17, 21, 24]);
    let sized = VhostUserSpec { queues: Some(2), sizes: vec![16], ..spec(&peer) };
    drop(device);
    assert_eq!(VhostUser::new(sized).unwrap().info().queue_sizes, [16, 16]);
}

#[test]
fn a_back_end_that_lacks_something_is_named() {
    let text = |options, kind, tag: Option<&str>| {
        let peer = Peer::new(options);
        let spec = VhostUserSpec { tag: tag.map(str::to_owned), ..VhostUserSpec::new(kind, peer.path()) };
        VhostUser::new(spec).map(|d| d.info().queue_sizes.len()).map_err(|e| e.to_string())
    };
    let old = Options { features: F_PROTOCOL_FEATURES, ..Options::default() };
    assert!(text(old, DeviceKind::RNG, None).unwrap_err().contains("virtio 1.0"));
    let bare = Options { features: VERSION_1, ..Options::default() };
    assert!(text(bare.clone(), DeviceKind::CONSOLE, None).unwrap_err().contains("configuration"));
    assert!(text(bare.clone(), DeviceKind::FS, None).unwrap_err().contains("tag"));
    assert_eq!(text(bare.clone(), DeviceKind::FS, Some("x")), Ok(2));
    assert_eq!(text(bare.clone(), DeviceKind::VSOCK, None), Ok(3));
    assert_eq!(text(bare, DeviceKind::RNG, None), Ok(1));
    let nowhere = VhostUser::new(VhostUserSpec::new(DeviceKind::RNG, "/nowhere")).unwrap_err();
    assert!(nowhere.to_string().contains("cannot connect") && nowhere.to_string().contains("/nowhere"));
}

#[test]
fn a_configuration_of_unknown_length_is_found() {
    for len in [0, 1, 12, 200, 256] {
        let peer = Peer::new(Options { config: vec![7; len], ..Options::default() });
        let kind = DeviceKind::from_id(63).unwrap();
        let device = VhostUser::new(VhostUserSpec::new(kind, peer.path())).unwrap();
        let mut bytes = [0; 256];
        device.config().read(0, &mut bytes);
        assert_eq!(bytes.iter().filter(|b| **b == 7).count(), len);
    }
}

/// Data goes round, whether the back end raises the interrupt itself or is helped.
#[test]
fn data_goes_round() {
    for direct in [true, false] {
        let peer = Peer::new(Options::default());
        let device = VhostUser::new(spec(&peer)).unwrap();
        let mut driver = if direct { MmioDriver::direct(device) } else { MmioDriver::new(device) };
        driver.start(u64::MAX);
        for n in 0..300u32 {
            assert_eq!(echo(&mut driver, (n % 2) as usize, &n.to_le_bytes()), n.to_le_bytes());
        }
        assert_eq!(*peer.seen.rings.lock().unwrap(), [(0, 128, 0), (1, 128, 0)]);
        let wanted = VERSION_1 | F_PROTOCOL_FEATURES | 1 << 3;
        assert_eq!(*peer.seen.features.lock().unwrap(), wanted);
        assert!(!needs_reset(&driver));
    }
}

/// A back end that knows no protocol features starts its rings by itself.
#[test]
fn the_oldest_back_ends_work() {
    let peer = Peer::new(Options { features: VERSION_1, ..Options::default() });
    let device = VhostUser::new(VhostUserSpec::new(DeviceKind::RNG, peer.path())).unwrap();
    let mut driver = MmioDriver::direct(device);
    driver.start(u64::MAX);
    until("the kick is handed over", || peer.seen.requests.lock().unwrap().contains(&12));
    driver.reset();
    // The features are asked for once more only to know that all before is done.
    assert_eq!(peer.requests(), [3, 1, 2, 5, 8, 10, 9, 13, 14, 12, 1, 11]);
}

#[test]
fn a_reset_takes_the_queues_back() {
    let peer = Peer::new(Options::default());
    let mut driver = MmioDriver::direct(VhostUser::new(spec(&peer)).unwrap());
    for _ in 0..3 {
        driver.start(u64::MAX);
        assert_eq!(echo(&mut driver, 1, b"abc"), b"abc");
        peer.requests();
        driver.reset();
        assert_eq!(peer.requests(), [18, 11, 18, 11, 34]);
        assert_eq!(driver.get(reg::INTERRUPT_STATUS), 0);
    }
}

#[test]
fn the_configuration_is_written_and_read_at_once() {
    let peer = Peer::new(Options::default());
    let mut driver = MmioDriver::new(VhostUser::new(spec(&peer)).unwrap());
    for running in [false, true] {
        if running {
            driver.start(u64::MAX);
        }
        driver.transport().write(reg::CONFIG + 4, &[50, 51, 52, u8::from(running)]);
        assert_eq!(config(&driver)[3..9], [4, 50, 51, 52, u8::from(running), 9]);
        assert_eq!(peer.seen.config.lock().unwrap()[4], 50);
        // Nothing past the end gets there.
        driver.transport().write(reg::CONFIG + 10, &[0; 4]);
        assert_eq!(config(&driver)[10..], [11, 12]);
    }
}

/// As a driver selects part of an input device's configuration, byte by byte, and a back end that keeps both bytes
/// only when they come together is told.
#[test]
fn what_is_selected_of_an_input_device_is_told_as_a_whole() {
    let peer = Peer::new(Options { config: vec![7; 136], ..Options::default() });
    let device = VhostUser::new(VhostUserSpec::new(DeviceKind::INPUT, peer.path())).unwrap();
    let driver = MmioDriver::new(device);
    let told = || peer.seen.config.lock().unwrap().clone();
    for (at, byte, selected) in [(0, 0x11, [0x11, 0]), (1, 3, [0x11, 3]), (1, 4, [0x11, 4]), (0, 1, [1, 4])] {
        driver.transport().write(reg::CONFIG + at, &[byte]);
        assert_eq!((&told()[..2], told()[2..] == [7; 134]), (&selected[..], true));
        // What it answers need not say what was selected.
        peer.seen.config.lock().unwrap()[..2].fill(0);
        driver.transport().write(reg::CONFIG + 2, &[7]);
        peer.seen.config.lock().unwrap()[..2].fill(0);
    }
    let sets = peer.requests().iter().filter(|r| **r == Request::SetConfig as u32).count();
    assert_eq!(sets, 8);
}

/// A console's interrupts wait for the terminals of the device before, and are not lost.
#[test]
fn a_console_waits_for_its_turn() {
    for given in [true, false] {
        let peer = Peer::new(Options::default());
        let before = Numbered::default();
        let mut device = VhostUser::new(spec(&peer)).unwrap();
        device.after(before.next().unwrap());
        let mut driver = MmioDriver::direct(device);
        driver.start(u64::MAX);
        assert!(driver.add(1, &[b"x"], &[1]));
        driver.kick(1);
        // It is done, and the driver is not told.
        until("it is done", || driver.wait_used(1, Duration::ZERO).is_some_and(|used| used.data == b"x"));
        assert!(!driver.wait_interrupt(Duration::from_millis(50)));
        before.set(given);
        // Without a turn it does not wait for ever.
        assert!(driver.wait_interrupt(WAIT));
        // From now on it is told at once.
        assert!(driver.add(1, &[b"y"], &[1]));
        driver.kick(1);
        assert!(driver.wait_interrupt(WAIT));
    }
}

/// Nor is the guest told early when the back end comes back, or has another configuration.
#[test]
fn nothing_is_told_before_the_turn() {
    let peer = Peer::new(Options { protocol: Protocol::all(), idle: 1, ..Options::default() });
    let before = Numbered::default();
    let mut device = VhostUser::new(spec(&peer)).unwrap();
    device.after(before.next().unwrap());
    let space = device.config();
    let mut driver = MmioDriver::new(device);
    driver.start(u64::MAX);
    until("it has started", || peer.seen.rings.lock().unwrap().len() == 2);
    peer.seen.rings.lock().unwrap().clear();
    peer.seen.hang_up.store(true, Ordering::SeqCst);
    until("it is back", || peer.seen.rings.lock().unwrap().len() == 2);
    peer.change_config(&[50; 12], Flags::NEED_REPLY);
    until("the configuration is another", || {
        let mut first = [0];
        space.read(0, &mut first);
        first == [50]
    });
    assert!(!driver.wait_interrupt(Duration::from_millis(100)));
    // Nor has the driver seen it.
    assert_ne!(config(&driver), [50; 12]);
    before.set(true);
    assert!(driver.wait_interrupt(WAIT));
    until("the driver sees it", || config(&driver) == [50; 12]);
}

#[test]
fn a_changed_configuration_is_told() {
    let peer = Peer::new(Options::default());
    let mut driver = MmioDriver::direct(VhostUser::new(spec(&peer)).unwrap());
    driver.start(u64::MAX);
    for (n, flags) in [(100, Flags::empty()), (101, Flags::NEED_REPLY)] {
        peer.change_config(&[n; 12], flags);
        // Others may come before: the peer interrupts when it starts.
        while config(&driver) != [n; 12] {
            assert!(driver.wait_interrupt(WAIT));
        }
    }
    assert_eq!(echo(&mut driver, 0, b"x"), b"x");
}

#[test]
fn a_back_end_that_is_gone_is_found_again_after_a_reset() {
    let peer = Peer::new(Options::default());
    let mut driver = MmioDriver::direct(VhostUser::new(spec(&peer)).unwrap());
    for _ in 0..3 {
        driver.start(u64::MAX);
        assert_eq!(echo(&mut driver, 0, b"x"), b"x");
        peer.seen.hang_up.store(true, Ordering::SeqCst);
        wait_for_reset_wish(&driver);
        assert!(driver.failures().is_empty());
    }
    // Gone for good: the driver is told, and nothing else happens.
    drop(peer);
    driver.start(u64::MAX);
    wait_for_reset_wish(&driver);
    driver.reset();
    assert!(driver.failures().is_empty());
}

/// While the device is idle nobody watches; the next start finds out.
#[test]
fn a_back_end_may_change_while_nobody_uses_it() {
    let peer = Peer::new(Options::default());
    let mut driver = MmioDriver::new(VhostUser::new(spec(&peer)).unwrap());
    peer.seen.hang_up.store(true, Ordering::SeqCst);
    until("it has hung up", || {
        peer.seen.hang_up.store(true, Ordering::SeqCst);
        driver.transport().write(reg::CONFIG, &[9]);
        peer.requests().contains(&(Request::SetOwner as u32))
    });
    driver.start(u64::MAX);
    if needs_reset(&driver) {
        driver.start(u64::MAX);
    }
    assert_eq!(echo(&mut driver, 0, b"x"), b"x");
}

/// What was under way is done by the next one, and the driver sees nothing of it.
#[test]
fn a_back_end_that_keeps_notes_is_followed_by_another() {
    let options = Options { protocol: Protocol::all(), idle: 1, ..Options::default() };
    let peer = Peer::new(options);
    let mut driver = MmioDriver::direct(VhostUser::new(spec(&peer)).unwrap());
    driver.start(u64::MAX);
    assert!(driver.add(1, &[b"under way"], &[9]));
    driver.kick(1);
    until("it has started", || peer.seen.rings.lock().unwrap().len() == 2);
    peer.requests();
    peer.seen.hang_up.store(true, Ordering::SeqCst);
    assert_eq!(driver.wait_used(1, WAIT).unwrap().data, b"under way");
    let requests = peer.requests();
    assert!(requests.contains(&32) && !requests.contains(&31), "{requests:?}");
    assert!(!needs_reset(&driver));
    // And the one after that goes on where this one was.
    peer.seen.rings.lock().unwrap().clear();
    peer.seen.hang_up.store(true, Ordering::SeqCst);
    until("the third one has started", || peer.seen.rings.lock().unwrap().len() == 2);
    assert_eq!(*peer.seen.rings.lock().unwrap(), [(0, 128, 0), (1, 128, 1)]);
    assert_eq!(echo(&mut driver, 1, b"on"), b"on");
}

/// Without what the one before had, it is not waited for: the driver starts anew.
#[test]
fn a_back_end_that_is_another_than_before_ends_the_wait() {
    let first = Options { protocol: Protocol::all(), ..Options::default() };
    for later in [Options::default(), Options { features: first.features - (1 << 3), ..first.clone() }] {
        let same = later.features == first.features;
        let peer = Peer::new(Options { later: Some(Box::new(later)), ..first.clone() });
        let mut driver = MmioDriver::direct(VhostUser::new(spec(&peer)).unwrap());
        driver.start(u64::MAX);
        assert_eq!(echo(&mut driver, 0, b"x"), b"x");
        peer.seen.hang_up.store(true, Ordering::SeqCst);
        wait_for_reset_wish(&driver);
        assert!(driver.failures().is_empty());
        if same {
            driver.start(u64::MAX);
            assert_eq!(echo(&mut driver, 0, b"y"), b"y");
        }
    }
}

#[test]
fn a_reset_ends_the_wait_for_a_back_end() {
    let peer = Peer::new(Options { protocol: Protocol::all(), ..Options::default() });
    let mut driver = MmioDriver::direct(VhostUser::new(spec(&peer)).unwrap());
    driver.start(u64::MAX);
    assert_eq!(echo(&mut driver, 0, b"x"), b"x");
    drop(peer);
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(driver.get(reg::STATUS) & (status::NEEDS_RESET | status::DRIVER_OK), status::DRIVER_OK);
    driver.reset();
}

#[test]
fn a_ring_that_is_given_up_is_told() {
    let peer = Peer::new(Options::default());
    let mut driver = MmioDriver::new(VhostUser::new(spec(&peer)).unwrap());
    driver.start(u64::MAX);
    assert_eq!(echo(&mut driver, 0, b"x"), b"x");
    peer.seen.break_ring.store(true, Ordering::SeqCst);
    wait_for_reset_wish(&driver);
    driver.start(u64::MAX);
    assert_eq!(echo(&mut driver, 0, b"y"), b"y");
}

#[test]
fn private_memory_is_not_shown() {
    assert!(matches!(shared_memory(&mock::memory(4096)), Err(DeviceError::Host { .. })));
}
