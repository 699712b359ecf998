//! General and system registers.

use std::fmt::Write;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_dtable, kvm_lapic_state,
    kvm_regs, kvm_segment, kvm_sregs, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use crate::{BootState, Error, Result, Table};

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;

const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
const BUSY_TSS: u8 = 0xb;

/// A segment over all of memory.
fn flat(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn set_segments(sregs: &mut kvm_sregs, code: kvm_segment, data: kvm_segment) {
    sregs.cs = code;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    // No descriptor stands behind it: the CPU only wants a valid one loaded.
    sregs.tr = kvm_segment { limit: 0x67, type_: BUSY_TSS, present: 1, ..Default::default() };
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
}

/// 64-bit mode as of "64-bit boot protocol" in Documentation/arch/x86/boot.rst of Linux.
fn long64(sregs: &mut kvm_sregs, cr3: u64, gdt: Table) {
    // CS must be 0x10 and the data segments 0x18.
    set_segments(sregs, flat(0x10, CODE, true), flat(0x18, DATA, false));
    sregs.gdt = kvm_dtable { base: gdt.base.0, limit: gdt.limit, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr3 = cr3;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// Protected mode as of docs/misc/pvh.pandoc of Xen: flat 32-bit segments, a 0x67 byte TSS, no paging.
fn pvh(sregs: &mut kvm_sregs) {
    set_segments(sregs, flat(0x8, CODE, false), flat(0x10, DATA, false));
    sregs.gdt = kvm_dtable::default();
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

/// Whether the vCPU waits for what only another one can send it: it halted with interrupts off, or has
/// not got its start-up interrupt.
pub(crate) fn is_off(fd: &VcpuFd) -> bool {
    const INTERRUPTS: u64 = 1 << 9;
    match fd.get_mp_state().map(|s| s.mp_state) {
        Ok(KVM_MP_STATE_HALTED) => fd.get_regs().is_ok_and(|r| r.rflags & INTERRUPTS == 0),
        Ok(KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED) => true,
        _ => false,
    }
}

/// Changes `sregs` of a new vCPU for `state`; the general registers, unless they stay.
fn for_state(state: &BootState, sregs: &mut kvm_sregs) -> Option<kvm_regs> {
    match *state {
        BootState::Long64 { rip, rsp, rsi, cr3, gdt } => {
            long64(sregs, cr3.0, gdt);
            Some(kvm_regs { rip, rsp, rbp: rsp, rsi, rflags: RFLAGS, ..Default::default() })
        }
        BootState::Pvh { rip, rbx } => {
            pvh(sregs);
            Some(kvm_regs { rip, rbx, rflags: RFLAGS, ..Default::default() })
        }
        BootState::Application => None,
    }
}

/// Sets the registers of a new vCPU. KVM makes vCPU 0 runnable and lets the others wait for their
/// start-up interrupt, so [`BootState::Application`] leaves all as it is.
pub(in crate::kvm) fn apply(fd: &VcpuFd, state: &BootState) -> Result<()> {
    let fail = |call, e| Error::call(call, "registers of a new vCPU", std::io::Error::from(e));
    if *state == BootState::Application {
        return Ok(());
    }
    let mut sregs = fd.get_sregs().map_err(|e| fail("KVM_GET_SREGS", e))?;
    let regs = for_state(state, &mut sregs);
    fd.set_sregs(&sregs).map_err(|e| fail("KVM_SET_SREGS", e))?;
    if let Some(regs) = regs {
        fd.set_regs(&regs).map_err(|e| fail("KVM_SET_REGS", e))?;
    }
    Ok(())
}

/// Turns extended states on before the guest does.
pub(super) fn set_states(fd: &VcpuFd, states: u64) -> Result<()> {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = states;
    fd.set_xcrs(&xcrs).map_err(|e| Error::call("KVM_SET_XCRS", "extended states of a new vCPU", e))
}

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
/// Delivery modes, not masked: the 8259 pair on one input, non-maskable interrupts on the other.
const MODE_EXTINT: u32 = 7 << 8;
const MODE_NMI: u32 = 4 << 8;

/// The boot CPU's local interrupt inputs as firmware leaves them (MultiProcessor Specification 1.4,
/// 3.6.2.2, virtual wire mode).
pub(super) fn connect_local_apic(fd: &VcpuFd) -> Result<()> {
    let fail = |call, e| Error::call(call, "the local APIC of a new vCPU", std::io::Error::from(e));
    let mut lapic = fd.get_lapic().map_err(|e| fail("KVM_GET_LAPIC", e))?;
    write_lapic(&mut lapic, LVT_LINT0, MODE_EXTINT);
    write_lapic(&mut lapic, LVT_LINT1, MODE_NMI);
    fd.set_lapic(&lapic).map_err(|e| fail("KVM_SET_LAPIC", e))
}

fn write_lapic(lapic: &mut kvm_lapic_state, register: usize, value: u32) {
    for (to, from) in lapic.regs[register..register + 4].iter_mut().zip(value.to_le_bytes()) {
        *to = from as _;
    }
}

/// Guest physical address of the instruction the vCPU is at, if its page tables map it.
pub(in crate::kvm) fn instruction_address(fd: &VcpuFd) -> Option<u64> {
    let (regs, sregs) = (fd.get_regs().ok()?, fd.get_sregs().ok()?);
    let linear = sregs.cs.base.wrapping_add(regs.rip);
    if sregs.cr0 & CR0_PG == 0 {
        return Some(linear);
    }
    let found = fd.translate_gva(linear).ok()?;
    (found.valid != 0).then_some(found.physical_address)
}

/// The registers in words, for an error message.
pub(in crate::kvm) fn describe(fd: &VcpuFd) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    if let Ok(r) = fd.get_regs() {
        let _ = write!(
            out,
            "rip={:#x} rflags={:#x} rsp={:#x} rbp={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} \
             rsi={:#x} rdi={:#x} r8={:#x} r9={:#x} r10={:#x} r11={:#x} r12={:#x} r13={:#x} r14={:#x} r15={:#x}",
            r.rip,
            r.rflags,
            r.rsp,
            r.rbp,
            r.rax,
            r.rbx,
            r.rcx,
            r.rdx,
            r.rsi,
            r.rdi,
            r.r8,
            r.r9,
            r.r10,
            r.r11,
            r.r12,
            r.r13,
            r.r14,
            r.r15,
        );
    }
    if let Ok(s) = fd.get_sregs() {
        let _ = write!(
            out,
            " cs={:#x}/{:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x}",
            s.cs.selector, s.cs.base, s.cr0, s.cr2, s.cr3, s.cr4, s.efer,
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use krun_memory::GuestAddress;

    #[test]
    fn long_mode_follows_the_boot_protocol() {
        let mut s = kvm_sregs { apic_base: 0xfee0_0900, ..Default::default() };
        let gdt = Table { base: GuestAddress(0x500), limit: 31 };
        let state =
            BootState::Long64 { rip: 0x100_0200, rsp: 0x8ff0, rsi: 0x7000, cr3: GuestAddress(0x9000), gdt };
        let r = for_state(&state, &mut s).unwrap();
        assert_eq!((r.rip, r.rsp, r.rsi, r.rflags), (0x100_0200, 0x8ff0, 0x7000, 2));
        assert_eq!((s.cs.selector, s.cs.l, s.cs.db, s.ds.selector, s.ss.db), (0x10, 1, 0, 0x18, 1));
        assert_eq!((s.cr0 & 0x8000_0001, s.cr3, s.cr4, s.efer), (0x8000_0001, 0x9000, 0x20, 0x500));
        assert_eq!((s.gdt.base, s.gdt.limit, s.apic_base), (0x500, 31, 0xfee0_0900));
    }

    #[test]
    fn the_table_in_memory_says_what_the_segments_say() {
        let gdt = crate::flat_gdt();
        for (segment, long) in [(flat(0x10, CODE, true), true), (flat(0x18, DATA, false), false)] {
            let at = usize::from(segment.selector);
            let raw = u64::from_le_bytes(gdt[at..at + 8].try_into().unwrap());
            let access = u64::from(segment.type_) | 1 << 4 | 1 << 7;
            let flags = u64::from(long) << 1 | u64::from(!long) << 2 | 1 << 3;
            assert_eq!(raw, 0xffff | access << 40 | 0xf << 48 | flags << 52);
        }
        assert_eq!(gdt[..16], [0; 16]);
    }

    #[test]
    fn pvh_has_no_paging() {
        let mut s = kvm_sregs { cr3: 1, cr4: 1, efer: 1, ..Default::default() };
        let r = for_state(&BootState::Pvh { rip: 0x100_0000, rbx: 0x6000 }, &mut s).unwrap();
        assert_eq!((r.rip, r.rbx, r.rflags), (0x100_0000, 0x6000, 2));
        assert_eq!((s.cr0, s.cr3, s.cr4, s.efer), (0x11, 0, 0, 0));
        assert_eq!((s.cs.l, s.cs.db, s.cs.limit, s.tr.limit, s.tr.type_), (0, 1, 0xffff_ffff, 0x67, 11));
    }

    #[test]
    fn other_cpus_keep_their_reset_state() {
        let mut s = kvm_sregs { cr0: 0x6000_0010, ..Default::default() };
        assert!(for_state(&BootState::Application, &mut s).is_none());
        assert_eq!(s, kvm_sregs { cr0: 0x6000_0010, ..Default::default() });
    }

    #[test]
    fn local_inputs_are_little_endian_words() {
        let mut lapic = kvm_lapic_state::default();
        write_lapic(&mut lapic, LVT_LINT0, MODE_EXTINT);
        assert_eq!(lapic.regs[0x350..0x354].iter().map(|b| *b as u8).collect::<Vec<_>>(), [0, 7, 0, 0]);
    }
}
