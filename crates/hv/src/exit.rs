//! Why a vCPU stopped running guest code, and the answers to that.

use krun_memory::GuestAddress;

/// Why [`crate::Vcpu::run`] returned. Data is little-endian, `size` bytes of it count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// The guest reads an I/O port; answer with [`Reply::Read`].
    IoIn {
        /// Port number.
        port: u16,
        /// 1, 2 or 4 bytes.
        size: u8,
    },
    /// The guest writes an I/O port.
    IoOut {
        /// Port number.
        port: u16,
        /// 1, 2 or 4 bytes.
        size: u8,
        /// What it writes; bytes past `size` are zero.
        data: [u8; 4],
    },
    /// The guest reads where no memory is; answer with [`Reply::Read`].
    MmioRead {
        /// Guest physical address.
        at: GuestAddress,
        /// 1 to 8 bytes.
        size: u8,
    },
    /// The guest writes where no writable memory is.
    MmioWrite {
        /// Guest physical address.
        at: GuestAddress,
        /// 1 to 8 bytes.
        size: u8,
        /// What it writes; bytes past `size` are zero.
        data: [u8; 8],
    },
    /// The vCPU halted and the host does not wait for its interrupts.
    Halted,
    /// A fault while delivering a double fault; a physical machine would reset.
    TripleFault,
    /// The guest asked the hypervisor for something that concerns the whole machine.
    SystemEvent(SystemEvent),
    /// [`crate::Kicker::kick`] was called.
    Interrupted,
}

/// Requests for the whole machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SystemEvent {
    /// Restart.
    Reset,
    /// Turn off.
    PowerOff,
    /// The guest's kernel gave up.
    Crash,
}

/// What the guest gets for the exit before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reply {
    /// The exit needed no answer.
    #[default]
    None,
    /// Bytes read, little-endian; those past the exit's `size` are ignored.
    Read([u8; 8]),
}

impl Reply {
    /// The bytes of `value`.
    pub fn value(value: u64) -> Self {
        Self::Read(value.to_le_bytes())
    }
}

/// Number of distinct reasons in [`ExitCounts`].
pub(crate) const REASONS: usize = 12;

/// Exits of a vCPU by reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExitCounts {
    pub(crate) by: [u64; REASONS],
}

/// Index into [`ExitCounts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Reason {
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    Ioapic,
    Halt,
    Shutdown,
    SystemEvent,
    Kick,
    Signal,
    Error,
    Other,
}

/// Names in the order of [`Reason`].
const NAMES: [&str; REASONS] = [
    "io-in",
    "io-out",
    "mmio-read",
    "mmio-write",
    "ioapic",
    "halt",
    "shutdown",
    "system-event",
    "kick",
    "signal",
    "error",
    "other",
];

impl ExitCounts {
    pub(crate) fn count(&mut self, reason: Reason) {
        self.by[reason as usize] += 1;
    }

    /// Reasons with their counts, those that never happened included.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        NAMES.iter().copied().zip(self.by.iter().copied())
    }

    /// All exits.
    pub fn total(&self) -> u64 {
        self.by.iter().sum()
    }
}

impl std::ops::AddAssign for ExitCounts {
    fn add_assign(&mut self, other: Self) {
        for (mine, theirs) in self.by.iter_mut().zip(other.by) {
            *mine += theirs;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_own_name_and_counter() {
        assert_eq!(Reason::Other as usize, REASONS - 1);
        let mut a = ExitCounts::default();
        a.count(Reason::Kick);
        a.count(Reason::Other);
        let mut b = a;
        b += a;
        assert_eq!(b.total(), 4);
        let seen: Vec<_> = b.iter().filter(|(_, n)| *n > 0).collect();
        assert_eq!(seen, [("kick", 2), ("other", 2)]);
    }
}
