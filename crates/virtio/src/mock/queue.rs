//! The driver's side of a split queue (virtio 1.2, section 2.7), well-behaved or not.

use std::sync::atomic::{Ordering, fence};

use krun_memory::{Bytes, GuestAddress, GuestMemory};

use crate::feature;
use crate::queue::QueueAddresses;
use crate::ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE};

/// One buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest physical address.
    pub at: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// A chain that came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    /// Index of its first descriptor.
    pub head: u16,
    /// Bytes stored, as the device says.
    pub written: u32,
    /// Those bytes.
    pub data: Vec<u8>,
}

/// What the driver remembers of a chain that the device has.
#[derive(Debug)]
struct Pending {
    descriptors: Vec<u16>,
    table: Option<(u64, u64)>,
    buffers: Vec<Buffer>,
    /// Whether the buffers go back to the heap.
    owned: bool,
}

/// The driver's side of one queue.
#[derive(Debug)]
pub struct DriverQueue {
    memory: GuestMemory,
    size: u16,
    features: u64,
    at: QueueAddresses,
    heap: Heap,
    free: Vec<u16>,
    pending: Vec<Option<Pending>>,
    avail: u16,
    kicked: u16,
    used: u16,
    interrupts: bool,
}

impl DriverQueue {
    /// Lays out a queue of `size` entries in the `len` bytes from `base`; the rest is for buffers.
    /// `start` is the first index of both rings, 0 unless the device was told otherwise.
    pub fn new(memory: &GuestMemory, base: u64, len: u64, size: u16, features: u64, start: u16) -> Self {
        let n = u64::from(size);
        let desc = base;
        let avail = desc + 16 * n;
        let used = (avail + 6 + 2 * n).next_multiple_of(4);
        let end = (used + 6 + 8 * n).next_multiple_of(4096);
        memory.write_slice(&vec![0; (end - base) as usize], GuestAddress(base)).unwrap();
        let queue = Self {
            memory: memory.clone(),
            size,
            features,
            at: QueueAddresses { desc, avail, used },
            heap: Heap { free: vec![(end, base + len - end)] },
            free: (0..size).rev().collect(),
            pending: (0..size).map(|_| None).collect(),
            avail: start,
            kicked: start,
            used: start,
            interrupts: true,
        };
        queue.put16(avail + 2, start);
        queue.put16(used + 2, start);
        queue.put16(queue.avail_event_at(), start);
        queue.put16(queue.used_event_at(), start);
        queue
    }

    /// Where the parts of the queue are.
    pub fn addresses(&self) -> QueueAddresses {
        self.at
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Chains that the device has.
    pub fn in_flight(&self) -> usize {
        self.pending.iter().flatten().count()
    }

    /// Makes a chain available: a buffer with the bytes of each of `out`, and room of each size in
    /// `room`. `None` when the queue or the memory is full.
    pub fn add(&mut self, out: &[&[u8]], room: &[u32]) -> Option<u16> {
        let mut buffers = Vec::new();
        for (len, data) in
            out.iter().map(|d| (d.len(), Some(d))).chain(room.iter().map(|&n| (n as usize, None)))
        {
            let Some(at) = self.heap.alloc(len as u64) else {
                self.release(&buffers);
                return None;
            };
            if let Some(data) = data {
                self.memory.write_slice(data, GuestAddress(at)).unwrap();
            }
            buffers.push(Buffer { at, len: len as u32, writable: data.is_none() });
        }
        let head = self.link(&buffers, true);
        if head.is_none() {
            self.release(&buffers);
        }
        head
    }

    /// Makes a chain of the given buffers available, whatever they are.
    pub fn add_buffers(&mut self, buffers: &[Buffer]) -> Option<u16> {
        self.link(buffers, false)
    }

    fn release(&mut self, buffers: &[Buffer]) {
        for b in buffers {
            self.heap.release(b.at, u64::from(b.len));
        }
    }

    fn link(&mut self, buffers: &[Buffer], owned: bool) -> Option<u16> {
        assert!(!buffers.is_empty(), "a chain has a buffer");
        let indirect = self.has(feature::RING_INDIRECT_DESC) && buffers.len() > 1;
        let needed = if indirect { 1 } else { buffers.len() };
        if self.free.len() < needed {
            return None;
        }
        let table = match indirect {
            true => Some((self.heap.alloc(16 * buffers.len() as u64)?, 16 * buffers.len() as u64)),
            false => None,
        };
        let descriptors = self.free.split_off(self.free.len() - needed);
        let head = descriptors[0];
        for (i, b) in buffers.iter().enumerate() {
            let last = i + 1 == buffers.len();
            let flags = if b.writable { DESC_WRITE } else { 0 } | if last { 0 } else { DESC_NEXT };
            match table {
                Some((at, _)) => {
                    let next = if last { 0 } else { i as u16 + 1 };
                    self.write_descriptor(at + 16 * i as u64, b.at, b.len, flags, next);
                }
                None => {
                    let next = if last { 0 } else { descriptors[i + 1] };
                    self.set_descriptor(descriptors[i], b.at, b.len, flags, next);
                }
            }
        }
        if let Some((at, len)) = table {
            self.set_descriptor(head, at, len as u32, DESC_INDIRECT, 0);
        }
        let pending = Pending { descriptors, table, buffers: buffers.to_vec(), owned };
        self.pending[usize::from(head)] = Some(pending);
        self.offer(head);
        Some(head)
    }

    /// Stores a descriptor in the queue's own table, whatever it says.
    pub fn set_descriptor(&self, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        self.write_descriptor(self.at.desc + 16 * u64::from(index), at, len, flags, next);
    }

    /// Stores a descriptor anywhere.
    pub fn write_descriptor(&self, to: u64, at: u64, len: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&at.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&raw, GuestAddress(to)).unwrap();
    }

    /// Makes the chain at `head` available without a look at it.
    pub fn offer(&mut self, head: u16) {
        self.put16(self.at.avail + 4 + 2 * u64::from(self.avail % self.size), head);
        self.set_avail_idx(self.avail.wrapping_add(1));
    }

    /// Stores `avail.idx`, whatever it says.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.avail = index;
        self.memory.store(index.to_le(), GuestAddress(self.at.avail + 2), Ordering::Release).unwrap();
    }

    /// Whether the device wants a notification for what was added since the last call.
    pub fn needs_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let (old, new) = (std::mem::replace(&mut self.kicked, self.avail), self.avail);
        if self.has(feature::RING_EVENT_IDX) {
            let event = self.get16(self.avail_event_at());
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            old != new && self.get16(self.at.used) & 1 == 0
        }
    }

    /// Takes the next chain that came back.
    pub fn collect(&mut self) -> Option<Used> {
        if !self.has_used() {
            return None;
        }
        let at = self.at.used + 4 + 8 * u64::from(self.used % self.size);
        let [id, written] = [at, at + 4]
            .map(|at| u32::from_le(self.memory.load::<u32>(GuestAddress(at), Ordering::Relaxed).unwrap()));
        let head = u16::try_from(id).expect("the device returned a descriptor that is none");
        let pending = self.pending[usize::from(head)].take().expect("the device returned a chain it had not");
        self.used = self.used.wrapping_add(1);
        if self.interrupts {
            self.put16(self.used_event_at(), self.used);
            fence(Ordering::SeqCst);
        }
        let mut data = Vec::new();
        for b in pending.buffers.iter().filter(|b| b.writable) {
            let n = (b.len as usize).min(written as usize - data.len());
            let from = data.len();
            data.resize(from + n, 0);
            self.memory.read_slice(&mut data[from..], GuestAddress(b.at)).unwrap();
        }
        assert_eq!(data.len(), written as usize, "the device says it stored more than there was room for");
        if pending.owned {
            self.release(&pending.buffers);
        }
        if let Some((at, len)) = pending.table {
            self.heap.release(at, len);
        }
        self.free.extend(pending.descriptors.iter().rev());
        Some(Used { head, written, data })
    }

    /// Whether a chain came back.
    pub fn has_used(&self) -> bool {
        let used: u16 = self.memory.load(GuestAddress(self.at.used + 2), Ordering::Acquire).unwrap();
        u16::from_le(used) != self.used
    }

    /// Says that interrupts are not wanted.
    pub fn disable_interrupts(&mut self) {
        self.interrupts = false;
        if !self.has(feature::RING_EVENT_IDX) {
            self.put16(self.at.avail, 1);
        } else {
            // Half a round away from anything the device will do soon.
            self.put16(self.used_event_at(), self.used.wrapping_sub(1 << 15));
        }
    }

    /// Says that interrupts are wanted; true when chains came back that none may be raised for.
    pub fn enable_interrupts(&mut self) -> bool {
        self.interrupts = true;
        if !self.has(feature::RING_EVENT_IDX) {
            self.put16(self.at.avail, 0);
        } else {
            self.put16(self.used_event_at(), self.used);
        }
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Stores `avail.used_event`.
    pub fn set_used_event(&self, index: u16) {
        self.put16(self.used_event_at(), index);
    }

    /// Index of the next chain to be added.
    pub fn avail_idx(&self) -> u16 {
        self.avail
    }

    fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    fn used_event_at(&self) -> u64 {
        self.at.avail + 4 + 2 * u64::from(self.size)
    }

    fn avail_event_at(&self) -> u64 {
        self.at.used + 4 + 8 * u64::from(self.size)
    }

    fn put16(&self, at: u64, value: u16) {
        self.memory.store(value.to_le(), GuestAddress(at), Ordering::Relaxed).unwrap();
    }

    fn get16(&self, at: u64) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(at), Ordering::Relaxed).unwrap())
    }
}

/// Buffers by first fit, in steps of 16 bytes.
#[derive(Debug)]
struct Heap {
    /// Start and length of what is free, by address.
    free: Vec<(u64, u64)>,
}

impl Heap {
    fn alloc(&mut self, len: u64) -> Option<u64> {
        let len = len.max(1).next_multiple_of(16);
        let slot = self.free.iter_mut().find(|f| f.1 >= len)?;
        let at = slot.0;
        *slot = (slot.0 + len, slot.1 - len);
        Some(at)
    }

    fn release(&mut self, at: u64, len: u64) {
        let len = len.max(1).next_multiple_of(16);
        let i = self.free.partition_point(|f| f.0 < at);
        self.free.insert(i, (at, len));
        // Join with the next one, then with the one before.
        for j in [i, i.wrapping_sub(1)] {
            if let (Some(&a), Some(&b)) = (self.free.get(j), self.free.get(j.wrapping_add(1)))
                && a.0 + a.1 == b.0
            {
                self.free[j].1 += b.1;
                self.free.remove(j + 1);
            }
        }
    }
}
