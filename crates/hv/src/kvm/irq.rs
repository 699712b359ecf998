//! Interrupt lines as irqfds, doorbells as ioeventfds.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use krun_event::Wake;
use krun_memory::GuestAddress;
use kvm_bindings::{
    KVM_CAP_IOEVENTFD_ANY_LENGTH, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign,
};

use super::sys;
use super::vm::{KvmVm, Shared};
use crate::{DoorbellGuard, Doorbells, Error, Irq, Result};

/// Pins of the I/O APIC.
pub(super) const LINES: u32 = 24;

pub(super) fn irq(vm: &Shared, line: u32) -> Result<Irq> {
    if line >= LINES {
        return Err(Error::Line { line, last: LINES - 1 });
    }
    let wake = Wake::new()
        .map_err(|e| Error::call("eventfd", "for an interrupt line; raise the limit of open files", e))?;
    // Global interrupt numbers below 24 are the pins of the I/O APIC, in the kernel or split. The
    // kernel forgets the eventfd by itself when its last descriptor is closed.
    sys::irqfd(&vm.fd, wake.as_raw_fd(), line)
        .map_err(|e| Error::call("KVM_IRQFD", "for an interrupt line", e))?;
    Ok(Irq::from_wake(wake))
}

impl Doorbells for KvmVm {
    fn register(&self, at: GuestAddress, value: Option<u32>, wake: &Wake) -> Result<DoorbellGuard> {
        let vm = self.shared();
        let any_length = vm.fd.check_extension_raw(KVM_CAP_IOEVENTFD_ANY_LENGTH.into()) > 0;
        let arg = kvm_ioeventfd {
            datamatch: value.map_or(0, u64::from),
            addr: at.0,
            // Length 0 matches writes of any width without decoding the instruction.
            len: if value.is_none() && any_length { 0 } else { 4 },
            fd: wake.as_raw_fd(),
            flags: if value.is_some() { 1 << kvm_ioeventfd_flag_nr_datamatch } else { 0 },
            ..Default::default()
        };
        sys::ioeventfd(&vm.fd, &arg)
            .map_err(|e| Error::call("KVM_IOEVENTFD", "address and value may be registered already", e))?;
        Ok(DoorbellGuard::new(Registration { vm: Arc::clone(vm), arg, _wake: wake.clone() }))
    }
}

struct Registration {
    vm: Arc<Shared>,
    arg: kvm_ioeventfd,
    /// Keeps the descriptor in `arg` ours until it is handed back.
    _wake: Wake,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.arg.flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
        if let Err(error) = sys::ioeventfd(&self.vm.fd, &self.arg) {
            tracing::warn!(%error, address = self.arg.addr, "cannot remove a doorbell");
        }
    }
}
