//! Model-specific registers at start.
//!
//! A new vCPU of KVM has the values of a reset, which are right for all but these: there is no
//! firmware that would set them up.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::{Error, Result};

/// IA32_MISC_ENABLE; bit 0 turns fast string operations on, as firmware does.
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
/// IA32_MTRR_DEF_TYPE; bit 11 turns the memory type ranges on, bits 7:0 are the type of memory that
/// no range covers. With write-back as that type no range is needed: KVM's guests have their device
/// memory uncached through page attributes or by not being memory at all.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ON: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// What the registers become, given what IA32_MISC_ENABLE is.
fn at_start(misc_enable: u64) -> [kvm_msr_entry; 2] {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    [entry(MISC_ENABLE, misc_enable | FAST_STRINGS), entry(MTRR_DEF_TYPE, MTRR_ON | WRITE_BACK)]
}

pub(super) fn apply(fd: &VcpuFd) -> Result<()> {
    let fail = |call, e| Error::call(call, "model-specific registers of a new vCPU", e);
    let mut read = list(&[kvm_msr_entry { index: MISC_ENABLE, ..Default::default() }])?;
    let count = fd.get_msrs(&mut read).map_err(|e| fail("KVM_GET_MSRS", std::io::Error::from(e)))?;
    let misc_enable = read.as_slice().first().filter(|_| count == 1).map_or(0, |entry| entry.data);
    let want = at_start(misc_enable);
    let set = fd.set_msrs(&list(&want)?).map_err(|e| fail("KVM_SET_MSRS", std::io::Error::from(e)))?;
    if let Some(refused) = want.get(set) {
        // The guest boots without it all the same, only slower.
        tracing::warn!(register = format_args!("{:#x}", refused.index), "KVM refused a register's value");
    }
    Ok(())
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|_| super::too_many("KVM_SET_MSRS", "too many registers at once"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_write_back_and_other_bits_stay() {
        let [misc, mtrr] = at_start(0x1800);
        assert_eq!((misc.index, misc.data), (0x1a0, 0x1801));
        assert_eq!((mtrr.index, mtrr.data), (0x2ff, 0x806));
    }
}
