//! Arguments as C passes them.

use std::ffi::{CStr, OsStr, OsString, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::{Answer, E2BIG, EINVAL};

/// Longest list of strings accepted, above what a Linux guest could give a program (6 MiB with the pointers); a list
/// without its NULL ends the reading there.
const MAX_LIST: usize = 1 << 20;

/// A string that must be there.
///
/// # Safety
/// `s` is NULL or points to a NUL-terminated string.
pub unsafe fn string(s: *const c_char) -> Answer<OsString> {
    if s.is_null() {
        return Err(EINVAL);
    }
    // SAFETY: not NULL, and the caller vouches for the terminator.
    Ok(OsStr::from_bytes(unsafe { CStr::from_ptr(s) }.to_bytes()).to_owned())
}

/// A string that must be there and be UTF-8.
///
/// # Safety
/// As for [`string`].
pub unsafe fn text(s: *const c_char) -> Answer<String> {
    // SAFETY: as promised to this function.
    unsafe { string(s) }?.into_string().map_err(|_| EINVAL)
}

/// A path that must be there and not be empty.
///
/// # Safety
/// As for [`string`].
pub unsafe fn path(s: *const c_char) -> Answer<PathBuf> {
    // SAFETY: as promised to this function.
    let path = unsafe { string(s) }?;
    if path.is_empty() { Err(EINVAL) } else { Ok(path.into()) }
}

/// A string that may be NULL.
///
/// # Safety
/// As for [`string`].
pub unsafe fn optional(s: *const c_char) -> Answer<Option<OsString>> {
    if s.is_null() {
        return Ok(None);
    }
    // SAFETY: as promised to this function.
    unsafe { string(s) }.map(Some)
}

/// A list of strings ended by NULL; `None` when the list itself is NULL.
///
/// # Safety
/// `list` is NULL or points to pointers of which each is NULL or a NUL-terminated string, up to the first NULL.
pub unsafe fn list(list: *const *const c_char) -> Answer<Option<Vec<OsString>>> {
    if list.is_null() {
        return Ok(None);
    }
    let mut strings = Vec::new();
    for at in 0..=MAX_LIST {
        // SAFETY: no NULL came before `at`, so the list goes on to here.
        let entry = unsafe { *list.add(at) };
        if entry.is_null() {
            return Ok(Some(strings));
        }
        // SAFETY: not NULL, so a string.
        strings.push(unsafe { string(entry) }?);
    }
    tracing::error!("a list of more than {MAX_LIST} strings, or one that does not end with NULL");
    Err(E2BIG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_are_taken_and_endless_ones_refused() {
        let word = c"K=V".as_ptr();
        for (len, wanted) in [(5000, Ok(5000)), (MAX_LIST, Ok(MAX_LIST)), (MAX_LIST + 1, Err(E2BIG))] {
            let mut pointers = vec![word; len];
            pointers.push(std::ptr::null());
            // SAFETY: a list of strings that ends with NULL.
            let taken = unsafe { list(pointers.as_ptr()) };
            assert_eq!(taken.map(|l| l.map_or(0, |l| l.len())), wanted);
        }
    }
}
