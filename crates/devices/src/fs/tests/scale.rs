//! Many files, few descriptors.

use std::fs;
use std::process::Command;

use super::client::{Client, ROOT, longs, words};
use crate::fs::abi::op;
use crate::fs::limits::Quota;
use crate::fs::{CachePolicy, FsSpec, setup};

fn small(descriptors: usize) -> Client {
    let dir = tempfile::tempdir().unwrap();
    let spec = FsSpec { source: Some(dir.path().to_owned()), ..FsSpec::default() };
    Client::build(dir, spec, |_| {}, descriptors)
}

/// Bytes of memory of this process that no other has and no file backs.
fn private_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("Private_Dirty:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

/// 20,000 files; `KRUN_TEST_FILES=1000000` makes more.
#[test]
fn many_files_with_thirty_two_descriptors() {
    let files = std::env::var("KRUN_TEST_FILES").map_or(20_000, |n| n.parse().unwrap());
    let dirs = files / 100;
    let mut c = small(32);
    let mut nodes = Vec::new();
    for d in 0..dirs {
        let path = c.path(&format!("d{d}"));
        fs::create_dir(&path).unwrap();
        for f in 0..100 {
            fs::write(path.join(format!("f{f}")), format!("{d}/{f}")).unwrap();
        }
    }
    let before = private_bytes();
    for d in 0..dirs {
        let dir = c.walk(&format!("d{d}")).unwrap().node;
        nodes.push((dir, None));
        for e in c.list(dir, true).unwrap() {
            if e.node != 0 {
                nodes.push((e.node, Some(format!("{d}/{}", &String::from_utf8_lossy(&e.name)[1..]))));
            }
        }
    }
    // The list of this test counts as well.
    println!("{} bytes for each file", private_bytes().saturating_sub(before) / files as u64);
    assert_eq!(c.counts().0, dirs * 101 + 1);
    assert!(c.counts().2 <= 32);
    // In an order that no cache likes.
    for i in (0..nodes.len()).map(|i| i * 7919 % nodes.len()) {
        if let (node, Some(text)) = &nodes[i] {
            assert_eq!(c.contents(*node).unwrap(), text.as_bytes());
        }
    }
    assert!(c.counts().2 <= 32);
    for (node, _) in nodes {
        c.forget(node, 1);
    }
    assert_eq!(c.counts(), (1, 0, 0));
}

#[test]
fn evicted_directories_are_found_after_moves_on_the_host() {
    let mut c = small(1);
    fs::create_dir_all(c.path("a/b/c")).unwrap();
    fs::write(c.path("a/b/c/f"), "deep").unwrap();
    fs::create_dir(c.path("x")).unwrap();
    let f = c.walk("a/b/c/f").unwrap().node;
    let x = c.walk("x").unwrap().node;
    assert_eq!(c.contents(f).unwrap(), b"deep");
    // Each of these takes the only place.
    c.list(x, false).unwrap();
    c.getattr(x).unwrap();
    fs::rename(c.path("a/b"), c.path("x/b")).unwrap();
    match c.contents(f) {
        // Found by file handle.
        Ok(data) => assert_eq!(data, b"deep"),
        // No file handles here: the guest looks it up again.
        Err(e) => assert_eq!(e, libc::ESTALE),
    }
    let again = c.walk("x/b/c/f").unwrap();
    assert_eq!((again.node, c.contents(f).unwrap()), (f, b"deep".to_vec()));
}

#[test]
fn batches_of_forgets_count() {
    let mut c = small(8);
    let mut list = Vec::new();
    for i in 0..10u64 {
        let name = std::ffi::CString::new(format!("f{i}")).unwrap();
        let node = c.mknod(ROOT, &name, libc::S_IFREG | 0o600, 0).unwrap().node;
        for _ in 0..i {
            c.lookup(ROOT, &name).unwrap();
        }
        list.push((node, i + 1));
    }
    let send = |c: &mut Client, list: &[(u64, u64)]| {
        let pairs: Vec<u64> = list.iter().flat_map(|(n, k)| [*n, *k]).collect();
        c.call(op::BATCH_FORGET, 0, &[&words(&[list.len() as u32, 0]), &longs(&pairs)]).unwrap();
    };
    let less: Vec<_> = list.iter().map(|(n, k)| (*n, k - 1)).collect();
    send(&mut c, &less);
    assert_eq!(c.counts().0, 11);
    send(&mut c, &list.iter().map(|(n, _)| (*n, 1)).collect::<Vec<_>>());
    assert_eq!(c.counts().0, 1);
}

fn limit_files(most: u64) {
    let limit = rustix::process::Rlimit { current: Some(most), maximum: Some(most) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
}

/// Runs the test `name` in a process of its own, for the limit is the process's. True there.
fn in_a_process_of_its_own(name: &str) -> bool {
    const MARK: &str = "KRUN_FS_TEST_LIMIT";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("fs::tests::scale::{name}"), "--test-threads=1"])
        .env(MARK, "1")
        .status()
        .unwrap();
    assert!(status.success());
    false
}

#[test]
fn running_out_of_descriptors_is_an_error_like_any_other() {
    if !in_a_process_of_its_own("running_out_of_descriptors_is_an_error_like_any_other") {
        return;
    }
    let mut c = small(1000);
    for i in 0..100 {
        fs::write(c.path(&format!("f{i}")), "x").unwrap();
    }
    limit_files(64);
    let nodes: Vec<_> = (0..100).map(|i| c.walk(&format!("f{i}")).unwrap().node).collect();
    let mut open = Vec::new();
    let mut refused = 0;
    for n in &nodes {
        match c.open(*n, libc::O_RDONLY) {
            Ok((fh, _)) => open.push(fh),
            Err(e) => {
                assert_eq!(e, libc::EMFILE);
                refused += 1;
            }
        }
    }
    // Cached descriptors make way for open files.
    assert!(refused > 0 && open.len() > 40, "{} open, {refused} refused", open.len());
    for fh in open {
        c.release(fh).unwrap();
    }
    for n in nodes {
        assert_eq!(c.contents(n).unwrap(), b"x");
    }
}

/// The descriptors are the process's: whatever one guest keeps open, disks, sockets and other shares find some.
#[test]
fn a_guest_leaves_descriptors_to_the_rest_of_the_process() {
    if !in_a_process_of_its_own("a_guest_leaves_descriptors_to_the_rest_of_the_process") {
        return;
    }
    limit_files(128);
    let always = CachePolicy::ALWAYS;
    let read_only = |spec: &mut FsSpec| (spec.read_only, spec.cache) = (true, always);
    let (mut writable, mut unopened) = (small(1000), Client::with(read_only));
    let mut nodes = Vec::new();
    for i in 0..200 {
        fs::write(writable.path(&format!("f{i}")), "x").unwrap();
        fs::write(unopened.path(&format!("f{i}")), "x").unwrap();
        nodes.push(writable.walk(&format!("f{i}")).unwrap().node);
        assert_eq!(writable.contents(nodes[i]).unwrap(), b"x");
        let node = unopened.walk(&format!("f{i}")).unwrap().node;
        assert_eq!(unopened.read_node(node, 0, 0, 10).unwrap(), b"x");
    }
    let (mut open, mut refused) = (Vec::new(), 0);
    for (i, node) in nodes.iter().enumerate() {
        let name = std::ffi::CString::new(format!("new{i}")).unwrap();
        for result in [
            writable.open(*node, libc::O_RDONLY).map(|(fh, _)| fh),
            writable.opendir(ROOT),
            writable.create(ROOT, &name, libc::O_RDWR, 0o600).map(|(_, fh)| fh),
        ] {
            match result {
                Ok(fh) => open.push(fh),
                Err(e) => {
                    assert_eq!(e, libc::EMFILE);
                    refused += 1;
                }
            }
        }
        assert_eq!(writable.path(&format!("new{i}")).exists(), writable.lookup(ROOT, &name).is_ok());
    }
    assert!(refused > 0 && open.len() > 30, "{} open, {refused} refused", open.len());
    let others: Vec<_> = (0..14).map(|_| fs::File::open("/dev/null")).collect();
    assert!(others.iter().all(Result::is_ok), "{others:?}");
    drop(others);
    assert!(!writable.path("new199").exists(), "what cannot be opened is not created");
    for fh in open {
        writable.release(fh).unwrap();
    }
    assert_eq!(writable.contents(nodes[0]).unwrap(), b"x");
}

#[test]
fn a_guest_that_never_forgets_reaches_its_quota() {
    let dir = tempfile::tempdir().unwrap();
    let quota = Quota::new(50);
    let spec = FsSpec { source: Some(dir.path().to_owned()), quota: quota.clone(), ..FsSpec::default() };
    let mut c = Client::build(dir, spec, |_| {}, 8);
    for i in 0..60 {
        fs::write(c.path(&format!("f{i}")), "x").unwrap();
    }
    let results: Vec<_> = (0..60).map(|i| c.walk(&format!("f{i}")).map(|e| e.node)).collect();
    assert!(results[..50].iter().all(Result::is_ok));
    assert!(results[50..].iter().all(|r| *r == Err(libc::ENFILE)));
    assert_eq!(c.opendir(ROOT).unwrap_err(), libc::ENFILE);
    // A listing goes on without lookups.
    for node in results[..8].iter().flatten() {
        c.forget(*node, 1);
    }
    let fh = c.opendir(ROOT).unwrap();
    assert_eq!(c.walk("f0").unwrap_err(), libc::ENFILE);
    c.release(fh).unwrap();
    c.walk("f0").unwrap();
    c.server.reset();
    assert_eq!(quota.left(), 50);
}

#[test]
fn the_soft_limit_is_raised_to_the_hard_one() {
    let hard = setup::raise_nofile().unwrap();
    let now = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    assert_eq!((now.current, now.maximum), (hard, hard));
}
