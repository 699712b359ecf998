//! Record locks that belong to an open file, not to this process (fcntl(2), "Open file description locks").

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// The last offset that a file can have; a lock up to here holds to the end, wherever that is.
pub const TO_THE_END: u64 = i64::MAX as u64;

/// A lock on a part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    pub kind: u32,
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
}

impl Record {
    /// As the host has it.
    fn raw(self) -> Result<libc::flock, Errno> {
        let kinds = [libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK];
        let kind = kinds.into_iter().find(|k| *k as u32 == self.kind).ok_or(Errno::INVAL)?;
        if self.end > TO_THE_END || self.start > self.end {
            return Err(Errno::INVAL);
        }
        let len = if self.end == TO_THE_END { 0 } else { self.end - self.start + 1 };
        Ok(libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: self.start as i64,
            l_len: len as i64,
            l_pid: 0,
        })
    }

    fn from_raw(raw: &libc::flock) -> Self {
        let start = u64::try_from(raw.l_start).unwrap_or(0);
        let end = match u64::try_from(raw.l_len) {
            Ok(len) if len > 0 => (start + len - 1).min(TO_THE_END),
            _ => TO_THE_END,
        };
        Self { kind: raw.l_type as u32, start, end }
    }
}

/// Takes or gives back a lock, without waiting.
///
/// # Errors
/// EAGAIN: another one has it; EBADF: `fd` is not open for that; or the host's reason.
pub fn set(fd: &impl AsFd, record: Record) -> Result<(), Errno> {
    let raw = record.raw()?;
    // SAFETY: the descriptor is open while it is borrowed; the structure is only read.
    match unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const raw) } {
        0 => Ok(()),
        _ => match super::last() {
            // Which of the two it is depends on the file system.
            Errno::ACCESS => Err(Errno::AGAIN),
            e => Err(e),
        },
    }
}

/// The lock that is in the way of `record`; one of kind `F_UNLCK` when there is none.
///
/// # Errors
/// The host's reason.
pub fn get(fd: &impl AsFd, record: Record) -> Result<Record, Errno> {
    let mut raw = record.raw()?;
    // SAFETY: the descriptor is open while it is borrowed; the kernel fills the structure.
    match unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &raw mut raw) } {
        0 => Ok(Record::from_raw(&raw)),
        _ => Err(super::last()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_nonsense_is_refused() {
        for (start, end) in [(0, 0), (5, 9), (0, TO_THE_END), (7, TO_THE_END), (7, TO_THE_END - 1)] {
            let record = Record { kind: libc::F_WRLCK as u32, start, end };
            assert_eq!(Record::from_raw(&record.raw().unwrap()), record);
        }
        for (kind, start, end) in
            [(3, 0, 0), (u32::MAX, 0, 0), (1, 2, 1), (1, 0, u64::MAX), (1, u64::MAX, u64::MAX)]
        {
            assert_eq!(Record { kind, start, end }.raw().err(), Some(Errno::INVAL));
        }
    }

    #[test]
    fn locks_belong_to_the_open_file() {
        let dir = tempfile::tempdir().unwrap();
        let open = || {
            let mut options = std::fs::OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).open(dir.path().join("f")).unwrap()
        };
        let (a, b) = (open(), open());
        let all = Record { kind: libc::F_WRLCK as u32, start: 0, end: TO_THE_END };
        set(&a, Record { start: 4, end: 7, ..all }).unwrap();
        assert_eq!(set(&b, all), Err(Errno::AGAIN));
        assert_eq!(get(&b, all), Ok(Record { start: 4, end: 7, ..all }));
        assert_eq!(get(&a, all).unwrap().kind, libc::F_UNLCK as u32);
        drop(a);
        set(&b, all).unwrap();
    }
}
