//! Sockets between the guest and this host.

use std::ffi::c_char;

use krun_api::{Vsock as Device, VsockDirection, VsockError, VsockPort, VsockType};

use crate::context::with;
use crate::{Answer, EEXIST, EINVAL, ENOTSUP, Errno, args};

/// Bits of the features that carry the guest's inet and unix sockets.
const TSI_FEATURES: u32 = 0b11;

/// What was said of the device so far.
#[derive(Debug, Default)]
pub struct Vsock {
    /// The device that comes by itself is not wanted.
    no_implicit: bool,
    explicit: bool,
    ports: Vec<VsockPort>,
}

impl Vsock {
    /// The device, if there is one: the one asked for, or the one that comes with ports.
    pub fn take(&mut self) -> Option<Device> {
        let ports = std::mem::take(&mut self.ports);
        let implicit = !self.no_implicit && !ports.is_empty();
        (self.explicit || implicit).then_some(Device { ports })
    }

    fn add(&mut self, port: VsockPort) -> Answer<()> {
        if self.no_implicit && !self.explicit {
            return Err(Errno(libc::ENODEV));
        }
        if self.ports.iter().any(|p| (p.port, p.direction) == (port.port, port.direction)) {
            return Err(EEXIST);
        }
        port.check().map_err(|e| {
            tracing::error!("{e}");
            match e {
                VsockError::Occupied { .. } => EEXIST,
                _ => EINVAL,
            }
        })?;
        self.ports.push(port);
        Ok(())
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_vsock_port(ctx_id: u32, port: u32, filepath: *const c_char) -> i32 {
    // SAFETY: the arguments are passed on as they came.
    unsafe { krun_add_vsock_port2(ctx_id, port, filepath, false) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_vsock_port2(
    ctx_id: u32,
    port: u32,
    filepath: *const c_char,
    listen: bool,
) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a string.
        let path = unsafe { args::path(filepath) }?;
        let direction = if listen { VsockDirection::FromHost } else { VsockDirection::FromGuest };
        context.vsock.add(VsockPort { port, path, direction, socket: VsockType::Stream })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_add_vsock(ctx_id: u32, tsi_features: u32) -> i32 {
    with(ctx_id, |context| {
        if tsi_features & !TSI_FEATURES != 0 {
            return Err(EINVAL);
        }
        if context.vsock.explicit || !context.vsock.no_implicit {
            return Err(EEXIST);
        }
        if tsi_features != 0 {
            return Err(ENOTSUP);
        }
        context.vsock.explicit = true;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_disable_implicit_vsock(ctx_id: u32) -> i32 {
    with(ctx_id, |context| {
        context.vsock.no_implicit = true;
        Ok(())
    })
}
