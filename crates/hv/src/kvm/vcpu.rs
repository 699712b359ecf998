//! A virtual CPU: from KVM's exits to [`Exit`] values and back.

use std::io;
use std::sync::{Arc, PoisonError};

use krun_memory::GuestAddress;
use kvm_bindings as kvm;
use kvm_ioctls::VcpuFd;

use super::kicker::Kicked;
use super::sys::{self, RunPage};
use super::vm::Shared;
use super::x86_64::{self, ioapic};
use crate::exit::Reason;
use crate::{BootState, Error, Exit, ExitCounts, Kicker, Reply, Result, Stop, SystemEvent, Vcpu};

/// A virtual CPU of KVM. Neither `Send` nor `Sync`.
#[derive(Debug)]
pub struct KvmVcpu {
    vm: Arc<Shared>,
    id: u32,
    fd: VcpuFd,
    page: Arc<RunPage>,
    kicked: Kicked,
    pending: Pending,
    counts: ExitCounts,
}

/// What is left to do for the exit before.
#[derive(Debug, Clone, Copy)]
enum Pending {
    Nothing,
    /// The answer to an MMIO read.
    Mmio,
    /// Items of a port access, the one last reported first. `offset` is where it lies in the page.
    Port {
        input: bool,
        port: u16,
        size: u8,
        offset: u64,
        left: u32,
    },
}

impl KvmVcpu {
    pub(super) fn new(vm: &Arc<Shared>, id: u32) -> Result<Self> {
        let fd = vm
            .fd
            .create_vcpu(id.into())
            .map_err(|e| Error::call("KVM_CREATE_VCPU", "each vCPU number can be used once per VM", e))?;
        let page = RunPage::map(&fd, vm.fd.run_size())
            .map_err(|e| Error::call("mmap", "the page shared with the kernel for a vCPU", e))?;
        let page = Arc::new(page);
        let kicked = Kicked::new(&fd, Arc::clone(&page))
            .map_err(|e| Error::call("KVM_SET_SIGNAL_MASK", "for interrupting a vCPU", e))?;
        x86_64::init(&fd, vm, id)?;
        let (pending, counts) = (Pending::Nothing, ExitCounts::default());
        Ok(Self { vm: Arc::clone(vm), id, fd, page, kicked, pending, counts })
    }

    /// Hands the guest the answer to the exit before; the next item if that was not the last.
    fn answer(&mut self, reply: Reply) -> Option<Exit> {
        match self.pending {
            Pending::Nothing => None,
            Pending::Mmio => {
                if let Reply::Read(data) = reply {
                    self.page.set_mmio_data(data);
                }
                self.pending = Pending::Nothing;
                None
            }
            Pending::Port { input, port, size, offset, left } => {
                if let (true, Reply::Read(data)) = (input, reply) {
                    self.page.write_data(offset, &data[..size.into()]);
                }
                self.port(input, port, size, offset + u64::from(size), left - 1)
            }
        }
    }

    /// Reports the first of `left` items at `offset` of the page; none if there is none.
    fn port(&mut self, input: bool, port: u16, size: u8, offset: u64, left: u32) -> Option<Exit> {
        if left == 0 {
            self.pending = Pending::Nothing;
            return None;
        }
        self.pending = Pending::Port { input, port, size, offset, left };
        if input {
            self.page.write_data(offset, &[0xff; 4][..size.into()]);
            return Some(Exit::IoIn { port, size });
        }
        Some(Exit::IoOut { port, size, data: self.page.read_data(offset, size.into()) })
    }

    /// Turns the exit in the page into a value; `None` if it was dealt with here.
    fn exit(&mut self) -> Result<Option<Exit>> {
        let exit = match self.page.exit_reason() {
            kvm::KVM_EXIT_IO => return self.io_exit(),
            kvm::KVM_EXIT_MMIO => return self.mmio_exit(),
            kvm::KVM_EXIT_INTR => return Ok(self.interrupted()),
            kvm::KVM_EXIT_IOAPIC_EOI => {
                // Lines are pulsed, never held, so the end of an interrupt changes nothing.
                self.counts.count(Reason::Ioapic);
                return Ok(None);
            }
            kvm::KVM_EXIT_IRQ_WINDOW_OPEN => {
                self.counts.count(Reason::Other);
                return Ok(None);
            }
            kvm::KVM_EXIT_HLT => (Reason::Halt, Exit::Halted),
            kvm::KVM_EXIT_SHUTDOWN => (Reason::Shutdown, Exit::TripleFault),
            kvm::KVM_EXIT_SYSTEM_EVENT => {
                let event = self.page.detail::<sys::EventKind>();
                let event = match event.kind {
                    kvm::KVM_SYSTEM_EVENT_SHUTDOWN => SystemEvent::PowerOff,
                    kvm::KVM_SYSTEM_EVENT_RESET => SystemEvent::Reset,
                    kvm::KVM_SYSTEM_EVENT_CRASH => SystemEvent::Crash,
                    other => return Err(self.stopped(format!("unknown system event {other}"))),
                };
                (Reason::SystemEvent, Exit::SystemEvent(event))
            }
            reason => return Err(self.failed(reason)),
        };
        self.counts.count(exit.0);
        Ok(Some(exit.1))
    }

    fn io_exit(&mut self) -> Result<Option<Exit>> {
        let io = self.page.detail::<sys::PortAccess>();
        let input = u32::from(io.direction) == kvm::KVM_EXIT_IO_IN;
        self.counts.count(if input { Reason::IoIn } else { Reason::IoOut });
        if !matches!(io.size, 1 | 2 | 4) {
            return Err(self.stopped(format!("access to port {:#x} of {} bytes", io.port, io.size)));
        }
        Ok(self.port(input, io.port, io.size, io.data_offset, io.count))
    }

    fn mmio_exit(&mut self) -> Result<Option<Exit>> {
        let mut mmio = self.page.detail::<sys::MmioAccess>();
        let Some(size) = u8::try_from(mmio.len).ok().filter(|n| (1..=8).contains(n)) else {
            let what = format!("access to {:#x} of {} bytes", mmio.phys_addr, mmio.len);
            return Err(self.stopped(what));
        };
        let write = mmio.is_write != 0;
        // What lies past the size is left from before.
        mmio.data[size.into()..].fill(0);
        if self.vm.ioapic.is_some() && ioapic::WINDOW.contains(&mmio.phys_addr) {
            self.counts.count(Reason::Ioapic);
            self.ioapic(mmio.phys_addr - ioapic::WINDOW.start, write.then_some(mmio.data))?;
            return Ok(None);
        }
        let at = GuestAddress(mmio.phys_addr);
        if write {
            self.counts.count(Reason::MmioWrite);
            return Ok(Some(Exit::MmioWrite { at, size, data: mmio.data }));
        }
        self.counts.count(Reason::MmioRead);
        self.page.set_mmio_data([0xff; 8]);
        self.pending = Pending::Mmio;
        Ok(Some(Exit::MmioRead { at, size }))
    }

    fn ioapic(&self, offset: u64, write: Option<[u8; 8]>) -> Result<()> {
        let Some(ioapic) = &self.vm.ioapic else { return Ok(()) };
        let mut ioapic = ioapic.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(data) = write else {
            self.page.set_mmio_data(u64::from(ioapic.read(offset)).to_le_bytes());
            return Ok(());
        };
        let [a, b, c, d, ..] = data;
        if ioapic.write(offset, u32::from_le_bytes([a, b, c, d])) {
            // The lock is held so that routes reach the kernel in the order of the writes.
            ioapic.set_routes(&self.vm.fd)?;
        }
        Ok(())
    }

    fn interrupted(&mut self) -> Option<Exit> {
        let kicked = self.kicked.take();
        self.counts.count(if kicked { Reason::Kick } else { Reason::Signal });
        kicked.then_some(Exit::Interrupted)
    }

    /// The error for an exit after which the guest cannot go on.
    #[cold]
    fn failed(&mut self, reason: u32) -> Error {
        match reason {
            kvm::KVM_EXIT_FAIL_ENTRY => {
                let fail = self.page.detail::<sys::FailEntry>();
                let code = fail.hardware_entry_failure_reason;
                self.stopped(format!("the CPU refused to enter the guest, reason {code:#x}"))
            }
            kvm::KVM_EXIT_INTERNAL_ERROR => {
                let (what, bytes) = x86_64::internal_error(&self.page);
                let mut error = self.stopped(format!("KVM cannot go on: {what}"));
                if let (Error::Stopped { stop, .. }, Some(bytes)) = (&mut error, bytes) {
                    stop.instruction = bytes;
                }
                error
            }
            other => self.stopped(format!("unexpected KVM exit {other}")),
        }
    }

    /// An error that says where the guest was.
    #[cold]
    fn stopped(&mut self, reason: String) -> Error {
        self.counts.count(Reason::Error);
        Error::Stopped { vcpu: self.id, stop: self.stop(reason) }
    }

    /// Where the guest is.
    fn stop(&self, reason: String) -> Box<Stop> {
        let registers = x86_64::regs::describe(&self.fd);
        let mut bytes = [0u8; 15];
        let known = x86_64::regs::instruction_address(&self.fd).map_or(0, |at| self.vm.peek(at, &mut bytes));
        let instruction = bytes[..known].to_vec();
        Box::new(Stop { reason, registers, instruction })
    }

    #[cold]
    fn run_failed(&mut self, error: &io::Error) -> Error {
        let mut reason = format!("KVM_RUN failed: {error}");
        let faulty = matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EHWPOISON));
        if faulty && self.page.exit_reason() == kvm::KVM_EXIT_MEMORY_FAULT {
            let fault = self.page.detail::<sys::MemoryFault>();
            reason += &format!(", memory at {:#x} cannot be had", fault.gpa);
        }
        if faulty {
            self.counts.count(Reason::Error);
            return Error::Memory { vcpu: self.id, stop: self.stop(reason) };
        }
        self.stopped(reason)
    }
}

impl Vcpu for KvmVcpu {
    fn kicker(&self) -> Kicker {
        let target = Arc::clone(self.kicked.target());
        Kicker::from_fn(move || target.kick())
    }

    fn set_boot_state(&mut self, state: &BootState) -> Result<()> {
        x86_64::regs::apply(&self.fd, state)
    }

    fn run(&mut self, reply: Reply) -> Result<Exit> {
        if let Some(exit) = self.answer(reply) {
            return Ok(exit);
        }
        loop {
            let exit = match sys::run(&self.fd) {
                Ok(()) => self.exit()?,
                Err(e) => match e.raw_os_error() {
                    Some(libc::EINTR) => self.interrupted(),
                    // A vCPU that waited for its start-up interrupt has got it.
                    Some(libc::EAGAIN) => None,
                    _ => return Err(self.run_failed(&e)),
                },
            };
            if let Some(exit) = exit {
                return Ok(exit);
            }
        }
    }

    fn prefault(&self, at: GuestAddress, len: u64) {
        if let Err(e) = sys::pre_fault(&self.fd, at.0, len) {
            tracing::debug!("{len:#x} bytes at {:#x} are not mapped ahead: {e}", at.0);
        }
    }

    fn exits(&self) -> ExitCounts {
        self.counts
    }

    fn is_off(&self) -> bool {
        x86_64::regs::is_off(&self.fd)
    }
}
