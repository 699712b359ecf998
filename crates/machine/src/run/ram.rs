//! Guest memory: from a plan to mappings with the kernel in them.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use krun_memory::{Bytes, GuestAddress, GuestMemory, Mapping, Memfd, assemble};

use crate::Error;
use crate::board::RamRange;
use crate::boot::BootImage;
use crate::boot::data::{Data, Segment};
use crate::sys::memory::{advise, huge_pages};

const PAGE: u64 = 4096;

/// Guest memory with everything in it that the first instruction expects.
#[derive(Debug)]
pub struct Ram {
    /// All of it.
    pub memory: GuestMemory,
    /// The mappings it consists of, by address.
    pub mappings: Vec<(GuestAddress, Mapping)>,
    /// Address and length of those that come from a file. The guest will touch most of their pages.
    pub files: Vec<(GuestAddress, u64)>,
}

/// The part of a segment that can be mapped from its file as it is.
fn mappable(s: &Segment) -> Option<(&File, RamRange)> {
    let Data::File(file, _) = &s.data else { return None };
    let size = s.len & !(PAGE - 1);
    let aligned = (s.at | s.offset).is_multiple_of(PAGE) && size > 0;
    aligned.then_some((&**file, RamRange { at: s.at, size, offset: s.offset }))
}

/// What is left of `ram` without the `holes`, which are sorted and do not overlap.
fn without(ram: &[RamRange], holes: &[RamRange]) -> Vec<RamRange> {
    let mut pieces = Vec::new();
    for range in ram {
        let mut at = range.at;
        let mut push = |from: u64, to: u64| {
            if from < to {
                pieces.push(RamRange { at: from, size: to - from, offset: range.offset + (from - range.at) });
            }
        };
        for hole in holes.iter().filter(|h| h.at >= range.at && h.end() <= range.end()) {
            push(at, hole.at);
            at = hole.end();
        }
        push(at, range.end());
    }
    pieces
}

/// Where RAM comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// RAM is a file in memory that other processes can map. Most hosts give no large pages to those.
    pub shared: bool,
    /// Ask for pages of 2 MiB.
    pub huge: bool,
    /// RAM is in huge pages that the administrator has set aside, in a memory file.
    pub reserved: bool,
}

impl Plan {
    /// The best for this host.
    pub fn choose(shared: bool, reserved: bool) -> Self {
        Self { shared, huge: reserved || huge_pages(shared), reserved }
    }

    /// Whether whole pages of the kernel's file are mapped copy-on-write: machines share what they do not
    /// change, and nothing is copied or cleared. Not in memory that other processes map, which has to be
    /// whole, nor in huge pages.
    fn maps_files(self) -> bool {
        !self.shared && !self.reserved
    }
}

impl Ram {
    /// Creates memory for `ram` and fills it with `boot`.
    ///
    /// # Errors
    /// The host's refusal.
    pub fn new(ram: &[RamRange], boot: &BootImage, plan: Plan) -> Result<Self, Error> {
        let mut mapped = Vec::new();
        let mut mappings = Vec::new();
        for (file, range) in boot.segments.iter().filter(|_| plan.maps_files()).filter_map(mappable) {
            let file = file.try_clone().map_err(load_error(range.at, range.size))?;
            let mapping = Mapping::copy_on_write(file, range.offset, range.size as usize)?;
            mappings.push((GuestAddress(range.at), mapping));
            mapped.push(range);
        }
        mapped.sort_by_key(|r| r.at);
        let size = ram.iter().map(|r| r.size).sum();
        let memfd = match (plan.reserved, plan.shared) {
            (true, _) => Some(Memfd::of_huge_pages(size)?),
            (false, true) => Some(Memfd::new(size)?),
            (false, false) => None,
        };
        for piece in without(ram, &mapped) {
            let mapping = aligned(
                piece.at,
                |size| match &memfd {
                    Some(file) => file.map(piece.offset, size),
                    None => Mapping::anonymous(size),
                },
                piece.size as usize,
            )?;
            mappings.push((GuestAddress(piece.at), mapping));
        }
        mappings.sort_by_key(|(at, _)| at.0);
        for (_, mapping) in &mappings {
            advise(mapping, plan.huge && !plan.reserved);
        }
        let memory = assemble(&mappings)?;
        for s in &boot.segments {
            let done = mappable(s).filter(|_| plan.maps_files()).map_or(0, |(_, range)| range.size);
            copy(&memory, s, done).map_err(load_error(s.at, s.len))?;
        }
        for (at, bytes) in &boot.writes {
            let written = memory.write_slice(bytes, GuestAddress(*at)).map_err(io::Error::other);
            written.map_err(load_error(*at, bytes.len() as u64))?;
        }
        let files = mapped.iter().map(|r| (GuestAddress(r.at), r.size)).collect();
        Ok(Self { memory, mappings, files })
    }
}

/// A mapping whose address equals `at` modulo 2 MiB, as the host needs it for large pages, if that can be
/// had: hosts hand out addresses downwards, so that something as large as the excess moves the next one.
fn aligned(
    at: u64,
    map: impl Fn(usize) -> Result<Mapping, krun_memory::Error>,
    size: usize,
) -> Result<Mapping, krun_memory::Error> {
    const HUGE: u64 = 2 << 20;
    let excess = |m: &Mapping| (m.as_ptr() as u64).wrapping_sub(at) % HUGE;
    let first = map(size)?;
    let gap = excess(&first);
    if gap == 0 || size < HUGE as usize {
        return Ok(first);
    }
    drop(first);
    let filler = Mapping::anonymous(gap as usize)?;
    let second = map(size);
    drop(filler);
    second
}

fn load_error(at: u64, len: u64) -> impl Fn(io::Error) -> Error {
    move |source| Error::Load { at, len, source: io::Error::new(source.kind(), source.to_string()) }
}

/// Copies a segment but for its first `skip` bytes.
fn copy(memory: &GuestMemory, s: &Segment, skip: u64) -> io::Result<()> {
    let (at, offset, len) = (GuestAddress(s.at + skip), s.offset + skip, s.len - skip);
    if len == 0 {
        return Ok(());
    }
    match &s.data {
        Data::File(file, _) => {
            let mut file = file.try_clone()?;
            file.seek(SeekFrom::Start(offset))?;
            memory.read_exact_volatile_from(at, &mut file, len as usize).map_err(io::Error::other)
        }
        data => {
            let bytes = data.bytes().get(offset as usize..(offset + len) as usize);
            memory.write_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?, at).map_err(io::Error::other)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use krun_hv::BootState;
    use proptest::prelude::*;
    use std::io::Write;

    const PRIVATE: Plan = Plan { shared: false, huge: false, reserved: false };

    fn boot(segments: Vec<Segment>) -> BootImage {
        let state = BootState::Application;
        BootImage { segments, writes: vec![(0x1000, vec![9, 8, 7])], state, cmdline: String::new() }
    }

    fn file(bytes: &[u8]) -> Data {
        let mut f = tempfile::tempfile().unwrap();
        f.write_all(bytes).unwrap();
        Data::File(f.into(), bytes.len() as u64)
    }

    #[test]
    fn mapped_and_copied_memory_look_the_same_and_leave_the_file_alone() {
        let bytes: Vec<u8> = (0..3 * 4096 + 100u32).map(|n| (n / 7) as u8).collect();
        let ram = [RamRange { at: 0, size: 1 << 20, offset: 0 }];
        let cases = [
            (file(&bytes), false, 4096, 3),
            (file(&bytes), true, 4096, 1),
            (file(&bytes), false, 100, 1),
            (bytes.clone().into(), false, 4096, 1),
        ];
        for (data, shared, offset, pieces) in cases {
            let plan = Plan { shared, huge: true, reserved: false };
            let len = bytes.len() as u64 - offset;
            let s = Segment { at: 0x8_0000, data: data.clone(), offset, len, room: len };
            let ram = Ram::new(&ram, &boot(vec![s]), plan).unwrap();
            assert_eq!(ram.mappings.len(), pieces);
            let mut got = vec![0; len as usize + 10];
            ram.memory.read_slice(&mut got, GuestAddress(0x8_0000)).unwrap();
            assert_eq!(got[..len as usize], bytes[offset as usize..]);
            assert_eq!(got[len as usize..], [0; 10]);
            ram.memory.write_obj(0xffu8, GuestAddress(0x8_0001)).unwrap();
            assert_eq!(data.array::<1>(offset + 1), Some([bytes[offset as usize + 1]]));
            let small: [u8; 3] = ram.memory.read_obj(GuestAddress(0x1000)).unwrap();
            assert_eq!(small, [9, 8, 7]);
        }
    }

    #[test]
    fn private_memory_is_aligned_for_large_pages() {
        // An odd page below which the next mapping would land.
        let _odd = Mapping::anonymous(4096 * 3).unwrap();
        for at in [0u64, 0x100_0000] {
            let ram = [RamRange { at, size: 64 << 20, offset: 0 }];
            let mut boot = boot(vec![]);
            boot.writes.clear();
            let ram = Ram::new(&ram, &boot, Plan { huge: true, ..PRIVATE }).unwrap();
            let excess = (ram.mappings[0].1.as_ptr() as u64).wrapping_sub(at) % (2 << 20);
            assert_eq!(excess, 0, "{at:#x}");
        }
    }

    #[test]
    fn a_file_that_shrank_is_an_error() {
        let Data::File(f, _) = file(&[1; 100]) else { panic!() };
        let s = Segment { at: 0x8_0000, data: Data::File(f, 200), offset: 0, len: 200, room: 200 };
        let ram = [RamRange { at: 0, size: 1 << 20, offset: 0 }];
        assert!(matches!(Ram::new(&ram, &boot(vec![s]), PRIVATE), Err(Error::Load { at: 0x8_0000, .. })));
    }

    proptest! {
        #[test]
        fn pieces_and_holes_cover_ram_exactly(cuts in prop::collection::btree_set(0u64..200, 0..12)) {
            let ram = [RamRange { at: 0, size: 100, offset: 0 }, RamRange { at: 120, size: 80, offset: 100 }];
            let cuts: Vec<_> = cuts.into_iter().collect();
            let holes: Vec<_> = cuts
                .chunks_exact(2)
                .map(|c| RamRange { at: c[0], size: c[1] - c[0], offset: 0 })
                .filter(|h| ram.iter().any(|r| h.at >= r.at && h.end() <= r.end()))
                .collect();
            let pieces = without(&ram, &holes);
            let covered = |list: &[RamRange], n: u64| list.iter().filter(|r| r.at <= n && n < r.end()).count();
            for n in 0..200 {
                prop_assert_eq!(covered(&ram, n), covered(&pieces, n) + covered(&holes, n));
            }
            for p in &pieces {
                let r = ram.iter().find(|r| r.at <= p.at && p.end() <= r.end()).unwrap();
                prop_assert_eq!(p.offset - r.offset, p.at - r.at);
            }
        }
    }
}
