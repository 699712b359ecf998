//! Signals to this process belong to the program in the guest.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use krun::{RawTerminal, Vm, terminal_size};
use krun_lab::{Running, WindowSize};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::low_level::emulate_default_handler;

/// This many INT or TERM end the machine itself, should the guest not listen.
const PATIENCE: u32 = 3;

/// What signals are given to.
pub trait Target: Send + Sync + 'static {
    /// Passes a signal on.
    fn signal(&self, number: i32);
    /// The terminal may have another size, and after this process was stopped and goes on another mode.
    fn refresh(&self);
    /// Ends it.
    fn kill(&self);
}

impl Target for Vm {
    fn signal(&self, number: i32) {
        Self::signal(self, number);
    }
    fn refresh(&self) {
        if let Err(e) = self.refresh_terminals() {
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
    pub raw: Option<RawTerminal>,
}

impl Target for Session {
    fn signal(&self, number: i32) {
        // It fails only when there is nobody any more to signal.
        let _ = self.running.signal(number);
    }
    fn refresh(&self) {
        let Some(raw) = &self.raw else { return };
        if let Err(e) = raw.enter() {
            eprintln!("krun: the terminal cannot be put in raw mode: {e}");
        }
        if let Some(size) = terminal_size(std::io::stdout()) {
            // As above.
            let _ = self.running.resize(WindowSize { rows: size.rows, cols: size.cols });
        }
    }
    fn kill(&self) {
        self.running.kill();
    }
}

/// What becomes of signals while there is nobody to give them to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Early {
    /// They are kept: there will be somebody in a moment.
    Keep,
    /// Those that ask this process to end do so at once.
    End,
}

/// Signals that arrive from now on.
pub struct Signals(Arc<Mutex<Stage>>);

enum Stage {
    Waiting(Early, Vec<i32>),
    Given(Weak<dyn Target>, u32),
}

impl Signals {
    /// Catches them, on a thread that lives as long as this process.
    pub fn catch(early: Early) -> std::io::Result<Self> {
        let list = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH, SIGCONT];
        let mut signals = signal_hook::iterator::Signals::new(list)?;
        let stage = Arc::new(Mutex::new(Stage::Waiting(early, Vec::new())));
        let shared = Arc::clone(&stage);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || signals.forever().for_each(|signal| arrived(&shared, signal)))?;
        Ok(Self(stage))
    }

    /// Gives them to `target`, those that were kept first.
    pub fn forward_to<T: Target>(self, target: &Arc<T>) {
        let target: Weak<T> = Arc::downgrade(target);
        let before = std::mem::replace(&mut *lock(&self.0), Stage::Given(target, 0));
        if let Stage::Waiting(_, kept) = before {
            kept.into_iter().for_each(|signal| arrived(&self.0, signal));
        }
    }
}

fn lock(stage: &Mutex<Stage>) -> MutexGuard<'_, Stage> {
    stage.lock().unwrap_or_else(PoisonError::into_inner)
}

fn arrived(stage: &Mutex<Stage>, signal: i32) {
    let (target, insisted) = match &mut *lock(stage) {
        Stage::Waiting(Early::End, _) if matches!(signal, SIGHUP | SIGINT | SIGQUIT | SIGTERM) => {
            // Does not come back, and whoever started this sees the signal.
            let _ = emulate_default_handler(signal);
            return;
        }
        Stage::Waiting(_, kept) => return kept.push(signal),
        Stage::Given(target, insisted) => {
            *insisted += u32::from(matches!(signal, SIGINT | SIGTERM));
            (target.upgrade(), *insisted)
        }
    };
    let Some(target) = target else { return };
    match signal {
        SIGWINCH | SIGCONT => target.refresh(),
        _ if insisted < PATIENCE => target.signal(signal),
        _ => target.kill(),
    }
}
