//! What needs the operating system by name.

pub mod signals;
