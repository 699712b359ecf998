//! From a `vmlinux` to the flat image that a guest starts from.

/// The loadable segments of a kernel, laid out as in guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flat {
    /// Bytes from the lowest to the highest physical address, what no segment fills being zero.
    pub image: Vec<u8>,
    /// Guest physical address of the first byte.
    pub load: u64,
    /// Guest physical address of the entry point.
    pub entry: u64,
}

/// A kernel that is larger than this is no kernel.
const LARGEST: u64 = 1 << 30;
const PT_LOAD: u32 = 1;

/// The segments of the 64-bit little-endian ELF file `file` by physical address, padded with zeros to a
/// multiple of `align` bytes.
///
/// # Errors
/// Not such a file, truncated, segments that overlap or lie nowhere sensible, or an entry outside of them.
pub fn flatten(file: &[u8], align: u64) -> Result<Flat, String> {
    if file.get(..4) != Some(b"\x7fELF") {
        return Err("not an ELF file".into());
    }
    if file.get(4..6) != Some(&[2, 1]) {
        return Err("not a 64-bit little-endian ELF file".into());
    }
    let entry = u64_at(file, 24)?;
    let mut segments = segments(file)?;
    segments.sort_by_key(|s| s.at);
    let (Some(first), Some(last)) = (segments.first(), segments.last()) else {
        return Err("no loadable segment".into());
    };
    let load = first.at;
    for pair in segments.windows(2) {
        if let [a, b] = pair
            && a.end > b.at
        {
            return Err(format!("segments at {:#x} and {:#x} overlap", a.at, b.at));
        }
    }
    let size = (last.end - load).next_multiple_of(align);
    if size > LARGEST {
        return Err(format!("segments from {load:#x} to {:#x} are more than 1 GiB", last.end));
    }
    if !segments.iter().any(|s| (s.at..s.at + s.bytes.len() as u64).contains(&entry)) {
        return Err(format!("the entry point {entry:#x} is in no segment"));
    }
    let mut image = vec![0; to_usize(size)?];
    for segment in &segments {
        let start = to_usize(segment.at - load)?;
        if let Some(to) = image.get_mut(start..start + segment.bytes.len()) {
            to.copy_from_slice(segment.bytes);
        }
    }
    Ok(Flat { image, load, entry })
}

struct Segment<'a> {
    at: u64,
    end: u64,
    bytes: &'a [u8],
}

fn segments(file: &[u8]) -> Result<Vec<Segment<'_>>, String> {
    let table = u64_at(file, 32)?;
    let entry_size = u64::from(u16_at(file, 54)?);
    let count = u64::from(u16_at(file, 56)?);
    if entry_size < 56 {
        return Err(format!("program headers of {entry_size} bytes"));
    }
    let mut segments = Vec::new();
    for i in 0..count {
        let header = table.checked_add(i * entry_size).ok_or("program headers lie outside of the file")?;
        if u32_at(file, header)? != PT_LOAD {
            continue;
        }
        let field = |offset: u64| header.checked_add(offset).map_or(Err(truncated()), |at| u64_at(file, at));
        let (offset, at, in_file, in_memory) = (field(8)?, field(24)?, field(32)?, field(40)?);
        if in_memory == 0 {
            continue;
        }
        if in_memory < in_file {
            return Err(format!("the segment at {at:#x} is larger in the file than in memory"));
        }
        let end = at
            .checked_add(in_memory)
            .filter(|end| end.checked_next_multiple_of(1 << 20).is_some())
            .ok_or_else(|| format!("the segment at {at:#x} does not end in the address space"))?;
        segments.push(Segment { at, end, bytes: slice(file, offset, in_file)? });
    }
    Ok(segments)
}

fn slice(file: &[u8], offset: u64, len: u64) -> Result<&[u8], String> {
    let end = offset.checked_add(len).ok_or_else(truncated)?;
    file.get(to_usize(offset)?..to_usize(end)?).ok_or_else(truncated)
}

fn array<const N: usize>(file: &[u8], offset: u64) -> Result<[u8; N], String> {
    slice(file, offset, N as u64)?.try_into().map_err(|_| truncated())
}

fn u16_at(file: &[u8], offset: u64) -> Result<u16, String> {
    array(file, offset).map(u16::from_le_bytes)
}

fn u32_at(file: &[u8], offset: u64) -> Result<u32, String> {
    array(file, offset).map(u32::from_le_bytes)
}

fn u64_at(file: &[u8], offset: u64) -> Result<u64, String> {
    array(file, offset).map(u64::from_le_bytes)
}

fn to_usize(n: u64) -> Result<usize, String> {
    usize::try_from(n).map_err(|_| truncated())
}

fn truncated() -> String {
    "the file is truncated".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with program headers (type, address, bytes, size in memory).
    fn elf(entry: u64, segments: &[(u32, u64, &[u8], u64)]) -> Vec<u8> {
        let mut file = vec![0; 64 + 56 * segments.len()];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[24..32].copy_from_slice(&entry.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&(segments.len() as u16).to_le_bytes());
        for (i, (kind, at, bytes, size)) in segments.iter().enumerate() {
            let h = 64 + 56 * i;
            file[h..h + 4].copy_from_slice(&kind.to_le_bytes());
            let offset = file.len() as u64;
            for (field, value) in [(8, offset), (24, *at), (32, bytes.len() as u64), (40, *size)] {
                file[h + field..h + field + 8].copy_from_slice(&value.to_le_bytes());
            }
            file.extend_from_slice(bytes);
        }
        file
    }

    #[test]
    fn segments_land_at_their_physical_addresses() {
        // Out of order, with a gap, a bss and a note that is not loaded.
        let file = elf(
            0x1001,
            &[(1, 0x1010, b"data", 8), (1, 0x1000, b"code", 4), (4, 0x9000, b"note", 4), (1, 0x7000, b"", 0)],
        );
        let flat = flatten(&file, 32).unwrap();
        assert_eq!((flat.load, flat.entry, flat.image.len()), (0x1000, 0x1001, 32));
        assert_eq!(&flat.image[..4], b"code");
        assert_eq!(&flat.image[16..20], b"data");
        assert!(flat.image[4..16].iter().chain(&flat.image[20..]).all(|b| *b == 0));
    }

    #[test]
    fn what_is_not_a_kernel_is_refused() {
        let good: (u32, u64, &[u8], u64) = (1, 0x1000, b"code", 4);
        let refused = |file: &[u8]| flatten(file, 4096).unwrap_err();
        assert_eq!(refused(b"MZ"), "not an ELF file");
        let mut wrong_class = elf(0x1000, &[good]);
        wrong_class[4] = 1;
        assert_eq!(refused(&wrong_class), "not a 64-bit little-endian ELF file");
        assert_eq!(refused(&elf(0x1000, &[])), "no loadable segment");
        assert!(refused(&elf(0x1000, &[good, (1, 0x1003, b"x", 1)])).contains("overlap"));
        assert!(refused(&elf(0x2000, &[good])).contains("entry point"));
        assert!(refused(&elf(0x1000, &[(1, 0x1000, b"code", 3)])).contains("larger in the file"));
        assert!(refused(&elf(0x1000, &[good, (1, 1 << 40, b"x", 1)])).contains("1 GiB"));
        assert!(refused(&elf(0x1000, &[good, (1, u64::MAX - 1, b"", 8)])).contains("address space"));
        assert!(refused(&elf(0x1000, &[good, (1, u64::MAX - 9, b"", 8)])).contains("address space"));
    }

    #[test]
    fn every_truncation_is_refused() {
        let file = elf(0x1000, &[(1, 0x1000, b"code", 4), (1, 0x2000, b"data", 4)]);
        assert!(flatten(&file, 4096).is_ok());
        for len in 0..file.len() {
            assert!(flatten(&file[..len], 4096).is_err(), "{len}");
        }
    }

    #[test]
    fn wild_headers_are_errors() {
        let good = elf(0x1000, &[(1, 0x1000, b"code", 4)]);
        for at in (24..120).step_by(2) {
            for value in [u64::MAX, 1 << 63, 0] {
                let mut file = good.clone();
                let end = (at + 8).min(file.len());
                file[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
                // No panic and no huge allocation, whatever comes out.
                let _ = flatten(&file, 4096);
            }
        }
    }
}
