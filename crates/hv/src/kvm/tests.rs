//! The back end against the kernel, with guests of a few instructions.
//!
//! They are written as 32-bit code for the flat segments of a PVH start, at [`CODE`], with a page of
//! data at [`DATA`] and a stack below [`STACK`].

#![allow(unsafe_code)]

use std::sync::mpsc;
use std::time::{Duration, Instant};

use krun_event::Wake;
use krun_memory::{GuestAddress, Mapping};

use super::{Kvm, KvmVm};
use crate::kvm::vcpu::KvmVcpu;
use crate::{BootState, Error, Exit, Hypervisor, MapGuard, Prot, Reply, Table, Vcpu, Vm, VmConfig, flat_gdt};

const CODE: u64 = 0x1000;
const DATA: u64 = 0x2000;
const STACK: u64 = 0x4000;
const RAM: usize = 0x4000;
/// No memory there.
const DEVICE: u64 = 0x8000;

/// Names the bytes of assembler code between two labels.
macro_rules! guest {
    ($name:ident, $mode:literal, $($line:literal),+ $(,)?) => {
        mod $name {
            std::arch::global_asm!(
                concat!(".pushsection .rodata.guest.", stringify!($name)),
                $mode,
                concat!("guest_", stringify!($name), "_start:"),
                $($line,)+
                concat!("guest_", stringify!($name), "_end:"),
                ".code64",
                ".popsection",
                options(att_syntax),
            );
            unsafe extern "C" {
                #[link_name = concat!("guest_", stringify!($name), "_start")]
                static START: u8;
                #[link_name = concat!("guest_", stringify!($name), "_end")]
                static END: u8;
            }
            pub fn code() -> &'static [u8] {
                // SAFETY: both symbols are in one section of this program, start before end.
                unsafe {
                    let len = (&raw const END).offset_from_unsigned(&raw const START);
                    std::slice::from_raw_parts(&raw const START, len)
                }
            }
        }
    };
}

mod window;

struct Machine {
    vm: KvmVm,
    ram: Mapping,
    _ram: MapGuard,
}

/// The host's KVM; `None`, with the reason on stderr, where there is none.
fn kvm() -> Option<Kvm> {
    Kvm::open().map_err(|e| eprintln!("skipped: {e}")).ok()
}

/// As [`kvm`], but not where kernel mode is interpreted by software that knows only some of it.
fn hardware() -> Option<Kvm> {
    let found = crate::probe();
    if !found.usable() {
        eprintln!("skipped: {found}");
        return None;
    }
    kvm()
}

impl Machine {
    fn new(kvm: &Kvm, code: &[u8], config: &VmConfig) -> Self {
        let vm = kvm.create_vm(config).unwrap();
        let ram = Mapping::anonymous(RAM).unwrap();
        let guard = vm.map(GuestAddress(0), &ram, Prot::ReadWrite).unwrap();
        let machine = Self { vm, ram, _ram: guard };
        machine.write(CODE, code);
        machine
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= RAM);
        for (i, b) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping, checked above.
            unsafe { self.ram.as_ptr().add(at as usize + i).write_volatile(*b) };
        }
    }

    fn read(&self, at: u64) -> u8 {
        // SAFETY: inside the mapping as far as the tests go.
        unsafe { self.ram.as_ptr().add(at as usize).read_volatile() }
    }

    fn vcpu(&self) -> KvmVcpu {
        let mut vcpu = self.vm.create_vcpu(0).unwrap();
        vcpu.set_boot_state(&BootState::Pvh { rip: CODE, rbx: DATA }).unwrap();
        vcpu
    }
}

fn started(kvm: &Kvm, code: &[u8]) -> (Machine, KvmVcpu) {
    let machine = Machine::new(kvm, code, &VmConfig::default());
    let vcpu = machine.vcpu();
    (machine, vcpu)
}

fn next(vcpu: &mut KvmVcpu) -> Exit {
    vcpu.run(Reply::None).unwrap()
}

fn out(port: u16, size: u8, value: u32) -> Exit {
    Exit::IoOut { port, size, data: value.to_le_bytes() }
}

guest!(
    ports,
    ".code32",
    "mov $0x41, %al",
    "out %al, $0x10",
    "in $0x11, %al",
    "out %al, $0x12",
    "mov $0x1234, %dx",
    "in %dx, %ax",
    "out %eax, %dx",
    "xor %eax, %eax",
    "in %dx, %eax",
    "out %eax, %dx",
    "1: jmp 1b",
);

#[test]
fn port_reads_get_their_answers() {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = started(&kvm, ports::code());
    assert_eq!(next(&mut vcpu), out(0x10, 1, 0x41));
    assert_eq!(next(&mut vcpu), Exit::IoIn { port: 0x11, size: 1 });
    assert_eq!(vcpu.run(Reply::value(0xffee)).unwrap(), out(0x12, 1, 0xee));
    assert_eq!(next(&mut vcpu), Exit::IoIn { port: 0x1234, size: 2 });
    assert_eq!(vcpu.run(Reply::value(0xdead_beef)).unwrap(), out(0x1234, 4, 0xbeef));
    assert_eq!(next(&mut vcpu), Exit::IoIn { port: 0x1234, size: 4 });
    // Not answered: all ones.
    assert_eq!(next(&mut vcpu), out(0x1234, 4, 0xffff_ffff));
    let counts: Vec<_> = vcpu.exits().iter().filter(|(_, n)| *n > 0).collect();
    assert_eq!(counts, [("io-in", 3), ("io-out", 4)]);
}

guest!(
    strings,
    ".code32",
    "cld",
    "mov $0x2000, %esi",
    "mov $5, %ecx",
    "mov $0x3f8, %dx",
    "rep outsb",
    "mov $0x2100, %edi",
    "mov $2, %ecx",
    "rep insw",
    "out %al, $0x80",
    "1: jmp 1b",
);

#[test]
fn string_instructions_come_item_by_item() {
    let Some(kvm) = kvm() else { return };
    let (machine, mut vcpu) = started(&kvm, strings::code());
    machine.write(DATA, b"hello");
    for byte in b"hello" {
        assert_eq!(next(&mut vcpu), out(0x3f8, 1, u32::from(*byte)));
    }
    assert_eq!(next(&mut vcpu), Exit::IoIn { port: 0x3f8, size: 2 });
    assert_eq!(vcpu.run(Reply::value(0x0201)).unwrap(), Exit::IoIn { port: 0x3f8, size: 2 });
    assert!(matches!(vcpu.run(Reply::value(0x0403)).unwrap(), Exit::IoOut { port: 0x80, .. }));
    assert_eq!([0x2100, 0x2101, 0x2102, 0x2103].map(|at| machine.read(at)), [1, 2, 3, 4]);
}

guest!(
    device,
    ".code32",
    "mov 0x8004, %eax",
    "mov %ax, 0x8008",
    "mov %eax, 0x800c",
    "mov 0x8000, %al",
    "out %al, $0x10",
    "1: jmp 1b",
);

#[test]
fn memory_accesses_get_their_answers() {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = started(&kvm, device::code());
    let at = |offset| GuestAddress(DEVICE + offset);
    assert_eq!(next(&mut vcpu), Exit::MmioRead { at: at(4), size: 4 });
    let data = [0x78, 0x56, 0, 0, 0, 0, 0, 0];
    assert_eq!(vcpu.run(Reply::value(0x99_1234_5678)).unwrap(), Exit::MmioWrite { at: at(8), size: 2, data });
    let data = [0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0];
    assert_eq!(next(&mut vcpu), Exit::MmioWrite { at: at(0xc), size: 4, data });
    assert_eq!(next(&mut vcpu), Exit::MmioRead { at: at(0), size: 1 });
    assert_eq!(next(&mut vcpu), out(0x10, 1, 0xff));
}

guest!(
    poke,
    ".code32",
    "1: mov 0x8000, %eax",
    "out %eax, $0x10",
    "incl %eax",
    "mov %eax, 0x8000",
    "out %eax, $0x11",
    "jmp 1b",
);

#[test]
fn memory_comes_and_goes_with_its_guard() {
    let Some(kvm) = kvm() else { return };
    let (machine, mut vcpu) = started(&kvm, poke::code());
    let page = Mapping::anonymous(4096).unwrap();
    // SAFETY: inside the mapping.
    unsafe { page.as_ptr().cast::<u32>().write_volatile(7) };
    let at = GuestAddress(DEVICE);
    assert_eq!(next(&mut vcpu), Exit::MmioRead { at, size: 4 });

    let guard = machine.vm.map(at, &page, Prot::ReadWrite).unwrap();
    assert_eq!(vcpu.run(Reply::value(1)).unwrap(), out(0x10, 4, 1));
    assert_eq!(next(&mut vcpu), out(0x11, 4, 2));
    assert_eq!(next(&mut vcpu), out(0x10, 4, 2));
    assert!(matches!(machine.vm.map(at, &page, Prot::ReadWrite), Err(Error::Placement { .. })));
    assert_eq!(next(&mut vcpu), out(0x11, 4, 3));

    drop(guard);
    assert_eq!(next(&mut vcpu), Exit::MmioRead { at, size: 4 });
    let guard = machine.vm.map(at, &page, Prot::ReadOnly).unwrap();
    assert_eq!(vcpu.run(Reply::value(9)).unwrap(), out(0x10, 4, 9));
    let data = [10, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(next(&mut vcpu), Exit::MmioWrite { at, size: 4, data });
    assert_eq!(next(&mut vcpu), out(0x11, 4, 10));
    assert_eq!(next(&mut vcpu), out(0x10, 4, 3));
    drop((page, guard));
}

guest!(
    bell,
    ".code32",
    "movl $3, 0x8050",
    "movl $4, 0x8050",
    "movw $9, 0x8060",
    "movl $3, 0x8050",
    "out %al, $0x10",
    "1: jmp 1b",
);

#[test]
fn doorbells_ring_without_an_exit() {
    let Some(kvm) = kvm() else { return };
    for in_a_page in [false, true] {
        rings(&kvm, in_a_page);
    }
}

/// The same where nothing is and in a page that the guest may read.
fn rings(kvm: &Kvm, in_a_page: bool) {
    let (machine, mut vcpu) = started(kvm, bell::code());
    let page = Mapping::anonymous(4096).unwrap();
    let _shown = in_a_page.then(|| machine.vm.map(GuestAddress(DEVICE), &page, Prot::ReadOnly).unwrap());
    let (three, any) = (Wake::new().unwrap(), Wake::new().unwrap());
    let bells = machine.vm.doorbells().unwrap();
    let at = GuestAddress(DEVICE + 0x50);
    let guard = bells.register(at, Some(3), &three).unwrap();
    let _any = bells.register(GuestAddress(DEVICE + 0x60), None, &any).unwrap();
    assert!(matches!(bells.register(at, Some(3), &any), Err(Error::Call { .. })));
    let write = |v| Exit::MmioWrite { at, size: 4, data: [v, 0, 0, 0, 0, 0, 0, 0] };
    assert_eq!(next(&mut vcpu), write(4));
    assert!(three.take());
    assert!(!any.take());
    drop(guard);
    assert_eq!(next(&mut vcpu), write(3));
    assert!(any.take());
    assert!(!three.take());
    assert!(matches!(next(&mut vcpu), Exit::IoOut { port: 0x10, .. }));
}

guest!(spin, ".code32", "1: jmp 1b");
guest!(halt, ".code32", "cli", "1: hlt", "jmp 1b");

/// Runs a vCPU on a thread of its own until it is kicked; returns what run returned and after how
/// long.
fn kicked_after(kvm: &Kvm, code: &'static [u8], delay: Duration) -> Exit {
    let machine = Machine::new(kvm, code, &VmConfig::default());
    let (tx, rx) = mpsc::channel();
    let machine = &machine;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let mut vcpu = machine.vcpu();
            tx.send(vcpu.kicker()).unwrap();
            next(&mut vcpu)
        });
        let kicker = rx.recv().unwrap();
        std::thread::sleep(delay);
        kicker.kick();
        let exit = thread.join().unwrap();
        // The vCPU and its thread are gone: nothing happens.
        kicker.kick();
        exit
    })
}

#[test]
fn a_kick_ends_a_loop_and_a_halt() {
    let Some(kvm) = kvm() else { return };
    for code in [spin::code(), halt::code()] {
        for delay in [Duration::ZERO, Duration::from_millis(30)] {
            assert_eq!(kicked_after(&kvm, code, delay), Exit::Interrupted);
        }
    }
}

#[test]
fn a_kick_ends_the_wait_for_start_up() {
    let Some(kvm) = hardware() else { return };
    let config = VmConfig { vcpus: 2, ..Default::default() };
    let machine = Machine::new(&kvm, spin::code(), &config);
    let mut second = machine.vm.create_vcpu(1).unwrap();
    second.set_boot_state(&BootState::Application).unwrap();
    let kicker = second.kicker();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            kicker.kick();
        });
        assert_eq!(next(&mut second), Exit::Interrupted);
    });
}

#[test]
fn no_kick_is_lost() {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = started(&kvm, spin::code());
    let kicker = vcpu.kicker();
    let (ask, asked) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // One kick for each request, at ever different moments before or in the run.
            for round in asked {
                for _ in 0..(round % 50) * 20 {
                    std::hint::spin_loop();
                }
                kicker.kick();
            }
        });
        for round in 0..500u32 {
            ask.send(round).unwrap();
            // Were a kick lost, this would never return.
            assert_eq!(next(&mut vcpu), Exit::Interrupted);
        }
        drop(ask);
    });
    assert_eq!(vcpu.exits().iter().find(|(name, _)| *name == "kick"), Some(("kick", 500)));
}

#[test]
fn signals_are_as_before_when_the_vcpu_is_gone() {
    let Some(kvm) = kvm() else { return };
    std::thread::spawn(move || {
        let mask = || std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let blocked = |s: &str| s.lines().find(|l| l.starts_with("SigBlk")).map(str::to_owned);
        let before = mask();
        let (machine, mut vcpu) = started(&kvm, spin::code());
        vcpu.kicker().kick();
        assert_eq!(next(&mut vcpu), Exit::Interrupted);
        vcpu.kicker().kick();
        assert_ne!(blocked(&mask()), blocked(&before));
        // A second one on the same thread must not end the protection of the first.
        let other = Machine::new(&kvm, spin::code(), &VmConfig::default());
        drop(other.vcpu());
        vcpu.kicker().kick();
        assert_eq!(next(&mut vcpu), Exit::Interrupted);
        // Not consumed; would end this process if it were delivered.
        vcpu.kicker().kick();
        drop(vcpu);
        drop(machine);
        assert_eq!(blocked(&mask()), blocked(&before));
    })
    .join()
    .unwrap();
}

extern "C" fn ignore(_: libc::c_int) {}

#[test]
fn other_signals_do_not_end_a_run() {
    let Some(kvm) = kvm() else { return };
    // SAFETY: the handler does nothing; no other test sends or handles this signal.
    unsafe { libc::signal(libc::SIGUSR2, ignore as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    let (_machine, mut vcpu) = started(&kvm, spin::code());
    let kicker = vcpu.kicker();
    // SAFETY: takes nothing.
    let thread = unsafe { libc::pthread_self() };
    let exit = std::thread::scope(|scope| {
        scope.spawn(move || {
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(2));
                // SAFETY: that thread waits in `run` until the kick below.
                unsafe { libc::pthread_kill(thread, libc::SIGUSR2) };
            }
            kicker.kick();
        });
        next(&mut vcpu)
    });
    assert_eq!(exit, Exit::Interrupted);
    let signals = vcpu.exits().iter().find(|(name, _)| *name == "signal").unwrap().1;
    assert!(signals > 0);
}

guest!(triple, ".code32", "lidt 0x2000", "int3");

#[test]
fn a_triple_fault_is_told() {
    let Some(kvm) = hardware() else { return };
    let (_machine, mut vcpu) = started(&kvm, triple::code());
    assert_eq!(next(&mut vcpu), Exit::TripleFault);
}

guest!(astray, ".code32", "mov $0x1234abcd, %ebp", "jmp *%ebx");

#[test]
fn what_kvm_cannot_emulate_is_told_with_the_place() {
    let Some(kvm) = hardware() else { return };
    let machine = Machine::new(&kvm, astray::code(), &VmConfig::default());
    let mut vcpu = machine.vm.create_vcpu(0).unwrap();
    // Instructions where no memory is.
    vcpu.set_boot_state(&BootState::Pvh { rip: CODE, rbx: DEVICE }).unwrap();
    let error = vcpu.run(Reply::None).unwrap_err();
    let text = error.to_string();
    let Error::Stopped { vcpu: 0, stop } = error else { panic!("{text}") };
    assert!(stop.reason.contains("suberror 1"), "{text}");
    assert!(stop.registers.contains("rip=0x8000") && stop.registers.contains("rbp=0x1234abcd"), "{text}");
}

// From the reset vector: vCPU 0 as after power-on, in 16-bit code that ends at 4 GiB.
guest!(
    reset,
    ".code16",
    "mov $0x5a, %al",
    "out %al, $0x10",
    "1: jmp 1b",
    ".fill 16 - (. - guest_reset_start)"
);

#[test]
fn an_untouched_vcpu_starts_at_the_reset_vector() {
    let Some(kvm) = kvm() else { return };
    let vm = kvm.create_vm(&VmConfig::default()).unwrap();
    let rom = Mapping::anonymous(4096).unwrap();
    for (i, b) in reset::code().iter().enumerate() {
        // SAFETY: inside the mapping.
        unsafe { rom.as_ptr().add(0xff0 + i).write_volatile(*b) };
    }
    let _rom = vm.map(GuestAddress(0xffff_f000), &rom, Prot::ReadOnly).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_boot_state(&BootState::Application).unwrap();
    assert_eq!(next(&mut vcpu), out(0x10, 1, 0x5a));
}

guest!(
    long,
    ".code64",
    "mov $0x1122334455667788, %rax",
    "shr $32, %rax",
    "out %eax, $0x10",
    "mov %esi, %eax",
    "out %eax, $0x11",
    "push %rax",
    "xor %eax, %eax",
    "pop %rax",
    "mov %ss, %ecx",
    "mov %ecx, %ss",
    "out %eax, $0x12",
    "mov $1, %eax",
    "cpuid",
    "mov %ecx, %eax",
    "out %eax, $0x13",
    "1: jmp 1b",
);

#[test]
fn long_mode_runs_and_cpuid_shows_a_hypervisor() {
    let Some(kvm) = hardware() else { return };
    let machine = Machine::new(&kvm, long::code(), &VmConfig::default());
    // One 2 MiB page: its root, directory pointers and directory take the first words of 3 pages.
    let (root, pointers, directory, gdt) = (0x3000u64, DATA, 0u64, 0x2800u64);
    machine.write(root, &(pointers | 3).to_le_bytes());
    machine.write(pointers, &(directory | 3).to_le_bytes());
    machine.write(directory, &0x83u64.to_le_bytes());
    machine.write(gdt, &flat_gdt());
    let mut vcpu = machine.vm.create_vcpu(0).unwrap();
    let gdt = Table { base: GuestAddress(gdt), limit: 31 };
    let state = BootState::Long64 { rip: CODE, rsp: STACK, rsi: 0x77, cr3: GuestAddress(root), gdt };
    vcpu.set_boot_state(&state).unwrap();
    assert_eq!(next(&mut vcpu), out(0x10, 4, 0x1122_3344));
    assert_eq!(next(&mut vcpu), out(0x11, 4, 0x77));
    assert_eq!(next(&mut vcpu), out(0x12, 4, 0x77));
    let Exit::IoOut { port: 0x13, data, .. } = next(&mut vcpu) else { panic!("no cpuid") };
    assert_eq!(u32::from_le_bytes(data) >> 31, 1);
}

// Interrupt 0x30 by the I/O APIC's pin 5: a gate to `2:`, both controllers switched on, then
// halted until it comes.
guest!(
    pin,
    ".code32",
    "mov $0x4000, %esp",
    "lgdt 0x2810",
    "lidt 0x2800",
    // Nothing from the 8259 pair, which is wired to the same lines.
    "mov $0xff, %al",
    "out %al, $0x21",
    "movl $0x1ff, 0xfee000f0",
    "movl $0x1a, 0xfec00000",
    "movl $0x30, 0xfec00010",
    "mov 0xfec00010, %eax",
    "out %eax, $0x11",
    "sti",
    "out %eax, $0x10",
    "1: hlt",
    "jmp 1b",
    ".org guest_pin_start + 0x100",
    "mov $0x55, %al",
    "out %al, $0x12",
    "movl $0, 0xfee000b0",
    "iret",
);

#[test]
fn a_pulse_reaches_the_guest() {
    let Some(kvm) = hardware() else { return };
    for split_irqchip in [false, true] {
        let machine = Machine::new(&kvm, pin::code(), &VmConfig { split_irqchip, ..Default::default() });
        // Gate 0x30: code segment 8, the handler, 32-bit interrupt gate. Tables at 0x2000, 0x2820.
        let gate: u64 = 0x1100 | 8 << 16 | 0x8e00 << 32;
        machine.write(DATA + 0x30 * 8, &gate.to_le_bytes());
        machine.write(DATA + 0x800, &[0xff, 0x03, 0x00, 0x20, 0, 0]);
        machine.write(DATA + 0x810, &[0x17, 0x00, 0x20, 0x28, 0, 0]);
        machine.write(DATA + 0x828, &0x00cf_9b00_0000_ffff_u64.to_le_bytes());
        machine.write(DATA + 0x830, &0x00cf_9300_0000_ffff_u64.to_le_bytes());
        let irq = machine.vm.irq(5).unwrap();
        assert!(matches!(machine.vm.irq(24), Err(Error::Line { .. })));
        let mut vcpu = machine.vcpu();
        if split_irqchip {
            assert_eq!(next(&mut vcpu), out(0x21, 1, 0xff));
        }
        assert_eq!(next(&mut vcpu), out(0x11, 4, 0x30));
        assert!(matches!(next(&mut vcpu), Exit::IoOut { port: 0x10, .. }));
        for _ in 0..3 {
            irq.pulse();
            assert_eq!(next(&mut vcpu), out(0x12, 1, 0x55), "split {split_irqchip}");
        }
        vcpu.kicker().kick();
        assert_eq!(next(&mut vcpu), Exit::Interrupted);
    }
}

#[test]
fn bad_numbers_are_refused() {
    let Some(kvm) = kvm() else { return };
    for vcpus in [0, kvm.max_vcpus() + 1] {
        let config = VmConfig { vcpus, ..Default::default() };
        assert!(matches!(kvm.create_vm(&config), Err(Error::Vcpus { .. })));
    }
    let vm = kvm.create_vm(&VmConfig::default()).unwrap();
    assert!(matches!(vm.create_vcpu(1), Err(Error::VcpuId { id: 1, vcpus: 1 })));
    let _first = vm.create_vcpu(0).unwrap();
    assert!(matches!(vm.create_vcpu(0), Err(Error::Call { .. })));
}

#[test]
fn hundreds_of_gigabytes_with_a_hole() {
    let Some(kvm) = kvm() else { return };
    let vm = kvm.create_vm(&VmConfig::default()).unwrap();
    let beyond = vm.map(GuestAddress(1 << 52), &Mapping::anonymous(4096).unwrap(), Prot::ReadWrite);
    assert!(matches!(beyond, Err(Error::Placement { .. })));
    let file = krun_memory::Memfd::new(512 << 30).unwrap();
    let (low, high) = (3u64 << 30, (512u64 - 3) << 30);
    let below = file.map(0, low as usize).unwrap();
    let above = file.map(low, high as usize).unwrap();
    let begin = Instant::now();
    let guards = [
        vm.map(GuestAddress(0), &below, Prot::ReadWrite).unwrap(),
        vm.map(GuestAddress(4 << 30), &above, Prot::ReadWrite).unwrap(),
    ];
    drop(guards);
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}
