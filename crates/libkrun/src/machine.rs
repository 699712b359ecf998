//! Processors, memory, kernel, and what the host can do.

use std::ffi::c_char;

use krun_api::{Kernel, KernelFormat};

use crate::context::with;
use crate::{Answer, EINVAL, Errno, answer, args};

#[unsafe(no_mangle)]
pub extern "C" fn krun_set_vm_config(ctx_id: u32, num_vcpus: u8, ram_mib: u32) -> i32 {
    with(ctx_id, |context| {
        if num_vcpus == 0 || ram_mib == 0 {
            return Err(EINVAL);
        }
        (context.vcpus, context.memory_mib) = (Some(num_vcpus), Some(ram_mib));
        Ok(())
    })
}

fn format(number: u32) -> Answer<KernelFormat> {
    Ok(match number {
        0 => KernelFormat::Raw,
        1 => KernelFormat::Elf,
        2 => KernelFormat::PeGz,
        3 => KernelFormat::ImageBz2,
        4 => KernelFormat::ImageGz,
        5 => KernelFormat::ImageZstd,
        _ => return Err(EINVAL),
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_kernel(
    ctx_id: u32,
    kernel_path: *const c_char,
    kernel_format: u32,
    initramfs: *const c_char,
    cmdline: *const c_char,
) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for strings, of which the last two may be NULL.
        let (path, initramfs, cmdline) =
            unsafe { (args::path(kernel_path)?, args::optional(initramfs)?, args::optional(cmdline)?) };
        let cmdline = cmdline.map(|c| c.into_string().map_err(|_| EINVAL)).transpose()?;
        context.kernel = Some(Kernel::File {
            path,
            format: format(kernel_format)?,
            initramfs: initramfs.map(Into::into),
            cmdline,
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_kernel_console(ctx_id: u32, console_id: *const c_char) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a string.
        let name = unsafe { args::text(console_id) }?;
        // It becomes one word of the command line.
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c == '"' || c.is_control()) {
            return Err(EINVAL);
        }
        context.kernel_console = Some(name);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_split_irqchip(ctx_id: u32, enable: bool) -> i32 {
    with(ctx_id, |context| {
        context.split_irqchip = enable;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_set_nested_virt(ctx_id: u32, enabled: bool) -> i32 {
    with(ctx_id, |context| {
        context.nested = enabled;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_smbios_oem_strings(ctx_id: u32, oem_strings: *const *const c_char) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a list.
        let strings = unsafe { args::list(oem_strings) }?.ok_or(EINVAL)?;
        let strings: Vec<_> =
            strings.into_iter().map(|s| s.into_string().map_err(|_| EINVAL)).collect::<Answer<_>>()?;
        krun_api::check_oem_strings(&strings).map_err(|e| {
            tracing::error!("{e}");
            EINVAL
        })?;
        context.oem_strings = strings;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_check_nested_virt() -> i32 {
    answer(|| Ok(i32::from(krun_api::host::nested_virtualisation())))
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_get_max_vcpus() -> i32 {
    answer(|| {
        let count = krun_api::host::max_vcpus().map_err(|e| {
            tracing::error!("{e}");
            Errno(libc::ENODEV)
        })?;
        i32::try_from(count).map_err(|_| EINVAL)
    })
}

/// Highest feature number of the header.
const LAST_FEATURE: u64 = 11;
const FEATURE_NET: u64 = 0;
const FEATURE_BLK: u64 = 1;
const FEATURE_INPUT: u64 = 4;
const FEATURE_INIT_BLOB: u64 = 11;

#[unsafe(no_mangle)]
pub extern "C" fn krun_has_feature(feature: u64) -> i32 {
    answer(|| match feature {
        FEATURE_NET | FEATURE_BLK | FEATURE_INPUT | FEATURE_INIT_BLOB => Ok(1),
        0..=LAST_FEATURE => Ok(0),
        _ => Err(EINVAL),
    })
}
