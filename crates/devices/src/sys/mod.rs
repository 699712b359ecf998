//! System calls that several devices need.

pub(crate) mod signals;
