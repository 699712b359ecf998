//! From a kernel and a board to memory contents and registers. Nothing here runs anything.

pub mod cmdline;
pub mod data;
pub mod kernel;
pub mod layout;
pub mod params;
pub mod smbios;

use std::path::PathBuf;

use krun_hv::{BootState, Table, flat_gdt};
use krun_memory::GuestAddress;

use crate::board::{Board, mp_table};
use crate::{Entry, Kernel, Spec};
use data::{Data, Segment};
use kernel::bundle::{Bundle, BundleError};
use kernel::{Image, KernelError};
use params::Params;

/// RAM that a kernel needs beside itself and the initramfs; below, it dies in ways that are hard to
/// tell.
const WORKING_MEMORY: u64 = 16 << 20;
const MIB: u64 = 1 << 20;

/// What lies in memory and in registers when the first instruction runs.
#[derive(Clone)]
pub struct BootImage {
    /// Kernel and initramfs.
    pub segments: Vec<Segment>,
    /// Small tables, at their guest physical addresses.
    pub writes: Vec<(u64, Vec<u8>)>,
    /// Registers of the first vCPU.
    pub state: BootState,
    /// The kernel's command line.
    pub cmdline: String,
}

impl std::fmt::Debug for BootImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let writes: Vec<_> =
            self.writes.iter().map(|(at, b)| format!("{} bytes at {at:#x}", b.len())).collect();
        f.debug_struct("BootImage")
            .field("segments", &self.segments)
            .field("writes", &writes)
            .field("state", &self.state)
            .field("cmdline", &self.cmdline)
            .finish()
    }
}

/// A machine that cannot boot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// A file that cannot be opened.
    #[error("cannot open the {what} {path}: {source}", path = path.display())]
    Open {
        /// Kernel or initramfs.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// A kernel file that is none.
    #[error("the kernel {path} cannot be used: {source}", path = path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: KernelError,
    },
    /// A kernel library.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The command line.
    #[error(transparent)]
    Cmdline(#[from] cmdline::CmdlineError),
    /// Kernel and initramfs do not fit.
    #[error("{have} MiB of memory are too little for this kernel{}: at least {need} MiB", if *initramfs { " and initramfs" } else { "" })]
    RamTooSmall {
        /// MiB there are, below 3 GiB.
        have: u64,
        /// MiB that would do.
        need: u64,
        /// Whether there is an initramfs.
        initramfs: bool,
    },
    /// A kernel that wants to lie where it cannot.
    #[error("the kernel wants to be loaded at {at:#x}; memory from {from:#x} up to 3 GiB can be used")]
    Placement {
        /// Where.
        at: u64,
        /// First usable address.
        from: u64,
    },
    /// The entry that was asked for.
    #[error("the kernel has no PVH entry point")]
    NoPvh,
    /// No randomness from the host.
    #[error("no random numbers from the host: {0}")]
    Seed(std::io::Error),
}

/// What [`crate::Kernel`] names, opened and taken apart.
#[derive(Debug)]
pub struct Payload {
    /// The kernel.
    pub image: Image,
    /// The initramfs.
    pub initramfs: Option<Data>,
}

impl Payload {
    /// Opens and parses the kernel and the initramfs of `kernel`.
    ///
    /// # Errors
    /// What is wrong, with the path.
    pub fn load(kernel: &Kernel) -> Result<Self, BootError> {
        let open = |what, path: &PathBuf| {
            Data::open(path).map_err(|source| BootError::Open { what, path: path.clone(), source })
        };
        match kernel {
            Kernel::Bundle(path) => {
                Ok(Self { image: Bundle::load(path.as_deref())?.image(), initramfs: None })
            }
            Kernel::File { path, format, initramfs, .. } => {
                let data = open("kernel", path)?;
                let image = kernel::parse(&data, *format)
                    .map_err(|source| BootError::Kernel { path: path.clone(), source })?;
                let initramfs = initramfs.as_ref().map(|path| open("initramfs", path)).transpose()?;
                Ok(Self { image, initramfs })
            }
        }
    }
}

impl BootImage {
    /// Plans the boot of `payload` on `board`; `seed` goes to the guest's random number generator.
    ///
    /// # Errors
    /// What does not fit.
    pub fn new(spec: &Spec, board: &Board, payload: Payload, seed: &[u8; 32]) -> Result<Self, BootError> {
        let Payload { image, initramfs } = payload;
        let base = match &spec.kernel {
            Kernel::File { cmdline: Some(own), .. } => own,
            _ => &spec.cmdline,
        };
        let cmdline = cmdline::assemble(base, board.device_words(), image.cmdline_limit)?;
        let mut segments = image.segments;
        let kernel_end = check_placement(&segments, board, initramfs.as_ref())?;
        let mut place = None;
        if let Some(data) = initramfs.filter(|d| !d.is_empty()) {
            let segment = initramfs_segment(data, kernel_end, board, image.initrd_max)?;
            place = Some((segment.at, segment.len));
            segments.push(segment);
        }
        let params = Params {
            ram: &board.ram,
            cmdline_len: cmdline.len(),
            initramfs: place,
            setup_header: image.setup_header.as_deref(),
        };
        let mut line = cmdline.clone().into_bytes();
        line.push(0);
        let (pointer, table) = mp_table(board.vcpus, layout::MP_TABLE as u32);
        let mut writes =
            vec![(layout::MP_POINTER, pointer.to_vec()), (layout::CMDLINE, line), (layout::MP_TABLE, table)];
        writes.extend(smbios::tables(&spec.oem_strings));
        let state = match (spec.entry, image.pvh) {
            (Entry::Auto | Entry::Long64, _) => {
                writes.push((layout::GDT, flat_gdt().to_vec()));
                writes.push((layout::SEED, params::seed_entry(seed)));
                writes.push((layout::PARAMS, params::zero_page(&params)));
                writes.push((layout::PAGE_TABLES, params::identity_map(kernel_end.div_ceil(1 << 30))));
                long64(image.entry64)
            }
            (Entry::Pvh, Some(entry)) => {
                writes.push((layout::PARAMS, params::pvh_start_info(&params)));
                BootState::Pvh { rip: entry.into(), rbx: layout::PARAMS }
            }
            (Entry::Pvh, None) => return Err(BootError::NoPvh),
        };
        Ok(Self { segments, writes, state, cmdline })
    }
}

fn long64(rip: u64) -> BootState {
    BootState::Long64 {
        rip,
        rsp: layout::STACK,
        rsi: layout::PARAMS,
        cr3: GuestAddress(layout::PAGE_TABLES),
        gdt: Table { base: GuestAddress(layout::GDT), limit: flat_gdt().len() as u16 - 1 },
    }
}

/// Checks that the kernel lies in RAM with room for the rest; returns its end.
fn check_placement(segments: &[Segment], board: &Board, initramfs: Option<&Data>) -> Result<u64, BootError> {
    let (from, to) = (layout::LEGACY_HOLE.1, crate::board::RAM_HOLE_START);
    let mut kernel_end = from;
    for s in segments {
        let end = s.end().filter(|end| s.at >= from && *end <= to);
        kernel_end = kernel_end.max(end.ok_or(BootError::Placement { at: s.at, from })?);
    }
    let extra = initramfs.map_or(0, |d| d.len().next_multiple_of(4096));
    let need = kernel_end.saturating_add(extra).saturating_add(WORKING_MEMORY);
    let have = board.low_ram_end();
    if need > have {
        let need = need.div_ceil(MIB);
        return Err(BootError::RamTooSmall { have: have / MIB, need, initramfs: initramfs.is_some() });
    }
    Ok(kernel_end)
}

/// As high as possible, out of the way of what the kernel unpacks.
fn initramfs_segment(data: Data, kernel_end: u64, board: &Board, max: u64) -> Result<Segment, BootError> {
    let len = data.len();
    let top = board.low_ram_end().min(max.saturating_add(1));
    let at = top.checked_sub(len).map(|at| at & !0xfff).filter(|at| *at >= kernel_end);
    let need = (kernel_end + len + WORKING_MEMORY).div_ceil(MIB);
    let at = at.ok_or(BootError::RamTooSmall { have: top / MIB, need, initramfs: true })?;
    Ok(Segment { at, data, offset: 0, len, room: len })
}

#[cfg(test)]
mod tests {
    use super::kernel::tests::small_elf;
    use super::*;
    use crate::KernelFormat;

    fn build(ram_mib: u64, initramfs: Option<usize>, entry: Entry) -> Result<BootImage, BootError> {
        let spec = Spec { ram_mib, entry, cmdline: "quiet".into(), ..Spec::default() };
        let board = Board::new(&spec, &[], 40).unwrap();
        let image = kernel::parse(&small_elf().into(), KernelFormat::Elf).unwrap();
        let payload = Payload { image, initramfs: initramfs.map(|n| vec![1; n].into()) };
        BootImage::new(&spec, &board, payload, &[7; 32])
    }

    #[test]
    fn nothing_overlaps_and_all_lies_in_ram() {
        for entry in [Entry::Long64, Entry::Pvh] {
            let boot = build(64, Some(5000), entry).unwrap();
            let mut all: Vec<(u64, u64)> = boot.segments.iter().map(|s| (s.at, s.room)).collect();
            all.extend(boot.writes.iter().map(|(at, b)| (*at, b.len() as u64)));
            all.sort_unstable();
            assert!(all.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0), "{boot:?}");
            let last = all.last().unwrap();
            assert!(last.0 + last.1 <= 64 << 20);
            assert_eq!(last.0, (64 << 20) - 8192);
        }
    }

    #[test]
    fn registers_point_at_what_was_written() {
        let boot = build(64, None, Entry::Auto).unwrap();
        let BootState::Long64 { rip, rsi, cr3, gdt, .. } = boot.state else { panic!("{boot:?}") };
        assert_eq!(rip, 0x100_0000);
        for at in [rsi, cr3.0, gdt.base.0] {
            assert!(boot.writes.iter().any(|w| w.0 == at), "{at:#x}");
        }
        assert_eq!(
            build(64, None, Entry::Pvh).unwrap().state,
            BootState::Pvh { rip: 0x100_0010, rbx: 0x7000 }
        );
    }

    #[test]
    fn what_does_not_fit_is_told_with_what_would() {
        let e = build(32, None, Entry::Auto).unwrap_err();
        assert_eq!(e.to_string(), "32 MiB of memory are too little for this kernel: at least 33 MiB");
        assert!(build(33, None, Entry::Auto).is_ok());
        let e = build(64, Some(40 << 20), Entry::Auto).unwrap_err();
        assert_eq!(
            e.to_string(),
            "64 MiB of memory are too little for this kernel and initramfs: at least 73 MiB"
        );
        assert!(build(73, Some(40 << 20), Entry::Auto).is_ok());
    }

    #[test]
    fn a_kernel_over_the_boot_data_is_refused() {
        let mut elf = small_elf();
        // Load and enter at 0x8000.
        for at in [24, 64 + 24] {
            elf[at..at + 8].copy_from_slice(&0x8000u64.to_le_bytes());
        }
        elf[0x210..0x214].copy_from_slice(&0x8010u32.to_le_bytes());
        let image = kernel::parse(&elf.into(), KernelFormat::Elf).unwrap();
        let spec = Spec::default();
        let board = Board::new(&spec, &[], 40).unwrap();
        let e = BootImage::new(&spec, &board, Payload { image, initramfs: None }, &[0; 32]).unwrap_err();
        assert!(matches!(e, BootError::Placement { at: 0x8000, .. }), "{e}");
    }
}
