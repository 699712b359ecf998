//! ELF kernels (System V ABI, chapter 4; `xen/include/public/elfnote.h` for the PVH entry).

use super::{CMDLINE_LIMIT, Image, KernelError, sorted};
use crate::boot::data::{Data, Segment};

const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
/// A kernel has about five.
const MAX_PROGRAM_HEADERS: u16 = 64;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_X86_64: u16 = 62;
/// Notes longer than this are not looked at.
const MAX_NOTES: u64 = 64 << 10;
/// `XEN_ELFNOTE_PHYS32_ENTRY`
const NOTE_PVH: u32 = 18;

pub fn has_magic(data: &Data) -> bool {
    data.array(0) == Some(*b"\x7fELF")
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from(u16_at(b, at)) | u32::from(u16_at(b, at + 2)) << 16
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

fn within(data: &Data, what: &'static str, at: u64, len: u64) -> Result<(), KernelError> {
    let have = data.len();
    let need = at.saturating_add(len);
    if need > have { Err(KernelError::Truncated { what, need, have }) } else { Ok(()) }
}

/// Takes an ELF kernel apart.
pub fn parse(data: &Data) -> Result<Image, KernelError> {
    if !has_magic(data) {
        return Err(KernelError::NotElf);
    }
    within(data, "the ELF header", 0, HEADER)?;
    let mut header = [0u8; HEADER as usize];
    data.read_at(0, &mut header)?;
    if header[4] != 2 || header[5] != 1 {
        return Err(KernelError::Elf("it is not 64-bit little-endian"));
    }
    if u16_at(&header, 18) != EM_X86_64 {
        return Err(KernelError::Elf("it is for another processor"));
    }
    if u16_at(&header, 16) != 2 {
        return Err(KernelError::Elf("it is not an executable (a library or an object file?)"));
    }
    let (entry64, table) = (u64_at(&header, 24), u64_at(&header, 32));
    let (entry_size, count) = (u16_at(&header, 54), u16_at(&header, 56));
    if u64::from(entry_size) != PROGRAM_HEADER || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(KernelError::Elf("the number or size of its program headers makes no sense"));
    }
    let table_len = u64::from(count) * PROGRAM_HEADER;
    within(data, "the table of program headers", table, table_len)?;
    let mut headers = vec![0u8; table_len as usize];
    data.read_at(table, &mut headers)?;

    let (mut segments, mut pvh) = (Vec::new(), None);
    for header in headers.chunks_exact(PROGRAM_HEADER as usize) {
        match u32_at(header, 0) {
            PT_LOAD => segments.extend(segment(data, header)?),
            PT_NOTE if pvh.is_none() => pvh = pvh_entry(data, header)?,
            _ => {}
        }
    }
    let segments = sorted(segments)?;
    let inside = |entry: u64| segments.iter().any(|s| s.at <= entry && entry - s.at < s.len);
    if segments.is_empty() {
        return Err(KernelError::Elf("it has nothing to load"));
    }
    if !inside(entry64) || pvh.is_some_and(|e| !inside(e.into())) {
        return Err(KernelError::Elf("its entry point lies outside of what it loads"));
    }
    Ok(Image {
        segments,
        entry64,
        pvh,
        cmdline_limit: CMDLINE_LIMIT,
        setup_header: None,
        initrd_max: u32::MAX.into(),
    })
}

/// The part of the guest's memory that one `PT_LOAD` header fills.
fn segment(data: &Data, header: &[u8]) -> Result<Option<Segment>, KernelError> {
    let (offset, at) = (u64_at(header, 8), u64_at(header, 24));
    let (len, room) = (u64_at(header, 32), u64_at(header, 40));
    if room == 0 {
        return Ok(None);
    }
    if len > room {
        return Err(KernelError::Elf("a segment is larger in the file than in memory"));
    }
    within(data, "a segment", offset, len)?;
    let segment = Segment { at, data: data.clone(), offset, len, room };
    match segment.end() {
        Some(_) => Ok(Some(segment)),
        None => Err(KernelError::Elf("a segment ends past the address space")),
    }
}

/// The 32-bit entry point among the notes of one `PT_NOTE` header.
fn pvh_entry(data: &Data, header: &[u8]) -> Result<Option<u32>, KernelError> {
    let (offset, len) = (u64_at(header, 8), u64_at(header, 32));
    within(data, "its notes", offset, len)?;
    if len > MAX_NOTES {
        return Ok(None);
    }
    let mut notes = vec![0u8; len as usize];
    data.read_at(offset, &mut notes)?;
    let mut rest = notes.as_slice();
    while rest.len() >= 12 {
        let (name_len, desc_len, kind) = (u32_at(rest, 0), u32_at(rest, 4), u32_at(rest, 8));
        let pad = |n: u32| (n as usize).next_multiple_of(4);
        let Some((name, after)) = rest[12..].split_at_checked(pad(name_len)) else { break };
        // The last note may go without its padding.
        let Some(desc) = after.get(..desc_len as usize) else { break };
        if kind == NOTE_PVH && name.get(..name_len as usize) == Some(b"Xen\0") {
            return match desc.len() {
                4 => Ok(Some(u32_at(desc, 0))),
                8 => Ok(u32::try_from(u64_at(desc, 0)).ok()),
                _ => Ok(None),
            };
        }
        rest = after.get(pad(desc_len)..).unwrap_or_default();
    }
    Ok(None)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A kernel of one page at 16 MiB whose PVH entry is 0x100_0010.
    pub fn small_elf() -> Vec<u8> {
        let mut e = vec![0u8; 0x1100];
        e[..6].copy_from_slice(b"\x7fELF\x02\x01");
        e[16..20].copy_from_slice(&[2, 0, 62, 0]);
        e[24..32].copy_from_slice(&0x100_0000u64.to_le_bytes());
        e[32..40].copy_from_slice(&64u64.to_le_bytes());
        e[54..58].copy_from_slice(&[56, 0, 2, 0]);
        let mut put = |n: usize, kind: u32, fields: [u64; 5]| {
            let at = 64 + n * 56;
            e[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            for (field, place) in fields.iter().zip([8, 16, 24, 32, 40]) {
                e[at + place..at + place + 8].copy_from_slice(&field.to_le_bytes());
            }
        };
        put(0, PT_LOAD, [0x100, 0xffff_ffff_8100_0000, 0x100_0000, 0x1000, 0x3000]);
        put(1, PT_NOTE, [0x200, 0, 0, 20, 20]);
        e[0x200..0x20c].copy_from_slice(&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        e[0x20c..0x210].copy_from_slice(b"Xen\0");
        e[0x210..0x214].copy_from_slice(&0x100_0010u32.to_le_bytes());
        e
    }

    #[test]
    fn segments_and_entries_are_found() {
        let image = parse(&small_elf().into()).unwrap();
        assert_eq!((image.entry64, image.pvh), (0x100_0000, Some(0x100_0010)));
        let s = &image.segments[0];
        assert_eq!((s.at, s.offset, s.len, s.room), (0x100_0000, 0x100, 0x1000, 0x3000));
    }

    #[test]
    fn a_kernel_without_notes_has_no_pvh_entry() {
        let mut e = small_elf();
        e[0x208] = 17;
        assert_eq!(parse(&e.into()).unwrap().pvh, None);
    }

    #[test]
    fn damage_is_named() {
        let fails = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut e = small_elf();
            change(&mut e);
            parse(&e.into()).unwrap_err().to_string()
        };
        assert!(fails(&|e| e.truncate(0x300)).contains("a segment ends at byte 4352, the file at 768"));
        assert!(fails(&|e| e.truncate(30)).contains("the ELF header"));
        assert!(fails(&|e| e.truncate(100)).contains("table of program headers"));
        assert!(fails(&|e| e[4] = 1).contains("not 64-bit"));
        assert!(fails(&|e| e[18] = 183).contains("another processor"));
        assert!(fails(&|e| e[16] = 3).contains("not an executable"));
        assert!(fails(&|e| e[27] = 0xff).contains("entry point"));
        assert!(fails(&|e| e[64] = 2).contains("nothing to load"));
        assert!(fails(&|e| (e[64 + 31], e[64 + 47]) = (0xff, 0xff)).contains("past the address space"));
        assert!(fails(&|e| e[56] = 0).contains("makes no sense"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(at in 0usize..0x220, junk in prop::collection::vec(any::<u8>(), 1..16), cut in 0usize..0x1200) {
            let mut e = small_elf();
            for (n, b) in junk.iter().enumerate() {
                e[at + n] = *b;
            }
            e.truncate(cut);
            if let Ok(image) = parse(&e.into()) {
                for s in &image.segments {
                    prop_assert!(s.offset + s.len <= s.data.len() && s.len <= s.room);
                    prop_assert!(s.end().is_some());
                }
            }
        }
    }
}
