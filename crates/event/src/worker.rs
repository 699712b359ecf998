//! Threads whose end is never lost.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{Builder, JoinHandle};

use crate::{Wake, with_signals_blocked};

/// Why a worker ended other than by returning.
#[derive(Debug, Clone, thiserror::Error)]
#[error("thread {thread} panicked: {message}")]
pub struct Failure {
    /// The thread's name.
    pub thread: String,
    /// The panic's message.
    pub message: String,
}

/// A named thread that is asked to stop by a [`Wake`] and joined on drop. A panic inside is caught
/// and handed to the supervisor. All signals are blocked on it: they are for the program's own threads.
#[derive(Debug)]
pub struct Worker<T> {
    stop: Wake,
    thread: Option<JoinHandle<Option<T>>>,
}

impl<T: Send + 'static> Worker<T> {
    /// Runs `body(stop)` on a new thread; it returns soon after `stop` is set. `on_panic` is called
    /// on that thread if `body` panics.
    ///
    /// # Errors
    /// The host's reason when no thread or descriptor can be had.
    pub fn spawn(
        name: &str,
        on_panic: impl FnOnce(Failure) + Send + 'static,
        body: impl FnOnce(&Wake) -> T + Send + 'static,
    ) -> std::io::Result<Self> {
        let stop = Wake::new()?;
        let (inner, thread_name) = (stop.clone(), name.to_owned());
        let main = move || match catch_unwind(AssertUnwindSafe(|| body(&inner))) {
            Ok(value) => Some(value),
            Err(payload) => {
                on_panic(Failure { thread: thread_name, message: panic_message(payload.as_ref()) });
                None
            }
        };
        let thread = with_signals_blocked(|| Builder::new().name(name.to_owned()).spawn(main))?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// The wake-up that asks the thread to stop.
    pub fn stopper(&self) -> &Wake {
        &self.stop
    }

    /// Whether the thread has returned.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Asks the thread to stop, waits for it and returns its value; `None` if it panicked.
    pub fn stop(mut self) -> Option<T> {
        self.stop.wake();
        self.thread.take().and_then(|t| t.join().ok().flatten())
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        self.stop.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The text of a panic.
pub fn panic_message(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn returns_its_value_when_stopped() {
        let w = Worker::spawn(
            "t",
            |_| (),
            |stop| {
                while !stop.take() {
                    std::thread::yield_now();
                }
                5
            },
        );
        assert_eq!(w.unwrap().stop(), Some(5));
    }

    #[test]
    fn signals_are_for_other_threads() {
        let status = Worker::spawn("t", |_| (), |_| std::fs::read_to_string("/proc/thread-self/status"));
        let status = status.unwrap().stop().unwrap().unwrap();
        let blocked = status.lines().find_map(|l| l.strip_prefix("SigBlk:\t")).unwrap();
        // SIGTERM, for one.
        assert_ne!(u64::from_str_radix(blocked, 16).unwrap() & 1 << 14, 0);
    }

    #[test]
    fn a_panic_reaches_the_supervisor() {
        let (tx, rx) = mpsc::channel();
        let w = Worker::<()>::spawn("bad", move |f| tx.send(f).unwrap(), |_| panic!("oh {}", 1)).unwrap();
        let f = rx.recv().unwrap();
        assert_eq!((f.thread.as_str(), f.message.as_str()), ("bad", "oh 1"));
        assert!(w.stop().is_none());
    }
}
