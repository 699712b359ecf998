//! What a machine shall be: plain data, checked without touching the host.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use krun_memory::HUGE_PAGE;

use crate::boot::smbios::{self, OemStringError};

/// Most virtual CPUs of a machine.
pub const MAX_VCPUS: u32 = 16;
/// Least RAM: below it no kernel of today gets as far as its init.
pub const MIN_RAM_MIB: u64 = 32;
/// Most RAM. The host's processor may set a lower limit, see [`crate::board::BoardError::PhysicalBits`].
pub const MAX_RAM_MIB: u64 = 4 << 20;

/// Everything about a machine but its virtio devices, which are handed over beside it.
#[derive(Debug)]
pub struct Spec {
    /// Virtual CPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// RAM in MiB, [`MIN_RAM_MIB`] to [`MAX_RAM_MIB`].
    pub ram_mib: u64,
    /// What boots.
    pub kernel: Kernel,
    /// The kernel's command line without the devices, which the machine adds.
    pub cmdline: String,
    /// A 16550 serial port, `ttyS0` in the guest.
    pub serial: Option<SerialSpec>,
    /// Emulate the I/O interrupt controller in this process instead of in the host's kernel.
    pub split_irqchip: bool,
    /// Let the guest use the processor's virtualisation.
    pub nested: bool,
    /// How the kernel is entered.
    pub entry: Entry,
    /// Strings for the guest, in its SMBIOS tables; without any it has no such tables.
    pub oem_strings: Vec<String>,
    /// RAM is a file in memory that can be passed to other processes (vhost-user). Slower on most hosts.
    pub shared_memory: bool,
    /// RAM is in huge pages that the host's administrator has set aside; a multiple of 2 MiB, then.
    pub huge_pages: bool,
}

/// The protocol by which a kernel is entered on x86_64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Entry {
    /// The 64-bit one: both take the same time, and this one hands over randomness too.
    #[default]
    Auto,
    /// In 64-bit mode with a zero page (Linux: Documentation/arch/x86/boot.rst).
    Long64,
    /// In 32-bit mode with a start info (PVH), for ELF kernels that have such an entry.
    Pvh,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            vcpus: 1,
            ram_mib: 512,
            kernel: Kernel::Bundle(None),
            cmdline: String::new(),
            serial: None,
            split_irqchip: false,
            nested: false,
            entry: Entry::Auto,
            oem_strings: Vec::new(),
            shared_memory: false,
            huge_pages: false,
        }
    }
}

/// Where the kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kernel {
    /// A library with a kernel in it (`libkrunfw.so.5`); `None`: where the system has one.
    Bundle(Option<PathBuf>),
    /// A kernel in a file of its own.
    File {
        /// The file.
        path: PathBuf,
        /// What it holds.
        format: KernelFormat,
        /// A root in memory, unpacked by the kernel.
        initramfs: Option<PathBuf>,
        /// Taken instead of [`Spec::cmdline`] when given.
        cmdline: Option<String>,
    },
}

/// What a kernel file holds. The file's own marks win over [`KernelFormat::Raw`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KernelFormat {
    /// aarch64: an uncompressed `Image`. x86_64: whatever the file says it is, of the others or a
    /// `bzImage`.
    Raw,
    /// An ELF executable (`vmlinux`).
    Elf,
    /// An EFI program with a gzip-compressed `Image` inside (aarch64).
    PeGz,
    /// A file with a bzip2-compressed kernel inside.
    ImageBz2,
    /// A file with a gzip-compressed kernel inside.
    ImageGz,
    /// A file with a zstd-compressed kernel inside.
    ImageZstd,
}

/// The two sides of a serial port, as this process sees them.
#[derive(Debug, Default)]
pub struct SerialSpec {
    /// Read here, for the guest.
    pub input: Option<OwnedFd>,
    /// Written here, by the guest.
    pub output: Option<OwnedFd>,
}

/// A value that no machine can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// See [`Spec::vcpus`].
    #[error("{asked} vCPUs: a machine has 1 to {MAX_VCPUS}")]
    Vcpus {
        /// What was asked for.
        asked: u32,
    },
    /// Less than [`MIN_RAM_MIB`].
    #[error("{asked} MiB of memory is too little to boot a kernel: at least {MIN_RAM_MIB} MiB")]
    RamTooSmall {
        /// What was asked for.
        asked: u64,
    },
    /// More than [`MAX_RAM_MIB`].
    #[error("{asked} MiB of memory is more than a machine can have: at most {MAX_RAM_MIB} MiB")]
    RamTooLarge {
        /// What was asked for.
        asked: u64,
    },
    /// See [`Spec::huge_pages`].
    #[error("{asked} MiB of memory in huge pages: must be a multiple of 2 MiB")]
    HugePages {
        /// What was asked for.
        asked: u64,
    },
    /// See [`Spec::oem_strings`].
    #[error(transparent)]
    OemString(#[from] OemStringError),
}

impl Spec {
    /// Checks every value by itself.
    ///
    /// # Errors
    /// The first value that no machine can have.
    pub fn validate(&self) -> Result<(), SpecError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(SpecError::Vcpus { asked: self.vcpus });
        }
        if self.ram_mib < MIN_RAM_MIB {
            return Err(SpecError::RamTooSmall { asked: self.ram_mib });
        }
        if self.ram_mib > MAX_RAM_MIB {
            return Err(SpecError::RamTooLarge { asked: self.ram_mib });
        }
        if self.huge_pages && !self.ram_bytes().is_multiple_of(HUGE_PAGE) {
            return Err(SpecError::HugePages { asked: self.ram_mib });
        }
        Ok(smbios::check(&self.oem_strings)?)
    }

    /// RAM in bytes.
    pub fn ram_bytes(&self) -> u64 {
        self.ram_mib << 20
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_told_with_the_value() {
        let text =
            |vcpus, ram_mib| Spec { vcpus, ram_mib, ..Spec::default() }.validate().unwrap_err().to_string();
        assert_eq!(text(0, 512), "0 vCPUs: a machine has 1 to 16");
        assert_eq!(text(65, 512), "65 vCPUs: a machine has 1 to 16");
        assert!(text(1, 1).starts_with("1 MiB of memory is too little"));
        assert!(text(1, 10 << 20).starts_with("10485760 MiB of memory is more"));
        let odd = Spec { ram_mib: 129, huge_pages: true, ..Spec::default() }.validate();
        assert_eq!(odd, Err(SpecError::HugePages { asked: 129 }));
        for (vcpus, ram_mib) in [(1, MIN_RAM_MIB), (MAX_VCPUS, MAX_RAM_MIB)] {
            assert_eq!(Spec { vcpus, ram_mib, ..Spec::default() }.validate(), Ok(()));
        }
    }
}
