//! System calls of the console.

mod timer;
mod unix;

pub use timer::Timer;
pub use unix::{read_into, write_from};
