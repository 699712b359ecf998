//! What CPUID tells the guest.
//!
//! The start is what this host's KVM supports (KVM_GET_SUPPORTED_CPUID). From that the features that
//! make no sense in these guests are taken, the topology is replaced by the guest's own (one
//! package of `vcpus` cores with one thread each, APIC ids in the order of vCPU numbers), and what
//! KVM can do but does not list is added.
//!
//! Leaf and bit names are those of the Intel SDM vol. 2, CPUID; of the AMD APM vol. 3, appendix E;
//! and of Documentation/virt/kvm/x86/cpuid.rst of Linux.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX as INDEXED, kvm_cpuid_entry2 as Leaf};

use crate::VmConfig;

/// What the host has to offer.
#[derive(Debug, Clone)]
pub(in crate::kvm) struct Host {
    pub(in crate::kvm) supported: Vec<Leaf>,
    /// KVM's local APICs have a TSC-deadline timer; its list never says so.
    pub(in crate::kvm) tsc_deadline: bool,
}

const BASIC: u32 = 0;
const HYPERVISOR: u32 = 0x4000_0000;
const TIMING: u32 = 0x4000_0010;

// Leaf 1.
const ECX_MONITOR: u32 = 1 << 3;
const ECX_VMX: u32 = 1 << 5;
const ECX_PDCM: u32 = 1 << 15;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
// Leaf 7.
const EBX_SGX: u32 = 1 << 2;
const ECX_SGX_LC: u32 = 1 << 30;
// Leaf 0x8000_0001.
const ECX_CMP_LEGACY: u32 = 1 << 1;
const ECX_SVM: u32 = 1 << 2;
const ECX_PERFCTR_CORE: u32 = 1 << 23;
const ECX_PERFCTR_NB: u32 = 1 << 24;
const ECX_PERFCTR_LLC: u32 = 1 << 28;

/// Leaves that stay empty: MONITOR/MWAIT, performance counters, SGX, processor trace, memory
/// encryption, AMD's performance monitoring v2 and AMD's newer topology (the older ones tell it all).
const HIDDEN: [u32; 7] = [5, 0xa, 0x12, 0x14, 0x8000_001f, 0x8000_0022, 0x8000_0026];

/// Whether this host is a machine that QEMU emulates in software (the "TCG" accelerator), as its
/// CPUID leaf 0x4000_0000 tells.
pub(in crate::kvm) fn host_is_emulated() -> bool {
    use std::arch::x86_64::__cpuid;
    if __cpuid(1).ecx & ECX_HYPERVISOR == 0 {
        return false;
    }
    let leaf = __cpuid(HYPERVISOR);
    [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).as_flattened() == b"TCGTCGTCGTCG"
}

/// The extended states of leaf 0xd that every CPU with AVX has: x87, SSE, AVX. None without XSAVE.
pub(in crate::kvm) fn common_states(supported: &[Leaf]) -> Option<u64> {
    let leaf = supported.iter().find(|l| (l.function, l.index) == (0xd, 0))?;
    Some(u64::from(leaf.eax & 7)).filter(|states| states & 1 != 0)
}

/// The first guest physical address past what the CPU can reach: leaf 0x8000_0008, EAX 23:16 for
/// guests where that is not zero, else 7:0; 36 bits without that leaf.
pub(in crate::kvm) fn address_end(leaves: &[Leaf]) -> u64 {
    let eax = leaves.iter().find(|l| l.function == 0x8000_0008).map_or(36, |l| l.eax);
    let bits = if eax >> 16 & 0xff != 0 { eax >> 16 & 0xff } else { eax & 0xff };
    1 << bits.clamp(32, 52)
}

/// CPUID of every vCPU of a VM; [`for_vcpu`] fills in what differs.
pub(in crate::kvm) fn template(host: &Host, config: &VmConfig, tsc_khz: Option<u32>) -> Vec<Leaf> {
    let mut leaves = host.supported.clone();
    leaves.retain(|l| !HIDDEN.contains(&l.function) && !is_topology(l.function));
    if !config.nested {
        leaves.retain(|l| l.function != 0x8000_000a);
    }
    features(&mut leaves, host, config);
    caches(&mut leaves, config.vcpus);
    topology(&mut leaves, host, config.vcpus);
    if let Some(khz) = tsc_khz {
        timing(&mut leaves, khz);
    }
    leaves
}

/// The template with the ids of vCPU `id`.
pub(super) fn for_vcpu(template: &[Leaf], id: u32) -> Vec<Leaf> {
    let mut leaves = template.to_vec();
    for leaf in &mut leaves {
        match leaf.function {
            1 => leaf.ebx = leaf.ebx & 0x00ff_ffff | id << 24,
            0xb | 0x1f => leaf.edx = id,
            0x8000_001e => {
                leaf.eax = id;
                leaf.ebx = leaf.ebx & !0xff | id & 0xff;
            }
            _ => {}
        }
    }
    leaves
}

fn is_topology(function: u32) -> bool {
    matches!(function, 0xb | 0x1f | 0x8000_001e)
}

fn find(leaves: &mut [Leaf], function: u32) -> Option<&mut Leaf> {
    leaves.iter_mut().find(|l| l.function == function && l.index == 0)
}

/// The leaf, made if the host has none.
fn leaf(leaves: &mut Vec<Leaf>, function: u32) -> &mut Leaf {
    let at = leaves.iter().position(|l| l.function == function && l.index == 0).unwrap_or_else(|| {
        leaves.push(Leaf { function, ..Default::default() });
        leaves.len() - 1
    });
    &mut leaves[at]
}

fn features(leaves: &mut Vec<Leaf>, host: &Host, config: &VmConfig) {
    let one = leaf(leaves, 1);
    one.ecx &= !(ECX_MONITOR | ECX_PDCM);
    one.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
    if host.tsc_deadline {
        one.ecx |= ECX_TSC_DEADLINE;
    }
    if !config.nested {
        one.ecx &= !ECX_VMX;
    }
    if let Some(seven) = find(leaves, 7) {
        seven.ebx &= !EBX_SGX;
        seven.ecx &= !ECX_SGX_LC;
    }
    if let Some(ext) = find(leaves, 0x8000_0001) {
        ext.ecx &= !(ECX_PERFCTR_CORE | ECX_PERFCTR_NB | ECX_PERFCTR_LLC);
        if !config.nested {
            ext.ecx &= !ECX_SVM;
        }
    }
}

/// Bits of an APIC id that number `count` things.
fn id_bits(count: u32) -> u32 {
    count.max(1).next_power_of_two().trailing_zeros()
}

/// Which CPUs share a cache: the last level is shared by all, the others are each core's own. Intel
/// has that in leaf 4, AMD in leaf 0x8000_001d with the same meaning of bits 25:14.
fn caches(leaves: &mut [Leaf], vcpus: u32) {
    let ids = (1 << id_bits(vcpus)) - 1;
    for leaf in leaves.iter_mut().filter(|l| matches!(l.function, 4 | 0x8000_001d)) {
        if leaf.eax & 0x1f == 0 {
            continue;
        }
        let level = leaf.eax >> 5 & 7;
        let sharing = if level >= 3 { ids } else { 0 };
        leaf.eax = leaf.eax & !(0xfff << 14) | (sharing & 0xfff) << 14;
        if leaf.function == 4 {
            // Cores of the package, as numbers that APIC ids leave room for, less one.
            leaf.eax = leaf.eax & !(0x3f << 26) | ids.min(0x3f) << 26;
        }
    }
}

fn topology(leaves: &mut Vec<Leaf>, host: &Host, vcpus: u32) {
    let bits = id_bits(vcpus);
    let one = leaf(leaves, 1);
    // EBX 23:16: how many APIC ids the package spans, only valid with HTT.
    one.ebx = one.ebx & !(0xff << 16) | (1u32 << bits).min(0xff) << 16;
    one.edx = if vcpus > 1 { one.edx | EDX_HTT } else { one.edx & !EDX_HTT };
    let has_1f = host.supported.iter().any(|l| l.function == 0x1f);
    let basic = leaf(leaves, BASIC);
    basic.eax = basic.eax.max(0xb);
    for function in [0xb, 0x1f] {
        if function == 0x1f && !has_1f {
            continue;
        }
        // Level number, id bits below the next level, logical CPUs, kind of level: threads of a
        // core, cores of the package, then none.
        for (index, shift, count, kind) in [(0, 0, 1, 1), (1, bits, vcpus, 2), (2, 0, 0, 0)] {
            let (eax, ebx, ecx) = (shift, count, kind << 8 | index);
            leaves.push(Leaf { function, index, flags: INDEXED, eax, ebx, ecx, ..Default::default() });
        }
    }
    let amd = host.supported.iter().any(|l| l.function == 0x8000_001e);
    if let Some(size) = find(leaves, 0x8000_0008).filter(|_| amd) {
        // ECX 7:0: cores less one; 15:12: APIC id bits for them.
        size.ecx = size.ecx & !0xf0ff | (vcpus - 1).min(0xff) | bits << 12;
    }
    if amd {
        // EBX 15:8: threads per core less one. ECX: node 0, one node.
        leaves.push(Leaf { function: 0x8000_001e, ..Default::default() });
        if let Some(ext) = find(leaves, 0x8000_0001) {
            ext.ecx = if vcpus > 1 { ext.ecx | ECX_CMP_LEGACY } else { ext.ecx & !ECX_CMP_LEGACY };
        }
    }
}

/// The frequencies of TSC and APIC timer in kHz, so that a guest need not measure them. KVM's APIC
/// bus runs at 1 GHz.
fn timing(leaves: &mut Vec<Leaf>, tsc_khz: u32) {
    let Some(signature) = find(leaves, HYPERVISOR) else { return };
    signature.eax = signature.eax.max(TIMING);
    leaves.push(Leaf { function: TIMING, eax: tsc_khz, ebx: 1_000_000, ..Default::default() });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn l(function: u32, index: u32, regs: [u32; 4]) -> Leaf {
        let [eax, ebx, ecx, edx] = regs;
        Leaf { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// A list as an AMD host with everything would give it.
    fn amd() -> Host {
        let supported = vec![
            l(0, 0, [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            l(1, 0, [0x800f12, 0x0702_0800, 0xfef8_3203 | ECX_MONITOR, 0x178b_fbff]),
            l(5, 0, [0x40, 0x40, 3, 0x11]),
            l(7, 0, [0, 0x209c_01a9 | EBX_SGX, ECX_SGX_LC | 4, 0]),
            l(0xa, 0, [0x0730_0402, 0, 0, 0x603]),
            l(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            l(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
            l(0x8000_0000, 0, [0x8000_001f, 0, 0, 0]),
            l(0x8000_0001, 0, [0, 0, 0xffff_ffff, 0]),
            l(0x8000_0008, 0, [0x3030, 0, 0x7007, 0]),
            l(0x8000_000a, 0, [1, 8, 0, 0xffff]),
            l(0x8000_001d, 0, [0x0c00_4121, 0, 0, 0]),
            l(0x8000_001d, 3, [0x0c01_c163, 0, 0, 0]),
            l(0x8000_001d, 4, [0, 0, 0, 0]),
            l(0x8000_001e, 0, [7, 0x103, 1, 0]),
            l(0x8000_001f, 0, [0xf, 0, 0, 0]),
        ];
        Host { supported, tsc_deadline: true }
    }

    fn intel() -> Host {
        let supported = vec![
            l(0, 0, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            l(1, 0, [0x606a6, 0x0510_0800, ECX_VMX | ECX_PDCM, 0]),
            l(4, 0, [0x1c00_4121, 0, 0, 0]),
            l(4, 3, [0x1c03_c163, 0, 0, 0]),
            l(4, 4, [0, 0, 0, 0]),
            l(0xb, 0, [1, 2, 0x100, 5]),
            l(0xb, 1, [4, 16, 0x201, 5]),
            l(0x1f, 0, [1, 2, 0x100, 5]),
            l(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
            l(0x8000_0008, 0, [0x3027, 0, 0, 0]),
        ];
        Host { supported, tsc_deadline: false }
    }

    fn of(vcpus: u32) -> VmConfig {
        VmConfig { vcpus, ..Default::default() }
    }

    fn get(leaves: &[Leaf], function: u32, index: u32) -> Leaf {
        let all: Vec<_> = leaves.iter().filter(|l| (l.function, l.index) == (function, index)).collect();
        assert_eq!(all.len(), 1, "leaf {function:#x}.{index}");
        *all[0]
    }

    #[test]
    fn features_are_added_and_taken() {
        let t = template(&amd(), &of(2), None);
        let one = get(&t, 1, 0);
        let added = ECX_HYPERVISOR | ECX_X2APIC | ECX_TSC_DEADLINE;
        assert_eq!(one.ecx & (added | ECX_MONITOR), added);
        let seven = get(&t, 7, 0);
        assert_eq!((seven.ebx & EBX_SGX, seven.ecx), (0, 4));
        let ext = get(&t, 0x8000_0001, 0).ecx;
        assert_eq!(ext & (ECX_SVM | ECX_PERFCTR_CORE | ECX_PERFCTR_NB | ECX_PERFCTR_LLC), 0);
        for hidden in HIDDEN.iter().chain(&[0x8000_000a]) {
            assert!(t.iter().all(|l| l.function != *hidden), "{hidden:#x}");
        }
        assert_eq!(get(&t, 0x4000_0001, 0), get(&amd().supported, 0x4000_0001, 0));
        let t = template(&intel(), &of(1), None);
        assert_eq!(get(&t, 1, 0).ecx & (ECX_VMX | ECX_PDCM | ECX_TSC_DEADLINE), 0);
    }

    #[test]
    fn nested_is_a_switch() {
        let nested = |host: &Host| template(host, &VmConfig { nested: true, ..of(1) }, None);
        assert_ne!(get(&nested(&amd()), 0x8000_0001, 0).ecx & ECX_SVM, 0);
        assert_eq!(get(&nested(&amd()), 0x8000_000a, 0).ebx, 8);
        assert_ne!(get(&nested(&intel()), 1, 0).ecx & ECX_VMX, 0);
    }

    #[test]
    fn topology_is_the_guests_own() {
        for (host, vcpus, bits) in [(amd(), 1, 0), (amd(), 3, 2), (intel(), 2, 1), (intel(), 16, 4)] {
            let t = for_vcpu(&template(&host, &of(vcpus), None), vcpus - 1);
            let one = get(&t, 1, 0);
            assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (vcpus - 1, 1 << bits));
            assert_eq!(one.edx & EDX_HTT != 0, vcpus > 1);
            let (threads, cores, end) = (get(&t, 0xb, 0), get(&t, 0xb, 1), get(&t, 0xb, 2));
            assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, 0x100, vcpus - 1));
            assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (bits, vcpus, 0x201, vcpus - 1));
            assert_eq!((end.eax, end.ebx, end.ecx, end.edx), (0, 0, 2, vcpus - 1));
            assert!(get(&t, BASIC, 0).eax >= 0xb);
        }
    }

    #[test]
    fn cores_of_an_amd_package() {
        let t = for_vcpu(&template(&amd(), &of(3), None), 2);
        assert_eq!(get(&t, 0x8000_0008, 0).ecx, 0x2002);
        let node = get(&t, 0x8000_001e, 0);
        assert_eq!((node.eax, node.ebx, node.ecx), (2, 2, 0));
        assert_eq!(get(&t, 0x8000_001d, 0).eax >> 14 & 0xfff, 0);
        assert_eq!(get(&t, 0x8000_001d, 3).eax >> 14 & 0xfff, 3);
        assert_eq!(get(&t, 0x8000_001d, 4).eax, 0);
        assert_ne!(get(&t, 0x8000_0001, 0).ecx & ECX_CMP_LEGACY, 0);
        let one = template(&amd(), &of(1), None);
        assert_eq!(get(&one, 0x8000_0001, 0).ecx & ECX_CMP_LEGACY, 0);
        assert!(one.iter().all(|l| l.function != 0x1f));
    }

    #[test]
    fn caches_of_an_intel_package() {
        let t = template(&intel(), &of(3), None);
        assert_eq!(get(&t, 4, 0).eax, 0x0c00_0121);
        assert_eq!(get(&t, 4, 3).eax, 0x0c00_c163);
        assert_eq!(get(&t, 4, 4).eax, 0);
        assert_eq!(get(&t, 0x1f, 1).ebx, 3);
        assert_eq!(get(&t, 0x8000_0008, 0), get(&intel().supported, 0x8000_0008, 0));
    }

    #[test]
    fn states_are_the_common_ones() {
        assert_eq!(common_states(&amd().supported), None);
        assert_eq!(common_states(&[l(0xd, 0, [0x207, 0, 0, 0]), l(0xd, 1, [8, 0, 0, 0])]), Some(7));
        assert_eq!(common_states(&[l(0xd, 0, [3, 0, 0, 0])]), Some(3));
        assert_eq!(common_states(&[l(0xd, 0, [0; 4])]), None);
    }

    #[test]
    fn address_width() {
        for (eax, bits) in [(0x3030, 48), (0x2d_3030, 45), (0x3027, 39), (0, 32), (0xff, 52)] {
            assert_eq!(address_end(&[l(0x8000_0008, 0, [eax, 0, 0, 0])]), 1 << bits);
        }
        assert_eq!(address_end(&[]), 1 << 36);
    }

    #[test]
    fn frequencies_extend_the_hypervisor_range() {
        let t = template(&amd(), &of(1), Some(2_600_000));
        assert_eq!(get(&t, HYPERVISOR, 0).eax, TIMING);
        let timing = get(&t, TIMING, 0);
        assert_eq!((timing.eax, timing.ebx), (2_600_000, 1_000_000));
        assert!(template(&intel(), &of(1), Some(1)).iter().all(|l| l.function != TIMING));
    }
}
