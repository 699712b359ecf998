//! Locks that guest and host see of each other.

use std::fs::File;

use super::client::{Client, ROOT, longs, u32_at, u64_at, words};
use crate::fs::abi::{FOPEN_NOFLUSH, LK_FLOCK, op};
use crate::fs::sys::locks::{self, Record, TO_THE_END};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

const READ: u32 = libc::F_RDLCK as u32;
const WRITE: u32 = libc::F_WRLCK as u32;
const NONE: u32 = libc::F_UNLCK as u32;

fn client() -> (Client, u64, u64) {
    let mut c = Client::with(|s| s.share_locks = true);
    std::fs::write(c.path("f"), "0123456789").unwrap();
    let node = c.lookup(ROOT, c"f").unwrap().node;
    let (fh, flags) = c.open(node, libc::O_RDWR).unwrap();
    assert_eq!(flags & FOPEN_NOFLUSH, 0, "closing a file gives locks back");
    (c, node, fh)
}

fn body(fh: u64, owner: u64, (start, end, kind): (u64, u64, u32), flags: u32) -> Vec<u8> {
    [longs(&[fh, owner, start, end]), words(&[kind, 0, flags, 0])].concat()
}

fn host(c: &Client) -> File {
    File::options().read(true).write(true).open(c.path("f")).unwrap()
}

#[test]
fn record_locks_of_guest_and_host_exclude_each_other() {
    let (mut c, node, fh) = client();
    let all = Record { kind: WRITE, start: 0, end: TO_THE_END };
    let set = |c: &mut Client, owner, lock| c.call(op::SETLK, node, &[&body(fh, owner, lock, 0)]).map(drop);
    set(&mut c, 1, (0, 3, WRITE)).unwrap();
    set(&mut c, 2, (4, 5, READ)).unwrap();
    assert_eq!(set(&mut c, 2, (3, 4, WRITE)), Err(libc::EAGAIN));
    let file = host(&c);
    assert_eq!(locks::get(&file, all), Ok(Record { kind: WRITE, start: 0, end: 3 }));
    assert_eq!(locks::set(&file, all), Err(Errno::AGAIN));
    locks::set(&file, Record { kind: READ, start: 4, end: 9 }).unwrap();
    assert_eq!(set(&mut c, 2, (8, TO_THE_END, WRITE)), Err(libc::EAGAIN));
    let seen = c.call(op::GETLK, node, &[&body(fh, 2, (8, TO_THE_END, WRITE), 0)]).unwrap();
    assert_eq!((u64_at(&seen, 0), u64_at(&seen, 8), u32_at(&seen, 16)), (4, 9, READ));
    // Closed by its owner, and given back by itself.
    c.call(op::FLUSH, node, &[&longs(&[fh, 0, 1])]).unwrap();
    assert_eq!(locks::get(&file, Record { end: 3, ..all }).unwrap().kind, NONE);
    set(&mut c, 2, (0, TO_THE_END, NONE)).unwrap();
    locks::set(&file, all).unwrap();
    assert_eq!(set(&mut c, 1, (0, 0, READ)), Err(libc::EAGAIN));
    // An open file that owns its locks goes without a FLUSH.
    drop(file);
    let (own, _) = c.open(node, libc::O_RDWR).unwrap();
    c.call(op::SETLK, node, &[&body(own, 77, (0, 9, WRITE), 0)]).unwrap();
    let file = host(&c);
    assert_eq!(locks::set(&file, all), Err(Errno::AGAIN));
    c.release(own).unwrap();
    locks::set(&file, all).unwrap();
    // A guest that is gone holds nothing.
    drop(file);
    set(&mut c, 1, (0, 0, WRITE)).unwrap();
    c.server.reset();
    locks::set(&host(&c), all).unwrap();
}

#[test]
fn bsd_locks_of_guest_and_host_exclude_each_other() {
    let (mut c, node, fh) = client();
    let set = |c: &mut Client, op, kind| c.call(op, node, &[&body(fh, 9, (0, 0, kind), LK_FLOCK)]).map(drop);
    let file = host(&c);
    set(&mut c, op::SETLK, READ).unwrap();
    assert_eq!(flock(&file, FlockOperation::NonBlockingLockExclusive), Err(Errno::AGAIN));
    flock(&file, FlockOperation::NonBlockingLockShared).unwrap();
    assert_eq!(set(&mut c, op::SETLK, WRITE), Err(libc::EAGAIN));
    flock(&file, FlockOperation::Unlock).unwrap();
    set(&mut c, op::SETLK, WRITE).unwrap();
    assert_eq!(flock(&file, FlockOperation::NonBlockingLockShared), Err(Errno::AGAIN));
    c.release(fh).unwrap();
    flock(&file, FlockOperation::NonBlockingLockShared).unwrap();
}

#[test]
fn waiting_is_for_who_can_serve_again() {
    let (mut c, node, fh) = client();
    let file = host(&c);
    flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    let wait = body(fh, 9, (0, 0, WRITE), LK_FLOCK);
    assert_eq!(c.call(op::SETLKW, node, &[&wait]).err(), Some(libc::ENOLCK));
    c.server.let_wait(true);
    assert_eq!(c.call(op::SETLKW, node, &[&wait]).err(), Some(libc::EINPROGRESS));
    drop(file);
    c.call(op::SETLKW, node, &[&wait]).unwrap();
    assert!(!c.server.waits());
}

#[test]
fn nonsense_is_refused_and_locks_are_not_served_unasked() {
    let (mut c, node, fh) = client();
    let quota = c.server.share().counts();
    for lock in [(3, 2, WRITE), (0, u64::MAX, WRITE), (0, 0, 7), (u64::MAX, u64::MAX, READ)] {
        assert_eq!(c.call(op::SETLK, node, &[&body(fh, 1, lock, 0)]).err(), Some(libc::EINVAL), "{lock:?}");
    }
    assert_eq!(c.call(op::SETLK, node, &[&body(fh, 1, (0, 0, 7), LK_FLOCK)]).err(), Some(libc::EINVAL));
    assert_eq!(c.call(op::SETLK, node, &[&body(99, 2, (0, 0, READ), 0)]).err(), Some(libc::EBADF));
    assert_eq!(c.call(op::SETLK, ROOT, &[&body(fh, 2, (0, 0, READ), 0)]).err(), Some(libc::EBADF));
    assert_eq!(c.server.share().counts(), quota);
    let mut without = Client::new();
    std::fs::write(without.path("f"), "").unwrap();
    let node = without.lookup(ROOT, c"f").unwrap().node;
    let (fh, _) = without.open(node, libc::O_RDWR).unwrap();
    let lock = body(fh, 1, (0, 0, READ), 0);
    assert_eq!(without.call(op::SETLK, node, &[&lock]).err(), Some(libc::ENOSYS));
}
