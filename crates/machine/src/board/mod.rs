//! Where everything is: memory, device windows, interrupt lines. Pure arithmetic.

mod mptable;

use krun_virtio::DeviceInfo;

use crate::Spec;

pub use mptable::mp_table;

const GIB: u64 = 1 << 30;

/// RAM ends here at the latest; devices follow until 4 GiB.
pub const RAM_HOLE_START: u64 = 3 * GIB;
/// RAM that does not fit below the hole continues here.
pub const RAM_HIGH_START: u64 = 4 * GIB;
/// The first virtio-mmio window.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Length of a virtio-mmio window.
pub const MMIO_SIZE: u64 = 0x1000;
/// The I/O APIC's registers.
pub const IOAPIC_BASE: u32 = 0xfec0_0000;
/// The local APICs' registers.
pub const LAPIC_BASE: u32 = 0xfee0_0000;
/// Input pins of the I/O APIC.
pub const IOAPIC_PINS: u8 = 24;
/// Interrupt of the first serial port.
pub const SERIAL_IRQ: u32 = 4;
/// First I/O port of the first serial port.
pub const SERIAL_PORT: u16 = 0x3f8;

/// Most virtio devices of a machine: Linux takes 2047 bytes of command line, and each device needs 36.
pub const MAX_DEVICES: usize = 48;

/// Lines that no legacy device uses: not the timer (0), keyboard (1), cascade (2), serial ports (3, 4),
/// clock (8) and mouse (12), whose drivers may claim them in a kernel that has them.
const FREE_LINES: [u32; 17] = [5, 6, 7, 9, 10, 11, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// A piece of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// Guest physical address.
    pub at: u64,
    /// Bytes.
    pub size: u64,
    /// Where it starts in the memory file.
    pub offset: u64,
}

impl RamRange {
    /// First address behind it.
    pub fn end(&self) -> u64 {
        self.at + self.size
    }
}

/// A virtio device's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// The device's name.
    pub name: String,
    /// Guest physical address of its registers.
    pub at: u64,
    /// Its interrupt line. Devices share lines when there are more of them than lines.
    pub irq: u32,
    /// Guest physical addresses of its shared memory regions, in the order the device lists them.
    pub shm: Vec<Window>,
}

/// A range of guest physical addresses for a device's shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The region's id.
    pub id: u8,
    /// Guest physical address.
    pub at: u64,
    /// Bytes.
    pub size: u64,
}

/// The machine's plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Board {
    /// Virtual CPUs; their local APIC ids count from 0.
    pub vcpus: u32,
    /// RAM, by address.
    pub ram: Vec<RamRange>,
    /// virtio devices, in the order they were given.
    pub slots: Vec<Slot>,
}

/// A machine that cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BoardError {
    /// More than [`MAX_DEVICES`].
    #[error("{asked} virtio devices: a machine has at most {MAX_DEVICES}")]
    Devices {
        /// Devices asked for.
        asked: usize,
    },
    /// The host's processor cannot address that much.
    #[error(
        "{ram_mib} MiB of memory and {windows} MiB of device windows reach beyond the {bits} address bits of this \
         host's processor: at most {} MiB of memory", limit_mib(*bits, *windows)
    )]
    PhysicalBits {
        /// RAM asked for.
        ram_mib: u64,
        /// Device windows above it.
        windows: u64,
        /// Width of a physical address.
        bits: u32,
    },
    /// A shared memory region of an impossible size.
    #[error(
        "device {name}: a shared memory region of {size:#x} bytes: must be a multiple of 4096, up to 1 TiB"
    )]
    Window {
        /// The device.
        name: String,
        /// Its size.
        size: u64,
    },
}

fn limit_mib(bits: u32, windows_mib: u64) -> u64 {
    let top = 1u64.checked_shl(bits).unwrap_or(u64::MAX) >> 20;
    // The hole below 4 GiB costs addresses too, and windows start at a GiB.
    top.saturating_sub((RAM_HIGH_START - RAM_HOLE_START) >> 20)
        .saturating_sub(windows_mib.next_multiple_of(1024))
}

impl Board {
    /// Lays out `spec` with `devices`, for a processor with physical addresses of `bits` bits.
    ///
    /// # Errors
    /// What does not fit.
    pub fn new(spec: &Spec, devices: &[DeviceInfo], bits: u32) -> Result<Self, BoardError> {
        let ram = ram_ranges(spec.ram_bytes());
        if devices.len() > MAX_DEVICES {
            return Err(BoardError::Devices { asked: devices.len() });
        }
        let ram_end = ram.last().map_or(0, RamRange::end);
        let windows_start = ram_end.max(RAM_HIGH_START).next_multiple_of(GIB);
        let mut next = windows_start;
        let mut slots = Vec::with_capacity(devices.len());
        for ((n, info), &irq) in devices.iter().enumerate().zip(FREE_LINES.iter().cycle()) {
            let mut shm = Vec::with_capacity(info.shm.len());
            for region in &info.shm {
                if region.size == 0 || region.size % 4096 != 0 || region.size > 1 << 40 {
                    return Err(BoardError::Window { name: info.name.clone(), size: region.size });
                }
                // 2 MiB aligned, so that the host can use large pages.
                shm.push(Window { id: region.id, at: next, size: region.size });
                next = (next + region.size).next_multiple_of(2 << 20);
            }
            slots.push(Slot { name: info.name.clone(), at: MMIO_BASE + n as u64 * MMIO_SIZE, irq, shm });
        }
        let (end, windows) =
            if next > windows_start { (next, (next - windows_start) >> 20) } else { (ram_end, 0) };
        if bits < 64 && end > 1 << bits {
            return Err(BoardError::PhysicalBits { ram_mib: spec.ram_mib, windows, bits });
        }
        Ok(Self { vcpus: spec.vcpus, ram, slots })
    }

    /// End of the RAM below the hole: where a kernel and its data may lie.
    pub fn low_ram_end(&self) -> u64 {
        self.ram.first().map_or(0, RamRange::end)
    }

    /// How the kernel is told about the devices: one word per device (`virtio_mmio.device=` in Linux's
    /// kernel-parameters).
    pub fn device_words(&self) -> impl Iterator<Item = String> + '_ {
        self.slots.iter().map(|s| format!("virtio_mmio.device=4K@{:#x}:{}", s.at, s.irq))
    }
}

fn ram_ranges(bytes: u64) -> Vec<RamRange> {
    let low = bytes.min(RAM_HOLE_START);
    let mut ranges = vec![RamRange { at: 0, size: low, offset: 0 }];
    if bytes > low {
        ranges.push(RamRange { at: RAM_HIGH_START, size: bytes - low, offset: low });
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use krun_virtio::ShmRegion;
    use proptest::prelude::*;

    fn info(shm: &[u64]) -> DeviceInfo {
        DeviceInfo {
            id: 1,
            name: "d".into(),
            features: 0,
            queue_sizes: vec![8],
            shm: shm.iter().enumerate().map(|(n, size)| ShmRegion { id: n as u8, size: *size }).collect(),
        }
    }

    fn spec(ram_mib: u64) -> Spec {
        Spec { ram_mib, ..Spec::default() }
    }

    #[test]
    fn ram_is_split_at_the_hole() {
        let small = Board::new(&spec(3072), &[], 40).unwrap();
        assert_eq!(small.ram, [RamRange { at: 0, size: 3 * GIB, offset: 0 }]);
        let large = Board::new(&spec(4096), &[], 40).unwrap();
        assert_eq!(large.ram[1], RamRange { at: 4 * GIB, size: GIB, offset: 3 * GIB });
    }

    #[test]
    fn devices_get_their_own_window_and_line() {
        let b = Board::new(&spec(512), &vec![info(&[]); 3], 40).unwrap();
        let words: Vec<_> = b.device_words().collect();
        assert_eq!(words[0], "virtio_mmio.device=4K@0xd0000000:5");
        assert_eq!(words[2], "virtio_mmio.device=4K@0xd0002000:7");
        let full = Board::new(&spec(512), &vec![info(&[]); MAX_DEVICES], 40).unwrap();
        assert_eq!((full.slots[16].irq, full.slots[17].irq, full.slots[47].irq), (23, 5, 20));
        let more = Board::new(&spec(512), &vec![info(&[]); 49], 40).unwrap_err();
        assert_eq!(more.to_string(), "49 virtio devices: a machine has at most 48");
    }

    #[test]
    fn what_the_processor_cannot_address_is_refused() {
        let e = Board::new(&spec(2 << 20), &[], 40).unwrap_err();
        assert!(e.to_string().contains("at most 1047552 MiB"), "{e}");
        assert!(Board::new(&spec(1_047_552), &[], 40).is_ok());
        assert!(Board::new(&spec(1_047_552), &[info(&[4096])], 40).is_err());
        assert!(matches!(
            Board::new(&spec(512), &[info(&[100])], 40),
            Err(BoardError::Window { size: 100, .. })
        ));
    }

    proptest! {
        #[test]
        fn nothing_overlaps(
            ram_mib in crate::spec::MIN_RAM_MIB..64 << 10,
            devices in prop::collection::vec(prop::collection::vec(1u64..1 << 20, 0..3), 0..=MAX_DEVICES),
        ) {
            let devices: Vec<_> =
                devices.iter().map(|s| info(&s.iter().map(|n| n * 4096).collect::<Vec<_>>())).collect();
            let b = Board::new(&spec(ram_mib), &devices, 48).unwrap();
            let mut all: Vec<(u64, u64)> = b.ram.iter().map(|r| (r.at, r.size)).collect();
            all.extend(b.slots.iter().map(|s| (s.at, MMIO_SIZE)));
            all.extend(b.slots.iter().flat_map(|s| &s.shm).map(|w| (w.at, w.size)));
            all.push((IOAPIC_BASE.into(), 4096));
            all.push((LAPIC_BASE.into(), 4096));
            all.sort_unstable();
            prop_assert!(all.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
            prop_assert_eq!(b.ram.iter().map(|r| r.size).sum::<u64>(), ram_mib << 20);
            // No line has two devices while another one has none, and so on.
            let shares = FREE_LINES.map(|line| b.slots.iter().filter(|s| s.irq == line).count());
            prop_assert_eq!(shares.iter().sum::<usize>(), devices.len());
            prop_assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1);
        }
    }
}
