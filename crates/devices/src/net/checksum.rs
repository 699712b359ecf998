//! The Internet checksum (RFC 1071).

/// The sum of `data` as 16-bit words in network order, folded to 16 bits; an odd byte counts as a high one.
pub fn sum(data: &[u8]) -> u16 {
    // The sum does not depend on the order of bytes but for a swap at the end, and words of 32 bits sum up
    // as pairs of 16 bits. 64 bits have room for the carries of any frame.
    let (words, rest) = data.as_chunks::<4>();
    let mut total: u64 = words.iter().map(|w| u64::from(u32::from_ne_bytes(*w))).sum();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_ne_bytes(last));
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::from_be((total & 0xffff) as u16)
}

/// Fills the field at `start + offset` with the checksum of all from `start` on, the field holding the sum of
/// what else it covers (a pseudo header); false when it does not lie in the frame.
pub fn fill(frame: &mut [u8], start: usize, offset: usize) -> bool {
    let at = start + offset;
    if frame.len() < at + 2 {
        return false;
    }
    // Zero would say that there is no checksum; as ones' complement numbers both are the same.
    let value = match !sum(&frame[start..]) {
        0 => 0xffff,
        value => value,
    };
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As RFC 1071 puts it.
    fn plain(data: &[u8]) -> u16 {
        let mut total = 0u32;
        for pair in data.chunks(2) {
            total += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            total = (total & 0xffff) + (total >> 16);
        }
        total as u16
    }

    proptest! {
        #[test]
        fn sums_are_right(data in prop::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert_eq!(sum(&data), plain(&data));
        }

        #[test]
        fn filled_sums_are_all_ones(mut data in prop::collection::vec(any::<u8>(), 2..300), start: usize, offset: usize) {
            let start = start % data.len();
            let offset = offset % data.len();
            let fits = start + offset + 2 <= data.len();
            prop_assert_eq!(fill(&mut data, start, offset), fits);
            // An odd offset puts the field across two words, which no protocol does.
            if fits && offset % 2 == 0 {
                data[start + offset] = 0;
                data[start + offset + 1] = 0;
                prop_assert!(fill(&mut data, start, offset));
                prop_assert_eq!(plain(&data[start..]), 0xffff);
            }
        }
    }

    #[test]
    fn a_long_frame_of_ones() {
        assert_eq!(sum(&[0xff; 70_000]), 0xffff);
    }
}
