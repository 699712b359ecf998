//! Running a machine: vCPU threads, devices, and the end of both.

mod bus;
mod end;
mod off;
mod ram;
#[cfg(test)]
mod tests;
mod vcpu;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{Builder, JoinHandle};

use krun_devices::legacy::{Ports, Serial};
use krun_event::{Wake, with_signals_blocked};
use krun_hv::{
    BootState, DoorbellGuard, ExitCounts, Hypervisor, Irq, MapGuard, Platform, Prot, Vm, VmConfig,
};
use krun_memory::{GuestAddress, GuestMemory};
use krun_virtio::{
    Interrupt, MmioTransport, RegisterPage, RegisterPages, SharedMemory, VirtioDevice, Windows, mmio::reg,
};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::board::{Board, MMIO_BASE, SERIAL_IRQ, Slot};
use crate::boot::{BootError, BootImage, Payload};
use crate::sys::memory::physical_address_bits;
use crate::{Error, SerialSpec, Spec};
use bus::Bus;
use end::End;
pub use end::Outcome;
use off::OffWatch;
use ram::{Plan, Ram};

/// Room for a vCPU thread: it handles one exit at a time.
const STACK: usize = 256 << 10;

/// Starts machines.
#[derive(Debug)]
pub struct Machine;

/// A machine that runs. Dropping it ends the machine and waits for that.
#[derive(Debug)]
pub struct Running {
    end: Arc<End>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What vCPU threads share and the last of them takes down.
pub(crate) struct Inner<V: Vm> {
    // Dropped in this order: nothing may reach the guest's memory once it is taken away.
    bus: Bus,
    _doorbells: Vec<DoorbellGuard>,
    _maps: Vec<MapGuard>,
    windows: Vec<Arc<dyn SharedMemory>>,
    /// How often something was put in place of memory that was gone.
    mended: AtomicU64,
    memory: GuestMemory,
    vm: V,
    end: Arc<End>,
    off: OffWatch,
    /// What the guest will touch page by page: what of the kernel is mapped from a file, and the devices'
    /// registers. Address and length.
    prefault: Vec<(GuestAddress, u64)>,
    /// vCPU threads that have not ended.
    left: AtomicU32,
}

impl Machine {
    /// Builds a machine of `spec` with `devices`, in the order of their slots, and starts it.
    ///
    /// # Errors
    /// What cannot work, with the value that is wrong. Nothing is left behind.
    pub fn start(spec: Spec, devices: Vec<Box<dyn VirtioDevice>>) -> Result<Running, Error> {
        // Before the host is asked for anything, so that the message is about the value.
        spec.validate()?;
        start_on(&Platform::open()?, spec, devices)
    }
}

fn seed() -> Result<[u8; 32], BootError> {
    let mut seed = [0u8; 32];
    getrandom(&mut seed, GetRandomFlags::empty()).map_err(|e| BootError::Seed(e.into()))?;
    Ok(seed)
}

/// [`Machine::start`] on any hypervisor.
pub(crate) fn start_on<H: Hypervisor>(
    hypervisor: &H,
    spec: Spec,
    devices: Vec<Box<dyn VirtioDevice>>,
) -> Result<Running, Error> {
    spec.validate()?;
    let infos: Vec<_> = devices.iter().map(|d| d.info()).collect();
    let board = Board::new(&spec, &infos, physical_address_bits())?;
    let boot = BootImage::new(&spec, &board, Payload::load(&spec.kernel)?, &seed()?)?;
    tracing::debug!(?board, ?boot, "starting");
    let config = VmConfig {
        vcpus: spec.vcpus,
        split_irqchip: spec.split_irqchip,
        nested: spec.nested,
        ..VmConfig::default()
    };
    let vm = hypervisor.create_vm(&config)?;
    let ram = Ram::new(&board.ram, &boot, Plan::choose(spec.shared_memory, spec.huge_pages))?;
    let end = Arc::new(End::new(spec.vcpus));
    let inner = connect(vm, ram, &board, spec.serial, devices, &end)?;
    let threads = spawn(&Arc::new(inner), spec.vcpus, &boot.state)?;
    Ok(Running { end, threads: Mutex::new(threads) })
}

/// Connects memory and devices with the VM.
fn connect<V: Vm>(
    vm: V,
    ram: Ram,
    board: &Board,
    serial: Option<SerialSpec>,
    devices: Vec<Box<dyn VirtioDevice>>,
    end: &Arc<End>,
) -> Result<Inner<V>, Error> {
    let mut maps = ram
        .mappings
        .iter()
        .map(|(at, mapping)| vm.map(*at, mapping, Prot::ReadWrite))
        .collect::<Result<Vec<_>, _>>()?;
    let serial = match serial {
        Some(spec) => {
            let irq = vm.irq(SERIAL_IRQ)?;
            let serial = Serial::new(spec.input, spec.output, move || irq.pulse(), failure(end))?;
            end.on_kill(serial.canceller());
            Some(serial)
        }
        None => None,
    };
    let pages = RegisterPages::new(devices.len())?;
    let mut prefault = ram.files;
    if !devices.is_empty() {
        show(&vm, &pages, &mut maps, &mut prefault);
    }
    let (windows, shown_at) = show_windows(&vm, board, &devices, &mut maps)?;
    let (mut slots, mut doorbells) = (Vec::with_capacity(devices.len()), Vec::new());
    let mut lines = Lines::default();
    // Set by acknowledgements of used buffers, and nobody looks at it: they end in the host's kernel.
    let acknowledged = Wake::new()
        .map_err(|source| Error::Device { name: "acknowledgements of interrupts".into(), source })?;
    for ((device, slot), n) in devices.into_iter().zip(&board.slots).zip(0..) {
        // There is a page for each.
        let Some(page) = pages.page(n) else { break };
        let line = lines.line(&vm, slot.irq)?;
        let mut transport = transport(device, slot, ram.memory.clone(), page, line, end)?;
        transport.set_windows(Arc::clone(&shown_at));
        if let Some(host) = vm.doorbells() {
            let at = GuestAddress(slot.at + reg::INTERRUPT_ACK);
            doorbells.push(host.register(at, Some(Interrupt::USED), &acknowledged)?);
            transport.need_no_acknowledgements();
            let at = GuestAddress(slot.at + reg::QUEUE_NOTIFY);
            for (queue, wake) in (0u32..).zip(transport.doorbells()) {
                doorbells.push(host.register(at, Some(queue), wake)?);
            }
        }
        slots.push(transport);
    }
    Ok(Inner {
        bus: Bus { ports: Ports::new(serial), slots },
        _doorbells: doorbells,
        _maps: maps,
        windows,
        mended: AtomicU64::new(0),
        memory: ram.memory,
        vm,
        end: Arc::clone(end),
        off: OffWatch::default(),
        prefault,
        left: AtomicU32::new(0),
    })
}

/// What a device calls when its thread has panicked.
fn failure(end: &Arc<End>) -> impl Fn(String) + Send + Sync + use<> {
    let end = Arc::clone(end);
    move |text| end.begin(Outcome::Error(text))
}

/// Shows the devices' registers to the guest, read only, so that reading one is no exit. Where the host
/// cannot, each read is one.
fn show<V: Vm>(
    vm: &V,
    pages: &RegisterPages,
    maps: &mut Vec<MapGuard>,
    prefault: &mut Vec<(GuestAddress, u64)>,
) {
    let at = GuestAddress(MMIO_BASE);
    match vm.map(at, pages.mapping(), Prot::ReadOnly) {
        Ok(guard) => {
            maps.push(guard);
            prefault.push((at, pages.mapping().len() as u64));
        }
        Err(e) => tracing::debug!("the guest reads registers by exits: {e}"),
    }
}

/// The windows of the devices, and where the guest sees them.
type Shown = (Vec<Arc<dyn SharedMemory>>, Arc<Windows>);

/// Shows the devices' windows to the guest.
fn show_windows<V: Vm>(
    vm: &V,
    board: &Board,
    devices: &[Box<dyn VirtioDevice>],
    maps: &mut Vec<MapGuard>,
) -> Result<Shown, Error> {
    let (mut windows, mut places) = (Vec::new(), Vec::new());
    for (device, slot) in devices.iter().zip(&board.slots) {
        for (id, memory) in device.shared_memory() {
            let Some(place) = slot.shm.iter().find(|place| place.id == id) else { continue };
            let at = GuestAddress(place.at);
            maps.push(vm.map(at, memory.mapping(), Prot::ReadWrite)?);
            places.push((at, memory.mapping().clone()));
            windows.push(memory);
        }
    }
    Ok((windows, Arc::new(Windows::new(places))))
}

/// Interrupt lines in use. Devices on one line share one [`Irq`]: the pulses of one follow each other, but
/// two that are driven at the same time could merge, and the second be lost between the guest's looks at the
/// devices.
#[derive(Debug, Default)]
struct Lines(BTreeMap<u32, Irq>);

impl Lines {
    fn line<V: Vm>(&mut self, vm: &V, line: u32) -> Result<Irq, Error> {
        Ok(match self.0.entry(line) {
            Entry::Occupied(irq) => irq.get().clone(),
            Entry::Vacant(place) => place.insert(vm.irq(line)?).clone(),
        })
    }
}

fn transport(
    device: Box<dyn VirtioDevice>,
    slot: &Slot,
    memory: GuestMemory,
    page: RegisterPage,
    irq: Irq,
    end: &Arc<End>,
) -> Result<MmioTransport, Error> {
    let direct = irq.wake().cloned();
    let mut transport = MmioTransport::new(device, memory, page, move || irq.pulse(), failure(end))
        .map_err(|source| Error::Device { name: slot.name.clone(), source })?;
    if let Some(line) = direct {
        transport.set_direct_line(line);
    }
    for window in &slot.shm {
        transport.place_shm(window.id, GuestAddress(window.at));
    }
    Ok(transport)
}

/// Starts a thread per vCPU and lets them run once all vCPUs exist.
fn spawn<V: Vm>(inner: &Arc<Inner<V>>, vcpus: u32, state: &BootState) -> Result<Vec<JoinHandle<()>>, Error> {
    let (created, results) = mpsc::channel();
    let (mut threads, mut gates) = (Vec::new(), Vec::new());
    let mut failed = None;
    for id in 0..vcpus {
        let (gate, go) = mpsc::channel();
        let (created, inner) = (created.clone(), Arc::clone(inner));
        let state = if id == 0 { *state } else { BootState::Application };
        inner.left.fetch_add(1, Ordering::SeqCst);
        let leave = Leave(Some(inner));
        let body = move || {
            if let Some(inner) = &leave.0 {
                vcpu::body(inner, id, &state, &created, &go);
            }
        };
        match with_signals_blocked(|| Builder::new().name(format!("vcpu{id}")).stack_size(STACK).spawn(body))
        {
            Ok(thread) => threads.push(thread),
            Err(source) => {
                failed = Some(Error::Thread { id, source });
                break;
            }
        }
        gates.push(gate);
    }
    drop(created);
    let mut kickers = Vec::new();
    for (_, result) in results.iter().take(threads.len()) {
        match result {
            Ok(kicker) => kickers.push(kicker),
            Err(e) => failed = failed.or(Some(e.into())),
        }
    }
    if failed.is_none() && kickers.len() < vcpus as usize {
        failed = Some(Error::Lost { id: kickers.len() as u32 });
    }
    if let Some(error) = failed {
        drop(gates);
        for thread in threads {
            let _ = thread.join();
        }
        return Err(error);
    }
    inner.end.set_kickers(kickers);
    tracing::info!("the guest's first instruction");
    for gate in gates {
        let _ = gate.send(());
    }
    Ok(threads)
}

/// A vCPU thread's part in the machine; the last one to go takes the machine down.
struct Leave<V: Vm>(Option<Arc<Inner<V>>>);

impl<V: Vm> Drop for Leave<V> {
    fn drop(&mut self) {
        let Some(inner) = self.0.take() else { return };
        if inner.left.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        let end = Arc::clone(&inner.end);
        tracing::info!("the guest's last instruction");
        inner.shut_down();
        drop(inner);
        tracing::info!("the machine is gone");
        end.finish();
    }
}

impl<V: Vm> Inner<V> {
    /// Puts something in place of memory that a vCPU could not get at; false if nothing is missing. `seen` is what it
    /// knows of how often that was done: another vCPU may have come first.
    fn mend(&self, seen: &mut u64) -> bool {
        // Each of them, for the host does not say where.
        if self.windows.iter().fold(false, |any, window| window.mend() | any) {
            self.mended.fetch_add(1, Ordering::SeqCst);
            return true;
        }
        let before = std::mem::replace(seen, self.mended.load(Ordering::SeqCst));
        before != *seen
    }

    /// Stops the devices. They pass on what the guest left with them, unless the machine was killed.
    fn shut_down(&self) {
        self.off.stop();
        let drain = !matches!(self.end.outcome(), None | Some(Outcome::Killed));
        for slot in &self.bus.slots {
            if let Err(e) = slot.shutdown(drain) {
                tracing::warn!(device = slot.info().name, "at the end: {e}");
            }
        }
        if let Some(serial) = self.bus.ports.serial() {
            serial.close();
        }
    }
}

impl Running {
    /// Waits until the machine has ended, its devices have stopped and its memory is released. Any
    /// number of threads may wait.
    pub fn wait(&self) -> Outcome {
        let outcome = self.end.wait(|| {
            off::ask(&self.end, off::PATIENCE);
        });
        self.join();
        outcome
    }

    /// The same without waiting; `None` while the machine runs. Who asks again and again looks after the machine as
    /// who waits does.
    pub fn try_wait(&self) -> Option<Outcome> {
        if self.end.is_look_due() {
            off::look(&self.end);
        }
        let outcome = self.end.try_wait()?;
        self.join();
        Some(outcome)
    }

    /// Ends the machine from any thread, at once: what its devices still hold is lost. Does not wait;
    /// does nothing when it has ended.
    pub fn kill(&self) {
        self.end.kill();
    }

    /// How often the vCPUs have left the guest so far, by reason.
    pub fn exits(&self) -> ExitCounts {
        self.end.counts()
    }

    /// Collects the threads, which have nothing more to do. All callers wait for that.
    fn join(&self) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        self.wait();
    }
}
