//! Functions of the ABI that this version does not serve: they check what can be checked and answer
//! -ENOTSUP, so that a program can tell and go on without.

use std::ffi::{c_char, c_int, c_void};

use crate::context::with;
use crate::{EINVAL, ENOTSUP, answer, args};

/// Defines functions that answer -ENOTSUP for an existing context, -EINVAL for a NULL among the
/// arguments named after `needs`.
macro_rules! not_served {
    ($($name:ident($($arg:ident: $type:ty),*) $(needs $($must:ident),+)?;)*) => {$(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name(ctx_id: u32 $(, $arg: $type)*) -> i32 {
            with(ctx_id, |_| {
                $($(if $must.is_null() { return Err(EINVAL); })+)?
                $(let _ = $arg;)*
                Err(ENOTSUP)
            })
        }
    )*};
}

not_served! {
    krun_set_gpu_options(virgl_flags: u32);
    krun_set_gpu_options2(virgl_flags: u32, shm_size: u64);
    krun_set_gpu_render_server_fd(render_server_fd: c_int);
    krun_add_display(width: u32, height: u32);
    krun_display_set_edid(display_id: u32, edid_blob: *const u8, blob_size: usize) needs edid_blob;
    krun_display_set_dpi(display_id: u32, dpi: u32);
    krun_display_set_physical_size(display_id: u32, width_mm: u16, height_mm: u16);
    krun_display_set_refresh_rate(display_id: u32, refresh_rate: u32);
    krun_set_display_backend(display_backend: *const c_void, backend_size: usize) needs display_backend;
    krun_set_snd_device(enable: bool);
    krun_set_firmware(firmware_path: *const c_char) needs firmware_path;
    krun_set_tee_config_file(filepath: *const c_char) needs filepath;
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_port_map(ctx_id: u32, port_map: *const *const c_char) -> i32 {
    with(ctx_id, |_| {
        // SAFETY: the header asks for a list.
        match unsafe { args::list(port_map) }? {
            Some(ports) if !ports.is_empty() => Err(ENOTSUP),
            _ => Ok(()),
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_set_mapped_volumes(_ctx_id: u32, _mapped_volumes: *const *const c_char) -> i32 {
    answer(|| Err(EINVAL))
}
