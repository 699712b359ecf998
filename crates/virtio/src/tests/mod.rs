//! Tests of the whole: the device's side against the driver's side.

mod bounce;
mod elsewhere;
mod life;
mod mmio;
mod notify;
mod pair;
mod queue;
