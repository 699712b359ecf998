//! Split virtqueues, device side (virtio 1.2, section 2.7).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use krun_memory::GuestMemory;

use crate::bounce::{Bounce, Refusal};
use crate::chain::Chain;
use crate::feature;
use crate::ring::{self, DESC_INDIRECT, DESC_NEXT, DESC_SIZE, DESC_WRITE, Descriptor, Ring};

/// Where the driver put a queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueAddresses {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
}

/// A part of a queue in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingPart {
    /// The descriptor table.
    Descriptors,
    /// An indirect descriptor table.
    Indirect,
    /// The available ring.
    Available,
    /// The used ring.
    Used,
}

impl std::fmt::Display for RingPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Descriptors => "descriptor table",
            Self::Indirect => "indirect table",
            Self::Available => "available ring",
            Self::Used => "used ring",
        })
    }
}

/// A broken rule of the ring.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The queue's size is not a power of two within the limit.
    #[error("queue size {size} is not a power of two up to {max}")]
    Size {
        /// What the driver asked for.
        size: u32,
        /// What the device offered.
        max: u16,
    },
    /// A part of the queue is not aligned.
    #[error("{part} at {at:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// Which part.
        part: RingPart,
        /// Guest physical address.
        at: u64,
        /// What the standard asks for.
        align: u64,
    },
    /// A part of the queue is not guest memory.
    #[error("{part} of {len} bytes at {at:#x} is not guest memory")]
    OutsideMemory {
        /// Which part.
        part: RingPart,
        /// Guest physical address.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// More chains are available and in use than the queue can hold.
    #[error("available index {avail} is more than {size} ahead of used index {used}")]
    Overrun {
        /// `avail.idx`.
        avail: u16,
        /// `used.idx`.
        used: u16,
        /// The queue's size.
        size: u16,
    },
    /// A descriptor index past the end of its table.
    #[error("chain {head}: descriptor {index} of {size}")]
    Index {
        /// First descriptor of the chain.
        head: u16,
        /// The offending index.
        index: u16,
        /// Entries of the table.
        size: u32,
    },
    /// A chain with more descriptors than its table: it loops.
    #[error("chain {head}: more than {limit} descriptors")]
    Loop {
        /// First descriptor of the chain.
        head: u16,
        /// Entries of the table.
        limit: u32,
    },
    /// A readable buffer after a writable one.
    #[error("chain {head}: a readable buffer follows a writable one")]
    Order {
        /// First descriptor of the chain.
        head: u16,
    },
    /// The buffers of a chain add up to more than 32 bits can say.
    #[error("chain {head}: longer than 4 GiB")]
    Length {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A buffer that is not guest memory.
    #[error("chain {head}: buffer of {len} bytes at {at:#x} is not guest memory")]
    Buffer {
        /// First descriptor of the chain.
        head: u16,
        /// Guest physical address.
        at: u64,
        /// Bytes.
        len: u32,
    },
    /// There is no memory for the device to use in place of buffers in windows.
    #[error("chain {head}: its buffers in windows do not fit into {max} bytes")]
    Windows {
        /// First descriptor of the chain.
        head: u16,
        /// What one queue can have at a time, if the host has it.
        max: u64,
    },
    /// An indirect table though the feature was not negotiated.
    #[error("chain {head}: indirect table without the feature")]
    IndirectRefused {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect table within an indirect table, or one that is not last in its chain.
    #[error("chain {head}: indirect table is nested or not last")]
    IndirectNested {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect table of an impossible length.
    #[error(
        "chain {head}: indirect table of {len} bytes; it takes {DESC_SIZE} to {max} in steps of {DESC_SIZE}"
    )]
    IndirectLength {
        /// First descriptor of the chain.
        head: u16,
        /// Bytes.
        len: u32,
        /// The limit in bytes.
        max: u32,
    },
    /// A completion without a chain taken before; the device's own mistake.
    #[error("chain {head} completed but none is in use")]
    NotTaken {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A part that was guest memory when the queue was set up is so no more.
    #[error("{part} at {at:#x} cannot be accessed")]
    Access {
        /// Which part.
        part: RingPart,
        /// Guest physical address.
        at: u64,
    },
}

/// The indices of a queue: with the driver's settings all that a snapshot needs of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueState {
    /// Index of the next available entry to take.
    pub next_avail: u16,
    /// Index of the next used entry to fill. What lies between the two is in use by the device.
    pub next_used: u16,
}

/// A split queue. Not shared: it lives with the device on its worker. The default is one that the
/// driver left disabled.
#[derive(Debug, Default)]
pub struct Queue {
    ring: Option<Ring>,
    features: u64,
    state: QueueState,
    /// `avail.idx` as last read.
    seen_avail: u16,
    /// Chains completed since the driver was last told or found not to want it.
    unannounced: u32,
    /// `used.idx` at that time.
    announced: u16,
    /// Whether the last [`Queue::pop`] found nothing and the driver was not asked to notify since.
    starved: bool,
    /// Whether the driver has to be asked to notify.
    silent: bool,
    /// Chains that may come before it does; see [`Queue::notify_after`].
    unnoticed: u16,
    /// What is lent in place of buffers in windows.
    bounce: Option<Arc<Bounce>>,
    /// A chain waits for some of that to come back, which had come back so often before.
    held: Option<u64>,
}

impl Queue {
    /// Largest size of a split queue.
    pub const SIZE_LIMIT: u16 = 1 << 15;
    /// Indirect tables may have this many entries, or as many as the queue if that is more. The standard
    /// wants no chain longer than the queue, but Linux builds such where a driver asks it to.
    pub const INDIRECT_LIMIT: u16 = 1024;

    /// Takes over a queue that the driver set up, with the accepted `features`.
    ///
    /// # Errors
    /// The size or an address breaks a rule.
    pub fn new(
        memory: &GuestMemory,
        size: u32,
        max: u16,
        at: QueueAddresses,
        features: u64,
    ) -> Result<Self, QueueError> {
        let max = max.min(Self::SIZE_LIMIT);
        let size = match u16::try_from(size) {
            Ok(n) if n.is_power_of_two() && n <= max => n,
            _ => return Err(QueueError::Size { size, max }),
        };
        let ring = Some(Ring::new(memory, size, at)?);
        Ok(Self { ring, features, ..Self::default() })
    }

    /// Continues from saved indices.
    #[must_use]
    pub fn with_state(mut self, state: QueueState) -> Self {
        self.state = state;
        self.seen_avail = state.next_avail;
        self.announced = state.next_used;
        self
    }

    /// Takes chains with buffers in windows, too.
    #[must_use]
    pub fn with_bounce(mut self, bounce: Arc<Bounce>) -> Self {
        self.bounce = Some(bounce);
        self
    }

    /// The indices.
    pub fn state(&self) -> QueueState {
        self.state
    }

    /// Whether the driver enabled the queue.
    pub fn is_enabled(&self) -> bool {
        self.ring.is_some()
    }

    /// Entries; 0 when disabled.
    pub fn size(&self) -> u16 {
        self.ring.map_or(0, |r| r.size())
    }

    /// Where it lies; all zero when disabled.
    pub fn addresses(&self) -> QueueAddresses {
        self.ring.map_or_else(QueueAddresses::default, |r| r.addresses())
    }

    /// `used.idx` as it is in memory; 0 when disabled.
    pub(crate) fn used_index(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        self.ring.map_or(Ok(0), |r| r.used_idx(memory))
    }

    /// `avail.idx` as it is in memory; 0 when disabled.
    pub(crate) fn available_index(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        self.ring.map_or(Ok(0), |r| r.avail_idx(memory))
    }

    /// Chains taken and not yet completed.
    pub fn in_use(&self) -> u16 {
        self.state.next_avail.wrapping_sub(self.state.next_used)
    }

    /// Whether chains wait to be taken.
    ///
    /// # Errors
    /// The driver broke a rule.
    pub fn is_waiting(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let Some(ring) = self.ring else { return Ok(false) };
        self.refresh(ring, memory)?;
        Ok(self.seen_avail != self.state.next_avail)
    }

    fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Reads `avail.idx` and checks that it is possible.
    fn refresh(&mut self, ring: Ring, memory: &GuestMemory) -> Result<(), QueueError> {
        let (avail, used) = (ring.avail_idx(memory)?, self.state.next_used);
        let waiting = avail.wrapping_sub(self.state.next_avail);
        // A driver can use a descriptor again only after it came back in the used ring, so what waits
        // and what the device holds never exceed the size together.
        if u32::from(waiting) + u32::from(self.in_use()) > u32::from(ring.size()) {
            return Err(QueueError::Overrun { avail, used, size: ring.size() });
        }
        self.seen_avail = avail;
        Ok(())
    }

    /// Takes the next chain; `None` when there is none or the queue is disabled.
    ///
    /// # Errors
    /// The driver broke a rule; the queue stays as it was.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        let Some(ring) = self.ring else { return Ok(None) };
        self.silent = true;
        if self.seen_avail == self.state.next_avail {
            self.refresh(ring, memory)?;
        }
        self.starved = self.seen_avail == self.state.next_avail;
        if self.starved {
            return Ok(None);
        }
        let head = ring.avail_head(memory, self.state.next_avail)?;
        let mut chain = match self.walk(ring, memory, head) {
            Err(QueueError::Windows { .. }) if self.hold() => return Ok(None),
            walked => walked?,
        };
        chain.hand_out();
        self.state.next_avail = self.state.next_avail.wrapping_add(1);
        Ok(Some(chain))
    }

    /// A chain found no room for its buffers in windows. Whether it may wait: others have some, which comes back.
    fn hold(&mut self) -> bool {
        let Some(bounce) = self.bounce.as_ref() else { return false };
        let returns = bounce.returns();
        if bounce.is_lent() {
            self.held = Some(returns);
        }
        self.held.is_some()
    }

    /// Whether a chain waited for room that has come back meanwhile.
    pub(crate) fn take_held(&mut self) -> bool {
        let returns = self.bounce.as_ref().map(|b| b.returns());
        let over = self.held.is_some() && self.held != returns;
        if over {
            self.held = None;
        }
        over
    }

    /// Treats the queue as found empty without a look: what waits is found by
    /// [`Queue::enable_notifications`].
    pub(crate) fn defer(&mut self) {
        (self.silent, self.starved) = (true, true);
    }

    /// Undoes the last pop: the next one reads the chain again.
    pub fn unpop(&mut self, chain: Chain) {
        debug_assert!(self.in_use() > 0, "chain {} put back but none is in use", chain.head);
        if self.in_use() > 0 {
            self.state.next_avail = self.state.next_avail.wrapping_sub(1);
            self.starved = false;
        }
    }

    /// Puts a chain in the used ring, `written` bytes having been stored in its writable part.
    ///
    /// # Errors
    /// The ring cannot be written, or the chain is not from here.
    pub fn complete(&mut self, memory: &GuestMemory, chain: Chain, written: u32) -> Result<(), QueueError> {
        self.complete_together(memory, [(chain, written)])
    }

    /// Puts several chains in the used ring, each with the bytes stored in it. The driver sees all of them at once.
    ///
    /// # Errors
    /// As for [`Queue::complete`].
    pub fn complete_together(
        &mut self,
        memory: &GuestMemory,
        chains: impl IntoIterator<Item = (Chain, u32)>,
    ) -> Result<(), QueueError> {
        let mut next = self.state.next_used;
        for (mut chain, written) in chains {
            let (head, room) = (chain.head, chain.writable_len());
            let (Some(ring), true) = (self.ring, self.state.next_avail != next) else {
                return Err(QueueError::NotTaken { head });
            };
            debug_assert!(written <= room, "{written} bytes stored in {room}");
            chain.settle(written);
            ring.put_used(memory, next, head, written.min(room))?;
            next = next.wrapping_add(1);
        }
        let count = next.wrapping_sub(self.state.next_used);
        self.state.next_used = next;
        if let (Some(ring), 1..) = (self.ring, count) {
            ring.set_used_idx(memory, next)?;
        }
        self.unannounced = self.unannounced.saturating_add(count.into());
        Ok(())
    }

    /// Whether an interrupt is due for what was completed since the last call (sections 2.7.7, 2.7.10).
    ///
    /// # Errors
    /// The ring cannot be read.
    pub fn take_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let (Some(ring), 1..) = (self.ring, self.unannounced) else { return Ok(false) };
        let (old, new) = (self.announced, self.state.next_used);
        let all = self.unannounced > u32::from(u16::MAX);
        self.unannounced = 0;
        self.announced = new;
        // The driver writes its wish and then looks at used.idx; we wrote used.idx and now look at the
        // wish. With a full fence on both sides at least one of us sees the other's store.
        fence(Ordering::SeqCst);
        if self.has(feature::RING_EVENT_IDX) {
            Ok(all || crosses(ring.used_event(memory)?, old, new))
        } else {
            Ok(!ring.no_interrupt(memory)?)
        }
    }

    /// Asks the driver not to notify. A wish only: it may still do so.
    ///
    /// # Errors
    /// The ring cannot be written.
    pub fn disable_notifications(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        let Some(ring) = self.ring else { return Ok(()) };
        self.silent = true;
        // With the event index an old index is the wish not to be notified.
        if self.has(feature::RING_EVENT_IDX) { Ok(()) } else { ring.set_notify(memory, false) }
    }

    /// Asks the driver to notify again if that may be needed. True when the device found the queue
    /// empty and a chain has come since that the driver may not notify for.
    ///
    /// # Errors
    /// The ring cannot be accessed, or the driver broke a rule.
    pub fn enable_notifications(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let Some(ring) = self.ring else { return Ok(false) };
        if !std::mem::take(&mut self.silent) {
            return Ok(false);
        }
        let mut unnoticed = std::mem::take(&mut self.unnoticed);
        if self.has(feature::RING_EVENT_IDX) {
            ring.set_avail_event(memory, self.state.next_avail.wrapping_add(unnoticed))?;
        } else {
            unnoticed = 0;
            ring.set_notify(memory, true)?;
        }
        // As for interrupts: our wish must be visible before we look once more.
        fence(Ordering::SeqCst);
        let starved = std::mem::take(&mut self.starved);
        let waiting = self.is_waiting(memory)?;
        Ok(waiting && starved && self.seen_avail.wrapping_sub(self.state.next_avail) > unnoticed)
    }

    /// Makes the next [`Queue::enable_notifications`] ask for a notification when `chains` more are there
    /// (at least one, at most as many as the queue holds), not at the first. A driver without the event
    /// index notifies at the first all the same.
    pub fn notify_after(&mut self, chains: u16) {
        self.unnoticed = chains.clamp(1, self.size().max(1)) - 1;
    }

    /// Follows the chain from `head`; every descriptor is read once and checked after.
    fn walk(&self, ring: Ring, memory: &GuestMemory, head: u16) -> Result<Chain, QueueError> {
        let mut chain = Chain::new(head);
        let (mut index, mut total) = (head, 0u32);
        let mut table = Table { at: None, entries: u32::from(ring.size()) };
        let mut left = table.entries;
        loop {
            if u32::from(index) >= table.entries {
                return Err(QueueError::Index { head, index, size: table.entries });
            }
            if left == 0 {
                return Err(QueueError::Loop { head, limit: table.entries });
            }
            left -= 1;
            let d = match table.at {
                Some(at) => ring::descriptor(memory, RingPart::Indirect, at, index)?,
                None => ring.descriptor(memory, index)?,
            };
            if d.flags & DESC_INDIRECT != 0 {
                table = self.indirect(ring, memory, head, &table, d)?;
                (index, left) = (0, table.entries);
                continue;
            }
            if d.len > 0 {
                total = total.checked_add(d.len).ok_or(QueueError::Length { head })?;
                let at = if ring::in_memory(memory, d.at, u64::from(d.len)) {
                    d.at
                } else {
                    self.lend(&mut chain, d)?
                };
                if !chain.push(at, d.len, d.flags & DESC_WRITE != 0) {
                    return Err(QueueError::Order { head });
                }
            }
            if d.flags & DESC_NEXT == 0 {
                return Ok(chain);
            }
            index = d.next;
        }
    }

    /// The address of what is used in place of a buffer that is not in memory.
    fn lend(&self, chain: &mut Chain, d: Descriptor) -> Result<u64, QueueError> {
        let head = chain.head;
        let nowhere = QueueError::Buffer { head, at: d.at, len: d.len };
        let Some(bounce) = &self.bounce else { return Err(nowhere) };
        match bounce.lend(d.at, d.len, d.flags & DESC_WRITE != 0) {
            Ok(loan) => {
                let at = loan.address();
                chain.borrow(loan);
                Ok(at)
            }
            Err(Refusal::NoWindow) => Err(nowhere),
            Err(Refusal::NoRoom) => Err(QueueError::Windows { head, max: Bounce::SIZE }),
        }
    }

    /// Checks the descriptor of an indirect table (section 2.7.5.3). Its write flag means nothing.
    fn indirect(
        &self,
        ring: Ring,
        memory: &GuestMemory,
        head: u16,
        outer: &Table,
        d: Descriptor,
    ) -> Result<Table, QueueError> {
        if !self.has(feature::RING_INDIRECT_DESC) {
            return Err(QueueError::IndirectRefused { head });
        }
        if outer.at.is_some() || d.flags & DESC_NEXT != 0 {
            return Err(QueueError::IndirectNested { head });
        }
        let max = u32::from(ring.size().max(Self::INDIRECT_LIMIT)) * DESC_SIZE;
        if d.len == 0 || !d.len.is_multiple_of(DESC_SIZE) || d.len > max {
            return Err(QueueError::IndirectLength { head, len: d.len, max });
        }
        if !ring::in_memory(memory, d.at, u64::from(d.len)) {
            let (part, at, len) = (RingPart::Indirect, d.at, u64::from(d.len));
            return Err(QueueError::OutsideMemory { part, at, len });
        }
        Ok(Table { at: Some(d.at), entries: d.len / DESC_SIZE })
    }
}

/// The table a chain runs through: an indirect one, or the queue's own.
struct Table {
    at: Option<u64>,
    entries: u32,
}

/// Whether the indices from `old` up to but without `new` include `event` (section 2.7.10).
fn crosses(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
