use std::time::{Duration, Instant};

use krun_virtio::mmio::reg;
use krun_virtio::mock::MmioDriver;

use super::peer::{Fault, Options, Peer, VERSION_1, until};
use super::{WAIT, echo, needs_reset, spec, wait_for_reset_wish};
use crate::vhost_user::message::{CONFIG_CHANGE, Flags, Header, Protocol, Request};
use crate::vhost_user::{VhostUser, VhostUserSpec};

/// What the front end waits for an answer in these tests.
const PATIENCE: Duration = Duration::from_millis(300);

const FAULTS: [Fault; 13] = [
    Fault::Silence,
    Fault::Close,
    Fault::Short,
    Fault::Cut,
    Fault::Huge,
    Fault::Long,
    Fault::Empty,
    Fault::Other,
    Fault::NoReply,
    Fault::Version,
    Fault::Refuse,
    Fault::Twice,
    Fault::Most,
];

/// All that is asked up to the moment when the device runs.
const BEFORE: [Request; 15] = [
    Request::GetFeatures,
    Request::GetProtocolFeatures,
    Request::GetQueueNum,
    Request::SetBackendReqFd,
    Request::GetConfig,
    Request::SetFeatures,
    Request::SetMemTable,
    Request::GetInflightFd,
    Request::SetInflightFd,
    Request::SetVringNum,
    Request::SetVringAddr,
    Request::SetVringBase,
    Request::SetVringCall,
    Request::SetVringKick,
    Request::SetVringEnable,
];

fn patient(peer: &Peer) -> VhostUserSpec {
    VhostUserSpec { timeout: PATIENCE, ..spec(peer) }
}

fn with_fault(request: Request, fault: Fault) -> Peer {
    let fault = Some((request, fault));
    // Notes only where they are the matter: with them a lost back end is waited for.
    let notes = matches!(request, Request::GetInflightFd | Request::SetInflightFd);
    let protocol = if notes { Protocol::all() } else { Options::default().protocol };
    Peer::new(Options { fault, protocol, ..Options::default() })
}

/// Whether the fault leaves a message that a back end may well send.
fn is_possible(request: Request, fault: Fault) -> bool {
    let number = matches!(
        request,
        Request::GetFeatures | Request::GetProtocolFeatures | Request::GetQueueNum | Request::GetInflightFd
    );
    number && matches!(fault, Fault::Refuse | Fault::Most)
}

#[test]
fn every_answer_may_be_wrong_before_the_device_runs() {
    for request in BEFORE {
        for fault in FAULTS {
            let (peer, start) = (with_fault(request, fault), Instant::now());
            let Ok(device) = VhostUser::new(patient(&peer)) else {
                assert!(!is_possible(request, fault), "{request:?} {fault:?}");
                assert!(start.elapsed() < 20 * PATIENCE, "{request:?} {fault:?}");
                continue;
            };
            let mut driver = MmioDriver::direct(device);
            // Without those of the ring, which the peer offers by mistake.
            driver.start(VERSION_1 | 0xff);
            if is_possible(request, fault) {
                assert_eq!(echo(&mut driver, 0, b"x"), b"x", "{request:?} {fault:?}");
            } else {
                until(&format!("{request:?} {fault:?} is noticed"), || needs_reset(&driver));
            }
            driver.reset();
            drop(driver);
            assert!(start.elapsed() < 20 * PATIENCE, "{request:?} {fault:?}");
        }
    }
}

#[test]
fn every_answer_may_be_wrong_when_the_device_stops() {
    for request in [Request::GetVringBase, Request::ResetDevice] {
        for fault in FAULTS {
            let peer = with_fault(request, fault);
            let mut driver = MmioDriver::direct(VhostUser::new(patient(&peer)).unwrap());
            for _ in 0..2 {
                driver.start(u64::MAX);
                assert_eq!(echo(&mut driver, 1, b"x"), b"x", "{request:?} {fault:?}");
                let start = Instant::now();
                driver.reset();
                assert!(start.elapsed() < 20 * PATIENCE, "{request:?} {fault:?}");
            }
            assert!(driver.failures().is_empty());
        }
    }
}

#[test]
fn a_write_to_the_configuration_may_go_wrong() {
    for fault in FAULTS {
        let peer = with_fault(Request::SetConfig, fault);
        let mut driver = MmioDriver::direct(VhostUser::new(patient(&peer)).unwrap());
        driver.transport().write(reg::CONFIG, &[1]);
        driver.start(u64::MAX);
        assert_eq!(echo(&mut driver, 1, b"x"), b"x");
        let start = Instant::now();
        driver.transport().write(reg::CONFIG, &[1]);
        assert!(start.elapsed() < 20 * PATIENCE, "{fault:?}");
        match fault {
            Fault::Refuse | Fault::Most => assert_eq!(echo(&mut driver, 1, b"x"), b"x"),
            _ => wait_for_reset_wish(&driver),
        }
    }
}

#[test]
fn bytes_that_nobody_asked_for_end_it() {
    let peer = Peer::new(Options::default());
    let mut driver = MmioDriver::new(VhostUser::new(patient(&peer)).unwrap());
    driver.start(u64::MAX);
    assert_eq!(echo(&mut driver, 0, b"x"), b"x");
    peer.seen.chatter.lock().unwrap().extend([0; 100]);
    wait_for_reset_wish(&driver);
}

#[test]
fn its_own_requests_may_be_anything() {
    let header = |request, flags, size| Header { request, flags, size }.encode().to_vec();
    for bytes in [
        vec![0xff; 4000],
        header(CONFIG_CHANGE, Flags::REPLY, 0),
        header(CONFIG_CHANGE, Flags::empty(), u32::MAX),
        [header(9, Flags::NEED_REPLY, 40), vec![0; 40]].concat(),
        header(CONFIG_CHANGE, Flags::NEED_REPLY, 0).repeat(2000),
    ] {
        let peer = Peer::new(Options::default());
        let mut driver = MmioDriver::direct(VhostUser::new(patient(&peer)).unwrap());
        driver.start(u64::MAX);
        peer.seen.ask.lock().unwrap().extend(bytes);
        for _ in 0..20 {
            assert_eq!(echo(&mut driver, 0, b"x"), b"x");
        }
        assert!(!needs_reset(&driver));
        driver.reset();
    }
}

/// One that takes no connection, or never says a word.
#[test]
fn a_socket_without_a_back_end_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let spec = VhostUserSpec { timeout: PATIENCE, ..VhostUserSpec::new("rng".parse().unwrap(), &path) };
    let start = Instant::now();
    let mut first = None;
    // The last ones find no room in the queue of connections.
    for _ in 0..3 {
        let e = VhostUser::new(spec.clone()).unwrap_err();
        first.get_or_insert(e.to_string());
    }
    assert!(first.unwrap().contains("no answer in time"));
    assert!(start.elapsed() < 20 * PATIENCE);
    drop(listener);
}

/// However long answers may take: with the machine they are of no use.
#[test]
fn a_kill_ends_every_wait() {
    let hour = Duration::from_secs(3600);
    for request in [Request::SetMemTable, Request::SetVringEnable, Request::GetVringBase, Request::SetConfig]
    {
        let peer = with_fault(request, Fault::Silence);
        let device = VhostUser::new(VhostUserSpec { timeout: hour, ..spec(&peer) }).unwrap();
        let handle = device.handle();
        let (done, returned) = std::sync::mpsc::channel();
        // On a thread of its own, for it waits.
        let thread = std::thread::spawn(move || {
            let mut driver = MmioDriver::direct(device);
            driver.start(u64::MAX);
            driver.transport().write(reg::CONFIG, &[1]);
            driver.reset();
            done.send(()).unwrap();
        });
        let asked = || peer.seen.requests.lock().unwrap().contains(&(request as u32));
        until(&format!("{request:?} is asked"), asked);
        assert!(returned.try_recv().is_err());
        handle.abandon();
        assert_eq!(returned.recv_timeout(WAIT), Ok(()), "{request:?}");
        thread.join().unwrap();
    }
}

#[test]
fn a_timeout_may_be_any() {
    for timeout in [Duration::MAX, Duration::from_secs(i64::MAX as u64), Duration::from_secs(u64::MAX / 4)] {
        let peer = Peer::new(Options::default());
        let device = VhostUser::new(VhostUserSpec { timeout, ..spec(&peer) }).unwrap();
        let mut driver = MmioDriver::direct(device);
        driver.start(u64::MAX);
        assert_eq!(echo(&mut driver, 0, b"x"), b"x", "{timeout:?}");
        driver.reset();
    }
    let peer = Peer::new(Options::default());
    let none = VhostUserSpec { timeout: Duration::ZERO, ..spec(&peer) };
    assert!(VhostUser::new(none).unwrap_err().to_string().contains("in time"));
}

/// Neither the device's thread nor the vCPU waits for it.
#[test]
fn the_flags_of_a_descriptor_may_be_changed() {
    let peer = Peer::new(Options { blocks: true, ..Options::default() });
    let device = VhostUser::new(spec(&peer)).unwrap();
    let (done, returned) = std::sync::mpsc::channel();
    // On a thread of its own, or a mistake would hang the test for ever.
    std::thread::spawn(move || {
        let mut driver = MmioDriver::new(device);
        for _ in 0..2 {
            driver.start(u64::MAX);
            driver.kick(0);
            driver.reset();
        }
        done.send(driver.failures().len()).unwrap();
    });
    assert_eq!(returned.recv_timeout(WAIT), Ok(0));
}
