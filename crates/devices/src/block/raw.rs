//! Raw images.

use std::fs::File;
use std::io;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::image::{Image, SECTOR};
use super::sys::Buffers;

/// Bytes copied at a time where memory and file cannot meet directly.
const CHUNK: usize = 1 << 20;
/// The largest unit that direct I/O asks for.
const PAGE: usize = 4096;

/// A file or block device whose bytes are the disk's.
pub struct Raw {
    file: Arc<File>,
    size: AtomicU64,
    /// What direct I/O wants addresses and lengths to be multiples of; 1 without.
    align: usize,
}

impl Raw {
    pub fn new(file: File, direct: bool) -> io::Result<Self> {
        let size = size(&file)?;
        let align = if direct { direct_unit(&file, size)? } else { 1 };
        Ok(Self { file: Arc::new(file), size: size.into(), align })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn can_transfer(&self, buffers: &Buffers) -> bool {
        self.align == 1 || buffers.is_aligned(self.align)
    }

    fn fill_with_zeroes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let zeroes = Aligned::new(len.min(CHUNK as u64) as usize);
        while len > 0 {
            let n = len.min(CHUNK as u64);
            self.file.write_all_at(&zeroes.bytes()[..n as usize], offset)?;
            offset += n;
            len -= n;
        }
        Ok(())
    }
}

/// In whole sectors. The end of a block device is found by seeking.
fn size(mut file: &File) -> io::Result<u64> {
    Ok(file.seek(SeekFrom::End(0))? / SECTOR * SECTOR)
}

/// Finds out by trying, as not every kernel tells.
fn direct_unit(file: &File, size: u64) -> io::Result<usize> {
    let mut buffer = Aligned::new(2 * PAGE);
    for unit in [SECTOR as usize, 1024, 2048] {
        // Address and length are multiples of this unit and of none of the larger ones.
        let result = file.read_at(&mut buffer.bytes_mut()[unit..2 * unit], 0);
        match result {
            Ok(_) if size.is_multiple_of(unit as u64) => return Ok(unit),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {}
            Err(e) => return Err(e),
        }
    }
    Ok(PAGE)
}

/// Bytes that start at a multiple of [`PAGE`].
struct Aligned {
    all: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let all = vec![0; len + PAGE];
        let start = all.as_ptr().addr().next_multiple_of(PAGE) - all.as_ptr().addr();
        Self { all, start, len }
    }

    fn bytes(&self) -> &[u8] {
        &self.all[self.start..self.start + self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.all[self.start..self.start + self.len]
    }
}

fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

impl Image for Raw {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn refresh(&self) -> io::Result<Option<u64>> {
        let size = size(&self.file)?;
        self.size.store(size, Ordering::Relaxed);
        Ok(Some(size))
    }

    fn block_size(&self) -> u32 {
        self.align.max(SECTOR as usize) as u32
    }

    fn read(&self, buffers: &mut Buffers, mut offset: u64) -> io::Result<()> {
        if self.can_transfer(buffers) {
            while buffers.left() > 0 {
                match retry(|| buffers.fill_from(self.fd(), offset))? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    n => offset += n as u64,
                }
            }
            return Ok(());
        }
        let mut chunk = Aligned::new(buffers.left().min(CHUNK));
        while buffers.left() > 0 {
            let n = buffers.left().min(CHUNK);
            let part = &mut chunk.bytes_mut()[..n];
            self.file.read_exact_at(part, offset)?;
            buffers.store(part);
            offset += n as u64;
        }
        Ok(())
    }

    fn write(&self, buffers: &mut Buffers, mut offset: u64) -> io::Result<()> {
        if self.can_transfer(buffers) {
            while buffers.left() > 0 {
                match retry(|| buffers.drain_to(self.fd(), offset))? {
                    0 => return Err(io::ErrorKind::WriteZero.into()),
                    n => offset += n as u64,
                }
            }
            return Ok(());
        }
        let mut chunk = Aligned::new(buffers.left().min(CHUNK));
        while buffers.left() > 0 {
            let part = &mut chunk.bytes_mut()[..buffers.left().min(CHUNK)];
            let n = buffers.load(part);
            self.file.write_all_at(&part[..n], offset)?;
            offset += n as u64;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn settle(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match retry(|| Ok(fallocate(&self.file, flags, offset, len)?)) {
            // It is advice, which not every file system takes.
            Err(e) if is_unsupported(&e) => Ok(()),
            other => other,
        }
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let ways = [
            unmap.then_some(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE),
            Some(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE),
        ];
        for flags in ways.into_iter().flatten() {
            match retry(|| Ok(fallocate(&self.file, flags, offset, len)?)) {
                Err(e) if is_unsupported(&e) => {}
                other => return other,
            }
        }
        self.fill_with_zeroes(offset, len)
    }

    fn direct(&self, buffers: Option<&Buffers>) -> Option<&Arc<File>> {
        buffers.is_none_or(|b| self.can_transfer(b)).then_some(&self.file)
    }
}

fn is_unsupported(e: &io::Error) -> bool {
    [Errno::OPNOTSUPP, Errno::NOSYS, Errno::NODEV, Errno::INVAL]
        .iter()
        .any(|errno| e.raw_os_error() == Some(errno.raw_os_error()))
}
