//! Terminals that change under way: their size, their mode, and who has them in the foreground.

use std::os::fd::AsFd;

use rustix::termios::{LocalModes, OptionalActions, Termios, Winsize, tcgetattr, tcsetattr, tcsetwinsize};

use super::*;
use crate::sys::signals;
use crate::tty::{RawTerminal, in_background};

fn set_size(fd: impl AsFd, cols: u16, rows: u16) {
    tcsetwinsize(fd, Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
}

fn is_raw(mode: &Termios) -> bool {
    !mode.local_modes.contains(LocalModes::ICANON)
}

/// The port of a terminal, both directions.
fn terminal(tty: &OwnedFd) -> PortSpec {
    let copy = || Some(tty.try_clone().unwrap());
    let raw = RawTerminal::new(tty).unwrap().map(Arc::new);
    PortSpec { terminal: raw, ..PortSpec::console(copy(), copy(), None) }
}

#[test]
fn each_terminal_is_followed_without_being_told() {
    let ((first, a), (second, b)) = (pty(), pty());
    set_size(&first, 80, 24);
    set_size(&second, 80, 24);
    let cooked = tcgetattr(&b).unwrap();
    let (stdin, _w) = input("in");
    let c = Console::new(ConsoleSpec { ports: vec![terminal(&a), stdin, terminal(&b)] }).unwrap();
    let handle = c.handle();
    // Before the driver is there.
    set_size(&first, 81, 24);
    let mut g = Guest::of(c);
    g.control(u32::MAX, DEVICE_READY, 1);
    g.told();
    g.control(0, PORT_READY, 1);
    let size = |cols: u8, rows: u8| vec![cols, 0, rows, 0];
    assert_eq!(g.told()[1], (0, RESIZE, 0, size(81, 24)));
    g.boot();
    g.poll();
    g.told();
    assert!(is_raw(&tcgetattr(&a).unwrap()) && is_raw(&tcgetattr(&b).unwrap()));
    // As after a stop, in which the shell had it.
    set_size(&second, 132, 50);
    tcsetattr(&b, OptionalActions::Now, &cooked).unwrap();
    let wait_for_it = |g: &mut Guest| {
        assert_eq!(g.h.poll(SOON).unwrap(), 1);
        g.poll();
    };
    wait_for_it(&mut g);
    assert_eq!(g.told(), [(2, RESIZE, 0, size(132, 50))]);
    assert!(is_raw(&tcgetattr(&b).unwrap()));
    // What somebody else says stays until the terminal changes.
    handle.resize(2, 10, 10);
    g.poll();
    assert_eq!(g.told(), [(2, RESIZE, 0, size(10, 10))]);
    wait_for_it(&mut g);
    assert!(g.told().is_empty());
    set_size(&second, 100, 30);
    handle.refresh();
    g.poll();
    g.poll();
    assert_eq!(g.told(), [(2, RESIZE, 0, size(100, 30))]);
    // Nobody looks at a terminal that is gone, and the other goes on.
    drop(second);
    g.poll();
    assert_eq!(g.events(), [(2, PORT_REMOVE, 0)]);
    set_size(&first, 99, 9);
    wait_for_it(&mut g);
    assert_eq!(g.told(), [(0, RESIZE, 0, size(99, 9))]);
    drop(first);
    g.poll();
    g.events();
    let _ = g.h.poll(2 * RETRY_AFTER);
    assert_eq!(g.h.poll(2 * RETRY_AFTER).unwrap(), 0, "no timer without a terminal");
}

/// A process whose terminal has another group in the foreground neither reads nor spins nor stops.
#[test]
fn a_terminal_in_the_background_waits() {
    use std::os::unix::process::CommandExt;
    use std::process::Command;
    const CHILD: &str = "KRUN_TEST_BACKGROUND";
    if std::env::var_os(CHILD).is_none() {
        // A session of one's own is needed, so a process.
        let me = std::env::current_exe().unwrap();
        let name = "console::device::tests::terminal::a_terminal_in_the_background_waits";
        let out = Command::new(me).args([name, "--exact", "--nocapture"]).env(CHILD, "1").output().unwrap();
        assert!(out.status.success(), "{}: {}", out.status, String::from_utf8_lossy(&out.stderr));
        return;
    }
    rustix::process::setsid().unwrap();
    let (theirs, _) = pty();
    let name = rustix::pty::ptsname(&theirs, Vec::new()).unwrap();
    // Without O_NOCTTY this becomes the session's terminal.
    use rustix::fs::{Mode, OFlags};
    let mine = rustix::fs::open(name, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
    assert!(!in_background(&mine));
    let mut other = Command::new("sleep").arg("60").process_group(0).spawn().unwrap();
    let set_foreground = |group| {
        signals::with_blocked(libc::SIGTTOU, || rustix::termios::tcsetpgrp(&mine, group)).unwrap();
    };
    set_foreground(rustix::process::Pid::from_child(&other));
    assert!(in_background(&mine));
    let mode = || format!("{:?}", tcgetattr(&mine).unwrap());
    let (before, cooked) = (mode(), tcgetattr(&mine).unwrap());
    let terminal = Arc::new(RawTerminal::new(&mine).unwrap().unwrap());
    terminal.enter().unwrap();
    assert_eq!(mode(), before, "it is another's");
    signals::block(libc::SIGTTIN);
    let spec = PortSpec::console(Some(mine.try_clone().unwrap()), None, None);
    let spec = PortSpec { terminal: Some(Arc::clone(&terminal)), ..spec };
    let c = Console::new(ConsoleSpec { ports: vec![spec] }).unwrap();
    let handle = c.handle();
    let mut g = Guest::of(c);
    g.boot();
    let mut keys = File::from(theirs);
    keys.write_all(b"hello\n").unwrap();
    for _ in 0..2 {
        assert_eq!(g.poll(), 0, "no spinning");
        assert!(g.receive(0, true).is_empty());
        assert!(g.told().is_empty(), "no hang-up");
        assert_eq!(g.h.poll(SOON).unwrap(), 1, "but a try now and then");
    }
    set_size(&keys, 67, 21);
    set_foreground(rustix::process::getpgrp());
    handle.refresh();
    g.poll();
    assert_eq!(g.receive(0, true), b"hello\n");
    let raw = mode();
    assert_ne!(raw, before);
    g.poll();
    assert_eq!(g.events(), [(0, RESIZE, 0)]);
    // Another job's turn, for which the shell has its own mode.
    set_foreground(rustix::process::Pid::from_child(&other));
    signals::with_blocked(libc::SIGTTOU, || tcsetattr(&mine, OptionalActions::Now, &cooked)).unwrap();
    keys.write_all(b"again\n").unwrap();
    g.h.poll(SOON).unwrap();
    assert!(g.receive(0, true).is_empty());
    set_foreground(rustix::process::getpgrp());
    // Output that never pauses does not put the next try off.
    let (start, mut got) = (std::time::Instant::now(), Vec::new());
    while got.is_empty() && start.elapsed() < SOON {
        g.send(0, b"busy");
        assert!(g.sent(0));
        g.poll();
        got = g.receive(0, true);
        std::thread::sleep(RETRY_AFTER / 20);
    }
    assert_eq!(got, b"again\n");
    assert_eq!(mode(), raw, "without being told");
    terminal.restore();
    assert_eq!(mode(), before);
    // Late by now, and for nobody.
    g.h.poll(SOON.min(2 * RETRY_AFTER)).unwrap();
    assert_eq!(g.poll(), 0);
    other.kill().unwrap();
    other.wait().unwrap();
    // The end of the master would send this process a hangup.
    std::process::exit(0);
}
