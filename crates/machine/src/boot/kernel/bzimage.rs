//! `bzImage` files (Linux: Documentation/arch/x86/boot.rst).

use super::compressed::{Packing, unpack};
use super::{CMDLINE_LIMIT, Image, KernelError, inside};
use crate::boot::data::{Data, Segment};

/// First byte of the setup header in the file and in the zero page.
pub const HEADER_AT: usize = 0x1f1;
/// Longest setup header: up to the end of its place in the zero page.
const HEADER_MAX: usize = 0x290 - HEADER_AT;
const SECTOR: u64 = 512;
/// `XLF_KERNEL_64`: there is a 64-bit entry point.
const KERNEL_64: u16 = 1;
const OLDEST: u16 = 0x20c;
/// Where the 64-bit entry point lies within the protected-mode part.
const ENTRY_64: u64 = 0x200;

pub fn has_magic(data: &Data) -> bool {
    data.array(0x1fe) == Some([0x55, 0xaa]) && data.array(0x202) == Some(*b"HdrS")
}

/// The setup header, by offsets as in the file.
struct Header([u8; 0x290]);

impl Header {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&self.0[at..at + N]);
        out
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    /// The header alone, as it goes into a zero page. Its length is a jump's target.
    fn for_zero_page(&self) -> Vec<u8> {
        let end = (0x202 + usize::from(self.0[0x201])).clamp(0x268, 0x290);
        self.0[HEADER_AT..end.min(HEADER_AT + HEADER_MAX)].to_vec()
    }
}

/// Takes a bzImage apart. A payload that can be unpacked here is, which is several times faster than
/// having the guest do it; else the file's own decompressor runs in the guest.
pub fn parse(data: &Data) -> Result<Image, KernelError> {
    let have = data.len();
    let mut header = Header([0; 0x290]);
    data.read_at(0, &mut header.0).map_err(|_| KernelError::Truncated {
        what: "the setup header",
        need: header.0.len() as u64,
        have,
    })?;
    if header.u16(0x206) < OLDEST {
        return Err(KernelError::BzImage("boot protocol older than 2.12 (Linux 3.8)"));
    }
    if header.u16(0x236) & KERNEL_64 == 0 {
        return Err(KernelError::BzImage("it has no 64-bit entry point: a 32-bit kernel?"));
    }
    let sectors = match header.0[HEADER_AT] {
        0 => 4,
        n => u64::from(n),
    };
    let start = (sectors + 1) * SECTOR;
    // In units of 16 bytes; the last unit may be padding that a file goes without.
    let system = u64::from(header.u32(0x1f4)) * 16;
    if start + system > have.next_multiple_of(16) {
        return Err(KernelError::Truncated { what: "the kernel", need: start + system, have });
    }
    let (offset, len) = (u64::from(header.u32(0x248)), u64::from(header.u32(0x24c)));
    let payload_end = start + offset + len;
    if payload_end > have {
        return Err(KernelError::Truncated { what: "the compressed kernel", need: payload_end, have });
    }
    if len > 0 {
        let mut payload = Vec::new();
        payload
            .try_reserve_exact(len as usize)
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::OutOfMemory))?;
        payload.resize(len as usize, 0);
        data.read_at(start + offset, &mut payload)?;
        if let Some(packing) = Packing::of(&payload) {
            return inside(packing, unpack(&payload, packing)?);
        }
    }
    self_unpacking(data, &header, start)
}

/// A kernel that unpacks itself (xz, lz4, lzma and lzo payloads).
fn self_unpacking(data: &Data, header: &Header, start: u64) -> Result<Image, KernelError> {
    let len = data.len().saturating_sub(start);
    let at = header.u64(0x258);
    let room = u64::from(header.u32(0x260)).max(len);
    if len <= ENTRY_64 {
        return Err(KernelError::Truncated { what: "the kernel", need: start + ENTRY_64, have: data.len() });
    }
    let segment = Segment { at, data: data.clone(), offset: start, len, room };
    if segment.end().is_none() {
        return Err(KernelError::BzImage("its preferred address is past the address space"));
    }
    Ok(Image {
        entry64: at + ENTRY_64,
        segments: vec![segment],
        pvh: None,
        cmdline_limit: (header.u32(0x238) as usize).min(CMDLINE_LIMIT),
        setup_header: Some(header.for_zero_page()),
        initrd_max: header.u32(0x22c).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KernelFormat;
    use crate::boot::kernel::parse as parse_any;
    use crate::boot::kernel::tests::small_elf;
    use proptest::prelude::*;
    use std::io::Write;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut b = vec![0u8; 1024 + 0x400];
        b.extend_from_slice(payload);
        b.resize(b.len().next_multiple_of(16), 0);
        let system = ((b.len() - 1024) / 16) as u32;
        let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]);
        put(0x1f4, &system.to_le_bytes());
        put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
        put(0x202, b"HdrS\x0f\x02");
        put(0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(0x236, &[0x3f, 0]);
        put(0x238, &2047u32.to_le_bytes());
        put(0x248, &0x400u32.to_le_bytes());
        put(0x24c, &(payload.len() as u32).to_le_bytes());
        put(0x258, &0x100_0000u64.to_le_bytes());
        put(0x260, &0x20_0000u32.to_le_bytes());
        b
    }

    #[test]
    fn a_gzip_payload_is_unpacked_here_whatever_the_format_says() {
        let mut e = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        e.write_all(&small_elf()).unwrap();
        let file = bzimage(&e.finish().unwrap());
        for format in [KernelFormat::Raw, KernelFormat::Elf, KernelFormat::ImageZstd] {
            let image = parse_any(&file.clone().into(), format).unwrap();
            assert_eq!((image.pvh, image.setup_header.is_none()), (Some(0x100_0010), true));
        }
    }

    #[test]
    fn another_payload_is_left_to_the_kernel() {
        let image = parse(&bzimage(b"\xfd7zXZ\0 and so on").into()).unwrap();
        assert_eq!(image.entry64, 0x100_0200);
        assert_eq!(image.segments[0].offset, 1024);
        assert_eq!(image.segments[0].room, 0x20_0000);
        let header = image.setup_header.unwrap();
        assert_eq!(&header[0x202 - HEADER_AT..][..4], b"HdrS");
        assert_eq!(header.len(), 0x268 - HEADER_AT);
        assert_eq!(image.initrd_max, 0x7fff_ffff);
    }

    #[test]
    fn damage_is_named() {
        let fails = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut b = bzimage(b"\xfd7zXZ\0 and so on");
            change(&mut b);
            parse(&b.into()).unwrap_err().to_string()
        };
        assert!(fails(&|b| b.truncate(0x250)).contains("the setup header"));
        assert!(fails(&|b| b.truncate(0x500)).contains("the kernel ends at byte"));
        assert!(fails(&|b| b[0x206] = 4).contains("older than 2.12"));
        assert!(fails(&|b| b[0x236] = 0).contains("32-bit"));
        assert!(fails(&|b| b[0x24f] = 1).contains("the compressed kernel"));
        assert!(fails(&|b| b[0x258..0x260].fill(0xff)).contains("preferred address"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(at in 0x1f1usize..0x280, junk in prop::collection::vec(any::<u8>(), 1..12), cut in 0usize..0xa00) {
            let mut b = bzimage(b"\xfd7zXZ\0 and so on");
            b[at..at + junk.len()].copy_from_slice(&junk);
            b.truncate(cut);
            let _ = parse(&b.into());
        }
    }
}
