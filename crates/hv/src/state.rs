//! The registers a vCPU starts with.

use krun_memory::GuestAddress;

/// A descriptor table in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table {
    /// Its first byte.
    pub base: GuestAddress,
    /// Offset of its last byte.
    pub limit: u16,
}

/// How a vCPU starts on x86_64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BootState {
    /// 64-bit mode as of the Linux boot protocol: paging on, flat segments (CS 0x10, data 0x18),
    /// interrupts off. The caller has put page tables and a table of [`flat_gdt`] into memory.
    Long64 {
        /// First instruction.
        rip: u64,
        /// Stack pointer.
        rsp: u64,
        /// Address of the boot parameters ("zero page").
        rsi: u64,
        /// Page-table root.
        cr3: GuestAddress,
        /// Where [`flat_gdt`] lies.
        gdt: Table,
    },
    /// 32-bit protected mode without paging as of the PVH boot protocol.
    Pvh {
        /// First instruction, below 4 GiB.
        rip: u64,
        /// Address of the `hvm_start_info` structure.
        rbx: u64,
    },
    /// As after power-on: a vCPU other than the first waits for its start-up interrupt; the first
    /// begins at the reset vector 0xffff_fff0.
    Application,
}

/// Flat segments for [`BootState::Long64`]: null, unused, 64-bit code (0x10), data (0x18).
/// Little-endian, as they belong into guest memory.
pub fn flat_gdt() -> [u8; 32] {
    let mut bytes = [0u8; 32];
    // Intel SDM vol. 3, 3.4.5: code with L=1, G=1, present, readable; data with B=1, G=1, writable.
    bytes[16..24].copy_from_slice(&0x00af_9b00_0000_ffff_u64.to_le_bytes());
    bytes[24..32].copy_from_slice(&0x00cf_9300_0000_ffff_u64.to_le_bytes());
    bytes
}
