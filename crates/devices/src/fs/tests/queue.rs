//! Through the rings, with the driver for tests.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use krun_virtio::VirtioDevice;
use krun_virtio::mock::{Harness, Used};
use rustix::fs::{FlockOperation, flock};

use super::client::{longs, u32_at, u64_at, words};
use crate::fs::abi::{LK_FLOCK, op};
use crate::fs::dax::{CHUNK, DaxSpec};
use crate::fs::{ExitCode, Fs, FsSpec};

const HIPRIO: usize = 0;
const REQUESTS: usize = 1;

fn head(op: u32, node: u64, len: usize) -> Vec<u8> {
    [words(&[40 + len as u32, op]), longs(&[9, node]), words(&[0; 4])].concat()
}

fn send(h: &mut Harness, op: u32, node: u64, body: &[u8], room: &[u32]) -> Used {
    let room: Vec<u32> = std::iter::once(16).chain(room.iter().copied()).collect();
    h.request(REQUESTS, &[&head(op, node, body.len()), body], &room).unwrap()
}

fn device() -> (tempfile::TempDir, Arc<ExitCode>, Harness) {
    let dir = tempfile::tempdir().unwrap();
    let exit = Arc::new(ExitCode::new());
    let spec = FsSpec {
        tag: "share".into(),
        source: Some(dir.path().to_owned()),
        exit_code: Some(Arc::clone(&exit)),
        ..FsSpec::default()
    };
    let mut h = Harness::new(Fs::new(spec).unwrap());
    init(&mut h);
    (dir, exit, h)
}

fn init(h: &mut Harness) {
    let init = send(h, op::INIT, 0, &words(&[7, 41, 1 << 17, u32::MAX, 0]), &[64]);
    assert_eq!((init.written, u32_at(&init.data, 4)), (80, 0));
}

#[test]
fn the_configuration_is_that_of_a_file_system() {
    let tag = "x".repeat(36);
    let fs = Fs::new(FsSpec { tag: tag.clone(), ..FsSpec::default() }).unwrap();
    let info = fs.info();
    assert_eq!((info.id, info.queue_sizes.len(), info.features), (26, 2, 0));
    let mut config = [0xffu8; 44];
    fs.config().read(0, &mut config);
    assert_eq!(&config[..36], tag.as_bytes());
    assert_eq!((u32_at(&config, 36), u32_at(&config, 40)), (1, 0));
    let mut past = [1u8; 4];
    fs.config().read(u64::MAX, &mut past);
    assert_eq!(past, [0; 4]);
}

#[test]
fn a_reset_ends_a_pause() {
    let dir = tempfile::tempdir().unwrap();
    let file = fs::File::create(dir.path().join("f")).unwrap();
    let spec = FsSpec {
        tag: "share".into(),
        source: Some(dir.path().to_owned()),
        dax: Some(DaxSpec { size: CHUNK, from: 0 }),
        ..FsSpec::default()
    };
    let mut h = Harness::new(Fs::new(spec).unwrap());
    for len in [1, 2] {
        init(&mut h);
        let found = send(&mut h, op::LOOKUP, 1, b"f\0", &[128]);
        let map = longs(&[u64::MAX, 0, CHUNK, 0, 0]);
        let done = send(&mut h, op::SETUPMAPPING, u64_at(&found.data, 16), &map, &[0]);
        assert_eq!(u32_at(&done.data, 4), 0);
        // The change, and the pause after it.
        file.set_len(len).unwrap();
        assert_eq!(h.poll(Duration::from_secs(5)).unwrap(), 1);
        h.restart().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        while h.poll(Duration::from_millis(50)).unwrap() > 0 {}
    }
}

#[test]
fn a_megabyte_goes_both_ways_in_pages() {
    let (dir, _, mut h) = device();
    let data: Vec<u8> = (0..1u32 << 20).map(|i| ((i * 31) >> 3) as u8).collect();
    let create = [words(&[2, 0o600, 0, 0]), b"big\0".to_vec()].concat();
    let made = send(&mut h, op::CREATE, 1, &create, &[128, 16]);
    let fh = u64_at(&made.data, 16 + 128);
    let write = [longs(&[fh, 0]), words(&[1 << 20, 0, 0, 0, 0, 0])].concat();
    let request = head(op::WRITE, 0, write.len() + data.len());
    let parts: Vec<&[u8]> = [&request[..], &write[..]].into_iter().chain(data.chunks(4096)).collect();
    let done = h.request(REQUESTS, &parts, &[16, 8]).unwrap();
    assert_eq!((u32_at(&done.data, 4), u32_at(&done.data, 16)), (0, 1 << 20));
    assert!(fs::read(dir.path().join("big")).unwrap() == data);
    let read = [longs(&[fh, 0]), words(&[1 << 20, 0, 0, 0, 0, 0])].concat();
    let back = send(&mut h, op::READ, 0, &read, &[4096; 256]);
    assert_eq!(back.written, 16 + (1 << 20));
    assert!(back.data[16..] == data[..]);
    // The end of the file: fewer bytes than room.
    let tail = [longs(&[fh, (1 << 20) - 5]), words(&[8192, 0, 0, 0, 0, 0])].concat();
    let back = send(&mut h, op::READ, 0, &tail, &[4096, 4096]);
    assert_eq!((back.written, u32_at(&back.data, 0)), (21, 21));
}

/// Whoever stops the device waits for one request, so the guest does not choose how long one takes.
#[test]
fn no_request_moves_more_than_was_agreed() {
    const MOST: usize = 1 << 20;
    let (dir, _, mut h) = device();
    let data = vec![7u8; MOST + 4096];
    let create = [words(&[2, 0o600, 0, 0]), b"big\0".to_vec()].concat();
    let fh = u64_at(&send(&mut h, op::CREATE, 1, &create, &[128, 16]).data, 16 + 128);
    let write = [longs(&[fh, 0]), words(&[data.len() as u32, 0, 0, 0, 0, 0])].concat();
    let request = head(op::WRITE, 0, write.len() + data.len());
    let done = h.request(REQUESTS, &[&request, &write, &data], &[16, 8]).unwrap();
    assert_eq!((u32_at(&done.data, 4), u32_at(&done.data, 16) as usize), (0, MOST));
    fs::write(dir.path().join("big"), &data).unwrap();
    let read = [longs(&[fh, 0]), words(&[u32::MAX, 0, 0, 0, 0, 0])].concat();
    let back = send(&mut h, op::READ, 0, &read, &[data.len() as u32]);
    assert_eq!(back.written as usize, 16 + MOST);
}

#[test]
fn forgets_come_on_their_own_queue() {
    let (dir, _, mut h) = device();
    fs::write(dir.path().join("f"), "").unwrap();
    let found = send(&mut h, op::LOOKUP, 1, b"f\0", &[128]);
    let node = u64_at(&found.data, 16);
    let attr = |h: &mut Harness| u32_at(&send(h, op::GETATTR, node, &[0; 16], &[104]).data, 4) as i32;
    assert_eq!(attr(&mut h), 0);
    let done = h.request(HIPRIO, &[&head(op::FORGET, node, 8), &longs(&[1])], &[]).unwrap();
    assert_eq!(done.written, 0);
    assert_eq!(attr(&mut h), -libc::ESTALE);
}

#[test]
fn a_forget_is_done_once_while_a_lock_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let spec = FsSpec {
        tag: "share".into(),
        source: Some(dir.path().to_owned()),
        share_locks: true,
        ..FsSpec::default()
    };
    let mut h = Harness::new(Fs::new(spec).unwrap());
    init(&mut h);
    let lookup = |h: &mut Harness, name: &str| {
        fs::write(dir.path().join(name), "").unwrap();
        u64_at(&send(h, op::LOOKUP, 1, format!("{name}\0").as_bytes(), &[128]).data, 16)
    };
    let (locked, other) = (lookup(&mut h, "locked"), lookup(&mut h, "other"));
    assert_eq!(lookup(&mut h, "other"), other);
    let host = fs::File::open(dir.path().join("locked")).unwrap();
    flock(&host, FlockOperation::NonBlockingLockExclusive).unwrap();
    let open = send(&mut h, op::OPEN, locked, &words(&[libc::O_RDWR as u32, 0]), &[16]);
    let lock =
        [longs(&[u64_at(&open.data, 16), 1, 0, 0]), words(&[libc::F_WRLCK as u32, 0, LK_FLOCK, 0])].concat();
    let waits = h.add(REQUESTS, &[&head(op::SETLKW, locked, lock.len()), &lock], &[16]);
    h.kick(REQUESTS).unwrap();
    assert!(h.collect(REQUESTS).is_none());
    let forget = |h: &mut Harness| {
        let done = h.request(HIPRIO, &[&head(op::FORGET, other, 8), &longs(&[1])], &[]).unwrap();
        assert_eq!((done.written, h.held(HIPRIO)), (0, 0));
    };
    let attr = |h: &mut Harness| u32_at(&send(h, op::GETATTR, other, &[0; 16], &[104]).data, 4) as i32;
    forget(&mut h);
    // The lock is tried again a few times, and nothing else is.
    for _ in 0..3 {
        assert_eq!(h.poll(Duration::from_secs(10)).unwrap(), 1);
    }
    assert_eq!((attr(&mut h), h.held(REQUESTS)), (0, 1));
    drop(host);
    h.poll(Duration::from_secs(10)).unwrap();
    let got = h.collect(REQUESTS).unwrap();
    assert_eq!((got.head, u32_at(&got.data, 4)), (waits, 0));
    assert_eq!(attr(&mut h), 0);
    forget(&mut h);
    assert_eq!(attr(&mut h), -libc::ESTALE);
}

#[test]
fn a_reset_forgets_the_guest() {
    let (dir, exit, mut h) = device();
    fs::write(dir.path().join("f"), "").unwrap();
    let node = u64_at(&send(&mut h, op::LOOKUP, 1, b"f\0", &[128]).data, 16);
    let ioctl = [longs(&[0]), words(&[0, 0x7602]), longs(&[3]), words(&[0, 0])].concat();
    send(&mut h, op::IOCTL, 1, &ioctl, &[16]);
    assert_eq!(exit.get(), Some(3));
    h.restart().unwrap();
    let early = send(&mut h, op::GETATTR, 1, &[0; 16], &[104]);
    assert_eq!(u32_at(&early.data, 4) as i32, -libc::EIO);
    init(&mut h);
    let stale = send(&mut h, op::GETATTR, node, &[0; 16], &[104]);
    assert_eq!(u32_at(&stale.data, 4) as i32, -libc::ESTALE);
}

#[test]
fn a_chain_that_is_no_request_stops_the_device() {
    let (_dir, _, mut h) = device();
    assert!(h.request(REQUESTS, &[&[0; 10]], &[16]).is_err());
    let (_dir, _, mut h) = device();
    assert!(h.request(REQUESTS, &[&head(op::GETATTR, 1, 16), &[0; 16]], &[8]).is_err());
}
