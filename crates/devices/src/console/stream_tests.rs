use std::fs::File;
use std::io::{Read as _, Write as _, pipe};
use std::os::unix::net::UnixStream;

use super::*;
use crate::console::test_util::pty;

fn read(s: &Stream, len: usize) -> io::Result<(Read, Vec<u8>)> {
    let mut data = vec![0u8; len];
    let (a, b) = data.split_at_mut(len / 2);
    let got = s.read(&[VolatileSlice::from(a), VolatileSlice::from(b)])?;
    if let Read::Data(n) = got {
        data.truncate(n);
    }
    Ok((got, data))
}

fn write(s: &Stream, data: &[u8]) -> io::Result<Option<usize>> {
    let mut data = data.to_vec();
    let middle = data.len() / 2;
    let (a, b) = data.split_at_mut(middle);
    s.write(&[VolatileSlice::from(a), VolatileSlice::from(b)])
}

fn flags(fd: &impl AsFd) -> OFlags {
    rustix::fs::fcntl_getfl(fd).unwrap()
}

/// As `Stream::new` makes it when a second description cannot be had.
fn polled(fd: OwnedFd) -> Stream {
    let terminal = rustix::termios::isatty(&fd);
    Stream { fd, access: Access::Polled(if terminal { TERMINAL_CHUNK } else { PIPE_ATOMIC }), terminal }
}

#[test]
fn pipes_are_read_without_waiting_and_their_flags_stay() {
    for with in [|fd| Stream::new(fd, Direction::Input), polled] {
        let (r, mut w) = pipe().unwrap();
        let kept = r.try_clone().unwrap();
        let s = with(r.into());
        assert_eq!(read(&s, 10).unwrap().0, Read::NotReady);
        w.write_all(b"hello").unwrap();
        assert_eq!(read(&s, 4).unwrap(), (Read::Data(4), b"hell".to_vec()));
        assert_eq!(read(&s, 4).unwrap(), (Read::Data(1), b"o".to_vec()));
        assert_eq!(read(&s, 4).unwrap().0, Read::NotReady);
        drop(w);
        assert_eq!(read(&s, 4).unwrap().0, Read::End);
        assert!(!flags(&kept).contains(OFlags::NONBLOCK));
    }
}

#[test]
fn a_full_pipe_takes_nothing_and_then_the_rest() {
    for with in [|fd| Stream::new(fd, Direction::Output), polled] {
        let (mut r, w) = pipe().unwrap();
        let kept = w.try_clone().unwrap();
        let s = with(w.into());
        let (data, mut sent) = (vec![7u8; 3000], 0);
        while let Some(n) = write(&s, &data).unwrap() {
            sent += n;
        }
        assert!(sent >= 40_000, "{sent}");
        let mut got = vec![0; sent];
        r.read_exact(&mut got).unwrap();
        assert!(write(&s, &data).unwrap().is_some());
        assert!(!flags(&kept).contains(OFlags::NONBLOCK));
        drop(r);
        let error = write(&s, &data).unwrap_err();
        assert!(Stream::is_gone(&error), "{error}");
    }
}

#[test]
fn the_writer_of_a_pipe_is_gone_when_stream_and_callers_are() {
    let (mut r, w) = pipe().unwrap();
    let s = Stream::new(w.into(), Direction::Output);
    assert_eq!(s.access, Access::Nonblocking, "pipes of one's own can be opened again");
    write(&s, b"x").unwrap();
    drop(s);
    let mut all = Vec::new();
    r.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"x");
}

#[test]
fn sockets_work_both_ways() {
    let (a, mut b) = UnixStream::pair().unwrap();
    let s = Stream::new(a.into(), Direction::Input);
    assert_eq!(read(&s, 4).unwrap().0, Read::NotReady);
    assert_eq!(write(&s, b"ping").unwrap(), Some(4));
    let mut got = [0; 4];
    b.read_exact(&mut got).unwrap();
    b.write_all(b"pong").unwrap();
    assert_eq!(read(&s, 9).unwrap(), (Read::Data(4), b"pong".to_vec()));
    assert!(!flags(&s).contains(OFlags::NONBLOCK));
    drop(b);
    assert_eq!(read(&s, 4).unwrap().0, Read::End);
    assert!(Stream::is_gone(&write(&s, b"x").unwrap_err()));
}

#[test]
fn files_and_null_end_at_once() {
    let null = Stream::new(File::open("/dev/null").unwrap().into(), Direction::Input);
    assert_eq!(read(&null, 4).unwrap().0, Read::End);
    let exe = Stream::new(File::open("/proc/self/exe").unwrap().into(), Direction::Input);
    assert_eq!(read(&exe, 4).unwrap(), (Read::Data(4), b"\x7fELF".to_vec()));
    let full = Stream::new(File::options().write(true).open("/dev/full").unwrap().into(), Direction::Output);
    let error = write(&full, b"x").unwrap_err();
    assert!(!Stream::is_gone(&error), "{error}");
}

#[test]
fn terminals_are_read_and_hang_up() {
    for with in [|fd| Stream::new(fd, Direction::Input), polled] {
        let (master, slave) = pty();
        let kept = slave.try_clone().unwrap();
        let s = with(slave);
        assert!(s.is_terminal());
        assert_eq!(read(&s, 4).unwrap().0, Read::NotReady);
        let mut keys = File::from(master);
        keys.write_all(b"ab\n").unwrap();
        assert_eq!(read(&s, 9).unwrap(), (Read::Data(3), b"ab\n".to_vec()));
        keys.write_all(b"\x04").unwrap();
        assert_eq!(read(&s, 9).unwrap().0, Read::End, "the end-of-file character");
        assert_eq!(read(&s, 9).unwrap().0, Read::NotReady);
        assert!(!flags(&kept).contains(OFlags::NONBLOCK));
        drop(keys);
        assert_eq!(read(&s, 9).unwrap().0, Read::HungUp);
    }
}

#[test]
fn a_master_is_not_opened_again() {
    let (master, slave) = pty();
    let s = Stream::new(master, Direction::Input);
    assert_eq!(s.access, Access::Polled(TERMINAL_CHUNK));
    assert_eq!(read(&s, 4).unwrap().0, Read::NotReady);
    File::from(slave).write_all(b"out").unwrap();
    assert_eq!(read(&s, 4).unwrap(), (Read::Data(3), b"out".to_vec()));
    assert_eq!(read(&s, 4).unwrap().0, Read::HungUp, "the slave is closed");
}

#[test]
fn a_terminal_nobody_reads_takes_nothing_at_some_point() {
    for with in [|fd| Stream::new(fd, Direction::Output), polled] {
        let (_master, slave) = pty();
        let raw = crate::tty::RawTerminal::new(&slave).unwrap().unwrap();
        raw.enter().unwrap();
        let s = with(slave);
        let mut sent = 0;
        while let Some(n) = write(&s, &[b'x'; 200]).unwrap() {
            sent += n;
            assert!(sent < 10 << 20);
        }
        assert!(sent > 0);
        drop(raw);
    }
}
