//! The caller's terminal: while the command has one of its own there, this one only passes bytes on.

use std::os::fd::{AsFd, OwnedFd};

use krun_wire::host::WindowSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::Error;

/// The size of the terminal behind `fd`; `None` if it is none, or does not know.
pub fn window_size(fd: impl AsFd) -> Option<WindowSize> {
    let size = tcgetwinsize(fd).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some(WindowSize { rows: size.ws_row, cols: size.ws_col })
}

/// A terminal in raw mode, until this is dropped.
#[derive(Debug)]
pub struct RawMode {
    fd: OwnedFd,
    before: Termios,
    raw: Termios,
}

impl RawMode {
    /// Switches the terminal behind `fd` to raw mode.
    ///
    /// # Errors
    /// It is no terminal.
    pub fn enter(fd: impl AsFd) -> Result<Self, Error> {
        let what = "switching the terminal to raw mode";
        let fd = rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(Error::host(what))?;
        let before = tcgetattr(&fd).map_err(Error::host(what))?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&fd, OptionalActions::Flush, &raw).map_err(Error::host(what))?;
        Ok(Self { fd, before, raw })
    }

    /// Puts the terminal back as it was, as dropping does.
    pub fn restore(&self) {
        // Nothing can be done about a terminal that is gone.
        let _ = tcsetattr(&self.fd, OptionalActions::Drain, &self.before);
    }

    /// Switches to raw mode again, after the shell has used the terminal while this process was stopped.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn resume(&self) -> Result<(), Error> {
        let what = "switching the terminal to raw mode again";
        tcsetattr(&self.fd, OptionalActions::Now, &self.raw).map_err(Error::host(what))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        self.restore();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;

    #[test]
    fn the_terminal_is_as_before() {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let tty = std::fs::File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let echoes = || tcgetattr(&tty).unwrap().local_modes.contains(LocalModes::ECHO | LocalModes::ICANON);
        assert!(echoes() && window_size(&tty).is_none());
        let raw = RawMode::enter(&tty).unwrap();
        assert!(!echoes());
        tcsetattr(&tty, OptionalActions::Now, &raw.before).unwrap();
        assert!(echoes());
        raw.resume().unwrap();
        assert!(!echoes());
        drop(raw);
        assert!(echoes());
        assert!(RawMode::enter(std::fs::File::open("/dev/null").unwrap()).is_err());
    }
}
