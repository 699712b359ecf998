//! Whole machines on this host's KVM, with kernels of a few instructions. Skipped, with the reason, where
//! there is none.

#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use krun_devices::rng::Rng;
use krun_machine::{Kernel, KernelFormat, Machine, Outcome, Running, SerialSpec, Spec, host};

/// mov dx, 0x3f8; then for 'o' and 'k': mov al, c; out dx, al
const SAY_OK: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'o', 0xee, 0xb0, b'k', 0xee];
/// mov word ptr [0x472], 0x1234
const ASK_FOR_A_WARM_RESTART: &[u8] = &[0x66, 0xc7, 0x04, 0x25, 0x72, 0x04, 0, 0, 0x34, 0x12];
/// mov al, 0xfe; out 0x64, al; hlt
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4];
/// lidt [0x6000], where nothing was written; int3
const TRIPLE_FAULT: &[u8] = &[0x0f, 0x01, 0x1c, 0x25, 0, 0x60, 0, 0, 0xcc];
/// jmp to itself
const LOOP: &[u8] = &[0xeb, 0xfe];
/// hlt, with interrupts off as they are at the start
const HALT: &[u8] = &[0xf4];
/// mov eax, [128 MiB], where nothing is; inc eax; jnz to the halt; reset; hlt
const RESET_IF_ALL_ONES: &[u8] =
    &[0xa1, 0, 0, 0, 0x08, 0, 0, 0, 0, 0xff, 0xc0, 0x75, 0x04, 0xb0, 0xfe, 0xe6, 0x64, 0xf4];
/// mov rsi, 4 GiB; mov dword ptr [rsi], esi, which faults as the boot tables end before that, without a handler
const TOUCH_UNMAPPED: &[u8] = &[0x48, 0xbe, 0, 0, 0, 0, 1, 0, 0, 0, 0x89, 0x36];

/// An ELF kernel at 16 MiB that consists of `code`.
fn kernel(code: &[&[u8]]) -> (tempfile::NamedTempFile, Kernel) {
    let code = code.concat();
    let mut elf = vec![0u8; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0]);
    put(24, &0x100_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &[56, 0, 1, 0]);
    // PT_LOAD of the second page.
    put(64, &[1, 0, 0, 0, 7, 0, 0, 0]);
    for (n, field) in [0x1000u64, 0x100_0000, 0x100_0000, code.len() as u64, 0x1000].iter().enumerate() {
        put(72 + n * 8, &field.to_le_bytes());
    }
    elf.extend_from_slice(&code);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), elf).unwrap();
    let path = PathBuf::from(file.path());
    (file, Kernel::File { path, format: KernelFormat::Elf, initramfs: None, cmdline: None })
}

fn start(code: &[&[u8]], change: impl FnOnce(&mut Spec)) -> Running {
    let (_file, kernel) = kernel(code);
    let mut spec = Spec { kernel, ram_mib: 64, ..Spec::default() };
    change(&mut spec);
    Machine::start(spec, vec![Box::new(Rng::new())]).unwrap()
}

fn outcome(code: &[&[u8]]) -> Outcome {
    start(code, |_| ()).wait()
}

fn count(dir: &str) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

/// Threads, descriptors and mappings of guest size of this process.
fn belongings() -> (usize, usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    // Not what the allocator only reserves.
    let large = maps.lines().filter(|l| l.contains(" rw")).filter(|l| {
        let ends = l.split(' ').next().and_then(|range| range.split_once('-')).unwrap();
        let number = |s| u64::from_str_radix(s, 16).unwrap();
        number(ends.1) - number(ends.0) >= 15 << 20
    });
    (count("/proc/self/task"), count("/proc/self/fd"), large.count())
}

/// The same once threads that were joined are out of sight, which takes them another moment. The test runner
/// has one and the test another.
fn settled() -> (usize, usize, usize) {
    let start = Instant::now();
    while belongings().0 > 2 && start.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(5));
    }
    belongings()
}

fn endings() {
    assert_eq!(outcome(&[RESET]), Outcome::Reset);
    assert_eq!(outcome(&[ASK_FOR_A_WARM_RESTART, RESET]), Outcome::Panic);
    assert_eq!(outcome(&[TRIPLE_FAULT]), Outcome::TripleFault);
    assert_eq!(outcome(&[TOUCH_UNMAPPED]), Outcome::TripleFault);
    assert_eq!(outcome(&[RESET_IF_ALL_ONES]), Outcome::Reset);
    // The processors that were not started count as off too.
    assert_eq!(start(&[HALT], |s| s.vcpus = 3).wait(), Outcome::PowerOff);
    assert_eq!(start(&[RESET], |s| s.split_irqchip = true).wait(), Outcome::Reset);
    assert_eq!(start(&[RESET], |s| s.shared_memory = true).wait(), Outcome::Reset);
    assert_eq!(start(&[RESET], |s| s.ram_mib = 200 << 10).wait(), Outcome::Reset);
}

fn serial_output() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let running = start(&[SAY_OK, RESET], |s| {
        s.serial = Some(SerialSpec { input: None, output: Some(writer.into()) });
    });
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), running.wait()), ("ok", Outcome::Reset));
    assert!(running.exits().iter().any(|(reason, n)| reason == "io-out" && n >= 2), "{:?}", running.exits());
}

fn killing() {
    let running = start(&[LOOP], |s| s.vcpus = 2);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(running.try_wait(), None);
    let asked = Instant::now();
    running.kill();
    assert_eq!(running.wait(), Outcome::Killed);
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    // A guest that writes where nobody reads.
    let (_reader, writer) = std::io::pipe().unwrap();
    let endless: Vec<u8> = [SAY_OK, &[0xeb, 0xf4]].concat();
    let running = start(&[&endless], |s| {
        s.serial = Some(SerialSpec { input: None, output: Some(writer.into()) });
    });
    std::thread::sleep(Duration::from_millis(300));
    running.kill();
    assert_eq!(running.wait(), Outcome::Killed);
    // Dropping ends it too.
    drop(start(&[LOOP], |_| ()));
}

fn two_at_once() {
    let (one, two) = (start(&[LOOP], |_| ()), start(&[RESET], |_| ()));
    assert_eq!((two.wait(), one.try_wait()), (Outcome::Reset, None));
    one.kill();
    assert_eq!(one.wait(), Outcome::Killed);
}

/// One test, as it counts what belongs to the process.
#[test]
fn machines_start_and_end_and_leave_nothing_behind() {
    let found = host::probe();
    if !found.usable() {
        eprintln!("skipped: {found}");
        return;
    }
    // Once for what a process keeps for good.
    assert_eq!(outcome(&[RESET]), Outcome::Reset);
    let before = settled();
    endings();
    serial_output();
    killing();
    two_at_once();
    for _ in 0..50 {
        assert_eq!(start(&[RESET], |s| s.vcpus = 4).wait(), Outcome::Reset);
    }
    assert_eq!(settled(), before);
}
