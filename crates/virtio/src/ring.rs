//! The three parts of a split queue in guest memory (virtio 1.2, section 2.7).
//!
//! Every field is read or written with one access of its own width, so a ring may cross from one
//! mapping of guest memory into the next.

use std::sync::atomic::Ordering;

use krun_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryBackend};

use crate::queue::{QueueAddresses, QueueError, RingPart};

/// The chain goes on at `next`.
pub(crate) const DESC_NEXT: u16 = 1;
/// The device writes the buffer.
pub(crate) const DESC_WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(crate) const DESC_INDIRECT: u16 = 4;
/// Bytes of a descriptor.
pub(crate) const DESC_SIZE: u32 = 16;

/// In `avail.flags`: the driver wants no interrupts.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// In `used.flags`: the device wants no notifications.
const USED_NO_NOTIFY: u16 = 1;

const AVAIL_FLAGS: u64 = 0;
const AVAIL_IDX: u64 = 2;
const AVAIL_RING: u64 = 4;
const USED_FLAGS: u64 = 0;
const USED_IDX: u64 = 2;
const USED_RING: u64 = 4;
const USED_ELEM: u64 = 8;

/// One descriptor as read from guest memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) at: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// A size and addresses that were checked: aligned, and wholly in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ring {
    size: u16,
    at: QueueAddresses,
}

impl Ring {
    /// Checks where the driver put the three parts.
    pub(crate) fn new(memory: &GuestMemory, size: u16, at: QueueAddresses) -> Result<Self, QueueError> {
        let n = u64::from(size);
        let parts = [
            (RingPart::Descriptors, at.desc, 16, u64::from(DESC_SIZE) * n),
            (RingPart::Available, at.avail, 2, AVAIL_RING + 2 * n + 2),
            (RingPart::Used, at.used, 4, USED_RING + USED_ELEM * n + 2),
        ];
        for (part, at, align, len) in parts {
            if at % align != 0 {
                return Err(QueueError::Misaligned { part, at, align });
            }
            if !in_memory(memory, at, len) {
                return Err(QueueError::OutsideMemory { part, at, len });
            }
        }
        Ok(Self { size, at })
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn addresses(&self) -> QueueAddresses {
        self.at
    }

    fn slot(&self, index: u16) -> u64 {
        // The size is a power of two, so the free-running index wraps without a seam.
        u64::from(index & (self.size - 1))
    }

    /// Reads descriptor `index`, which is below the size.
    pub(crate) fn descriptor(&self, memory: &GuestMemory, index: u16) -> Result<Descriptor, QueueError> {
        descriptor(memory, RingPart::Descriptors, self.at.desc, index)
    }

    /// `avail.idx`; what it covers may be read after.
    pub(crate) fn avail_idx(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        load(memory, RingPart::Available, self.at.avail + AVAIL_IDX, Ordering::Acquire)
    }

    /// `avail.ring[index]`.
    pub(crate) fn avail_head(&self, memory: &GuestMemory, index: u16) -> Result<u16, QueueError> {
        let at = self.at.avail + AVAIL_RING + 2 * self.slot(index);
        load(memory, RingPart::Available, at, Ordering::Relaxed)
    }

    /// `avail.used_event`: the driver wants an interrupt for the completion with this index.
    pub(crate) fn used_event(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        let at = self.at.avail + AVAIL_RING + 2 * u64::from(self.size);
        load(memory, RingPart::Available, at, Ordering::Relaxed)
    }

    /// Whether `avail.flags` says that the driver wants no interrupts.
    pub(crate) fn no_interrupt(&self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let flags = load(memory, RingPart::Available, self.at.avail + AVAIL_FLAGS, Ordering::Relaxed)?;
        Ok(flags & AVAIL_NO_INTERRUPT != 0)
    }

    /// Fills `used.ring[index]`.
    pub(crate) fn put_used(
        &self,
        memory: &GuestMemory,
        index: u16,
        head: u16,
        len: u32,
    ) -> Result<(), QueueError> {
        let at = self.at.used + USED_RING + USED_ELEM * self.slot(index);
        store32(memory, at, u32::from(head))?;
        store32(memory, at + 4, len)
    }

    /// Publishes every entry below `index`.
    pub(crate) fn set_used_idx(&self, memory: &GuestMemory, index: u16) -> Result<(), QueueError> {
        store16(memory, self.at.used + USED_IDX, index, Ordering::Release)
    }

    /// `used.idx`, where another process writes it.
    pub(crate) fn used_idx(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        load(memory, RingPart::Used, self.at.used + USED_IDX, Ordering::Acquire)
    }

    /// `used.avail_event`: the device wants a notification for the buffer with this index.
    pub(crate) fn set_avail_event(&self, memory: &GuestMemory, index: u16) -> Result<(), QueueError> {
        let at = self.at.used + USED_RING + USED_ELEM * u64::from(self.size);
        store16(memory, at, index, Ordering::Relaxed)
    }

    /// `used.flags`: whether the device wants notifications.
    pub(crate) fn set_notify(&self, memory: &GuestMemory, wanted: bool) -> Result<(), QueueError> {
        let flags = if wanted { 0 } else { USED_NO_NOTIFY };
        store16(memory, self.at.used + USED_FLAGS, flags, Ordering::Relaxed)
    }
}

/// Whether `len` bytes from `at` are all guest memory.
pub(crate) fn in_memory(memory: &GuestMemory, at: u64, len: u64) -> bool {
    let Ok(len) = usize::try_from(len) else { return false };
    GuestMemoryBackend::check_range(memory, GuestAddress(at), len)
}

/// Reads entry `index` of a descriptor table at `table`, which is in guest memory as a whole.
pub(crate) fn descriptor(
    memory: &GuestMemory,
    part: RingPart,
    table: u64,
    index: u16,
) -> Result<Descriptor, QueueError> {
    let at = table + u64::from(DESC_SIZE) * u64::from(index);
    let mut raw = [0u8; DESC_SIZE as usize];
    memory.read_slice(&mut raw, GuestAddress(at)).map_err(|_| QueueError::Access { part, at })?;
    let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = raw;
    Ok(Descriptor {
        at: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
        len: u32::from_le_bytes([l0, l1, l2, l3]),
        flags: u16::from_le_bytes([f0, f1]),
        next: u16::from_le_bytes([n0, n1]),
    })
}

fn load(memory: &GuestMemory, part: RingPart, at: u64, order: Ordering) -> Result<u16, QueueError> {
    let raw: u16 = memory.load(GuestAddress(at), order).map_err(|_| QueueError::Access { part, at })?;
    Ok(u16::from_le(raw))
}

fn store16(memory: &GuestMemory, at: u64, value: u16, order: Ordering) -> Result<(), QueueError> {
    let part = RingPart::Used;
    memory.store(value.to_le(), GuestAddress(at), order).map_err(|_| QueueError::Access { part, at })
}

fn store32(memory: &GuestMemory, at: u64, value: u32) -> Result<(), QueueError> {
    let part = RingPart::Used;
    memory
        .store(value.to_le(), GuestAddress(at), Ordering::Relaxed)
        .map_err(|_| QueueError::Access { part, at })
}
