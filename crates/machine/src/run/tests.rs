//! The run loop and the end of a machine, on a hypervisor made of scripts.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use krun_hv::{
    BootState, Exit, ExitCounts, Hypervisor, Irq, Kicker, MapGuard, Prot, Reply, SystemEvent, Vcpu, Vm,
    VmConfig,
};
use krun_memory::{Bytes, GuestAddress, Mapping, assemble};

use super::{Outcome, Running, start_on};
use crate::boot::kernel::tests::small_elf;
use crate::{Error, Kernel, KernelFormat, Spec};

/// What a vCPU does, in order; then it waits for a kick.
#[derive(Clone)]
enum Step {
    Exit(Exit),
    /// The reply to the exit before.
    Expect([u8; 8]),
    /// Writes to guest memory.
    Poke(u64, u16),
    Fail,
    Panic,
    /// Guest code that takes a while, whatever is asked meanwhile.
    Sleep,
}

#[derive(Default)]
struct Seen {
    states: Mutex<Vec<(u32, BootState)>>,
    /// Bytes mapped.
    mapped: Mutex<u64>,
    alive: Mutex<u32>,
}

struct Script {
    steps: Vec<Vec<Step>>,
    cannot_create: Option<u32>,
    seen: Arc<Seen>,
}

struct FakeVm {
    steps: Vec<Vec<Step>>,
    cannot_create: Option<u32>,
    seen: Arc<Seen>,
    memory: Mutex<Vec<(GuestAddress, Mapping)>>,
}

struct FakeVcpu {
    id: u32,
    seen: Arc<Seen>,
    steps: RefCell<VecDeque<Step>>,
    kicked: Arc<(Mutex<bool>, Condvar)>,
    memory: Vec<(GuestAddress, Mapping)>,
}

impl Hypervisor for Script {
    type Vm = FakeVm;

    fn create_vm(&self, _: &VmConfig) -> krun_hv::Result<FakeVm> {
        Ok(FakeVm {
            steps: self.steps.clone(),
            cannot_create: self.cannot_create,
            seen: Arc::clone(&self.seen),
            memory: Mutex::default(),
        })
    }
}

struct Unmap(Arc<Seen>, u64);

impl Drop for Unmap {
    fn drop(&mut self) {
        *self.0.mapped.lock().unwrap() -= self.1;
    }
}

impl Vm for FakeVm {
    type Vcpu = FakeVcpu;

    fn create_vcpu(&self, id: u32) -> krun_hv::Result<FakeVcpu> {
        if self.cannot_create == Some(id) {
            return Err(krun_hv::Error::VcpuId { id, vcpus: 0 });
        }
        *self.seen.alive.lock().unwrap() += 1;
        Ok(FakeVcpu {
            id,
            seen: Arc::clone(&self.seen),
            steps: RefCell::new(self.steps.get(id as usize).cloned().unwrap_or_default().into()),
            kicked: Arc::default(),
            memory: self.memory.lock().unwrap().clone(),
        })
    }

    fn map(&self, at: GuestAddress, mapping: &Mapping, _: Prot) -> krun_hv::Result<MapGuard> {
        self.memory.lock().unwrap().push((at, mapping.clone()));
        *self.seen.mapped.lock().unwrap() += mapping.len() as u64;
        Ok(MapGuard::new(Unmap(Arc::clone(&self.seen), mapping.len() as u64)))
    }

    fn irq(&self, _: u32) -> krun_hv::Result<Irq> {
        Ok(Irq::from_fn(|| {}))
    }
}

impl Drop for FakeVcpu {
    fn drop(&mut self) {
        *self.seen.alive.lock().unwrap() -= 1;
    }
}

impl Vcpu for FakeVcpu {
    fn kicker(&self) -> Kicker {
        let kicked = Arc::clone(&self.kicked);
        Kicker::from_fn(move || {
            *kicked.0.lock().unwrap() = true;
            kicked.1.notify_all();
        })
    }

    fn set_boot_state(&mut self, state: &BootState) -> krun_hv::Result<()> {
        self.seen.states.lock().unwrap().push((self.id, *state));
        Ok(())
    }

    fn run(&mut self, reply: Reply) -> krun_hv::Result<Exit> {
        loop {
            let step = self.steps.borrow_mut().pop_front();
            match step {
                Some(Step::Exit(exit)) => return Ok(exit),
                Some(Step::Expect(data)) => assert_eq!(reply, Reply::Read(data)),
                Some(Step::Poke(at, value)) => {
                    assemble(&self.memory).unwrap().write_obj(value, GuestAddress(at)).unwrap();
                }
                Some(Step::Fail) => return Err(krun_hv::Error::Line { line: 99, last: 23 }),
                Some(Step::Panic) => panic!("as told"),
                Some(Step::Sleep) => std::thread::sleep(std::time::Duration::from_millis(300)),
                None => {
                    let kicked = self.kicked.0.lock().unwrap();
                    *self.kicked.1.wait_while(kicked, |k| !*k).unwrap() = false;
                    return Ok(Exit::Interrupted);
                }
            }
        }
    }

    fn exits(&self) -> ExitCounts {
        ExitCounts::default()
    }

    fn is_off(&self) -> bool {
        self.steps.borrow().is_empty()
    }
}

fn kernel() -> (tempfile::NamedTempFile, Kernel) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), small_elf()).unwrap();
    let kernel =
        Kernel::File { path: file.path().into(), format: KernelFormat::Elf, initramfs: None, cmdline: None };
    (file, kernel)
}

fn start(steps: Vec<Vec<Step>>, cannot_create: Option<u32>) -> (Result<Running, Error>, Arc<Seen>) {
    let (_file, kernel) = kernel();
    let seen = Arc::new(Seen::default());
    let spec = Spec { vcpus: steps.len() as u32, ram_mib: 64, kernel, ..Spec::default() };
    let script = Script { steps, cannot_create, seen: Arc::clone(&seen) };
    (start_on(&script, spec, Vec::new()), seen)
}

/// Runs to the end and checks that nothing is left.
fn outcome(steps: Vec<Vec<Step>>) -> Outcome {
    let (running, seen) = start(steps, None);
    let outcome = running.unwrap().wait();
    assert_eq!((*seen.alive.lock().unwrap(), *seen.mapped.lock().unwrap()), (0, 0));
    outcome
}

fn out(port: u16, value: u8) -> Step {
    Step::Exit(Exit::IoOut { port, size: 1, data: [value, 0, 0, 0] })
}

#[test]
fn a_reset_ends_all_vcpus() {
    assert_eq!(outcome(vec![vec![out(0x80, 1), out(0x64, 0xfe)], vec![], vec![]]), Outcome::Reset);
    assert_eq!(outcome(vec![vec![], vec![], vec![out(0x64, 0xfe)]]), Outcome::Reset);
}

#[test]
fn a_warm_reset_is_a_panic() {
    assert_eq!(outcome(vec![vec![Step::Poke(0x472, 0x1234), out(0x64, 0xfe)]]), Outcome::Panic);
}

#[test]
fn every_way_to_end_has_its_outcome() {
    assert_eq!(outcome(vec![vec![Step::Exit(Exit::TripleFault)]]), Outcome::TripleFault);
    let event = |e| outcome(vec![vec![Step::Exit(Exit::SystemEvent(e))]]);
    assert_eq!(event(SystemEvent::PowerOff), Outcome::PowerOff);
    assert_eq!(event(SystemEvent::Reset), Outcome::Reset);
    assert_eq!(event(SystemEvent::Crash), Outcome::Panic);
    let Outcome::Error(text) = outcome(vec![vec![], vec![Step::Fail]]) else { panic!() };
    assert!(text.contains("no interrupt line 99"), "{text}");
    let Outcome::Error(text) = outcome(vec![vec![], vec![Step::Panic]]) else { panic!() };
    assert_eq!(text, "the thread of vCPU 1 panicked: as told");
}

#[test]
fn reads_of_nothing_are_all_ones_and_writes_are_ignored() {
    let at = GuestAddress(0xd000_0000);
    let steps = vec![
        Step::Exit(Exit::MmioRead { at, size: 4 }),
        Step::Expect([0xff; 8]),
        Step::Exit(Exit::MmioWrite { at, size: 8, data: [1; 8] }),
        Step::Exit(Exit::IoIn { port: 0x2f8, size: 2 }),
        Step::Expect([0xff, 0xff, 0, 0, 0, 0, 0, 0]),
        Step::Exit(Exit::IoIn { port: 0x71, size: 1 }),
        Step::Expect([0; 8]),
        out(0x64, 0xfe),
    ];
    assert_eq!(outcome(vec![steps]), Outcome::Reset);
}

#[test]
fn kill_works_from_any_thread_and_twice() {
    let (running, seen) = start(vec![vec![], vec![]], None);
    let running = running.unwrap();
    assert_eq!(running.try_wait(), None);
    std::thread::scope(|s| {
        let waiter = s.spawn(|| running.wait());
        s.spawn(|| running.kill());
        running.kill();
        assert_eq!(waiter.join().unwrap(), Outcome::Killed);
    });
    assert_eq!((running.wait(), running.try_wait()), (Outcome::Killed, Some(Outcome::Killed)));
    assert_eq!(*seen.mapped.lock().unwrap(), 0);
}

#[test]
fn a_vcpu_that_cannot_be_created_leaves_nothing_behind() {
    let (result, seen) = start(vec![vec![]; 4], Some(3));
    assert!(matches!(result.unwrap_err(), Error::Hypervisor(krun_hv::Error::VcpuId { id: 3, .. })));
    assert_eq!((*seen.alive.lock().unwrap(), *seen.mapped.lock().unwrap()), (0, 0));
}

/// The accesses of a driver that takes the first device into service and out again.
fn use_a_device() -> Vec<Step> {
    let write = |offset: u64, value: u32| {
        let mut data = [0; 8];
        data[..4].copy_from_slice(&value.to_le_bytes());
        Step::Exit(Exit::MmioWrite { at: GuestAddress(0xd000_0000 + offset), size: 4, data })
    };
    // ACKNOWLEDGE, DRIVER, the one feature that every driver must accept, FEATURES_OK, DRIVER_OK, reset.
    [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x70, 15), (0x70, 0)]
        .map(|(offset, value)| write(offset, value))
        .into()
}

fn start_with_device(steps: Vec<Vec<Step>>) -> (Running, Arc<Seen>) {
    let (_file, kernel) = kernel();
    let seen = Arc::new(Seen::default());
    let spec = Spec { vcpus: steps.len() as u32, ram_mib: 64, kernel, ..Spec::default() };
    let script = Script { steps, cannot_create: None, seen: Arc::clone(&seen) };
    (start_on(&script, spec, vec![Box::new(krun_devices::rng::Rng::new())]).unwrap(), seen)
}

#[test]
fn a_guest_that_halts_after_it_took_its_devices_out_of_service_is_off() {
    // What scripts do at their end counts as off.
    let (running, seen) = start_with_device(vec![use_a_device(), vec![]]);
    assert_eq!(running.wait(), Outcome::PowerOff);
    assert_eq!((*seen.alive.lock().unwrap(), *seen.mapped.lock().unwrap()), (0, 0));
}

#[test]
fn a_guest_that_goes_on_is_left_alone() {
    let mut still_running = use_a_device();
    still_running.push(Step::Sleep);
    still_running.push(out(0x64, 0xfe));
    let (running, _) = start_with_device(vec![still_running, vec![]]);
    assert_eq!(running.wait(), Outcome::Reset);
}

#[test]
fn only_the_first_vcpu_boots() {
    let (running, seen) = start(vec![vec![out(0x64, 0xfe)], vec![], vec![]], None);
    running.unwrap().wait();
    for (id, state) in seen.states.lock().unwrap().iter() {
        assert_eq!(*id == 0, matches!(state, BootState::Long64 { rip: 0x100_0000, .. }), "{id}");
    }
}

#[test]
fn values_that_cannot_be_are_refused_before_anything_else() {
    static REACHED: AtomicBool = AtomicBool::new(false);
    struct Unused;
    impl Hypervisor for Unused {
        type Vm = FakeVm;
        fn create_vm(&self, _: &VmConfig) -> krun_hv::Result<FakeVm> {
            REACHED.store(true, Ordering::SeqCst);
            Err(krun_hv::Error::Vcpus { asked: 0, max: 0 })
        }
    }
    for spec in [
        Spec { vcpus: 0, ..Spec::default() },
        Spec { ram_mib: 1, ..Spec::default() },
        Spec { kernel: Kernel::Bundle(Some("/nowhere".into())), ..Spec::default() },
    ] {
        assert!(start_on(&Unused, spec, Vec::new()).is_err());
    }
    assert!(!REACHED.load(Ordering::SeqCst));
}
