//! The server driven by a small FUSE client, against directories of the host.

mod client;
mod confine;
mod kernel;
mod locks;
mod mapped;
mod mounts;
mod ops;
mod overlays;
mod owners;
mod pseudo;
mod queue;
mod random;
mod read_only;
mod removed;
mod scale;
mod twin;
