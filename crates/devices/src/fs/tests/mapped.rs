//! The DAX window, as a guest asks for it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};

use krun_memory::Memfd;
use krun_virtio::{SharedMemory, VirtioDevice};

use super::client::{Client, ROOT, longs, u32_at, words};
use crate::fs::abi::{Fattr, op};
use crate::fs::dax::{CHUNK, DaxSpec};
use crate::fs::tests::client::Set;
use crate::fs::{CachePolicy, Fs, FsError, FsSpec, setup};

const PIECES: u64 = 4;
const READ: u64 = 2;
const WRITE: u64 = 1;
const WHOLE: u64 = PIECES * CHUNK;

/// A guest with a window, and a file `f` of two pieces that begin with `a` and `b`.
fn client(change: impl FnOnce(&mut FsSpec)) -> Client {
    let mut client = Client::with(|s| {
        let root = s.source.clone().unwrap();
        let f = File::create(root.join("f")).unwrap();
        f.set_len(2 * CHUNK).unwrap();
        f.write_all_at(b"a", 0).unwrap();
        f.write_all_at(b"b", CHUNK).unwrap();
        s.dax = Some(DaxSpec { size: WHOLE, from: CHUNK });
        change(s);
    });
    let windows = client.server.window().is_some();
    let reply = init(&mut client, true);
    // FUSE_MAP_ALIGNMENT and the alignment; FUSE_HAS_INODE_DAX.
    let told = (u32_at(&reply, 12) >> 26 & 1, u32_at(&reply, 28) >> 16, u32_at(&reply, 32) >> 1 & 1);
    assert_eq!(told, if windows { (1, 21, 1) } else { (0, 0, 0) });
    client
}

/// INIT of a guest that knows of mapped files, or does not.
fn init(c: &mut Client, knows: bool) -> Vec<u8> {
    let flags = u32::MAX >> 1;
    c.call(op::INIT, 0, &[&words(&[7, 41, 1 << 17, flags, if knows { 2 } else { 0 }]), &[0; 44]]).unwrap()
}

fn map(c: &mut Client, node: u64, at: u64, offset: u64, len: u64, flags: u64) -> Result<(), i32> {
    // Linux's driver names no open file.
    let body = longs(&[u64::MAX, offset, len, flags, at]);
    c.raw(op::SETUPMAPPING, node, &body, 0).map(drop)
}

fn unmap(c: &mut Client, node: u64, places: &[(u64, u64)]) -> Result<(), i32> {
    let pairs: Vec<u64> = places.iter().flat_map(|(at, len)| [*at, *len]).collect();
    let body = [words(&[places.len() as u32]), longs(&pairs)].concat();
    c.raw(op::REMOVEMAPPING, node, &body, 0).map(drop)
}

/// The first byte of each piece of the window.
fn firsts(c: &Client) -> Vec<u8> {
    let copy = Memfd::new(WHOLE).unwrap();
    c.server.window().unwrap().mapping().copy_to_file(0..WHOLE as usize, copy.file(), 0).unwrap();
    (0..PIECES)
        .map(|n| {
            let mut byte = [0];
            copy.file().read_exact_at(&mut byte, n * CHUNK).unwrap();
            byte[0]
        })
        .collect()
}

/// Writes to the window as the guest would; false if it may not.
fn poke(c: &Client, at: u64, byte: u8) -> bool {
    let data = Memfd::new(1).unwrap();
    data.file().write_all_at(&[byte], 0).unwrap();
    let at = at as usize;
    c.server.window().unwrap().mapping().copy_from_file(at..at + 1, data.file(), 0).unwrap()
}

/// The flags of a file's attributes.
fn flags(c: &mut Client, name: &str) -> u32 {
    let reply = c.raw(op::LOOKUP, ROOT, &[name.as_bytes(), b"\0"].concat(), 128).unwrap();
    u32_at(&reply, 40 + 84)
}

#[test]
fn files_are_shown_where_the_guest_wants_them() {
    let mut c = client(|_| {});
    let f = c.lookup(ROOT, c"f").unwrap().node;
    map(&mut c, f, CHUNK, 0, 2 * CHUNK, READ | WRITE).unwrap();
    assert_eq!(firsts(&c), [0, b'a', b'b', 0]);
    // In place of what was there.
    map(&mut c, f, 2 * CHUNK, 0, CHUNK, READ).unwrap();
    assert_eq!(firsts(&c), [0, b'a', b'a', 0]);
    assert!(poke(&c, CHUNK, b'A') && !poke(&c, 2 * CHUNK, b'B'));
    assert_eq!(fs::read(c.path("f")).unwrap()[0], b'A');
    assert_eq!(firsts(&c), [0, b'A', b'A', 0]);
    unmap(&mut c, f, &[(2 * CHUNK, CHUNK), (CHUNK, CHUNK)]).unwrap();
    assert_eq!(firsts(&c), [0; 4]);
    // A file that has no name any more.
    map(&mut c, f, 0, CHUNK, CHUNK, READ).unwrap();
    c.unlink(ROOT, c"f").unwrap();
    map(&mut c, f, CHUNK, CHUNK, CHUNK, READ | WRITE).unwrap();
    assert_eq!(firsts(&c), [b'b', b'b', 0, 0]);
    // All goes when the guest starts anew.
    c.init().unwrap();
    assert_eq!((firsts(&c), c.server.window().unwrap().count()), (vec![0; 4], 0));
}

#[test]
fn what_is_no_place_is_refused() {
    let mut c = client(|_| {});
    fs::create_dir(c.path("d")).unwrap();
    let (f, d) = (c.lookup(ROOT, c"f").unwrap().node, c.lookup(ROOT, c"d").unwrap().node);
    let inval = Err(libc::EINVAL);
    for (at, offset, len) in [
        (WHOLE, 0, CHUNK),
        (WHOLE - CHUNK, 0, 2 * CHUNK),
        (0, 0, WHOLE + CHUNK),
        (4096, 0, CHUNK),
        (0, 4096, CHUNK),
        (0, 0, 4096),
        (0, 0, 0),
        (u64::MAX - CHUNK + 1, 0, CHUNK),
        (CHUNK, 0, u64::MAX - CHUNK + 1),
        (0, u64::MAX - CHUNK + 1, CHUNK),
        (0, (1 << 63) - CHUNK, CHUNK),
    ] {
        assert_eq!(map(&mut c, f, at, offset, len, READ), inval, "{at:#x} {offset:#x} {len:#x}");
    }
    for node in [d, ROOT] {
        assert_eq!(map(&mut c, node, 0, 0, CHUNK, READ), inval);
    }
    assert!(map(&mut c, 12345, 0, 0, CHUNK, READ).is_err());
    for place in [(WHOLE, CHUNK), (4096, CHUNK), (0, 4096), (CHUNK, u64::MAX - CHUNK + 1), (0, 0)] {
        assert_eq!(unmap(&mut c, f, &[place]), inval, "{place:?}");
    }
    // More than the list has.
    assert_eq!(c.raw(op::REMOVEMAPPING, f, &words(&[2, 0, 0, 0, 0]), 0).err(), Some(libc::EINVAL));
    assert_eq!(c.raw(op::REMOVEMAPPING, f, &words(&[u32::MAX]), 0).err(), Some(libc::EINVAL));
    assert_eq!((firsts(&c), c.server.window().unwrap().count()), (vec![0; 4], 0));
    // Without a window there is no such request.
    let mut without = client(|s| s.dax = None);
    let f = without.lookup(ROOT, c"f").unwrap().node;
    assert_eq!(map(&mut without, f, 0, 0, CHUNK, READ), Err(libc::ENOSYS));
    assert_eq!(unmap(&mut without, f, &[(0, CHUNK)]), Err(libc::ENOSYS));
}

#[test]
fn nothing_is_written_through_a_read_only_share() {
    let mut c = client(|s| s.read_only = true);
    let f = c.lookup(ROOT, c"f").unwrap().node;
    assert_eq!(map(&mut c, f, 0, 0, CHUNK, READ | WRITE), Err(libc::EROFS));
    assert_eq!(map(&mut c, f, 0, 0, CHUNK, WRITE), Err(libc::EROFS));
    map(&mut c, f, 0, 0, CHUNK, READ).unwrap();
    assert!(!poke(&c, 0, b'x'));
    assert_eq!(firsts(&c), [b'a', 0, 0, 0]);
}

#[test]
fn large_files_are_offered_and_small_and_special_ones_are_not() {
    let prepare = |s: &mut FsSpec| {
        let root = s.source.clone().unwrap();
        fs::write(root.join("small"), "x").unwrap();
        fs::create_dir(root.join("d")).unwrap();
        fs::copy(root.join("f"), root.join("set-id")).unwrap();
        fs::set_permissions(root.join("set-id"), fs::Permissions::from_mode(0o4755)).unwrap();
    };
    let mut c = client(prepare);
    let all = |c: &mut Client| ["f", "small", "d", "set-id"].map(|name| flags(c, name));
    assert_eq!(all(&mut c), [2, 0, 0, 0]);
    // A guest that does not know of it.
    let mut c = client(prepare);
    init(&mut c, false);
    assert_eq!(all(&mut c), [0; 4]);
    let mut c = client(|s| {
        prepare(s);
        s.dax = None;
    });
    assert_eq!(all(&mut c), [0; 4]);
}

#[test]
fn a_file_that_became_shorter_is_complete_again_when_the_guest_has_heard_of_it() {
    let mut c = client(|s| s.cache = CachePolicy::NEVER);
    let f = c.lookup(ROOT, c"f").unwrap().node;
    map(&mut c, f, 0, CHUNK, CHUNK, READ | WRITE).unwrap();
    let host = File::options().write(true).open(c.path("f")).unwrap();
    host.set_len(CHUNK).unwrap();
    let window = std::sync::Arc::clone(c.server.window().unwrap());
    assert!(window.mend() && !window.mend());
    // What the guest writes meanwhile is nobody's.
    assert!(poke(&c, 0, b'?'));
    c.lookup(ROOT, c"f").unwrap();
    assert_eq!(window.lacking().len(), 1);
    host.write_all_at(b"new", CHUNK).unwrap();
    assert_eq!(firsts(&c)[0], b'?');
    c.lookup(ROOT, c"f").unwrap();
    // Its end is not in the window for now, as it lies within a piece.
    assert_eq!((firsts(&c)[0], window.lacking()[0].there), (b'n', 4096));
    // The guest itself makes it shorter and longer.
    c.setattr(f, Fattr::SIZE, Set { size: 0, ..Set::default() }).unwrap();
    assert_eq!((window.lacking()[0].there, window.mend()), (0, false));
    c.setattr(f, Fattr::SIZE, Set { size: 2 * CHUNK, ..Set::default() }).unwrap();
    assert!(window.lacking().is_empty() && !window.mend());
    // One that the guest does not know any more stays as it is.
    host.set_len(0).unwrap();
    assert!(window.mend());
    c.forget(f, 3);
    host.set_len(2 * CHUNK).unwrap();
    c.lookup(ROOT, c"f").unwrap();
    assert_eq!(window.lacking().len(), 1);
}

#[test]
fn what_the_host_changes_is_followed_without_a_request() {
    let mut c = client(|_| {});
    let f = c.lookup(ROOT, c"f").unwrap().node;
    map(&mut c, f, 0, 0, 2 * CHUNK, READ | WRITE).unwrap();
    let (host, window) =
        (File::options().write(true).open(c.path("f")).unwrap(), c.server.window().cloned().unwrap());
    let there = || window.lacking().iter().map(|l| l.there).collect::<Vec<_>>();
    host.set_len(4097).unwrap();
    c.server.follow_changes();
    assert_eq!(there(), [8192, 0]);
    assert!(!window.mend());
    host.set_len(CHUNK + 1).unwrap();
    host.write_all_at(b"n", CHUNK).unwrap();
    c.server.follow_changes();
    assert_eq!((there(), firsts(&c)), (vec![4096], vec![b'a', b'n', 0, 0]));
    // The end of a file that ends within a piece is not asked for again and again, and found when it moves.
    let (fh, _) = c.open(f, libc::O_RDWR).unwrap();
    c.write(fh, 2 * CHUNK - 1, b"w", 0).unwrap();
    assert_eq!(there(), [0u64; 0]);
    host.set_len(0).unwrap();
    unmap(&mut c, f, &[(0, 2 * CHUNK)]).unwrap();
    c.server.follow_changes();
    // One that is too short from the start.
    map(&mut c, f, CHUNK, CHUNK, CHUNK, READ).unwrap();
    assert_eq!((there(), window.mend()), (vec![0], false));
}

#[test]
fn holes_have_their_room_before_they_can_be_written_to() {
    use std::os::unix::fs::MetadataExt;
    let mut c = client(|_| {});
    let f = c.lookup(ROOT, c"f").unwrap().node;
    let blocks = |c: &Client| fs::metadata(c.path("f")).unwrap().blocks();
    map(&mut c, f, 0, 0, CHUNK, READ).unwrap();
    assert_eq!(map(&mut c, f, WHOLE, 0, CHUNK, READ | WRITE), Err(libc::EINVAL));
    assert!(blocks(&c) < CHUNK / 512, "nothing is taken for what is refused");
    map(&mut c, f, 0, 0, CHUNK, READ | WRITE).unwrap();
    assert!((CHUNK / 512..2 * CHUNK / 512).contains(&blocks(&c)), "{}", blocks(&c));
    assert_eq!(fs::metadata(c.path("f")).unwrap().len(), 2 * CHUNK);
}

#[test]
fn a_longer_file_is_not_shown_again_while_the_disk_has_no_room_for_it() {
    let mut small = None;
    let mut c = client(|s| {
        let small = small.insert(s.source.clone().unwrap().join("small"));
        fs::create_dir(&*small).unwrap();
    });
    let small = small.unwrap();
    let mount = |args: &[&str]| std::process::Command::new(args[0]).args(&args[1..]).arg(&small).output();
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs"]).is_ok_and(|out| out.status.success()) {
        println!("skipped: no file system can be mounted here");
        return;
    }
    let host = File::create(small.join("f")).unwrap();
    host.set_len(CHUNK).unwrap();
    let dir = c.lookup(ROOT, c"small").unwrap().node;
    let f = c.lookup(dir, c"f").unwrap().node;
    map(&mut c, f, 0, 0, CHUNK, READ | WRITE).unwrap();
    let window = c.server.window().cloned().unwrap();
    let mut resize = |len| {
        host.set_len(len).unwrap();
        c.server.follow_changes();
        window.lacking().iter().map(|l| l.there).collect::<Vec<_>>()
    };
    assert_eq!(resize(0), [0]);
    let full = File::create(small.join("full")).unwrap();
    while std::io::Write::write(&mut &full, &[1; 4096]).is_ok_and(|n| n > 0) {}
    assert_eq!(resize(CHUNK), [0]);
    assert!(window.take_lost(f) && !window.take_lost(f));
    full.set_len(0).unwrap();
    assert_eq!((resize(CHUNK), window.take_lost(f)), (vec![0u64; 0], false));
    drop((c, full, host));
    let _ = mount(&["umount", "-l"]);
}

#[test]
fn what_a_file_has_lost_is_not_kept_longer_than_its_node() {
    let mut c = client(|_| {});
    let f = c.lookup(ROOT, c"f").unwrap().node;
    c.lookup(ROOT, c"f").unwrap();
    let window = c.server.window().cloned().unwrap();
    window.lose(f);
    c.forget(f, 1);
    assert!(window.take_lost(f));
    window.lose(f);
    c.forget(f, 1);
    assert!(!window.take_lost(f));
}

#[test]
fn files_whose_server_may_hang_are_refused() {
    let mut c = client(|s| s.source = Some("/proc".into()));
    let version = c.lookup(ROOT, c"version").unwrap().node;
    // Unmapped files of this kind would be refused by the host as well, with another error.
    assert_eq!(map(&mut c, version, 0, 0, CHUNK, READ), Err(libc::EINVAL));
}

#[test]
fn a_device_has_the_window_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let spec = |size| FsSpec {
        tag: "t".into(),
        source: Some(dir.path().to_owned()),
        dax: Some(DaxSpec { size, from: 0 }),
        ..FsSpec::default()
    };
    let device = Fs::new(spec(WHOLE)).unwrap();
    assert_eq!(device.info().shm.iter().map(|r| (r.id, r.size)).collect::<Vec<_>>(), [(0, WHOLE)]);
    let shared = device.shared_memory();
    assert_eq!(
        shared.iter().map(|(id, m)| (*id, m.mapping().len())).collect::<Vec<_>>(),
        [(0, WHOLE as usize)]
    );
    for size in [0, 4096, CHUNK + 4096, (16 << 30) + CHUNK, u64::MAX] {
        let error = setup::share(&spec(size)).err().unwrap();
        assert!(matches!(error, FsError::Window { size: told } if told == size), "{error}");
    }
}

#[test]
fn files_beside_a_window_have_blocks_as_large_as_pages() {
    let blocks = |window: bool| {
        let mut c = client(|s| {
            // Where files have blocks of 1 KiB.
            s.source = Some("/proc".into());
            s.dax = s.dax.filter(|_| window);
        });
        let file = c.lookup(ROOT, c"version").unwrap().node;
        let of = |c: &mut Client, node| u32_at(&c.call(op::GETATTR, node, &[&[0; 16]]).unwrap(), 96);
        (of(&mut c, file), of(&mut c, ROOT))
    };
    assert_eq!((blocks(false), blocks(true)), ((1024, 1024), (4096, 1024)));
}
