//! Starting: from what was said to a running VM, and the end of this process.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use krun_api as api;
use rustix::event::{EventfdFlags, eventfd};

use crate::context::{self, Console, Context, Port, with_answer};
use crate::{Answer, EINVAL, Errno, answer};

/// How long the workload has between TERM and KILL when the shutdown descriptor is written to.
const GRACE: Duration = Duration::from_secs(10);

fn errno(e: &std::io::Error) -> Errno {
    Errno(e.raw_os_error().unwrap_or(libc::EIO))
}

/// An own copy of one of the caller's descriptors; `None` for -1.
pub fn duplicate(fd: RawFd) -> Answer<Option<OwnedFd>> {
    if fd < 0 {
        return Ok(None);
    }
    // SAFETY: it was open when it was given, and duplicating one that is closed since only fails.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned().map(Some).map_err(|e| errno(&e))
}

fn console(console: Console) -> Answer<api::Console> {
    Ok(match console {
        Console::Standard { input, output, error } => api::Console::Standard {
            input: duplicate(input)?,
            output: duplicate(output)?,
            error: duplicate(error)?,
        },
        Console::Ports(ports) => {
            let port = |p| {
                Ok(match p {
                    Port::Terminal { name, tty } => {
                        api::Port::Terminal { name, tty: duplicate(tty)?.ok_or(EINVAL)? }
                    }
                    Port::Stream { name, input, output } => {
                        api::Port::Stream { name, input: duplicate(input)?, output: duplicate(output)? }
                    }
                })
            };
            api::Console::Ports(ports.into_iter().map(port).collect::<Answer<_>>()?)
        }
    })
}

/// The console that a VM has unless it was disabled: the process's own streams, or a file.
fn implicit_console(context: &Context) -> Answer<Option<api::Console>> {
    if context.no_console {
        return Ok(None);
    }
    let Some(path) = &context.console_output else {
        return api::Console::inherit().map(Some).map_err(|e| errno(&e));
    };
    let file = File::create(path).map_err(|e| {
        tracing::error!("console output {}: {e}", path.display());
        errno(&e)
    })?;
    let copy = file.try_clone().map_err(|e| errno(&e))?;
    Ok(Some(api::Console::Standard { input: None, output: Some(file.into()), error: Some(copy.into()) }))
}

fn config(context: &mut Context) -> Answer<api::VmConfig> {
    let mut consoles: Vec<_> = implicit_console(context)?.into_iter().collect();
    for described in context.consoles.drain(..) {
        consoles.push(console(described)?);
    }
    let serial = match context.serial {
        None => None,
        Some((input, output)) => Some(api::Serial { input: duplicate(input)?, output: duplicate(output)? }),
    };
    let (disks, root_disk) = context.disks.take(context.has_root());
    let defaults = api::VmConfig::default();
    crate::files::fit_windows(&mut context.shares, context.memory_mib.unwrap_or(defaults.memory_mib));
    Ok(api::VmConfig {
        vcpus: context.vcpus.unwrap_or(defaults.vcpus),
        memory_mib: context.memory_mib.unwrap_or(defaults.memory_mib),
        kernel: context.kernel.take().unwrap_or(defaults.kernel),
        kernel_console: context.kernel_console.take(),
        shares: std::mem::take(&mut context.shares),
        disks,
        root_disk,
        command: std::mem::take(&mut context.command),
        init: !context.no_init,
        split_irqchip: context.split_irqchip,
        nested: context.nested,
        oem_strings: std::mem::take(&mut context.oem_strings),
        kernel_args: defaults.kernel_args,
        // One source of randomness is enough.
        rng: context.vhost_user.iter().all(|d| d.kind != api::DeviceKind::RNG),
        balloon: defaults.balloon,
        huge_pages: defaults.huge_pages,
        inputs: context.inputs.drain(..).map(crate::input::device).collect::<Answer<_>>()?,
        nets: context.nets.take()?,
        vsock: context.vsock.take(),
        vhost_user: std::mem::take(&mut context.vhost_user),
        verbose: defaults.verbose,
        consoles,
        serial,
        kernel_log: None,
    })
}

fn check(result: libc::c_int, what: &str) -> Answer<()> {
    if result == 0 {
        return Ok(());
    }
    let e = std::io::Error::last_os_error();
    tracing::error!("{what}: {e}");
    Err(errno(&e))
}

/// Leaves all groups but `gid`. A user namespace may forbid it (user_namespaces(7)), so that nobody gets rid of a group
/// by which something is refused to him; there the groups stay.
fn leave_groups(gid: libc::gid_t) -> Answer<()> {
    // SAFETY: one group, and a place that holds one.
    let result = unsafe { libc::setgroups(1, &raw const gid) };
    if result != 0 && std::fs::read("/proc/self/setgroups").is_ok_and(|s| s.starts_with(b"deny")) {
        tracing::warn!("this user namespace does not let go of supplementary groups: they stay");
        return Ok(());
    }
    check(result, "setgroups")
}

/// Takes on the group, then the user, that the caller asked for. The functions of the C library do so in all of its
/// threads.
fn drop_identity(context: &Context) -> Answer<()> {
    // SAFETY: neither passes memory.
    let (is_root, own_gid) = unsafe { (libc::geteuid() == 0, libc::getegid()) };
    if context.uid.is_some() && is_root {
        leave_groups(context.gid.unwrap_or(own_gid))?;
    }
    if let Some(gid) = context.gid {
        // SAFETY: no memory is passed.
        check(unsafe { libc::setgid(gid) }, "setgid")?;
    }
    if let Some(uid) = context.uid {
        // SAFETY: no memory is passed.
        check(unsafe { libc::setuid(uid) }, "setuid")?;
    }
    Ok(())
}

fn start_errno(error: &api::Error) -> Errno {
    Errno(error.raw_os_error().unwrap_or(libc::EINVAL))
}

/// Asks for the end of the workload when the descriptor is written to.
fn watch_shutdown(vm: &Arc<api::Vm>, fd: Arc<OwnedFd>) {
    let vm = Arc::downgrade(vm);
    let watch = move || {
        let mut count = [0u8; 8];
        let mut ready = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, which lives on this stack.
        while unsafe { libc::poll(&mut ready, 1, -1) } < 0 {}
        let _ = rustix::io::read(&fd, &mut count);
        if let Some(vm) = vm.upgrade() {
            vm.shutdown(GRACE);
        }
    };
    // The caller's handlers run on its own threads.
    let spawn = || std::thread::Builder::new().name("shutdown".into()).spawn(watch);
    if let Err(e) = api::with_signals_blocked(spawn) {
        tracing::error!("cannot watch the shutdown descriptor: {e}");
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_get_shutdown_eventfd(ctx_id: u32) -> i32 {
    with_answer(ctx_id, |context| {
        if context.no_init {
            // Only the built-in init listens for it.
            return Err(EINVAL);
        }
        if context.shutdown.is_none() {
            let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|e| Errno(e.raw_os_error()))?;
            context.shutdown = Some(Arc::new(fd));
        }
        context.shutdown.as_ref().map(|fd| fd.as_raw_fd()).ok_or(EINVAL)
    })
}

/// Runs the VM and ends the process.
fn enter(mut context: Context) -> Answer {
    let config = config(&mut context)?;
    drop_identity(&context)?;
    // This process is the VM's now; a limit that stays low only means that the guest can open fewer files.
    if let Err(e) = api::raise_open_file_limit() {
        tracing::warn!("the limit of open files stays: {e}");
    }
    let vm = api::Vm::start(config).map_err(|e| {
        tracing::error!("{e}");
        start_errno(&e)
    })?;
    let vm = Arc::new(vm);
    if let Some(fd) = context.shutdown.take() {
        watch_shutdown(&vm, fd);
    }
    let status = match vm.wait() {
        Ok(status) => status.code(),
        Err(e) => {
            tracing::error!("{e}");
            api::EXIT_SETUP
        }
    };
    // The VM's threads are joined, its sockets removed and the terminal is as it was. Not `exit`: most callers are
    // the child of a fork, with copies of their parent's unwritten output and of its handlers, which are the
    // parent's to write and to run. Programs of the 1.x library know it so.
    // SAFETY: ends the process, as the header says.
    unsafe { libc::_exit(status) }
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_start_enter(ctx_id: u32) -> i32 {
    answer(|| enter(context::remove(ctx_id)?))
}
