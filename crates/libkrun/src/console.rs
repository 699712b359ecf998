//! Consoles, ports and the serial line.

use std::ffi::{c_char, c_int};

use crate::context::{Console, Port, with, with_answer};
use crate::{Answer, EEXIST, EINVAL, ENOENT, args};

/// A descriptor that is open, or -1 for none.
fn descriptor_or_none(fd: c_int) -> Answer<c_int> {
    if fd == -1 { Ok(fd) } else { descriptor(fd) }
}

/// A descriptor that is open.
pub fn descriptor(fd: c_int) -> Answer<c_int> {
    // SAFETY: F_GETFD touches no memory and changes nothing.
    if fd >= 0 && unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0 { Ok(fd) } else { Err(EINVAL) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_console_output(ctx_id: u32, filepath: *const c_char) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a string.
        let path = unsafe { args::path(filepath) }?;
        if context.console_output.is_some() {
            return Err(EEXIST);
        }
        context.console_output = Some(path);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_disable_implicit_console(ctx_id: u32) -> i32 {
    with(ctx_id, |context| {
        context.no_console = true;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_add_virtio_console_default(
    ctx_id: u32,
    input_fd: c_int,
    output_fd: c_int,
    err_fd: c_int,
) -> i32 {
    with(ctx_id, |context| {
        let console = Console::Standard {
            input: descriptor_or_none(input_fd)?,
            output: descriptor_or_none(output_fd)?,
            error: descriptor_or_none(err_fd)?,
        };
        context.consoles.push(console);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_add_serial_console_default(ctx_id: u32, input_fd: c_int, output_fd: c_int) -> i32 {
    with(ctx_id, |context| {
        if context.serial.is_some() {
            return Err(EEXIST);
        }
        context.serial = Some((descriptor_or_none(input_fd)?, descriptor_or_none(output_fd)?));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_add_virtio_console_multiport(ctx_id: u32) -> i32 {
    with_answer(ctx_id, |context| {
        context.consoles.push(Console::Ports(Vec::new()));
        i32::try_from(context.consoles.len() - 1).map_err(|_| EINVAL)
    })
}

fn add_port(ctx_id: u32, console_id: u32, port: impl FnOnce() -> Answer<Port>) -> i32 {
    with(ctx_id, |context| match context.consoles.get_mut(console_id as usize) {
        Some(Console::Ports(ports)) => {
            ports.push(port()?);
            Ok(())
        }
        Some(Console::Standard { .. }) => Err(EINVAL),
        None => Err(ENOENT),
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_console_port_tty(
    ctx_id: u32,
    console_id: u32,
    name: *const c_char,
    tty_fd: c_int,
) -> i32 {
    add_port(ctx_id, console_id, || {
        // SAFETY: the header asks for a string.
        let name = if name.is_null() { String::new() } else { unsafe { args::text(name) }? };
        // SAFETY: isatty touches no memory.
        if unsafe { libc::isatty(descriptor(tty_fd)?) } == 0 {
            return Err(crate::Errno(libc::ENOTTY));
        }
        Ok(Port::Terminal { name, tty: tty_fd })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_console_port_inout(
    ctx_id: u32,
    console_id: u32,
    name: *const c_char,
    input_fd: c_int,
    output_fd: c_int,
) -> i32 {
    add_port(ctx_id, console_id, || {
        // SAFETY: the header asks for a string.
        let name = unsafe { args::text(name) }?;
        if name.is_empty() {
            return Err(EINVAL);
        }
        Ok(Port::Stream {
            name,
            input: descriptor_or_none(input_fd)?,
            output: descriptor_or_none(output_fd)?,
        })
    })
}
