//! System calls of the console.

mod unix;

pub use unix::{read_into, write_from};
