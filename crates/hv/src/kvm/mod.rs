//! KVM, the hypervisor of Linux.

use std::io;

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Cap;

mod irq;
mod kicker;
mod sys;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;
pub(crate) mod x86_64;

pub use vm::KvmVm;

use crate::{Error, Hypervisor, Result, VmConfig};

/// The device through which everything is asked for.
pub(crate) const DEVICE: &str = "/dev/kvm";

/// What the back end cannot do without, with the names of the kernel's headers.
const REQUIRED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// An open /dev/kvm that has been checked for what is needed.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens the device.
    ///
    /// # Errors
    /// It is missing or not permitted ([`Error::Open`]), or the host's KVM is too old.
    pub fn open() -> Result<Self> {
        let fd = kvm_ioctls::Kvm::new().map_err(|e| Error::Open { path: DEVICE, source: e.into() })?;
        let found = fd.get_api_version();
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(Error::ApiVersion { found });
        }
        let missing: Vec<_> =
            REQUIRED.iter().filter(|(cap, _)| !fd.check_extension(*cap)).map(|(_, name)| *name).collect();
        if !missing.is_empty() {
            return Err(Error::Missing { missing });
        }
        Ok(Self { fd })
    }

    /// Most vCPUs that one VM can have on this host.
    pub fn max_vcpus(&self) -> u32 {
        u32::try_from(self.fd.get_max_vcpus()).unwrap_or(u32::MAX).min(x86_64::MAX_VCPUS)
    }
}

impl Hypervisor for Kvm {
    type Vm = KvmVm;

    fn create_vm(&self, config: &VmConfig) -> Result<KvmVm> {
        let max = self.max_vcpus();
        if config.vcpus == 0 || config.vcpus > max {
            return Err(Error::Vcpus { asked: config.vcpus, max });
        }
        let cpuid = self
            .fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| Error::call("KVM_GET_SUPPORTED_CPUID", "what CPUs this host can offer", e))?;
        let host = x86_64::cpuid::Host {
            supported: cpuid.as_slice().to_vec(),
            tsc_deadline: self.fd.check_extension(Cap::TscDeadlineTimer),
        };
        KvmVm::new(create(&self.fd)?, *config, host)
    }
}

/// KVM_CREATE_VM. The kernel gives up when a signal comes in between, so it is asked again.
fn create(fd: &kvm_ioctls::Kvm) -> Result<kvm_ioctls::VmFd> {
    let mut tries = 0;
    loop {
        match fd.create_vm() {
            Ok(vm) => return Ok(vm),
            Err(e) if e.errno() == libc::EINTR && tries < 100 => tries += 1,
            Err(e) => {
                let hint = "the host may be short of memory, or another hypervisor has the CPU";
                return Err(Error::call("KVM_CREATE_VM", hint, io::Error::from(e)));
            }
        }
    }
}
