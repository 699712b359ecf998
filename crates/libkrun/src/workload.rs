//! The program, its arguments and its identity.

use std::ffi::{OsString, c_char};
use std::os::unix::ffi::OsStrExt;

use crate::context::with;
use crate::{Answer, EINVAL, answer, args};

/// The caller's environment as `KEY=VALUE` entries.
fn own_environment() -> Vec<OsString> {
    std::env::vars_os()
        .map(|(mut key, value)| {
            key.push("=");
            key.push(value);
            key
        })
        .collect()
}

/// # Safety
/// As for [`args::list`].
unsafe fn environment(envp: *const *const c_char) -> Answer<Vec<OsString>> {
    // SAFETY: as promised to this function.
    let entries = unsafe { args::list(envp) }?.unwrap_or_else(own_environment);
    if entries.iter().all(|e| e.as_bytes().contains(&b'=')) { Ok(entries) } else { Err(EINVAL) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_exec(
    ctx_id: u32,
    exec_path: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a string and two lists.
        let (program, arguments, env) =
            unsafe { (args::path(exec_path)?, args::list(argv)?, environment(envp)?) };
        context.command.program = program.into();
        context.command.args = arguments.unwrap_or_default();
        context.command.env = env;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_env(ctx_id: u32, envp: *const *const c_char) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a list.
        context.command.env = unsafe { environment(envp) }?;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_workdir(ctx_id: u32, workdir_path: *const c_char) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a string.
        context.command.cwd = Some(unsafe { args::path(workdir_path) }?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_rlimits(ctx_id: u32, rlimits: *const *const c_char) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a list.
        let list = unsafe { args::list(rlimits) }?.ok_or(EINVAL)?;
        let parse = |entry: &OsString| entry.to_str().and_then(|e| e.parse().ok()).ok_or(EINVAL);
        context.command.limits = list.iter().map(parse).collect::<Answer<_>>()?;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_get_default_init(data_out: *mut *const u8, len_out: *mut usize) -> i32 {
    answer(|| {
        if data_out.is_null() || len_out.is_null() {
            return Err(EINVAL);
        }
        // SAFETY: neither is NULL, and the header asks for writable places.
        unsafe {
            data_out.write(krun_api::INIT.as_ptr());
            len_out.write(krun_api::INIT.len());
        }
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_disable_implicit_init(ctx_id: u32) -> i32 {
    with(ctx_id, |context| {
        context.no_init = true;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_setuid(ctx_id: u32, uid: libc::uid_t) -> i32 {
    with(ctx_id, |context| {
        context.uid = Some(uid);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_setgid(ctx_id: u32, gid: libc::gid_t) -> i32 {
    with(ctx_id, |context| {
        context.gid = Some(gid);
        Ok(())
    })
}
