//! Readiness, wake-ups and supervised worker threads.

mod poll;
mod sys;
mod wake;
mod worker;

pub use poll::{Interest, Poll, Ready};
pub use sys::signals::with_signals_blocked;
pub use wake::Wake;
pub use worker::{Failure, Worker, panic_message};
