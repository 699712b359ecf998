//! What the kernel is told: the zero page of the Linux boot protocol
//! (Documentation/arch/x86/{boot,zero-page}.rst) or the start info of PVH (xen/include/public/arch-x86/hvm/start_info.h).

use super::layout;
use crate::board::RamRange;

/// What both protocols say.
#[derive(Debug)]
pub struct Params<'a> {
    /// RAM, by address.
    pub ram: &'a [RamRange],
    /// Length of the command line at [`layout::CMDLINE`], without its NUL.
    pub cmdline_len: usize,
    /// Address and length of the initramfs.
    pub initramfs: Option<(u64, u64)>,
    /// The setup header of a kernel that unpacks itself.
    pub setup_header: Option<&'a [u8]>,
}

/// Kind of a memory range, for both protocols (and the BIOS call they are named after, E820).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// For the kernel to use.
    Ram = 1,
    /// To be left alone.
    Reserved = 2,
}

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820 {
    /// First address.
    pub at: u64,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: Kind,
}

/// The memory map, by address.
pub fn e820(ram: &[RamRange]) -> Vec<E820> {
    let (hole, hole_end) = layout::LEGACY_HOLE;
    let entry = |at, end: u64, kind| E820 { at, size: end.saturating_sub(at), kind };
    let mut map = vec![
        entry(0, layout::BASE_MEMORY_END, Kind::Ram),
        entry(layout::BASE_MEMORY_END, hole, Kind::Reserved),
    ];
    for range in ram {
        map.push(entry(range.at.max(hole_end), range.end(), Kind::Ram));
    }
    map.retain(|e| e.size > 0);
    map
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The zero page.
pub fn zero_page(p: &Params<'_>) -> Vec<u8> {
    const HEADER: usize = 0x1f1;
    const ENTRIES: usize = 0x1e8;
    const TABLE: usize = 0x2d0;
    let mut page = vec![0u8; 4096];
    if let Some(header) = p.setup_header {
        put(&mut page, HEADER, header);
    } else {
        put(&mut page, 0x1fe, &0xaa55u16.to_le_bytes());
        put(&mut page, 0x202, b"HdrS");
        put(&mut page, 0x206, &0x020fu16.to_le_bytes());
        put(&mut page, 0x230, &0x0100_0000u32.to_le_bytes());
    }
    // A boot loader without a number of its own.
    page[0x210] = 0xff;
    // LOADED_HIGH
    page[0x211] |= 1;
    if let Some((at, len)) = p.initramfs {
        put(&mut page, 0x218, &(at as u32).to_le_bytes());
        put(&mut page, 0x21c, &(len as u32).to_le_bytes());
        put(&mut page, 0xc0, &((at >> 32) as u32).to_le_bytes());
        put(&mut page, 0xc4, &((len >> 32) as u32).to_le_bytes());
    }
    put(&mut page, 0x228, &(layout::CMDLINE as u32).to_le_bytes());
    put(&mut page, 0x238, &(p.cmdline_len as u32).to_le_bytes());
    put(&mut page, 0x250, &layout::SEED.to_le_bytes());
    let map = e820(p.ram);
    page[ENTRIES] = map.len() as u8;
    for (e, entry) in map.iter().zip(page[TABLE..].chunks_exact_mut(20)) {
        put(entry, 0, &e.at.to_le_bytes());
        put(entry, 8, &e.size.to_le_bytes());
        put(entry, 16, &(e.kind as u32).to_le_bytes());
    }
    page
}

/// A `setup_data` entry with randomness (type 9).
pub fn seed_entry(seed: &[u8; 32]) -> Vec<u8> {
    let mut entry = vec![0u8; 16];
    put(&mut entry, 8, &9u32.to_le_bytes());
    put(&mut entry, 12, &(seed.len() as u32).to_le_bytes());
    entry.extend_from_slice(seed);
    entry
}

/// The start info with module list and memory map behind it, for [`layout::PARAMS`].
pub fn pvh_start_info(p: &Params<'_>) -> Vec<u8> {
    const MODULES: usize = 0x40;
    const MAP: usize = 0x80;
    let map = e820(p.ram);
    let mut page = vec![0u8; MAP + 24 * map.len()];
    put(&mut page, 0, &0x336e_c578u32.to_le_bytes());
    put(&mut page, 4, &1u32.to_le_bytes());
    put(&mut page, 24, &layout::CMDLINE.to_le_bytes());
    if let Some((at, len)) = p.initramfs {
        put(&mut page, 12, &1u32.to_le_bytes());
        put(&mut page, 16, &(layout::PARAMS + MODULES as u64).to_le_bytes());
        put(&mut page, MODULES, &at.to_le_bytes());
        put(&mut page, MODULES + 8, &len.to_le_bytes());
    }
    put(&mut page, 40, &(layout::PARAMS + MAP as u64).to_le_bytes());
    put(&mut page, 48, &(map.len() as u32).to_le_bytes());
    for (e, entry) in map.iter().zip(page[MAP..].chunks_exact_mut(24)) {
        put(entry, 0, &e.at.to_le_bytes());
        put(entry, 8, &e.size.to_le_bytes());
        put(entry, 16, &(e.kind as u32).to_le_bytes());
    }
    page
}

/// Page tables that map the first `gib` GiB (1 to 4) onto themselves in pages of 2 MiB, for
/// [`layout::PAGE_TABLES`]. The bits: present, writable; large page (Intel SDM vol. 3, 4.5).
pub fn identity_map(gib: u64) -> Vec<u8> {
    const TABLE: u64 = 0xfff + 1;
    const LINK: u64 = 0b11;
    const LARGE: u64 = 0b1000_0011;
    let gib = gib.clamp(1, 4);
    let mut words = vec![0u64; (2 + gib as usize) * 512];
    words[0] = (layout::PAGE_TABLES + TABLE) | LINK;
    for n in 0..gib {
        words[512 + n as usize] = (layout::PAGE_TABLES + (2 + n) * TABLE) | LINK;
    }
    for (n, word) in words[1024..].iter_mut().enumerate() {
        *word = (n as u64) << 21 | LARGE;
    }
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: [RamRange; 2] = [
        RamRange { at: 0, size: 3 << 30, offset: 0 },
        RamRange { at: 4 << 30, size: 1 << 30, offset: 3 << 30 },
    ];

    fn u64_at(b: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(b[at..at + 8].try_into().unwrap())
    }

    fn u32_at(b: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(b[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_memory_map_leaves_out_the_holes() {
        let ram: Vec<_> = e820(&RAM).iter().filter(|e| e.kind == Kind::Ram).map(|e| (e.at, e.size)).collect();
        assert_eq!(ram, [(0, 0x9fc00), (1 << 20, (3 << 30) - (1 << 20)), (4 << 30, 1 << 30)]);
    }

    #[test]
    fn the_zero_page_says_all() {
        let p =
            Params { ram: &RAM, cmdline_len: 10, initramfs: Some((0xbf00_0000, 5000)), setup_header: None };
        let page = zero_page(&p);
        assert_eq!(page.len(), 4096);
        assert_eq!((&page[0x1fe..0x200], &page[0x202..0x206]), (&[0x55, 0xaa][..], &b"HdrS"[..]));
        assert_eq!((u32_at(&page, 0x218), u32_at(&page, 0x21c)), (0xbf00_0000, 5000));
        assert_eq!((u32_at(&page, 0x228), u64_at(&page, 0x250)), (0x1000, 0x1c00));
        assert_eq!(page[0x1e8], 4);
        assert_eq!((u64_at(&page, 0x2d0 + 60), u64_at(&page, 0x2d0 + 68)), (4 << 30, 1 << 30));
        // "sentinel": anything else there makes the kernel wipe what it does not know.
        assert_eq!(page[0x1ef], 0);
    }

    #[test]
    fn a_kernel_s_own_setup_header_is_kept() {
        let header: Vec<u8> = (0..0x77).map(|n| n as u8 | 0x80).collect();
        let p = Params { ram: &RAM, cmdline_len: 0, initramfs: None, setup_header: Some(&header) };
        let page = zero_page(&p);
        assert_eq!(page[0x1f1..0x1fe], header[..13]);
        assert_eq!(page[0x210], 0xff);
        assert_eq!(u64_at(&page, 0x258), u64::from_le_bytes(header[0x67..0x6f].try_into().unwrap()));
    }

    #[test]
    fn the_start_info_points_into_itself() {
        let p =
            Params { ram: &RAM, cmdline_len: 0, initramfs: Some((0xbf00_0000, 5000)), setup_header: None };
        let info = pvh_start_info(&p);
        assert_eq!(u32_at(&info, 0), 0x336e_c578);
        let at = |address: u64| (address - layout::PARAMS) as usize;
        assert_eq!(u64_at(&info, at(u64_at(&info, 16))), 0xbf00_0000);
        let (map, count) = (at(u64_at(&info, 40)), u32_at(&info, 48));
        assert_eq!((count, info.len()), (4, map + 96));
        assert_eq!(u64_at(&info, map + 72), 4 << 30);
        assert!(info.len() <= 4096);
    }

    #[test]
    fn every_address_is_mapped_onto_itself() {
        for gib in [1, 4] {
            let tables = identity_map(gib);
            assert!(layout::PAGE_TABLES + tables.len() as u64 <= layout::BOOT_DATA_END);
            let entry = |at: u64| u64_at(&tables, (at - layout::PAGE_TABLES) as usize);
            for at in [0u64, 0x20_0000, (gib << 30) - 1] {
                let pointers = entry(layout::PAGE_TABLES) & !0xfff;
                let directory = entry(pointers + (at >> 30) * 8) & !0xfff;
                let page = entry(directory + (at >> 21 & 511) * 8);
                assert_eq!((page & !0x1f_ffff, page & 0x83), (at & !0x1f_ffff, 0x83));
            }
            assert_eq!(entry(layout::PAGE_TABLES + 0x1000 + gib * 8), 0);
        }
    }
}
