//! Where boot data lies in the guest's first MiB. All of it is read before the kernel gives memory to
//! others. As few pages as possible: each one costs the guest a fault.

/// The MP table's pointer: the first place where a kernel looks for it.
pub const MP_POINTER: u64 = 0;
/// `BIOS data area`: a kernel leaves its wish for a warm restart here (0x1234).
pub const WARM_RESTART_FLAG: u64 = 0x472;
/// Segment descriptors.
pub const GDT: u64 = 0x500;
/// The kernel's command line, up to [`MP_TABLE`].
pub const CMDLINE: u64 = 0x1000;
/// The MP table, at most 1 KiB.
pub const MP_TABLE: u64 = 0x1800;
/// Randomness for the kernel, as a `setup_data` entry.
pub const SEED: u64 = 0x1c00;
/// Top of the stack, should the kernel use it before it has its own.
pub const STACK: u64 = 0x2000;
/// The zero page, or the PVH start info with what belongs to it.
pub const PARAMS: u64 = 0x7000;
/// Page tables: root, directory pointers, one directory per GiB.
pub const PAGE_TABLES: u64 = 0x8000;
/// End of the memory that boot data may use.
pub const BOOT_DATA_END: u64 = 0x1_0000;
/// End of usable memory below the legacy hole.
pub const BASE_MEMORY_END: u64 = 0x9_fc00;
/// The legacy hole: first address, first address behind it.
pub const LEGACY_HOLE: (u64, u64) = (0xa_0000, 0x10_0000);
