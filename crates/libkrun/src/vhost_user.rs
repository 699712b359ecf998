//! Devices whose other half is another process.

use std::ffi::c_char;

use krun_api::{DeviceKind, VhostUser};

use crate::context::with;
use crate::{Answer, EINVAL, args};

/// Most sizes that are read of a list; more than a device can have queues.
const MAX_SIZES: usize = 256;

/// Sizes of queues: `count` of them, or up to a zero if that is 0.
///
/// # Safety
/// `sizes` is NULL or points to so many.
unsafe fn sizes(sizes: *const u16, count: u16) -> Answer<Vec<u16>> {
    let mut list = Vec::new();
    let most = if count == 0 { MAX_SIZES } else { count.into() };
    while !sizes.is_null() && list.len() < most {
        // SAFETY: the caller vouches for `count` of them, or for a zero at the end, which has not come.
        let size = unsafe { *sizes.add(list.len()) };
        if size == 0 && count == 0 {
            return Ok(list);
        }
        list.push(size);
    }
    if count == 0 && !sizes.is_null() { Err(EINVAL) } else { Ok(list) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_vhost_user_device(
    ctx_id: u32,
    device_type: u32,
    socket_path: *const c_char,
    name: *const c_char,
    num_queues: u16,
    queue_sizes: *const u16,
) -> i32 {
    with(ctx_id, |context| {
        let kind = DeviceKind::from_id(device_type).ok_or(EINVAL)?;
        // SAFETY: the header asks for strings, of which the second may be NULL, and for a list.
        let (path, name, sizes) =
            unsafe { (args::path(socket_path)?, args::optional(name)?, sizes(queue_sizes, num_queues)?) };
        let name = name.map(|n| n.into_string().map_err(|_| EINVAL)).transpose()?;
        let device = VhostUser {
            queues: Some(num_queues).filter(|n| *n > 0),
            sizes,
            tag: name.clone().filter(|_| kind == DeviceKind::FS),
            name,
            ..VhostUser::new(kind, path)
        };
        device.validate().map_err(|e| {
            tracing::error!("{e}");
            EINVAL
        })?;
        context.vhost_user.push(device);
        Ok(())
    })
}
