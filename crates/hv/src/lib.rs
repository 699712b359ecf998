//! Hypervisors behind one set of traits.
//!
//! A [`Hypervisor`] makes a [`Vm`], a [`Vm`] makes [`Vcpu`]s, and a [`Vcpu`] runs guest code until
//! something happens that the caller must deal with: an [`Exit`]. Exits and the answers to them are
//! plain values; nothing in here calls back into its user.
//!
//! The back end for this host is [`Platform`]. An ability that not every host has is an `Option`.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use krun_event::Wake;
use krun_memory::{GuestAddress, Mapping};

mod error;
mod exit;
mod state;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod kvm;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod probe;

pub use error::{Error, Stop};
pub use exit::{Exit, ExitCounts, Reply, SystemEvent};
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub use kvm::Kvm as Platform;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub use probe::{Finding, Probe, nested_virtualisation, probe};
pub use state::{BootState, Table, flat_gdt};

/// What this crate's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a virtual machine is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmConfig {
    /// Virtual CPUs that will be created, ids `0..vcpus`. The guest is told this number.
    pub vcpus: u32,
    /// Only the local interrupt controllers live in the host kernel; the I/O controller is
    /// emulated here and there is no 8259 pair.
    pub split_irqchip: bool,
    /// The guest may itself use hardware virtualisation.
    pub nested: bool,
    /// Give the guest a programmable interval timer. Linux guests with the KVM clock and a
    /// TSC-deadline timer need none, and it costs a host kernel thread per VM.
    pub pit: bool,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self { vcpus: 1, split_irqchip: false, nested: false, pit: false }
    }
}

/// How the guest may use mapped memory. It can execute whatever it can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prot {
    /// Writes leave the guest as [`Exit::MmioWrite`].
    ReadOnly,
    /// Ordinary memory.
    ReadWrite,
}

/// A host facility that can create virtual machines.
pub trait Hypervisor {
    /// Its virtual machines.
    type Vm: Vm;

    /// Creates an empty virtual machine: no memory, no vCPUs.
    ///
    /// # Errors
    /// More vCPUs than the host allows, or the host's refusal.
    fn create_vm(&self, config: &VmConfig) -> Result<Self::Vm>;
}

/// A virtual machine. It ends when this value and its vCPUs, guards and interrupts are dropped.
pub trait Vm: Send + Sync + 'static {
    /// Its virtual CPUs.
    type Vcpu: Vcpu;

    /// Creates virtual CPU `id`, bound to the calling thread: create, run and drop it there.
    ///
    /// # Errors
    /// An id outside the configured count, one that exists already, or the host's refusal.
    fn create_vcpu(&self, id: u32) -> Result<Self::Vcpu>;

    /// Shows `mapping` to the guest at physical address `at` until the guard is dropped. The guard
    /// keeps the mapping alive. May be called while vCPUs run.
    ///
    /// # Errors
    /// Address or size not page-aligned, overlap with memory mapped before, or the host's refusal.
    fn map(&self, at: GuestAddress, mapping: &Mapping, prot: Prot) -> Result<MapGuard>;

    /// Edge-triggered interrupt line `line` (on x86_64 a pin of the I/O APIC, 0 to 23).
    ///
    /// # Errors
    /// No such line, or the host's refusal.
    fn irq(&self, line: u32) -> Result<Irq>;

    /// Doorbells that the host rings without an exit to user space, where it has them.
    fn doorbells(&self) -> Option<&dyn Doorbells> {
        None
    }

    /// Frequency of the guest's time stamp counter in kHz, where known before it runs.
    fn tsc_khz(&self) -> Option<u32> {
        None
    }
}

/// Guest writes that set a [`Wake`] and do not end [`Vcpu::run`].
pub trait Doorbells {
    /// Sets `wake` whenever the guest writes to `at` in its physical address space; with `value`,
    /// only for 32-bit writes of that value. Ends when the guard is dropped.
    ///
    /// # Errors
    /// The host's refusal, for one because address and value are registered already.
    fn register(&self, at: GuestAddress, value: Option<u32>, wake: &Wake) -> Result<DoorbellGuard>;
}

/// A virtual CPU. Stays on the thread it was created on.
pub trait Vcpu {
    /// A handle by which any thread makes [`Vcpu::run`] return.
    fn kicker(&self) -> Kicker;

    /// Sets registers before the first run.
    ///
    /// # Errors
    /// The host's refusal.
    fn set_boot_state(&mut self, state: &BootState) -> Result<()>;

    /// Runs guest code until the next exit. `reply` answers the exit before this one:
    /// [`Reply::Read`] after [`Exit::IoIn`] and [`Exit::MmioRead`], else [`Reply::None`]. A read
    /// that is not answered gives the guest all ones.
    ///
    /// # Errors
    /// The guest cannot go on ([`Error::Stopped`]), or not without some memory ([`Error::Memory`]: it may be run again),
    /// or the host's refusal.
    fn run(&mut self, reply: Reply) -> Result<Exit>;

    /// Gives the guest the pages of `len` bytes of its memory from `at` now, where the host can do that
    /// in one go, not each by an exit on first use. Nothing depends on it.
    fn prefault(&self, at: GuestAddress, len: u64) {
        let _ = (at, len);
    }

    /// How often this vCPU has left the guest, by reason.
    fn exits(&self) -> ExitCounts;

    /// Whether nothing but another vCPU can make this one run again: it halted with interrupts off, or
    /// was not started yet. False where the host does not tell.
    fn is_off(&self) -> bool {
        false
    }
}

/// An interrupt line as a value. Clones are the same line.
#[derive(Clone)]
pub struct Irq(IrqKind);

#[derive(Clone)]
enum IrqKind {
    Wake(Wake),
    Call(Arc<dyn Fn() + Send + Sync>),
}

impl Irq {
    /// A line that the host kernel drives whenever `wake` is set.
    pub fn from_wake(wake: Wake) -> Self {
        Self(IrqKind::Wake(wake))
    }

    /// A line driven by a function call.
    pub fn from_fn(pulse: impl Fn() + Send + Sync + 'static) -> Self {
        Self(IrqKind::Call(Arc::new(pulse)))
    }

    /// One rising and falling edge. Never blocks; edges the guest has not seen yet merge.
    pub fn pulse(&self) {
        match &self.0 {
            IrqKind::Wake(wake) => wake.wake(),
            IrqKind::Call(pulse) => pulse(),
        }
    }

    /// The wake-up that drives the line, to hand to another process, where there is one.
    pub fn wake(&self) -> Option<&Wake> {
        match &self.0 {
            IrqKind::Wake(wake) => Some(wake),
            IrqKind::Call(_) => None,
        }
    }
}

impl fmt::Debug for Irq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            IrqKind::Wake(wake) => f.debug_tuple("Irq").field(wake).finish(),
            IrqKind::Call(_) => f.write_str("Irq(fn)"),
        }
    }
}

/// Makes a vCPU's [`Vcpu::run`] return [`Exit::Interrupted`]. Clones act on the same vCPU.
#[derive(Clone)]
pub struct Kicker(Arc<dyn Fn() + Send + Sync>);

impl Kicker {
    /// A kicker that calls `kick`.
    pub fn from_fn(kick: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(kick))
    }

    /// The run that is going on, or else the next one, returns [`Exit::Interrupted`]. Never blocks
    /// for long, may be called from any thread, and does nothing once the vCPU is gone.
    pub fn kick(&self) {
        (self.0)();
    }
}

impl fmt::Debug for Kicker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kicker")
    }
}

/// Memory shown to a guest; dropping it takes the memory away again.
#[must_use = "the memory is taken away when this is dropped"]
pub struct MapGuard(#[allow(dead_code, reason = "held for its drop")] Box<dyn Any + Send + Sync>);

impl MapGuard {
    /// Wraps what a back end wants dropped.
    pub fn new(inner: impl Any + Send + Sync) -> Self {
        Self(Box::new(inner))
    }
}

impl fmt::Debug for MapGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MapGuard")
    }
}

/// A registered doorbell; dropping it ends the registration.
#[must_use = "the doorbell is removed when this is dropped"]
pub struct DoorbellGuard(#[allow(dead_code, reason = "held for its drop")] Box<dyn Any + Send + Sync>);

impl DoorbellGuard {
    /// Wraps what a back end wants dropped.
    pub fn new(inner: impl Any + Send + Sync) -> Self {
        Self(Box::new(inner))
    }
}

impl fmt::Debug for DoorbellGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DoorbellGuard")
    }
}
