//! The host's terminal: its size, and raw mode that is always undone.
//!
//! No signal handler is installed here. A program that wants to follow `SIGWINCH` asks [`size`] and tells
//! the console; one that was stopped and goes on (`SIGCONT`) calls [`RawTerminal::resume`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr};

use crate::console::TerminalSize;
use crate::sys::signals;

/// The size of the terminal `fd`; `None` if it is no terminal or has no size.
pub fn size(fd: impl AsFd) -> Option<TerminalSize> {
    let size = tcgetwinsize(fd).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some(TerminalSize { cols: size.ws_col, rows: size.ws_row })
}

/// Whether `fd` is this process's controlling terminal and another process group has it in the
/// foreground: reading from it, and changing its mode, is not for us now.
pub fn in_background(fd: impl AsFd) -> bool {
    // Of a terminal that is not ours to control, nobody can tell the foreground (ENOTTY).
    tcgetpgrp(fd).is_ok_and(|foreground| foreground != rustix::process::getpgrp())
}

/// A terminal in raw mode, for as long as this value lives.
///
/// A panic that unwinds drops the value; a program that ends in other ways calls [`RawTerminal::restore`]
/// first, from any thread or from a signal handler.
#[derive(Debug)]
pub struct RawTerminal {
    fd: OwnedFd,
    before: Termios,
    raw: Termios,
    is_raw: AtomicBool,
}

impl RawTerminal {
    /// Switches `fd` to raw mode: every key reaches the reader at once and as it is. `None` if `fd` is no
    /// terminal, or if this process is in the background and must leave the terminal alone.
    ///
    /// # Errors
    /// The terminal's mode cannot be read or set.
    pub fn enter(fd: impl AsFd) -> io::Result<Option<Self>> {
        if !isatty(&fd) || in_background(&fd) {
            return Ok(None);
        }
        let before = tcgetattr(&fd)?;
        let mut raw = before.clone();
        raw.make_raw();
        let terminal =
            Self { fd: fd.as_fd().try_clone_to_owned()?, before, raw, is_raw: AtomicBool::new(false) };
        terminal.set(&terminal.raw)?;
        terminal.is_raw.store(true, Ordering::Release);
        Ok(Some(terminal))
    }

    /// Puts the terminal back exactly as it was. Once is enough; more do no harm. Async-signal-safe.
    ///
    /// In the background nothing is done: the shell has set the terminal up for whoever has it now.
    pub fn restore(&self) {
        if self.is_raw.swap(false, Ordering::AcqRel) && !in_background(&self.fd) {
            // A terminal that is gone cannot be restored and needs no restoring.
            let _ = self.set(&self.before);
        }
    }

    /// Sets raw mode again after the process was stopped and continued in the foreground, the shell
    /// having set its own mode in between. Nothing after [`RawTerminal::restore`].
    ///
    /// # Errors
    /// The terminal's mode cannot be set.
    pub fn resume(&self) -> io::Result<()> {
        if self.is_raw.load(Ordering::Acquire) && !in_background(&self.fd) {
            self.set(&self.raw)?;
        }
        Ok(())
    }

    /// The terminal.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn set(&self, mode: &Termios) -> io::Result<()> {
        // Should the process go to the background just now, SIGTTOU must not stop it half-way. At once,
        // not after the output has gone: a terminal that takes no output must not keep us.
        signals::with_blocked(libc::SIGTTOU, || tcsetattr(&self.fd, OptionalActions::Now, mode))?;
        Ok(())
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        self.restore();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::test_util::pty;
    use rustix::termios::{LocalModes, OutputModes, Winsize, tcsetwinsize};

    fn modes(fd: &OwnedFd) -> String {
        format!("{:?}", tcgetattr(fd).unwrap())
    }

    #[test]
    fn raw_and_back_exactly() {
        let (_master, slave) = pty();
        let mut odd = tcgetattr(&slave).unwrap();
        odd.output_modes.remove(OutputModes::ONLCR);
        odd.local_modes.remove(LocalModes::ECHOE);
        tcsetattr(&slave, OptionalActions::Now, &odd).unwrap();
        let before = modes(&slave);
        let raw = RawTerminal::enter(&slave).unwrap().unwrap();
        let now = tcgetattr(&slave).unwrap();
        assert!(!now.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
        assert!(!now.output_modes.contains(OutputModes::OPOST));
        drop(raw);
        assert_eq!(modes(&slave), before);
    }

    #[test]
    fn restore_happens_once_and_resume_not_after_it() {
        let (_master, slave) = pty();
        let before = modes(&slave);
        let raw = RawTerminal::enter(&slave).unwrap().unwrap();
        let while_raw = modes(&slave);
        // A shell that took the terminal over while we were stopped.
        tcsetattr(&slave, OptionalActions::Now, &raw.before).unwrap();
        raw.resume().unwrap();
        assert_eq!(modes(&slave), while_raw);
        raw.restore();
        assert_eq!(modes(&slave), before);
        // From here on the terminal is not ours.
        tcsetattr(&slave, OptionalActions::Now, &raw.raw).unwrap();
        raw.restore();
        raw.resume().unwrap();
        drop(raw);
        assert_eq!(modes(&slave), while_raw);
    }

    #[test]
    fn a_panic_restores() {
        let (_master, slave) = pty();
        let before = modes(&slave);
        let fd = slave.try_clone().unwrap();
        let thread = std::thread::spawn(move || {
            let _raw = RawTerminal::enter(&fd).unwrap().unwrap();
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        assert!(thread.join().is_err());
        assert_eq!(modes(&slave), before);
    }

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        let (r, _w) = std::io::pipe().unwrap();
        assert!(RawTerminal::enter(&r).unwrap().is_none());
        assert_eq!(size(&r), None);
        assert!(!in_background(&r));
    }

    #[test]
    fn size_is_that_of_the_terminal() {
        let (master, slave) = pty();
        assert_eq!(size(&slave), None, "a new pseudo-terminal has none");
        let winsize = Winsize { ws_row: 50, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&master, winsize).unwrap();
        assert_eq!(size(&slave), Some(TerminalSize { cols: 132, rows: 50 }));
    }

    #[test]
    fn a_terminal_that_hung_up_is_no_trouble() {
        let (master, slave) = pty();
        let raw = RawTerminal::enter(&slave).unwrap().unwrap();
        drop(master);
        raw.restore();
    }
}
