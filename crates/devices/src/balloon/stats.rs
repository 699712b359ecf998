//! Statistics as a driver sends them (virtio 1.2, section 5.5.6.4).

/// Bytes of one statistic: a tag of 16 bits and a value of 64.
const ENTRY: usize = 10;
/// Most statistics read from one buffer; the specification has 16 tags.
const LIMIT: usize = 64;
/// Most bytes of a buffer that are looked at.
pub(super) const MAX_BYTES: usize = ENTRY * LIMIT;

/// What the guest says of its memory. Amounts are in bytes, the others are counts since it started; `None`
/// is what its driver does not tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryStats {
    /// Read from swap.
    pub swap_in: Option<u64>,
    /// Written to swap.
    pub swap_out: Option<u64>,
    /// Page faults that needed input or output.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Not used for anything.
    pub free: Option<u64>,
    /// All that the kernel manages.
    pub total: Option<u64>,
    /// Available to programs without swapping (an estimate).
    pub available: Option<u64>,
    /// File contents that can be dropped.
    pub caches: Option<u64>,
    /// Programs killed for want of memory.
    pub oom_kills: Option<u64>,
}

impl MemoryStats {
    /// Parses a buffer; tags that are not known here, and what is left of a broken entry, are passed over.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut stats = Self::default();
        for entry in bytes.chunks_exact(ENTRY).take(LIMIT) {
            let tag = u16::from_le_bytes([entry[0], entry[1]]);
            let mut value = [0; 8];
            value.copy_from_slice(&entry[2..]);
            let field = match tag {
                0 => &mut stats.swap_in,
                1 => &mut stats.swap_out,
                2 => &mut stats.major_faults,
                3 => &mut stats.minor_faults,
                4 => &mut stats.free,
                5 => &mut stats.total,
                6 => &mut stats.available,
                7 => &mut stats.caches,
                10 => &mut stats.oom_kills,
                _ => continue,
            };
            *field = Some(u64::from_le_bytes(value));
        }
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tags_find_their_fields() {
        let mut bytes = Vec::new();
        for (tag, value) in [(4u16, 1000u64), (5, 2000), (99, 1), (4, 1001), (10, u64::MAX)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([5, 0, 1]);
        let wanted = MemoryStats {
            free: Some(1001),
            total: Some(2000),
            oom_kills: Some(u64::MAX),
            ..MemoryStats::default()
        };
        assert_eq!(MemoryStats::parse(&bytes), wanted);
    }

    proptest! {
        #[test]
        fn any_bytes_will_do(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = MemoryStats::parse(&bytes);
        }
    }
}
