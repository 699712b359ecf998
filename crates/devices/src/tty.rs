//! The host's terminal: its size, and raw mode that is always undone.
//!
//! No signal handler is installed here: whoever has a terminal looks now and then whether it has another size, and
//! calls [`RawTerminal::enter`] again, which does nothing where nothing is to be done.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::termios::{
    OptionalActions, SpecialCodeIndex, Termios, isatty, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr,
};

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

/// A terminal that is in raw mode while this process has it in the foreground, until [`RawTerminal::restore`] or
/// the end of this value.
#[derive(Debug)]
pub struct RawTerminal {
    fd: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    /// Not ours so far.
    Untouched,
    Raw {
        before: Box<Termios>,
        raw: Box<Termios>,
    },
    /// Not ours any more.
    Restored,
}

impl RawTerminal {
    /// The terminal behind `fd`, as it is for now. `None` if that is no terminal.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(fd: impl AsFd) -> io::Result<Option<Self>> {
        if !isatty(&fd) {
            return Ok(None);
        }
        Ok(Some(Self { fd: fd.as_fd().try_clone_to_owned()?, state: Mutex::new(State::Untouched) }))
    }

    /// Switches to raw mode: every key reaches the reader at once and as it is. Also for when the shell may have
    /// set its own mode meanwhile: this process was stopped, or in the background. Nothing in the background, where
    /// the terminal is another's, and nothing after [`RawTerminal::restore`].
    ///
    /// # Errors
    /// The terminal's mode cannot be read or set.
    pub fn enter(&self) -> io::Result<()> {
        let mut state = self.lock();
        if in_background(&self.fd) {
            return Ok(());
        }
        if let State::Untouched = *state {
            let before = tcgetattr(&self.fd)?;
            let mut raw = before.clone();
            raw.make_raw();
            *state = State::Raw { before: Box::new(before), raw: Box::new(raw) };
        }
        match &*state {
            State::Raw { raw, .. } if !same_mode(&tcgetattr(&self.fd)?, raw) => self.set(raw),
            _ => Ok(()),
        }
    }

    /// Puts the terminal back exactly as it was, for good.
    ///
    /// In the background nothing is done: the shell has set the terminal up for whoever has it now.
    pub fn restore(&self) {
        let mut state = self.lock();
        if let State::Raw { before, .. } = std::mem::replace(&mut *state, State::Restored)
            && !in_background(&self.fd)
        {
            // A terminal that is gone cannot be restored and needs no restoring.
            let _ = self.set(&before);
        }
    }

    /// Its size, if it has one.
    pub fn size(&self) -> Option<TerminalSize> {
        size(&self.fd)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, mode: &Termios) -> io::Result<()> {
        // Should the process go to the background just now, SIGTTOU must not stop it half-way. At once,
        // not after the output has gone: a terminal that takes no output must not keep us.
        signals::with_blocked(libc::SIGTTOU, || tcsetattr(&self.fd, OptionalActions::Now, mode))?;
        Ok(())
    }
}

/// Whether two modes are the same in what raw mode is about.
fn same_mode(a: &Termios, b: &Termios) -> bool {
    let flags = |t: &Termios| (t.input_modes, t.output_modes, t.control_modes, t.local_modes);
    let wait =
        |t: &Termios| (t.special_codes[SpecialCodeIndex::VMIN], t.special_codes[SpecialCodeIndex::VTIME]);
    flags(a) == flags(b) && wait(a) == wait(b)
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

    fn raw(fd: &OwnedFd) -> RawTerminal {
        let terminal = RawTerminal::new(fd).unwrap().unwrap();
        terminal.enter().unwrap();
        terminal
    }

    #[test]
    fn raw_and_back_exactly() {
        let (_master, slave) = pty();
        let mut odd = tcgetattr(&slave).unwrap();
        odd.output_modes.remove(OutputModes::ONLCR);
        odd.local_modes.remove(LocalModes::ECHOE);
        tcsetattr(&slave, OptionalActions::Now, &odd).unwrap();
        let before = modes(&slave);
        let raw = raw(&slave);
        let now = tcgetattr(&slave).unwrap();
        assert!(!now.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
        assert!(!now.output_modes.contains(OutputModes::OPOST));
        drop(raw);
        assert_eq!(modes(&slave), before);
    }

    #[test]
    fn restore_happens_once_and_nothing_after_it() {
        let (_master, slave) = pty();
        let before = tcgetattr(&slave).unwrap();
        let untouched = RawTerminal::new(&slave).unwrap().unwrap();
        let terminal = raw(&slave);
        let while_raw = tcgetattr(&slave).unwrap();
        untouched.restore();
        drop(untouched);
        assert_eq!(modes(&slave), format!("{while_raw:?}"), "it never was raw by this one");
        // A shell that took the terminal over while we were stopped.
        tcsetattr(&slave, OptionalActions::Now, &before).unwrap();
        terminal.enter().unwrap();
        assert_eq!(modes(&slave), format!("{while_raw:?}"));
        terminal.restore();
        assert_eq!(modes(&slave), format!("{before:?}"));
        // From here on the terminal is not ours.
        terminal.enter().unwrap();
        assert_eq!(modes(&slave), format!("{before:?}"));
        tcsetattr(&slave, OptionalActions::Now, &while_raw).unwrap();
        terminal.restore();
        drop(terminal);
        assert_eq!(modes(&slave), format!("{while_raw:?}"));
    }

    #[test]
    fn a_panic_restores() {
        let (_master, slave) = pty();
        let before = modes(&slave);
        let fd = slave.try_clone().unwrap();
        let thread = std::thread::spawn(move || {
            let _raw = raw(&fd);
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        assert!(thread.join().is_err());
        assert_eq!(modes(&slave), before);
    }

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        let (r, _w) = std::io::pipe().unwrap();
        assert!(RawTerminal::new(&r).unwrap().is_none());
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
        let raw = raw(&slave);
        drop(master);
        raw.restore();
    }
}
