//! What needs the operating system by name.

pub mod library;
pub mod memory;
