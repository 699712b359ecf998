//! The table of contexts: plain data, no descriptor, no thread.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use krun_api::{Command, Kernel, ROOT_TAG, Share};

use crate::{Answer, ENOENT, Errno, answer};

/// What was said of a VM so far. Descriptors are the caller's numbers until the VM starts.
#[derive(Debug, Default)]
pub struct Context {
    pub vcpus: Option<u8>,
    pub memory_mib: Option<u32>,
    pub kernel: Option<Kernel>,
    pub kernel_console: Option<String>,
    pub split_irqchip: bool,
    pub nested: bool,
    pub oem_strings: Vec<String>,
    pub shares: Vec<Share>,
    pub disks: crate::disks::Disks,
    pub command: Command,
    pub no_init: bool,
    pub no_console: bool,
    pub console_output: Option<PathBuf>,
    pub consoles: Vec<Console>,
    pub serial: Option<(RawFd, RawFd)>,
    pub inputs: Vec<crate::input::Described>,
    pub nets: crate::net::Nets,
    pub vsock: crate::vsock::Vsock,
    pub vhost_user: Vec<krun_api::VhostUser>,
    pub uid: Option<libc::uid_t>,
    pub gid: Option<libc::gid_t>,
    pub shutdown: Option<Arc<std::os::fd::OwnedFd>>,
}

/// A console device as the caller described it.
#[derive(Debug)]
pub enum Console {
    Standard { input: RawFd, output: RawFd, error: RawFd },
    Ports(Vec<Port>),
}

/// A port of a console device.
#[derive(Debug)]
pub enum Port {
    Terminal { name: String, tty: RawFd },
    Stream { name: String, input: RawFd, output: RawFd },
}

impl Context {
    /// The share with `tag`.
    pub fn share(&mut self, tag: &str) -> Answer<&mut Share> {
        self.shares.iter_mut().find(|s| s.tag == tag).ok_or(ENOENT)
    }

    /// Whether a root directory was given. The implicit one has none behind it.
    pub fn has_root(&self) -> bool {
        self.shares.iter().any(|s| s.tag == ROOT_TAG && s.source.is_some())
    }
}

#[derive(Default)]
struct Table {
    next: u32,
    contexts: HashMap<u32, Context>,
}

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);

fn table() -> MutexGuard<'static, Table> {
    // A panic while the table was held left plain data behind, nothing half-written.
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds an empty context.
pub fn create() -> Answer {
    let mut table = table();
    let id = table.next;
    table.next = i32::try_from(id).ok().and_then(|i| i.checked_add(1)).ok_or(Errno(libc::ENOSPC))? as u32;
    table.contexts.insert(id, Context::default());
    Ok(id as i32)
}

/// Takes a context out of the table.
pub fn remove(id: u32) -> Answer<Context> {
    table().contexts.remove(&id).ok_or(ENOENT)
}

/// Changes a context: the body of most functions of the ABI.
pub fn with(id: u32, change: impl FnOnce(&mut Context) -> Answer<()>) -> i32 {
    with_answer(id, |context| change(context).map(|()| 0))
}

/// Changes a context and answers a value.
pub fn with_answer(id: u32, change: impl FnOnce(&mut Context) -> Answer) -> i32 {
    answer(|| table().contexts.get_mut(&id).ok_or(ENOENT).and_then(change))
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_create_ctx() -> i32 {
    answer(|| {
        // The caller may change its mount namespace before it starts the VM, so the bundle is looked for
        // now. Without one, a kernel may still be given; starting says what is missing.
        if let Err(e) = krun_api::preload_kernel() {
            tracing::debug!("no kernel bundle yet: {e}");
        }
        create()
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_free_ctx(ctx_id: u32) -> i32 {
    answer(|| remove(ctx_id).map(|_| 0))
}
