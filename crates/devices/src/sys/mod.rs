//! System calls that several devices need.

pub(crate) mod signals;
mod timer;

pub(crate) use timer::Timer;
