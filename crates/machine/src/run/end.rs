//! How a machine ends, agreed on by all its threads.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use krun_hv::{ExitCounts, Kicker};

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The guest turned itself off.
    PowerOff,
    /// The guest asked to be restarted, which is how most guests end.
    Reset,
    /// The guest's kernel gave up.
    Panic,
    /// The guest's kernel destroyed its own exception handling.
    TripleFault,
    /// [`super::Running::kill`] was called.
    Killed,
    /// The machine could not go on.
    Error(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("powered off"),
            Self::Reset => f.write_str("reset"),
            Self::Panic => f.write_str("its kernel panicked"),
            Self::TripleFault => f.write_str("triple fault"),
            Self::Killed => f.write_str("killed"),
            Self::Error(text) => f.write_str(text),
        }
    }
}

#[derive(Default)]
struct State {
    outcome: Option<Outcome>,
    /// All threads are past their work, and what they used is gone.
    done: bool,
    kickers: Vec<Kicker>,
    /// What makes waits for the outside world give up.
    cancel: Vec<Box<dyn Fn() + Send + Sync>>,
    /// How often [`End::are_all_off`] has asked, and the vCPUs that have not answered, or no.
    census: (u64, usize),
    /// When somebody looked after the machine last.
    looked: Option<Instant>,
}

/// How often who waits for a machine looks after it.
const LOOK: Duration = Duration::from_secs(2);

/// The end that a machine's threads share.
pub struct End {
    ending: AtomicBool,
    /// Number of the last question to the vCPUs.
    asking: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
    counts: Vec<Mutex<ExitCounts>>,
}

impl fmt::Debug for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("End").field("outcome", &state.outcome).field("done", &state.done).finish()
    }
}

impl End {
    /// For a machine of `vcpus`.
    pub fn new(vcpus: u32) -> Self {
        Self {
            ending: AtomicBool::new(false),
            asking: AtomicU64::new(0),
            state: Mutex::default(),
            changed: Condvar::new(),
            counts: (0..vcpus).map(|_| Mutex::default()).collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No method leaves the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how to interrupt the vCPUs. Does so if the end has begun: a device may fail before the vCPUs run.
    pub fn set_kickers(&self, kickers: Vec<Kicker>) {
        let mut state = self.lock();
        state.kickers = kickers;
        if state.outcome.is_some() {
            state.kickers.iter().for_each(Kicker::kick);
        }
    }

    /// Begins the end, once: the first outcome stays.
    pub fn begin(&self, outcome: Outcome) {
        let mut state = self.lock();
        if state.outcome.is_none() {
            state.outcome = Some(outcome);
            self.ending.store(true, Ordering::SeqCst);
            for kicker in &state.kickers {
                kicker.kick();
            }
        }
    }

    /// Says what makes a wait for the outside world give up when the machine is killed.
    pub fn on_kill(&self, cancel: impl Fn() + Send + Sync + 'static) {
        self.lock().cancel.push(Box::new(cancel));
    }

    /// Begins the end if it has not begun, and hastens it if it has.
    pub fn kill(&self) {
        self.begin(Outcome::Killed);
        for cancel in &self.lock().cancel {
            cancel();
        }
    }

    /// Whether every vCPU says within `patience` that it is off.
    pub fn are_all_off(&self, patience: Duration) -> bool {
        let mut state = self.lock();
        state.census = (state.census.0 + 1, self.counts.len());
        self.asking.store(state.census.0, Ordering::SeqCst);
        for kicker in &state.kickers {
            kicker.kick();
        }
        let all = |s: &mut State| s.census.1 > 0;
        let waited =
            self.changed.wait_timeout_while(state, patience, all).unwrap_or_else(PoisonError::into_inner);
        waited.0.census.1 == 0
    }

    /// A vCPU that was interrupted answers a question not yet answered, whose number it keeps in
    /// `answered`.
    pub fn answer(&self, answered: &mut u64, is_off: impl FnOnce() -> bool) {
        let question = self.asking.load(Ordering::SeqCst);
        if question != std::mem::replace(answered, question) && is_off() {
            let mut state = self.lock();
            // An answer that comes late is not one to a later question.
            if state.census.0 == question && state.census.1 > 0 {
                state.census.1 -= 1;
                self.changed.notify_all();
            }
        }
    }

    /// Whether the end has begun.
    pub fn has_begun(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// How, if so.
    pub fn outcome(&self) -> Option<Outcome> {
        self.lock().outcome.clone()
    }

    /// All is over.
    pub fn finish(&self) {
        let mut state = self.lock();
        state.done = true;
        state.kickers = Vec::new();
        state.cancel = Vec::new();
        self.changed.notify_all();
    }

    /// Whether it is time to look after the machine, for who does not wait: every [`LOOK`] from the first call on.
    pub fn is_look_due(&self) -> bool {
        let mut state = self.lock();
        let due = !state.done && state.looked.is_some_and(|last| last.elapsed() >= LOOK);
        if due || state.looked.is_none() {
            state.looked = Some(Instant::now());
        }
        due
    }

    /// The outcome once all is over, without waiting.
    pub fn try_wait(&self) -> Option<Outcome> {
        let state = self.lock();
        state.outcome.clone().filter(|_| state.done)
    }

    /// Waits until all is over, and calls `look` every [`LOOK`] meanwhile.
    pub fn wait(&self, look: impl Fn()) -> Outcome {
        let mut state = self.lock();
        loop {
            let waited = self.changed.wait_timeout_while(state, LOOK, |s| !s.done);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.done {
                break;
            }
            drop(state);
            look();
            state = self.lock();
        }
        state.outcome.clone().unwrap_or_else(|| Outcome::Error("the vCPUs ended without a reason".into()))
    }

    /// Stores the exits of a vCPU so far.
    pub fn store_counts(&self, vcpu: u32, counts: ExitCounts) {
        if let Some(place) = self.counts.get(vcpu as usize) {
            *place.lock().unwrap_or_else(PoisonError::into_inner) = counts;
        }
    }

    /// The exits of all vCPUs so far.
    pub fn counts(&self) -> ExitCounts {
        let mut sum = ExitCounts::default();
        for counts in &self.counts {
            sum += *counts.lock().unwrap_or_else(PoisonError::into_inner);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn killing_twice_hastens_an_end_that_waits() {
        let end = End::new(0);
        let cancelled = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&cancelled);
        end.on_kill(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        end.begin(Outcome::Reset);
        assert_eq!(cancelled.load(Ordering::SeqCst), 0);
        end.kill();
        assert_eq!((cancelled.load(Ordering::SeqCst), end.outcome()), (1, Some(Outcome::Reset)));
    }

    #[test]
    fn all_vcpus_must_answer_the_same_question() {
        let end = Arc::new(End::new(2));
        assert!(!end.are_all_off(Duration::ZERO));
        let (mut one, mut two) = (0, 0);
        // Too late for the first question.
        end.answer(&mut one, || true);
        assert!(!end.are_all_off(Duration::ZERO));
        let inner = Arc::clone(&end);
        let vcpus = std::thread::spawn(move || {
            while inner.asking.load(Ordering::SeqCst) < 3 {
                std::thread::yield_now();
            }
            inner.answer(&mut one, || true);
            inner.answer(&mut one, || true);
            inner.answer(&mut two, || false);
            while inner.asking.load(Ordering::SeqCst) < 4 {
                std::thread::yield_now();
            }
            inner.answer(&mut one, || true);
            inner.answer(&mut two, || true);
        });
        assert!(!end.are_all_off(Duration::from_millis(100)));
        assert!(end.are_all_off(Duration::from_secs(20)));
        vcpus.join().unwrap();
    }

    #[test]
    fn who_asks_again_and_again_looks_now_and_then() {
        let end = End::new(0);
        assert_eq!([(); 2].map(|()| end.is_look_due()), [false, false]);
        end.lock().looked = Instant::now().checked_sub(LOOK);
        assert_eq!([(); 2].map(|()| end.is_look_due()), [true, false]);
        end.lock().looked = Instant::now().checked_sub(LOOK);
        end.finish();
        assert!(!end.is_look_due());
    }

    #[test]
    fn kickers_that_come_after_the_end_kick() {
        let end = End::new(1);
        end.begin(Outcome::Error("a device failed".into()));
        let kicks = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&kicks);
        end.set_kickers(vec![Kicker::from_fn(move || {
            count.fetch_add(1, Ordering::SeqCst);
        })]);
        assert_eq!(kicks.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn the_first_outcome_stays_and_kicks_once() {
        let end = End::new(1);
        let kicks = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&kicks);
        end.set_kickers(vec![Kicker::from_fn(move || {
            count.fetch_add(1, Ordering::SeqCst);
        })]);
        assert!(!end.has_begun());
        end.begin(Outcome::Reset);
        end.begin(Outcome::Killed);
        assert_eq!((kicks.load(Ordering::SeqCst), end.try_wait()), (1, None));
        end.finish();
        assert_eq!((end.try_wait(), end.wait(|| {})), (Some(Outcome::Reset), Outcome::Reset));
    }
}
