//! A virtual machine: its memory slots, interrupt controllers and vCPUs.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use krun_memory::{GuestAddress, Mapping};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VmFd};

use super::irq;
use super::vcpu::KvmVcpu;
use super::x86_64::cpuid;
use super::x86_64::ioapic::Ioapic;
use crate::{Doorbells, Error, Irq, MapGuard, Prot, Result, Vm, VmConfig};

/// Four pages that KVM needs inside the guest's address space on Intel hosts: an identity map and a
/// task-state segment for real mode. Between the local APIC and 16 MiB of room for firmware below
/// 4 GiB.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: u64 = IDENTITY_MAP + PAGE;
const PRIVATE_END: u64 = TSS + 3 * PAGE;
const PAGE: u64 = 4096;

/// A virtual machine of KVM.
#[derive(Debug)]
pub struct KvmVm(Arc<Shared>);

/// What the VM, its vCPUs and its guards share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) fd: VmFd,
    pub(super) config: VmConfig,
    /// CPUID of all vCPUs, without what differs between them.
    pub(super) cpuid: Vec<kvm_bindings::kvm_cpuid_entry2>,
    /// Extended states that vCPUs start with, where it must not be left to the guest to turn them
    /// on: QEMU's software CPU (7.2, AMD) does not tell KVM when a nested guest executes XSETBV, so
    /// KVM would go on with the reset value, report the wrong size in CPUID, and Linux would do
    /// without AVX.
    pub(super) states: Option<u64>,
    /// The I/O APIC when it is not in the kernel.
    pub(super) ioapic: Option<Mutex<Ioapic>>,
    slots: Mutex<Slots>,
    tsc_khz: Option<u32>,
}

/// Memory slots in use.
#[derive(Debug, Default)]
struct Slots {
    /// By guest address; they do not overlap.
    used: BTreeMap<u64, Slot>,
    free: Vec<u32>,
    next: u32,
    max: u32,
    /// The first address the CPU cannot reach.
    end: u64,
}

#[derive(Debug)]
struct Slot {
    number: u32,
    mapping: Mapping,
}

impl KvmVm {
    pub(super) fn new(fd: VmFd, config: VmConfig, host: cpuid::Host) -> Result<Self> {
        fd.set_identity_map_address(IDENTITY_MAP)
            .map_err(|e| Error::call("KVM_SET_IDENTITY_MAP_ADDR", "reserving pages below 4 GiB", e))?;
        fd.set_tss_address(TSS as usize)
            .map_err(|e| Error::call("KVM_SET_TSS_ADDR", "reserving pages below 4 GiB", e))?;
        if config.split_irqchip {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
            cap.args[0] = irq::LINES.into();
            fd.enable_cap(&cap)
                .map_err(|e| Error::call("KVM_CAP_SPLIT_IRQCHIP", "run without split_irqchip", e))?;
        } else {
            fd.create_irq_chip()
                .map_err(|e| Error::call("KVM_CREATE_IRQCHIP", "interrupt controllers in the kernel", e))?;
        }
        if config.pit && !config.split_irqchip {
            let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            fd.create_pit2(pit).map_err(|e| Error::call("KVM_CREATE_PIT2", "run without the timer", e))?;
        }
        let tsc_khz = tsc_khz(&fd);
        let max = u32::try_from(fd.check_extension_int(Cap::NrMemslots)).unwrap_or(0).max(32);
        let cpuid = cpuid::template(&host, &config, tsc_khz);
        let states = cpuid::host_is_emulated().then(|| cpuid::common_states(&cpuid)).flatten();
        let ioapic = config.split_irqchip.then(Mutex::default);
        let slots = Mutex::new(Slots { max, end: cpuid::address_end(&cpuid), ..Default::default() });
        Ok(Self(Arc::new(Shared { fd, config, cpuid, states, ioapic, slots, tsc_khz })))
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }
}

/// KVM_GET_TSC_KHZ of a VM, which hosts before 5.16 do not have.
fn tsc_khz(fd: &VmFd) -> Option<u32> {
    super::sys::tsc_khz(fd).ok().filter(|khz| *khz > 0)
}

impl Vm for KvmVm {
    type Vcpu = KvmVcpu;

    fn create_vcpu(&self, id: u32) -> Result<KvmVcpu> {
        let vcpus = self.0.config.vcpus;
        if id >= vcpus {
            return Err(Error::VcpuId { id, vcpus });
        }
        KvmVcpu::new(&self.0, id)
    }

    fn map(&self, at: GuestAddress, mapping: &Mapping, prot: Prot) -> Result<MapGuard> {
        self.0.map(at.0, mapping, prot)?;
        Ok(MapGuard::new(Unmap { vm: Arc::clone(&self.0), at: at.0 }))
    }

    fn irq(&self, line: u32) -> Result<Irq> {
        irq::irq(&self.0, line)
    }

    fn doorbells(&self) -> Option<&dyn Doorbells> {
        Some(self)
    }

    fn tsc_khz(&self) -> Option<u32> {
        self.0.tsc_khz
    }
}

impl Shared {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn map(&self, at: u64, mapping: &Mapping, prot: Prot) -> Result<()> {
        let size = mapping.len() as u64;
        let mut slots = self.slots();
        slots.check(at, size, mapping.as_ptr() as u64)?;
        let full = Error::Placement { at, size, why: "the host has no memory slot left" };
        let number = slots.take().ok_or(full)?;
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: if prot == Prot::ReadOnly { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: at,
            memory_size: size,
            userspace_addr: mapping.as_ptr() as u64,
        };
        // SAFETY: the range is mapped in this process and stays so: the slot table keeps a clone of
        // the mapping until the kernel has let go of it. The guest's accesses race with ours, which
        // are all volatile or atomic.
        if let Err(e) = unsafe { self.fd.set_user_memory_region(region) } {
            slots.free.push(number);
            return Err(Error::call("KVM_SET_USER_MEMORY_REGION", "showing memory to the guest", e));
        }
        slots.used.insert(at, Slot { number, mapping: mapping.clone() });
        Ok(())
    }

    fn unmap(&self, at: u64) {
        let mut slots = self.slots();
        let Some(slot) = slots.used.remove(&at) else { return };
        let region =
            kvm_userspace_memory_region { slot: slot.number, guest_phys_addr: at, ..Default::default() };
        // SAFETY: size zero removes the slot; the mapping is dropped after this call at the earliest.
        match unsafe { self.fd.set_user_memory_region(region) } {
            Ok(()) => slots.free.push(slot.number),
            Err(error) => {
                // The kernel may still hand these pages to the guest, so they must stay mapped.
                tracing::error!(%error, at, "cannot take memory from the guest");
                std::mem::forget(slot);
            }
        }
    }

    /// Copies up to `out.len()` bytes of guest memory at `at`, for error messages; nothing of a window.
    pub(super) fn peek(&self, at: u64, out: &mut [u8]) -> usize {
        let slots = self.slots();
        let Some((start, slot)) = slots.used.range(..=at).next_back() else { return 0 };
        if slot.mapping.may_change() {
            return 0;
        }
        let offset = at - start;
        let left = (slot.mapping.len() as u64).saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(out.len());
        for (i, byte) in out[..len].iter_mut().enumerate() {
            // SAFETY: offset + i lies inside the mapping, which the slot table keeps alive.
            *byte = unsafe { slot.mapping.as_ptr().add(offset as usize + i).read_volatile() };
        }
        len
    }
}

impl Slots {
    /// Whether memory may be placed there.
    fn check(&self, at: u64, size: u64, host: u64) -> Result<()> {
        let no = |why| Err(Error::Placement { at, size, why });
        if size == 0 || !(at | size | host).is_multiple_of(PAGE) {
            return no("address and size must be multiples of 4096 and not zero");
        }
        let Some(end) = at.checked_add(size) else {
            return no("it would end past the address space");
        };
        if end > self.end {
            return no("this host's CPU cannot address that much");
        }
        if at < PRIVATE_END && IDENTITY_MAP < end {
            return no("0xfeffc000 to 0xff000000 belong to the hypervisor");
        }
        if let Some((start, below)) = self.used.range(..end).next_back()
            && start + below.mapping.len() as u64 > at
        {
            return no("it would overlap memory that is there");
        }
        Ok(())
    }

    fn take(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            let number = self.next;
            (number < self.max).then(|| self.next += 1)?;
            Some(number)
        })
    }
}

struct Unmap {
    vm: Arc<Shared>,
    at: u64,
}

impl Drop for Unmap {
    fn drop(&mut self) {
        self.vm.unmap(self.at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(used: &[(u64, usize)]) -> Slots {
        let mut slots = Slots { max: 3, end: 1 << 41, ..Default::default() };
        for (at, size) in used {
            let number = slots.take().unwrap();
            slots.used.insert(*at, Slot { number, mapping: Mapping::anonymous(*size).unwrap() });
        }
        slots
    }

    #[test]
    fn placement_rules() {
        let s = with(&[(0x1000, 0x2000), (0x10_0000, 0x1000)]);
        for (at, size) in [(0, 0x1000), (0x3000, 0x1000), (0x3000, 0xf_d000), (1 << 40, 1 << 40)] {
            assert!(s.check(at, size, 0).is_ok(), "{at:#x} {size:#x}");
        }
        for (at, size, host) in [
            (0x1000, 0x1000, 0),
            (0, 0x2000, 0),
            (0x2000, 0x2000, 0),
            (0, 0x20_0000, 0),
            (0x10, 0x1000, 0),
            (0x8000, 0x10, 0),
            (0x8000, 0, 0),
            (0x8000, 0x1000, 1),
            (u64::MAX - 0xfff, 0x2000, 0),
            ((1 << 41) - 0x1000, 0x2000, 0),
            (0xfeff_f000, 0x1000, 0),
            (0xc000_0000, 0x8000_0000, 0),
        ] {
            assert!(matches!(s.check(at, size, host), Err(Error::Placement { .. })), "{at:#x} {size:#x}");
        }
    }

    #[test]
    fn slot_numbers_end_and_come_back() {
        let mut s = with(&[(0, 0x1000)]);
        assert_eq!((s.take(), s.take(), s.take()), (Some(1), Some(2), None));
        s.free.push(1);
        assert_eq!(s.take(), Some(1));
    }
}
