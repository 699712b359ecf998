//! The device with a driver that behaves, and one that does not.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use krun_virtio::mock::{Harness, MmioDriver};
use proptest::prelude::*;

use super::device::Block;
use super::image::Image;
use super::request::{MAX_SEGMENTS, MAX_ZEROES};
use super::sys::Buffers;
use super::{BlockError, BlockSpec, DiskFormat, SyncMode};

const SECTOR: usize = 512;
const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);
const FLUSH_BIT: u64 = 1 << 9;
const WCE_BIT: u64 = 1 << 11;

fn image(len: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

fn spec(path: &Path) -> BlockSpec {
    BlockSpec { id: "disk-1".into(), path: path.to_owned(), ..BlockSpec::default() }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(&kind.to_le_bytes());
    out[8..].copy_from_slice(&sector.to_le_bytes());
    out
}

fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// The next answer: data and status.
fn answer(h: &mut Harness) -> (Vec<u8>, u8) {
    loop {
        if let Some(mut used) = h.collect(0) {
            let status = used.data.pop().unwrap();
            return (used.data, status);
        }
        assert!(h.poll(PATIENCE).unwrap() > 0, "no answer");
    }
}

fn ask(h: &mut Harness, out: &[&[u8]], room: &[u32]) -> (Vec<u8>, u8) {
    h.add(0, out, room);
    h.kick(0).unwrap();
    answer(h)
}

fn write(h: &mut Harness, sector: u64, data: &[u8]) -> u8 {
    ask(h, &[&header(1, sector), data], &[1]).1
}

fn read(h: &mut Harness, sector: u64, sectors: usize) -> (Vec<u8>, u8) {
    ask(h, &[&header(0, sector)], &[(sectors * SECTOR) as u32, 1])
}

fn flush(h: &mut Harness) -> u8 {
    ask(h, &[&header(4, 0)], &[1]).1
}

/// With io_uring where it is permitted, and without.
fn both(test: impl Fn(bool)) {
    for threads_only in [false, true] {
        test(threads_only);
    }
}

#[test]
fn what_is_written_is_read_and_in_the_file() {
    both(|threads_only| {
        let file = image(MIB);
        let mut h = Harness::new(Block::new(BlockSpec { threads_only, ..spec(file.path()) }).unwrap());
        let data: Vec<u8> = (0..3 * SECTOR).map(|i| i as u8 ^ (i >> 8) as u8).collect();
        assert_eq!(write(&mut h, 5, &data), 0);
        assert_eq!(flush(&mut h), 0);
        assert_eq!(read(&mut h, 5, 3), (data.clone(), 0));
        // Buffers of odd sizes, the header in pieces, the status beside the data.
        let head = header(1, 9);
        let parts: [&[u8]; 4] = [&head[..7], &head[7..], &data[..100], &data[100..SECTOR]];
        assert_eq!(ask(&mut h, &parts, &[1]).1, 0);
        let (seen, status) = ask(&mut h, &[&header(0, 9)], &[13, SECTOR as u32 - 12]);
        assert_eq!((&seen[..], status), (&data[..SECTOR], 0));
        let mut stored = vec![0; data.len()];
        file.as_file().read_exact_at(&mut stored, 5 * SECTOR as u64).unwrap();
        assert_eq!(stored[..3 * SECTOR], data[..]);
        assert_eq!(
            ask(&mut h, &[&header(8, 0)], &[20, 1]),
            (b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(), 0)
        );
    });
}

#[test]
fn a_long_id_is_kept_and_cut_for_the_guest() {
    let file = image(MIB);
    let id = "/var/lib/images/fedora-43.raw";
    let block = Block::new(BlockSpec { id: id.into(), ..spec(file.path()) }).unwrap();
    assert_eq!(block.handle().id(), id);
    let mut h = Harness::new(block);
    assert_eq!(ask(&mut h, &[&header(8, 0)], &[20, 1]), (id.as_bytes()[..20].to_vec(), 0));
}

#[test]
fn requests_past_the_end_or_unknown_are_answered() {
    let file = image(MIB);
    let mut h = Harness::new(Block::new(spec(file.path())).unwrap());
    let end = MIB / 512;
    assert_eq!(read(&mut h, end - 1, 1).1, 0);
    assert_eq!(read(&mut h, end, 1).1, 1);
    assert_eq!(read(&mut h, end - 1, 2).1, 1);
    assert_eq!(write(&mut h, u64::MAX, &[0; SECTOR]), 1);
    assert_eq!(write(&mut h, u64::MAX / 512, &[0; SECTOR]), 1);
    assert_eq!(write(&mut h, 0, &[0; 100]), 1);
    assert_eq!(write(&mut h, 0, &[]), 1);
    assert_eq!(ask(&mut h, &[&header(77, 0)], &[1]).1, 2);
    // Zoned and secure-erase requests are not offered.
    assert_eq!(ask(&mut h, &[&header(14, 0), &segment(0, 1, 0)], &[1]).1, 2);
    assert_eq!(file.as_file().metadata().unwrap().len(), MIB);
}

#[test]
fn a_request_without_header_or_status_ends_the_device() {
    for (out, room) in [(&[&[0u8; 15][..]][..], &[1u32][..]), (&[&header(0, 0)[..]], &[])] {
        let file = image(MIB);
        let mut h = Harness::new(Block::new(spec(file.path())).unwrap());
        h.add(0, out, room);
        assert!(h.kick(0).is_err());
    }
}

#[test]
fn discard_and_zeroes() {
    both(|threads_only| {
        let file = image(4 * MIB);
        let mut h = Harness::new(Block::new(BlockSpec { threads_only, ..spec(file.path()) }).unwrap());
        let data = vec![7u8; MIB as usize];
        for sector in [0, 2048, 4096] {
            assert_eq!(write(&mut h, sector, &data), 0);
        }
        let two = [segment(0, 2048, 0), segment(4096, 8, 0)].concat();
        assert_eq!(ask(&mut h, &[&header(11, 0), &two], &[1]).1, 0);
        assert_eq!(ask(&mut h, &[&header(13, 0), &segment(2048, 1024, 0)], &[1]).1, 0);
        assert_eq!(ask(&mut h, &[&header(13, 0), &segment(3072, 512, 1)], &[1]).1, 0);
        assert_eq!(read(&mut h, 2048, 1536), (vec![0; 1536 * SECTOR], 0));
        assert_eq!(read(&mut h, 3584, 512), (vec![7; 512 * SECTOR], 0));
        // Reserved flags, too many ranges, too long a range, half a range, past the end.
        assert_eq!(ask(&mut h, &[&header(11, 0), &segment(0, 8, 1)], &[1]).1, 2);
        assert_eq!(ask(&mut h, &[&header(13, 0), &segment(0, 8, 2)], &[1]).1, 2);
        let many = segment(0, 1, 0).repeat(MAX_SEGMENTS as usize + 1);
        assert_eq!(ask(&mut h, &[&header(11, 0), &many], &[1]).1, 1);
        assert_eq!(ask(&mut h, &[&header(13, 0), &segment(0, MAX_ZEROES + 1, 0)], &[1]).1, 1);
        assert_eq!(ask(&mut h, &[&header(13, 0), &[0; 15]], &[1]).1, 1);
        assert_eq!(ask(&mut h, &[&header(13, 0), &segment(8191, 2, 0)], &[1]).1, 1);
        assert_eq!(ask(&mut h, &[&header(13, 0)], &[1]).1, 1);
    });
}

#[test]
fn a_read_only_disk_is_not_written() {
    let file = image(MIB);
    let mut h = Harness::new(Block::new(BlockSpec { read_only: true, ..spec(file.path()) }).unwrap());
    assert_eq!(write(&mut h, 0, &[1; SECTOR]), 1);
    assert_eq!(ask(&mut h, &[&header(11, 0), &segment(0, 8, 0)], &[1]).1, 1);
    assert_eq!(flush(&mut h), 0);
    assert_eq!(read(&mut h, 0, 1), (vec![0; SECTOR], 0));
}

#[test]
fn direct_io_with_buffers_of_any_alignment() {
    // The temporary directory may be in memory, where the host may refuse it.
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![3; MIB as usize]).unwrap();
    let direct = match Block::new(BlockSpec { direct_io: true, ..spec(&path) }) {
        Err(BlockError::Direct { .. }) => {
            println!("skipped: {} has no direct I/O", dir.path().display());
            return;
        }
        other => other.unwrap(),
    };
    let mut h = Harness::new(direct);
    let data: Vec<u8> = (0..64 * SECTOR).map(|i| (i / 7) as u8).collect();
    let head = header(1, 8);
    for cut in [0, 16, 100, 4096] {
        assert_eq!(ask(&mut h, &[&head, &data[..cut], &data[cut..]], &[1]).1, 0);
        assert_eq!(read(&mut h, 8, 64), (data.clone(), 0));
    }
    assert_eq!(flush(&mut h), 0);
}

#[test]
fn a_file_that_shrinks_is_an_error_until_it_grows() {
    both(|threads_only| {
        let file = image(MIB);
        let mut h = Harness::new(Block::new(BlockSpec { threads_only, ..spec(file.path()) }).unwrap());
        file.as_file().set_len(MIB / 2).unwrap();
        assert_eq!(read(&mut h, 1500, 1).1, 1);
        assert_eq!(read(&mut h, 0, 1).1, 0);
        file.as_file().set_len(MIB).unwrap();
        assert_eq!(read(&mut h, 1500, 1).1, 0);
    });
}

#[test]
fn a_new_size_is_told() {
    let file = image(MIB);
    let block = Block::new(spec(file.path())).unwrap();
    let handle = block.handle();
    let mut h = Harness::new(block);
    let sectors = |h: &Harness| {
        let mut raw = [0; 8];
        h.config().read(0, &mut raw);
        u64::from_le_bytes(raw)
    };
    assert_eq!(sectors(&h), 2048);
    assert_eq!(handle.refresh().unwrap(), MIB);
    file.as_file().set_len(2 * MIB + 100).unwrap();
    assert_eq!(handle.refresh().unwrap(), 2 * MIB);
    h.poll(PATIENCE).unwrap();
    assert_eq!((sectors(&h), h.take_config_changes()), (4096, 1));
    assert_eq!(read(&mut h, 4095, 1).1, 0);
}

/// Counts flushes, and holds reads back until it is told.
#[derive(Default)]
struct Counting {
    flushes: AtomicUsize,
    reads: AtomicUsize,
    released: AtomicBool,
}

impl Image for Counting {
    fn size(&self) -> u64 {
        MIB
    }
    fn refresh(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }
    fn block_size(&self) -> u32 {
        512
    }
    fn read(&self, buffers: &mut Buffers, _offset: u64) -> io::Result<()> {
        while !self.released.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        buffers.store(&[9; SECTOR]);
        self.reads.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn write(&self, _buffers: &mut Buffers, offset: u64) -> io::Result<()> {
        assert!(offset != 512 * 13, "a mistake in the driver of the image");
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn settle(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }
    fn zero(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        Ok(())
    }
}

fn counting(sync: SyncMode) -> (Arc<Counting>, Block) {
    let image = Arc::new(Counting::default());
    let block =
        Block::with_image(BlockSpec { sync, ..BlockSpec::default() }, Arc::clone(&image) as Arc<dyn Image>);
    (image, block.unwrap())
}

#[test]
fn a_flush_is_what_the_mode_says() {
    for (sync, flushes) in [(SyncMode::None, 0), (SyncMode::Relaxed, 1), (SyncMode::Full, 1)] {
        let (image, block) = counting(sync);
        let mut h = Harness::new(block);
        assert_eq!(write(&mut h, 0, &[0; SECTOR]), 0);
        assert_eq!(image.flushes.load(Ordering::SeqCst), 0);
        assert_eq!(flush(&mut h), 0);
        assert_eq!(image.flushes.load(Ordering::SeqCst), flushes);
    }
}

#[test]
fn without_a_cache_every_write_is_durable() {
    // The driver knows no flush, or has switched the cache off.
    let cases = [(!(FLUSH_BIT | WCE_BIT), None, 1), (!FLUSH_BIT, None, 1), (u64::MAX, Some(0), 1)];
    let cached = [(u64::MAX, None, 0), (u64::MAX, Some(1), 0), (!WCE_BIT, Some(0), 0)];
    for (features, writeback, flushes) in cases.into_iter().chain(cached) {
        let (image, block) = counting(SyncMode::Full);
        let mut h = Harness::with_features(block, features).unwrap();
        if let Some(value) = writeback {
            h.config().write(32, &[value]);
        }
        assert_eq!(write(&mut h, 0, &[0; SECTOR]), 0);
        assert_eq!(image.flushes.load(Ordering::SeqCst), flushes, "{features:x} {writeback:?}");
    }
}

#[test]
fn a_reset_waits_for_what_is_in_flight() {
    let (image, block) = counting(SyncMode::Full);
    let mut h = Harness::new(block);
    for _ in 0..20 {
        h.add(0, &[&header(0, 0)], &[SECTOR as u32, 1]);
    }
    h.kick(0).unwrap();
    assert_eq!(h.held(0), 20);
    let release = Arc::clone(&image);
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        release.released.store(true, Ordering::SeqCst);
    });
    h.restart().unwrap();
    assert_eq!(image.reads.load(Ordering::SeqCst), 20);
    assert_eq!(read(&mut h, 0, 1), (vec![9; SECTOR], 0));
}

#[test]
fn the_end_of_a_guest_answers_everything() {
    let (image, block) = counting(SyncMode::Full);
    image.released.store(true, Ordering::SeqCst);
    let mut h = Harness::new(block);
    for _ in 0..50 {
        h.add(0, &[&header(0, 0)], &[SECTOR as u32, 1]);
    }
    h.drain().unwrap();
    assert_eq!((h.held(0), image.reads.load(Ordering::SeqCst)), (0, 50));
}

#[test]
fn an_error_of_the_host_is_one_of_the_disk() {
    let (_image, block) = counting(SyncMode::Full);
    let mut h = Harness::new(block);
    assert_eq!(ask(&mut h, &[&header(11, 0), &segment(0, 8, 0)], &[1]).1, 1);
    assert_eq!(write(&mut h, 0, &[0; SECTOR]), 0);
}

#[test]
#[should_panic(expected = "a mistake in the driver of the image")]
fn a_panic_on_a_thread_is_not_lost() {
    let (_image, block) = counting(SyncMode::Full);
    let mut h = Harness::new(block);
    write(&mut h, 13, &[0; SECTOR]);
}

#[test]
fn a_thousand_resets_in_mid_flight() {
    both(|threads_only| {
        let file = image(MIB);
        let block = Block::new(BlockSpec { threads_only, queues: 2, ..spec(file.path()) }).unwrap();
        let mut driver = MmioDriver::new(block);
        let data = [0x5a; 8 * SECTOR];
        for round in 0..1000u64 {
            driver.start(u64::MAX);
            for i in 0..16 {
                let queue = (i % 2) as usize;
                let head = header((i % 3 == 0).into(), (round + i) % 2000);
                match i % 3 {
                    0 => assert!(driver.add(queue, &[&head, &data], &[1])),
                    _ => assert!(driver.add(queue, &[&head], &[8 * SECTOR as u32, 1])),
                }
                driver.kick(queue);
            }
            driver.reset();
        }
        driver.start(u64::MAX);
        assert!(driver.add(1, &[&header(0, 0)], &[SECTOR as u32, 1]));
        driver.kick(1);
        let used = driver.wait_used(1, PATIENCE).expect("it still works");
        assert_eq!(used.data[SECTOR], 0);
        assert!(driver.failures().is_empty(), "{:?}", driver.failures());
    });
}

#[test]
fn an_image_belongs_to_one_writer_or_many_readers() {
    let file = image(MIB);
    let reader = || Block::new(BlockSpec { read_only: true, ..spec(file.path()) });
    let first = Block::new(spec(file.path())).unwrap();
    for second in [Block::new(spec(file.path())), reader()] {
        let error = second.err().unwrap();
        assert!(matches!(error, BlockError::Locked { .. }), "{error}");
        assert!(error.to_string().contains("in use by another VM"), "{error}");
    }
    drop(first);
    let readers = (reader().unwrap(), reader().unwrap());
    assert!(matches!(Block::new(spec(file.path())), Err(BlockError::Locked { .. })));
    drop(readers);
    Block::new(spec(file.path())).unwrap();
}

#[test]
fn what_is_no_image_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let missing = Block::new(spec(&dir.path().join("none"))).err().unwrap();
    assert!(missing.to_string().contains("none: No such file"), "{missing}");
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(matches!(Block::new(spec(&fifo)), Err(BlockError::Kind { .. })));
    let queues = BlockSpec { queues: 17, ..spec(&fifo) };
    assert!(matches!(Block::new(queues), Err(BlockError::Queues { asked: 17 })));
    let file = image(MIB);
    for format in [DiskFormat::Qcow2, DiskFormat::Vmdk] {
        let e = Block::new(BlockSpec { format, read_only: true, ..spec(file.path()) }).err().unwrap();
        assert!(matches!(e, BlockError::Format { .. }), "{e}");
    }
}

/// One step of a driver, for comparison with a plain array.
#[derive(Debug, Clone)]
enum Step {
    Write(u64, usize, u8),
    Read(u64, usize),
    Zero(u64, u32, bool),
    Flush,
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u64..250, 1usize..6, any::<u8>()).prop_map(|(a, n, v)| Step::Write(a, n, v)),
        4 => (0u64..250, 1usize..6).prop_map(|(a, n)| Step::Read(a, n)),
        1 => (0u64..250, 1u32..6, any::<bool>()).prop_map(|(a, n, u)| Step::Zero(a, n, u)),
        1 => Just(Step::Flush),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..40)
}

/// Whatever the driver does, the disk is an array of bytes.
fn like_an_array(spec: BlockSpec, size: usize, all: &[Step]) {
    let mut h = Harness::new(Block::new(spec).unwrap());
    let mut model = vec![0u8; size];
    for step in all {
        match *step {
            Step::Write(at, n, value) => {
                let data = vec![value; n * SECTOR];
                assert_eq!(write(&mut h, at, &data), 0);
                model[at as usize * SECTOR..][..data.len()].copy_from_slice(&data);
            }
            Step::Read(at, n) => {
                let want = model[at as usize * SECTOR..][..n * SECTOR].to_vec();
                assert_eq!(read(&mut h, at, n), (want, 0));
            }
            Step::Zero(at, n, unmap) => {
                let segment = segment(at, n, unmap.into());
                assert_eq!(ask(&mut h, &[&header(13, 0), &segment], &[1]).1, 0);
                model[at as usize * SECTOR..][..n as usize * SECTOR].fill(0);
            }
            Step::Flush => assert_eq!(flush(&mut h), 0),
            Step::Restart => h.restart().unwrap(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn a_raw_disk_is_an_array(all in steps(), threads_only: bool) {
        let file = image(256 * SECTOR as u64);
        like_an_array(BlockSpec { threads_only, ..spec(file.path()) }, 256 * SECTOR, &all);
    }
}

mod formats;
