//! Signals to this process belong to the program in the guest.

use std::sync::{Arc, Weak};

use krun::Vm;
use krun_lab::{RawMode, Running, WindowSize};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};

/// This many INT or TERM end the machine itself, should the guest not listen.
const PATIENCE: u32 = 3;

/// What signals are given to.
pub trait Target: Send + Sync + 'static {
    /// Passes a signal on.
    fn signal(&self, number: i32);
    /// Passes the terminal's size on.
    fn resize(&self, columns: u16, rows: u16);
    /// This process was stopped and goes on: the terminal may have another mode and size.
    fn resume(&self);
    /// Ends it.
    fn kill(&self);
}

impl Target for Vm {
    fn signal(&self, number: i32) {
        Self::signal(self, number);
    }
    fn resize(&self, columns: u16, rows: u16) {
        Self::resize(self, columns, rows);
    }
    fn resume(&self) {
        if let Err(e) = self.resume_terminals() {
            eprintln!("krun: {e}");
        }
    }
    fn kill(&self) {
        Self::kill(self);
    }
}

/// A command in the emulated host, and the terminal that it has there.
pub struct Session {
    /// The command.
    pub running: Running,
    /// This side of its terminal.
    pub raw: Option<RawMode>,
}

impl Target for Session {
    fn signal(&self, number: i32) {
        // It fails only when there is nobody any more to signal.
        let _ = self.running.signal(number);
    }
    fn resize(&self, columns: u16, rows: u16) {
        let _ = self.running.resize(WindowSize { rows, cols: columns });
    }
    fn resume(&self) {
        let Some(raw) = &self.raw else { return };
        if let Err(e) = raw.resume() {
            eprintln!("krun: {e}");
        }
        if let Some(WindowSize { rows, cols }) = krun_lab::window_size(std::io::stdout()) {
            self.resize(cols, rows);
        }
    }
    fn kill(&self) {
        self.running.kill();
    }
}

/// Signals that arrive from now on, kept until there is somebody to give them to.
pub struct Signals(signal_hook::iterator::Signals);

impl Signals {
    /// Catches them.
    pub fn catch() -> std::io::Result<Self> {
        let list = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH, SIGCONT];
        Ok(Self(signal_hook::iterator::Signals::new(list)?))
    }

    /// Gives them to the guest from a thread that lives as long as this process.
    pub fn forward_to<T: Target>(self, target: &Arc<T>) {
        let target = Arc::downgrade(target);
        let spawned =
            std::thread::Builder::new().name("signals".into()).spawn(move || forward(self.0, &target));
        if let Err(e) = spawned {
            eprintln!("krun: signals are not passed on: {e}");
        }
    }
}

fn forward<T: Target>(mut signals: signal_hook::iterator::Signals, target: &Weak<T>) {
    let mut insisted = 0;
    for signal in signals.forever() {
        let Some(target) = target.upgrade() else { return };
        match signal {
            SIGWINCH => {
                if let Ok(size) = rustix::termios::tcgetwinsize(std::io::stdout()) {
                    target.resize(size.ws_col, size.ws_row);
                }
            }
            SIGCONT => target.resume(),
            _ => {
                insisted += u32::from(matches!(signal, SIGINT | SIGTERM));
                if insisted < PATIENCE {
                    target.signal(signal);
                } else {
                    target.kill();
                }
            }
        }
    }
}
