//! What is particular to x86_64.

pub(crate) mod cpuid;
pub(crate) mod ioapic;
pub(crate) mod msrs;
pub(crate) mod regs;

use kvm_bindings::{CpuId, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES as HAS_BYTES};
use kvm_ioctls::VcpuFd;

use super::sys::{EmulationFailure, InternalError, RunPage};
use super::vm::Shared;
use crate::{Error, Result};

/// As many as 8-bit APIC ids can name beside the I/O APIC's and the broadcast id.
pub(super) const MAX_VCPUS: u32 = 254;

/// Sets what does not depend on how the guest is booted.
pub(super) fn init(fd: &VcpuFd, vm: &Shared, id: u32) -> Result<()> {
    let entries = cpuid::for_vcpu(&vm.cpuid, id);
    let list = CpuId::from_entries(&entries)
        .map_err(|_| too_many("KVM_SET_CPUID2", "the host reports more CPUID leaves than KVM takes"))?;
    fd.set_cpuid2(&list).map_err(|e| Error::call("KVM_SET_CPUID2", "describing the CPU to the guest", e))?;
    msrs::apply(fd)?;
    if let Some(states) = vm.states {
        regs::set_states(fd, states)?;
    }
    if id == 0 {
        regs::connect_local_apic(fd)?;
    }
    Ok(())
}

fn too_many(call: &'static str, hint: &'static str) -> Error {
    Error::call(call, hint, std::io::Error::from_raw_os_error(libc::E2BIG))
}

/// KVM's words for KVM_EXIT_INTERNAL_ERROR, and the instruction's bytes if it gave them.
pub(super) fn internal_error(page: &RunPage) -> (String, Option<Vec<u8>>) {
    let error = page.detail::<InternalError>();
    let what = match error.suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "an instruction it cannot emulate",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions at once",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was delivered",
        kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit that it does not know",
        _ => "no reason given",
    };
    let what = format!("{what} (internal error, suberror {})", error.suberror);
    if error.suberror != kvm_bindings::KVM_INTERNAL_ERROR_EMULATION {
        let data = &error.data[..(error.ndata as usize).min(error.data.len())];
        return (format!("{what}, data {data:x?}"), None);
    }
    let failure = page.detail::<EmulationFailure>();
    let bytes = (failure.count >= 3 && failure.flags & u64::from(HAS_BYTES) != 0).then(|| {
        let len = usize::from(failure.insn_size).min(failure.insn_bytes.len());
        failure.insn_bytes[..len].to_vec()
    });
    (what, bytes)
}
