//! Requests to an evdev device (Linux: include/uapi/linux/input.h).
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::InputEvent;
use super::config::MAX_BYTES;

/// An event as evdev has it.
const RECORD: usize = size_of::<libc::input_event>();
/// Events read at once.
const BATCH: usize = 64;
/// The last bytes of an event are its type, code and value; before them is its time.
const TIME: usize = RECORD - InputEvent::SIZE;

/// The number of a request that reads `len` bytes: `_IOC(_IOC_READ, 'E', number, len)`.
const fn request(number: u8, len: usize) -> libc::c_ulong {
    2 << 30 | (len as libc::c_ulong) << 16 | (b'E' as libc::c_ulong) << 8 | number as libc::c_ulong
}

/// Asks for up to `N` bytes; returns them and how many came.
fn ask<const N: usize>(fd: BorrowedFd<'_>, number: u8) -> io::Result<([u8; N], usize)> {
    let mut bytes = [0u8; N];
    // SAFETY: requests of this form store at most `N` bytes, which their number says, at the address given;
    // the array is alive for the call.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), request(number, N) as _, bytes.as_mut_ptr()) };
    match usize::try_from(done) {
        Ok(len) => Ok((bytes, len.min(N))),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

fn some(fd: BorrowedFd<'_>, number: u8) -> io::Result<Vec<u8>> {
    let (bytes, len) = ask::<MAX_BYTES>(fd, number)?;
    Ok(bytes[..len].to_vec())
}

/// `EVIOCGID`: bus, vendor, product, version.
pub fn ids(fd: BorrowedFd<'_>) -> io::Result<[u16; 4]> {
    let (b, _) = ask::<8>(fd, 0x02)?;
    Ok([0, 2, 4, 6].map(|at| u16::from_ne_bytes([b[at], b[at + 1]])))
}

/// `EVIOCGNAME`.
pub fn name(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    some(fd, 0x06)
}

/// `EVIOCGUNIQ`.
pub fn serial(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    some(fd, 0x08)
}

/// `EVIOCGPROP`.
pub fn properties(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    some(fd, 0x09)
}

/// `EVIOCGBIT`: the codes of a type, or for 0 the types. Bitmaps are of words; hosts here are little-endian, so
/// that their bytes are in order.
pub fn codes(fd: BorrowedFd<'_>, kind: u8) -> io::Result<Vec<u8>> {
    some(fd, 0x20 + kind)
}

/// `EVIOCGABS`: minimum, maximum, fuzz, flat, resolution of an axis.
pub fn axis(fd: BorrowedFd<'_>, code: u8) -> io::Result<[u32; 5]> {
    let (b, _) = ask::<24>(fd, 0x40 + code)?;
    // The first is the present value.
    Ok([4, 8, 12, 16, 20].map(|at| u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])))
}

/// Whether reading will not block.
pub fn is_readable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut fds, Some(&now)) {
        Ok(_) => Ok(!fds[0].revents().is_empty()),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Reads what is there, at least one event; blocks if there is none.
pub fn read(fd: BorrowedFd<'_>) -> io::Result<Vec<InputEvent>> {
    let mut bytes = [0u8; RECORD * BATCH];
    let len = match rustix::io::read(fd, &mut bytes) {
        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(len) => len,
        Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => 0,
        Err(e) => return Err(e.into()),
    };
    let event = |record: &[u8]| {
        let mut own = [0; InputEvent::SIZE];
        own.copy_from_slice(&record[TIME..]);
        InputEvent::from_bytes(own)
    };
    Ok(bytes[..len].chunks_exact(RECORD).map(event).collect())
}

/// Writes an event; the host sets its time.
pub fn write(fd: BorrowedFd<'_>, event: InputEvent) -> io::Result<()> {
    let mut record = [0u8; RECORD];
    record[TIME..].copy_from_slice(&event.to_bytes());
    rustix::io::write(fd, &record)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_header() {
        assert_eq!(request(0x02, 8), 0x8008_4502);
        assert_eq!(request(0x40, 24), 0x8018_4540);
        assert_eq!((RECORD, TIME), (24, 16));
    }
}
