//! From a kernel file to segments and entry points.

pub mod bundle;
mod bzimage;
mod compressed;
mod elf;

use crate::KernelFormat;
use crate::boot::data::{Data, Segment};

pub use compressed::Packing;

/// A kernel, taken apart.
#[derive(Debug, Clone)]
pub struct Image {
    /// What belongs where; no two overlap.
    pub segments: Vec<Segment>,
    /// First instruction in 64-bit mode, with a zero page.
    pub entry64: u64,
    /// First instruction of the PVH protocol, for kernels that have one.
    pub pvh: Option<u32>,
    /// Longest command line it takes, without the final NUL.
    pub cmdline_limit: usize,
    /// For a `bzImage` that unpacks itself: its setup header, to be passed back to it.
    pub setup_header: Option<Vec<u8>>,
    /// Highest address for the last byte of an initramfs.
    pub initrd_max: u64,
}

/// Longest command line of an x86_64 Linux (`COMMAND_LINE_SIZE` less the NUL).
pub const CMDLINE_LIMIT: usize = 2047;

/// A file that is not the kernel it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The file ends too soon.
    #[error("it is truncated: {what} ends at byte {need}, the file at {have}")]
    Truncated {
        /// Which part.
        what: &'static str,
        /// Where the part ends.
        need: u64,
        /// Where the file ends.
        have: u64,
    },
    /// An ELF kernel was promised.
    #[error("it is not an ELF file")]
    NotElf,
    /// An ELF file that cannot be a kernel for this machine.
    #[error("its ELF header is not that of an x86_64 kernel: {0}")]
    Elf(&'static str),
    /// A bzImage that cannot be booted.
    #[error("its bzImage header cannot be used: {0}")]
    BzImage(&'static str),
    /// A compressed kernel was promised.
    #[error("there is no {0} data in it")]
    NotPacked(Packing),
    /// Compressed data that is damaged.
    #[error("its {packing} data is damaged: {source}")]
    Unpack {
        /// How it was compressed.
        packing: Packing,
        /// What the decoder says.
        source: std::io::Error,
    },
    /// Compressed data that grows without measure.
    #[error("its {packing} data unpacks to more than {} MiB", limit >> 20)]
    TooLarge {
        /// How it was compressed.
        packing: Packing,
        /// Most bytes allowed.
        limit: u64,
    },
    /// What was inside is no kernel.
    #[error("what its {packing} data unpacks to is no kernel: {source}")]
    Inside {
        /// How it was compressed.
        packing: Packing,
        /// Why not.
        source: Box<KernelError>,
    },
    /// A format that this architecture does not boot.
    #[error("format {0:?} is for aarch64 kernels; x86_64 boots ELF, bzImage, and these compressed")]
    Architecture(KernelFormat),
    /// No mark of any format.
    #[error("it is neither an ELF file, nor a bzImage, nor one of these compressed with gzip, bzip2 or zstd")]
    Unknown,
    /// Parts on top of each other.
    #[error("two of its segments overlap at {at:#x}")]
    Overlap {
        /// Guest physical address.
        at: u64,
    },
    /// The file cannot be read.
    #[error("it cannot be read: {0}")]
    Read(#[from] std::io::Error),
}

/// Takes a kernel file apart.
///
/// # Errors
/// What is wrong with it.
pub fn parse(data: &Data, format: KernelFormat) -> Result<Image, KernelError> {
    if elf::has_magic(data) {
        return elf::parse(data);
    }
    if bzimage::has_magic(data) {
        return bzimage::parse(data);
    }
    let packing = match format {
        KernelFormat::Elf => return Err(KernelError::NotElf),
        KernelFormat::PeGz => return Err(KernelError::Architecture(format)),
        KernelFormat::Raw => Packing::at_start(data).ok_or(KernelError::Unknown)?,
        KernelFormat::ImageBz2 => Packing::Bzip2,
        KernelFormat::ImageGz => Packing::Gzip,
        KernelFormat::ImageZstd => Packing::Zstd,
    };
    let data = data.load()?;
    let unpacked = compressed::find_and_unpack(data.bytes(), packing)?;
    inside(packing, unpacked)
}

/// The kernel within compressed data: an ELF file.
fn inside(packing: Packing, unpacked: Vec<u8>) -> Result<Image, KernelError> {
    elf::parse(&unpacked.into()).map_err(|source| KernelError::Inside { packing, source: Box::new(source) })
}

/// Sorts `segments` and refuses overlap.
fn sorted(mut segments: Vec<Segment>) -> Result<Vec<Segment>, KernelError> {
    segments.sort_by_key(|s| s.at);
    for pair in segments.windows(2) {
        if pair[0].end().is_none_or(|end| end > pair[1].at) {
            return Err(KernelError::Overlap { at: pair[1].at });
        }
    }
    Ok(segments)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;

    pub use super::elf::tests::small_elf;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut e = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        e.write_all(bytes).unwrap();
        e.finish().unwrap()
    }

    fn bzip(bytes: &[u8]) -> Vec<u8> {
        let mut e = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        e.write_all(bytes).unwrap();
        e.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    fn packed() -> [(KernelFormat, Vec<u8>); 3] {
        let elf = small_elf();
        [
            (KernelFormat::ImageGz, gzip(&elf)),
            (KernelFormat::ImageBz2, bzip(&elf)),
            (KernelFormat::ImageZstd, zstd(&elf)),
        ]
    }

    #[test]
    fn every_packing_is_found_behind_a_stub_and_at_the_start() {
        for (format, bytes) in packed() {
            let mut stub = vec![0x90; 1000];
            stub.extend_from_slice(&bytes);
            stub.extend_from_slice(b"tail");
            assert_eq!(parse(&stub.into(), format).unwrap().entry64, 0x100_0000, "{format:?}");
            assert_eq!(parse(&bytes.into(), KernelFormat::Raw).unwrap().entry64, 0x100_0000, "{format:?}");
        }
    }

    #[test]
    fn truncated_and_missing_packings_are_told() {
        for (format, mut bytes) in packed() {
            bytes.truncate(bytes.len() / 2);
            let e = parse(&bytes.into(), format).unwrap_err();
            assert!(matches!(e, KernelError::Unpack { .. }), "{format:?}: {e}");
            let e = parse(&vec![0; 4096].into(), format).unwrap_err();
            assert!(matches!(e, KernelError::NotPacked(_)), "{format:?}: {e}");
        }
        let e = parse(&gzip(b"not a kernel").into(), KernelFormat::ImageGz).unwrap_err();
        assert_eq!(e.to_string(), "what its gzip data unpacks to is no kernel: it is not an ELF file");
    }

    #[test]
    fn formats_that_are_not_there_are_told() {
        let junk = || Data::from(vec![7; 4096]);
        assert!(matches!(parse(&junk(), KernelFormat::Raw), Err(KernelError::Unknown)));
        assert!(matches!(parse(&junk(), KernelFormat::Elf), Err(KernelError::NotElf)));
        assert!(matches!(parse(&junk(), KernelFormat::PeGz), Err(KernelError::Architecture(_))));
        assert!(matches!(parse(&vec![].into(), KernelFormat::Elf), Err(KernelError::NotElf)));
    }
}
