//! Noticing that a guest has turned itself off where there is nothing to turn off.
//!
//! A machine without ACPI has no power switch. When its kernel is told to power off or to halt, it takes
//! its devices out of service (Linux since 6.12) and then halts every processor with interrupts off. The
//! host's kernel waits for ever in such a processor and tells nobody. So after a running device was taken
//! out of service, the vCPUs are interrupted a few times and asked whether they are off; for other kernels
//! whoever waits for the machine asks every now and then.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use krun_event::{Interest, Poll, Wake, Worker};

use super::{End, Outcome};

/// The first look comes after this, the others each after twice the time before.
const FIRST: Duration = Duration::from_millis(25);
const LOOKS: u32 = 9;
/// How long an interrupted vCPU may take to answer.
pub const PATIENCE: Duration = Duration::from_millis(100);
/// The same where nobody wants to wait.
const QUICK: Duration = Duration::from_millis(5);

/// A thread that looks, while there is reason to.
#[derive(Debug, Default)]
pub struct OffWatch {
    worker: Mutex<Option<Worker<()>>>,
}

impl OffWatch {
    /// A device was taken out of service: looks for a while, unless that is going on.
    pub fn look(&self, end: &Arc<End>) {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        if worker.as_ref().is_some_and(|w| !w.is_finished()) || end.has_begun() {
            return;
        }
        let (end, supervisor) = (Arc::clone(end), Arc::clone(end));
        let on_panic = move |f: krun_event::Failure| supervisor.begin(Outcome::Error(f.to_string()));
        let body = move |stop: &Wake| {
            if let Err(e) = watch(&end, stop) {
                tracing::warn!("a guest that turns itself off will not be noticed: {e}");
            }
        };
        match Worker::spawn("off-watch", on_panic, body) {
            Ok(new) => *worker = Some(new),
            Err(e) => tracing::warn!("a guest that turns itself off will not be noticed: {e}"),
        }
    }

    /// Ends the thread.
    pub fn stop(&self) {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

fn watch(end: &End, stop: &Wake) -> std::io::Result<()> {
    let mut poll = Poll::new()?;
    poll.add(stop, 0, Interest::Read)?;
    let mut ready = Vec::new();
    for look in 0..LOOKS {
        poll.wait(&mut ready, Some(FIRST * 2u32.pow(look)))?;
        if !ready.is_empty() || end.has_begun() {
            return Ok(());
        }
        if ask(end, PATIENCE) {
            return Ok(());
        }
    }
    Ok(())
}

/// Asks, in hardly any time: where the vCPUs are slow to answer, the next look may find out.
pub fn look(end: &End) {
    ask(end, QUICK);
}

/// Asks all vCPUs whether they are off, and ends the machine if so.
pub fn ask(end: &End, patience: Duration) -> bool {
    // Twice: a vCPU that answered could have been started again by one that answered later.
    let off = !end.has_begun() && end.are_all_off(patience) && end.are_all_off(patience);
    if off {
        end.begin(Outcome::PowerOff);
    }
    off
}
