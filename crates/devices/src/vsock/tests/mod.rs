//! A guest's socket layer that does what a test says, and programs of the host.

mod connections;
mod guest;
mod hostile;
mod limits;
mod packets;
mod random;
mod random_packets;
