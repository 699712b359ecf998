//! The devices of the machine. Each is a [`krun_virtio::VirtioDevice`] made from a spec of plain data; none
//! knows the hypervisor. System calls that need `unsafe` are in `sys` modules.

pub mod balloon;
pub mod block;
pub mod console;
pub mod fs;
pub mod input;
pub mod legacy;
pub mod net;
pub mod rng;
mod sys;
pub mod tty;
pub mod vhost_user;
pub mod vsock;
