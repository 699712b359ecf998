//! Kernels within compressed data.

use std::fmt;
use std::io::{self, Read};

use super::KernelError;
use crate::boot::data::Data;

/// Most bytes that are unpacked; a kernel has about 50 MiB.
const LIMIT: u64 = 512 << 20;

/// How data is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// RFC 1952.
    Gzip,
    /// bzip2.
    Bzip2,
    /// RFC 8878.
    Zstd,
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Zstd => "zstd",
        })
    }
}

impl Packing {
    const ALL: [Self; 3] = [Self::Gzip, Self::Bzip2, Self::Zstd];

    fn matches(self, bytes: &[u8]) -> bool {
        match self {
            Self::Gzip => bytes.starts_with(&[0x1f, 0x8b, 8]),
            // The level is a digit, and the first block starts with six digits of pi.
            Self::Bzip2 => {
                bytes.starts_with(b"BZh")
                    && bytes.get(3).is_some_and(|level| (b'1'..=b'9').contains(level))
                    && bytes.get(4..10) == Some(&[0x31, 0x41, 0x59, 0x26, 0x53, 0x59])
            }
            Self::Zstd => bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]),
        }
    }

    /// The packing whose mark `data` starts with.
    pub fn at_start(data: &Data) -> Option<Self> {
        let mut head = vec![0u8; data.len().min(10) as usize];
        data.read_at(0, &mut head).ok()?;
        Self::of(&head)
    }

    /// The packing whose mark `bytes` start with.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.matches(bytes))
    }
}

/// Unpacks the first run of `packing` within `bytes`; what follows it is ignored.
///
/// # Errors
/// None is there, it is damaged, or it is too large.
pub fn find_and_unpack(bytes: &[u8], packing: Packing) -> Result<Vec<u8>, KernelError> {
    let at =
        (0..bytes.len()).find(|at| packing.matches(&bytes[*at..])).ok_or(KernelError::NotPacked(packing))?;
    unpack(&bytes[at..], packing)
}

/// Unpacks what `bytes` start with.
///
/// # Errors
/// It is damaged or too large.
pub fn unpack(bytes: &[u8], packing: Packing) -> Result<Vec<u8>, KernelError> {
    unpack_up_to(bytes, packing, LIMIT)
}

fn unpack_up_to(bytes: &[u8], packing: Packing, limit: u64) -> Result<Vec<u8>, KernelError> {
    let damaged = |source: io::Error| {
        // That decoder's errors are its internal state.
        let zstd = packing == Packing::Zstd;
        let source = if zstd { io::Error::new(source.kind(), "truncated or corrupt frame") } else { source };
        KernelError::Unpack { packing, source }
    };
    let decoder: Box<dyn Read + '_> = match packing {
        Packing::Gzip => Box::new(flate2::read::GzDecoder::new(bytes)),
        Packing::Bzip2 => Box::new(bzip2::read::BzDecoder::new(bytes)),
        Packing::Zstd => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(bytes);
            Box::new(decoder.map_err(|e| damaged(io::Error::other(e)))?)
        }
    };
    let mut out = Vec::with_capacity(bytes.len().saturating_mul(3).min(64 << 20));
    decoder.take(limit + 1).read_to_end(&mut out).map_err(damaged)?;
    if out.len() as u64 > limit {
        return Err(KernelError::TooLarge { packing, limit });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    #[test]
    fn growth_is_limited() {
        let mut e = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        e.write_all(&vec![0u8; 1 << 20]).unwrap();
        let bomb = e.finish().unwrap();
        assert!(matches!(unpack_up_to(&bomb, Packing::Gzip, 1 << 19), Err(KernelError::TooLarge { .. })));
        assert_eq!(unpack_up_to(&bomb, Packing::Gzip, 1 << 20).unwrap().len(), 1 << 20);
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_decoder_panic(junk in prop::collection::vec(any::<u8>(), 0..300), kind in 0usize..3) {
            let head: [&[u8]; 3] = [&[0x1f, 0x8b, 8], b"BZh91AY&SY", &[0x28, 0xb5, 0x2f, 0xfd]];
            let mut bytes = head[kind].to_vec();
            bytes.extend(junk);
            let _ = unpack_up_to(&bytes, Packing::ALL[kind], 1 << 20);
        }
    }
}
