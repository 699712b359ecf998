//! System calls that several devices need.

mod descriptors;
pub(crate) mod messages;
mod pieces;
pub(crate) mod signals;
mod timer;

pub(crate) use descriptors::descriptors_for_guests;
pub(crate) use pieces::{MAX_PIECES, read_into, write_from};
pub(crate) use timer::Timer;
