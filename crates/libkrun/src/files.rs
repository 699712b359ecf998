//! Shares and overlays.

use std::ffi::c_char;
use std::path::{Component, Path};
use std::slice;
use std::sync::Arc;

use krun_api::{Dax, Overlay, OverlayContent, ROOT_TAG, Share};

use crate::context::{Context, with};
use crate::{Answer, EEXIST, EINVAL, ENOENT, ENOTDIR, args};

/// Longest tag of a virtio-fs device, in bytes.
const MAX_TAG: usize = 36;

fn add_share(context: &mut Context, share: Share) -> Answer<()> {
    if share.tag.is_empty() || share.tag.len() > MAX_TAG {
        return Err(EINVAL);
    }
    if share.tag == ROOT_TAG && context.disks.has_root() {
        return Err(EEXIST);
    }
    match context.share(&share.tag) {
        // What was put into the implicit root goes into this one.
        Ok(root) if root.source.is_none() => {
            let overlays = std::mem::take(&mut root.overlays);
            *root = Share { overlays, ..share };
        }
        Ok(_) => return Err(EEXIST),
        Err(_) => context.shares.push(share),
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_set_root(ctx_id: u32, root_path: *const c_char) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for a string.
        let path = unsafe { args::path(root_path) }?;
        add_share(context, Share::root(path))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_virtiofs(ctx_id: u32, tag: *const c_char, path: *const c_char) -> i32 {
    // SAFETY: the arguments are passed on as they came.
    unsafe { krun_add_virtiofs4(ctx_id, tag, path, 0, false, 0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_virtiofs2(
    ctx_id: u32,
    tag: *const c_char,
    path: *const c_char,
    shm_size: u64,
) -> i32 {
    // SAFETY: the arguments are passed on as they came.
    unsafe { krun_add_virtiofs4(ctx_id, tag, path, shm_size, false, 0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_virtiofs3(
    ctx_id: u32,
    tag: *const c_char,
    path: *const c_char,
    shm_size: u64,
    read_only: bool,
) -> i32 {
    // SAFETY: the arguments are passed on as they came.
    unsafe { krun_add_virtiofs4(ctx_id, tag, path, shm_size, read_only, 0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_virtiofs4(
    ctx_id: u32,
    tag: *const c_char,
    path: *const c_char,
    shm_size: u64,
    read_only: bool,
    semantics: u32,
) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for strings.
        let (tag, path) = unsafe { (args::text(tag)?, args::path(path)?) };
        // Both semantics are served by the one, complete implementation.
        if semantics > 1 {
            return Err(EINVAL);
        }
        add_share(context, Share { read_only, dax: window(shm_size), ..Share::new(tag, path) })
    })
}

/// The window for a size that callers choose as they like: in whole steps, and no larger than there is.
fn window(shm_size: u64) -> Option<Dax> {
    let size = shm_size.min(Dax::MAX).next_multiple_of(Dax::STEP);
    (size > 0).then(|| Dax::new(size))
}

/// Makes windows smaller, or leaves them out, where they are too large together: for one guest, or for its memory, of which
/// its kernel takes 1/64 of their size. Callers chose sizes when they meant nothing, and their guests are to start.
pub fn fit_windows(shares: &mut [Share], memory_mib: u32) {
    // At most an eighth of the guest's memory.
    let memory = u64::from(memory_mib) << 20;
    let mut left = Dax::MAX_TOTAL.min(memory * 8);
    for share in shares {
        let Some(asked) = share.dax else { continue };
        let window = asked.window.min(left / Dax::STEP * Dax::STEP);
        left -= window;
        if window < asked.window {
            let (asked, window) = (asked.window >> 20, window >> 20);
            tracing::warn!(
                tag = share.tag,
                asked,
                window,
                "a DAX window (MiB) is made smaller; with 0 there is none"
            );
        }
        share.dax = (window > 0).then_some(Dax { window, ..asked });
    }
}

/// Checks that the parent of `path` is there: a directory of the host or one added before.
fn check_parent(share: &Share, path: &Path) -> Answer<()> {
    if path.as_os_str().is_empty() || !path.components().all(|c| matches!(c, Component::Normal(_))) {
        return Err(EINVAL);
    }
    if share.overlays.iter().any(|o| o.path == path) {
        return Err(EEXIST);
    }
    let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) else { return Ok(()) };
    if let Some(overlay) = share.overlays.iter().find(|o| o.path == parent) {
        return match overlay.content {
            OverlayContent::Directory => Ok(()),
            OverlayContent::File { .. } => Err(ENOTDIR),
        };
    }
    let on_host = share.source.as_ref().ok_or(ENOENT)?.join(parent);
    match on_host.symlink_metadata() {
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(_) => Err(ENOTDIR),
        Err(e) => Err(crate::Errno(e.raw_os_error().unwrap_or(libc::ENOENT))),
    }
}

fn add_overlay(context: &mut Context, tag: &str, overlay: Overlay) -> Answer<()> {
    // The implicit root is empty and exists as soon as something is put there; another may still take its place.
    if tag == ROOT_TAG && context.share(tag).is_err() {
        context.shares.push(Share { source: None, ..Share::root("") });
    }
    let share = context.share(tag)?;
    check_parent(share, &overlay.path)?;
    share.overlays.push(overlay);
    Ok(())
}

/// Bytes that the caller lends for the VM's life.
struct Borrowed(&'static [u8]);

impl AsRef<[u8]> for Borrowed {
    fn as_ref(&self) -> &[u8] {
        self.0
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_fs_add_overlay_file(
    ctx_id: u32,
    fs_tag: *const c_char,
    path: *const c_char,
    data: *const u8,
    data_len: usize,
    mode: u32,
    one_shot: bool,
) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for strings.
        let (tag, path) = unsafe { (args::text(fs_tag)?, args::path(path)?) };
        let bytes: &'static [u8] = match (data.is_null(), data_len) {
            (_, 0) => &[],
            (true, _) => return Err(EINVAL),
            // SAFETY: the header has the caller keep the bytes, unchanged, until the VM has ended.
            (false, len) => unsafe { slice::from_raw_parts(data, len) },
        };
        let data = Arc::new(Borrowed(bytes));
        let path = path.strip_prefix("/").map(Path::to_owned).unwrap_or(path);
        let content = OverlayContent::File { data, one_shot };
        add_overlay(context, &tag, Overlay { path, mode, content })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_fs_add_overlay_dir(
    ctx_id: u32,
    fs_tag: *const c_char,
    path: *const c_char,
    mode: u32,
) -> i32 {
    with(ctx_id, |context| {
        // SAFETY: the header asks for strings.
        let (tag, path) = unsafe { (args::text(fs_tag)?, args::path(path)?) };
        let path = path.strip_prefix("/").map(Path::to_owned).unwrap_or(path);
        add_overlay(context, &tag, Overlay { path, mode, content: OverlayContent::Directory })
    })
}
