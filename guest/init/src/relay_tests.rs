use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, Timespec, poll};

use super::*;

thread_local! {
    /// The host's port of the test that runs on this thread.
    static PORT: RefCell<Option<OwnedFd>> = const { RefCell::new(None) };
}

/// A port whose other end the test has. Like a real one it does not block.
fn port() -> UnixStream {
    let (guest, host) = UnixStream::pair().unwrap();
    guest.set_nonblocking(true).unwrap();
    PORT.set(Some(guest.into()));
    host
}

fn take(_: &str) -> io::Result<Option<OwnedFd>> {
    Ok(PORT.take())
}

/// One round of the main loop for an output. `false`: nothing happened for a while.
fn turn_output(output: &mut Output) -> bool {
    let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
    let events = match output.interest() {
        Some(Interest { fd, events }) => {
            let mut fds = [PollFd::from_borrowed_fd(fd, events)];
            if poll(&mut fds, Some(&wait)).unwrap() == 0 {
                return false;
            }
            fds[0].revents()
        }
        None if output.due().is_some() => {
            std::thread::sleep(Duration::from_millis(1));
            PollFlags::empty()
        }
        None => return false,
    };
    output.turn(events);
    true
}

fn turn_input(input: &mut Input) -> bool {
    let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
    let events = {
        let interests = input.interests();
        let fds = interests.iter().flatten().map(|i| PollFd::from_borrowed_fd(i.fd, i.events));
        let mut fds: Vec<_> = fds.collect();
        if poll(&mut fds, Some(&wait)).unwrap() == 0 && input.due().is_none() {
            return false;
        }
        fds.first().map(PollFd::revents)
    };
    let Some(events) = events else { return false };
    input.turn(events);
    true
}

fn output(open: Opener) -> (Output, std::fs::File) {
    let (output, end) = Output::with_opener("port", open, Patience::default()).unwrap();
    (output, end.into())
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 251) as u8).collect()
}

#[test]
fn output_arrives_whole_and_ends() {
    let mut host = port();
    let (mut output, mut end) = output(take);
    let sent = pattern(3_000_000);
    let expected = sent.clone();
    let writer = std::thread::spawn(move || end.write_all(&sent));
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        host.read_to_end(&mut got).unwrap();
        got
    });
    while output.interest().is_some() {
        turn_output(&mut output);
    }
    writer.join().unwrap().unwrap();
    assert!(output.is_drained());
    assert_eq!(reader.join().unwrap(), expected);
}

#[test]
fn a_port_is_opened_at_the_first_byte_only() {
    static OPENED: AtomicUsize = AtomicUsize::new(0);
    fn counting(name: &str) -> io::Result<Option<OwnedFd>> {
        OPENED.fetch_add(1, Ordering::Relaxed);
        take(name)
    }
    let mut host = port();
    let (mut output, mut end) = output(counting);
    assert!(!turn_output(&mut output) && output.is_drained());
    assert_eq!(OPENED.load(Ordering::Relaxed), 0);
    end.write_all(b"x").unwrap();
    assert!(turn_output(&mut output));
    assert_eq!(OPENED.load(Ordering::Relaxed), 1);
    let mut byte = [0];
    host.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"x");
}

#[test]
fn nobody_behind_the_port_ends_the_writer() {
    let host = port();
    let (mut output, mut end) = output(take);
    end.write_all(b"x").unwrap();
    turn_output(&mut output);
    drop(host);
    end.write_all(b"y").unwrap();
    while turn_output(&mut output) {}
    assert_eq!(end.write_all(b"z").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn a_full_port_is_waited_for() {
    let mut host = port();
    let (mut output, mut end) = output(take);
    let sent = pattern(60_000);
    let mut total = 0;
    // Until neither the port nor the pipe takes more.
    while total < 100 * sent.len() && !output.full {
        end.write_all(&sent).unwrap();
        total += sent.len();
        turn_output(&mut output);
    }
    assert!(output.full && !output.is_drained());
    assert!(!turn_output(&mut output), "it must wait, not spin");
    host.set_nonblocking(true).unwrap();
    let mut got = 0;
    let mut buffer = vec![0; 1 << 20];
    while got < total {
        match host.read(&mut buffer) {
            Ok(n) => got += n,
            Err(_) => {
                turn_output(&mut output);
            }
        }
    }
    assert!(output.is_drained());
}

#[test]
fn a_late_port_gets_what_was_written_before() {
    static TRIES: AtomicUsize = AtomicUsize::new(0);
    fn late(name: &str) -> io::Result<Option<OwnedFd>> {
        if TRIES.fetch_add(1, Ordering::Relaxed) < 3 { Ok(None) } else { take(name) }
    }
    let mut host = port();
    let (mut output, mut end) = output(late);
    end.write_all(b"early").unwrap();
    for _ in 0..1000 {
        if !turn_output(&mut output) {
            break;
        }
    }
    let mut got = [0; 5];
    host.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"early");
}

#[test]
fn input_arrives_whole_and_ends() {
    let mut host = port();
    let (mut input, end) = Input::with_opener("port", take, Patience::default()).unwrap();
    let sent = pattern(2_000_000);
    let expected = sent.clone();
    let writer = std::thread::spawn(move || host.write_all(&sent));
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        std::fs::File::from(end).read_to_end(&mut got).unwrap();
        got
    });
    while input.pipe.is_some() {
        turn_input(&mut input);
    }
    writer.join().unwrap().unwrap();
    assert_eq!(reader.join().unwrap(), expected);
}

#[test]
fn nobody_who_reads_ends_the_input() {
    let mut host = port();
    let (mut input, end) = Input::with_opener("port", take, Patience::default()).unwrap();
    input.turn(PollFlags::empty());
    drop(end);
    while input.pipe.is_some() {
        assert!(turn_input(&mut input), "the pipe's end must be noticed");
    }
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn an_input_that_may_be_early_is_not_taken_for_ended() {
    let (read, write) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).unwrap();
    drop(write);
    PORT.set(Some(read));
    let late = Patience { head_start: Duration::ZERO, grace: Duration::from_millis(30) };
    let (mut input, _end) = Input::with_opener("port", take, late).unwrap();
    input.turn(PollFlags::empty());
    assert!(matches!(input.port, Port::Open { .. }) && input.pipe.is_some() && input.due().is_some());
    std::thread::sleep(Duration::from_millis(40));
    input.turn(PollFlags::empty());
    assert!(input.pipe.is_none());
}

#[test]
fn the_command_gets_a_head_start() {
    let _host = port();
    let patience = Patience { head_start: Duration::from_millis(20), grace: Duration::ZERO };
    let (mut input, _end) = Input::with_opener("port", take, patience).unwrap();
    input.turn(PollFlags::empty());
    assert!(matches!(input.port, Port::Unopened { .. }));
    std::thread::sleep(input.due().unwrap().saturating_sub(uptime()));
    input.turn(PollFlags::empty());
    assert!(matches!(input.port, Port::Open { .. }));
}

#[test]
fn waits_grow_and_end() {
    let mut backoff = Backoff::new(Duration::ZERO, Duration::from_millis(20));
    let mut waits = 0;
    while backoff.again() {
        std::thread::sleep(backoff.due().saturating_sub(uptime()));
        waits += 1;
    }
    assert!((3..=6).contains(&waits), "{waits}");
}
