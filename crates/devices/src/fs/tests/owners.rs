//! Who owns what the guest makes, and what becomes of set-id bits.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use rustix::thread::{CapabilitiesSecureBits, CapabilitySet};

use super::client::{Client, ROOT, Set, is_root, words};
use crate::fs::abi::{Fattr, OPEN_KILL_SUIDGID, WRITE_KILL_SUIDGID, op};

#[test]
fn new_files_belong_to_the_guests_user() {
    let mut c = Client::new();
    (c.uid, c.gid) = (1234, 5678);
    // Not writable for that user on the host: the guest's kernel has checked already.
    let mine = fs::metadata(c.dir.path()).unwrap();
    let expected = if is_root() { (1234, 5678) } else { (mine.uid(), mine.gid()) };
    c.create(ROOT, c"f", libc::O_RDWR, 0o666).unwrap();
    c.mkdir(ROOT, c"d", 0o777).unwrap();
    c.symlink(ROOT, c"l", c"t").unwrap();
    c.mknod(ROOT, c"p", libc::S_IFIFO | 0o666, 0).unwrap();
    for name in ["f", "d", "l", "p"] {
        let m = fs::symlink_metadata(c.path(name)).unwrap();
        assert_eq!((m.uid(), m.gid()), expected, "{name}");
    }
    assert_eq!(fs::metadata(c.path("f")).unwrap().mode() & 0o7777, 0o666);
    // And the thread is itself again.
    fs::write(c.path("own"), "").unwrap();
    let m = fs::metadata(c.path("own")).unwrap();
    assert_eq!((m.uid(), m.gid()), (mine.uid(), mine.gid()));
}

#[test]
fn a_set_group_id_directory_passes_its_group_on() {
    if !is_root() {
        println!("skipped: giving files to others takes root");
        return;
    }
    let mut c = Client::new();
    fs::create_dir(c.path("d")).unwrap();
    chown(c.path("d"), Some(10), Some(20)).unwrap();
    fs::set_permissions(c.path("d"), fs::Permissions::from_mode(0o2775)).unwrap();
    (c.uid, c.gid) = (1234, 5678);
    let d = c.lookup(ROOT, c"d").unwrap().node;
    c.create(d, c"f", libc::O_RDWR, 0o644).unwrap();
    c.mkdir(d, c"s", 0o755).unwrap();
    let (f, s) = (fs::metadata(c.path("d/f")).unwrap(), fs::metadata(c.path("d/s")).unwrap());
    assert_eq!((f.uid(), f.gid()), (1234, 20));
    assert_eq!((s.gid(), s.mode() & 0o2000), (20, 0o2000));
}

#[test]
fn owners_change_as_the_host_allows() {
    let mut c = Client::new();
    fs::write(c.path("f"), "").unwrap();
    let f = c.lookup(ROOT, c"f").unwrap();
    let both = Fattr::UID | Fattr::GID;
    let same = Set { uid: f.attr.uid, gid: f.attr.gid, ..Set::default() };
    assert!(c.setattr(f.node, both, same).is_ok());
    let other = c.setattr(f.node, both, Set { uid: 4321, gid: 8765, ..Set::default() });
    if is_root() {
        let a = other.unwrap();
        assert_eq!((a.uid, a.gid), (4321, 8765));
        // Owner and mode in one request: the mode is not lost to the change of owner.
        let set = Set { uid: 1, mode: 0o6755, ..Set::default() };
        let a = c.setattr(f.node, Fattr::UID | Fattr::MODE, set).unwrap();
        assert_eq!((a.uid, a.gid, a.mode & 0o7777), (1, 8765, 0o6755));
        let l = c.symlink(ROOT, c"l", c"f").unwrap().node;
        assert_eq!(c.setattr(l, Fattr::UID, Set { uid: 7, ..Set::default() }).unwrap().uid, 7);
        assert_eq!(fs::metadata(c.path("f")).unwrap().uid(), 1, "not the link's target");
    } else {
        assert_eq!(other, Err(libc::EPERM));
    }
}

#[test]
fn set_id_bits_go_when_the_guest_says_so() {
    let mut c = Client::new();
    let (f, fh) = c.create(ROOT, c"f", libc::O_RDWR, 0o755).unwrap();
    let bits = |c: &Client| fs::metadata(c.path("f")).unwrap().mode() & 0o6000;
    let arm = |c: &Client| fs::set_permissions(c.path("f"), fs::Permissions::from_mode(0o6755)).unwrap();
    arm(&c);
    if is_root() {
        c.write(fh, 0, b"x", 0).unwrap();
        assert_eq!(bits(&c), 0o6000, "root's write leaves them");
    }
    c.write(fh, 0, b"x", WRITE_KILL_SUIDGID).unwrap();
    assert_eq!(bits(&c), 0);
    arm(&c);
    c.setattr(f.node, Fattr::SIZE | Fattr::KILL_SUIDGID, Set::default()).unwrap();
    assert_eq!(bits(&c), 0);
    // The next change has its privilege back.
    let a = c.setattr(f.node, Fattr::MODE, Set { mode: 0o6755, ..Set::default() }).unwrap();
    assert_eq!(a.mode & 0o6000, 0o6000);
    if is_root() {
        c.write(fh, 0, b"x", 0).unwrap();
        assert_eq!(bits(&c), 0o6000);
    }
}

/// Without `CAP_SETPCAP` the kernel raises the file capabilities whenever a worn identity is taken off.
#[test]
fn set_id_bits_go_also_after_an_identity_was_worn_without_setpcap() {
    if !is_root() {
        println!("skipped: wearing identities takes root");
        return;
    }
    // Capabilities are a thread's own.
    std::thread::spawn(|| {
        let mut bits = rustix::thread::capabilities_secure_bits().unwrap();
        bits.remove(CapabilitiesSecureBits::NO_SETUID_FIXUP);
        rustix::thread::set_capabilities_secure_bits(bits).unwrap();
        let mut caps = rustix::thread::capabilities(None).unwrap();
        caps.effective.remove(CapabilitySet::SETPCAP);
        caps.permitted.remove(CapabilitySet::SETPCAP);
        rustix::thread::set_capabilities(None, caps).unwrap();
        let mut c = Client::new();
        let (_, fh) = c.create(ROOT, c"f", libc::O_RDWR, 0o755).unwrap();
        fs::set_permissions(c.path("f"), fs::Permissions::from_mode(0o6755)).unwrap();
        // In one request: no privilege for set-id bits, and another identity.
        (c.uid, c.gid) = (1234, 5678);
        let body = words(&[(libc::O_RDWR | libc::O_TRUNC) as u32, 0o644, 0, OPEN_KILL_SUIDGID]);
        c.call(op::CREATE, ROOT, &[&body, b"other\0"]).unwrap();
        assert_eq!(fs::metadata(c.path("other")).unwrap().uid(), 1234);
        c.write(fh, 0, b"x", WRITE_KILL_SUIDGID).unwrap();
        assert_eq!(fs::metadata(c.path("f")).unwrap().mode() & 0o6000, 0);
    })
    .join()
    .unwrap();
}

#[test]
fn attributes_of_set_id_files_are_not_kept() {
    let mut c = Client::new();
    fs::write(c.path("f"), "").unwrap();
    let valid = |c: &mut Client| {
        let f = c.lookup(ROOT, c"f").unwrap();
        let again = c.call(crate::fs::abi::op::GETATTR, f.node, &[&[0; 16]]).unwrap();
        (f.attr_valid, super::client::u64_at(&again, 0))
    };
    assert_eq!(valid(&mut c), (1, 1));
    fs::set_permissions(c.path("f"), fs::Permissions::from_mode(0o4755)).unwrap();
    assert_eq!(valid(&mut c), (0, 0));
}
