//! Extended attributes, under the names they have on the host.
//!
//! They are reached through `/proc/self/fd/N`, which is the working directory of the serving thread, for the
//! calls on descriptors refuse those that cannot do I/O, and no other kind exists for special files.

use std::ffi::CStr;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::{Result, Share};
use crate::fs::abi::XATTR_MAX;
use crate::fs::inodes::What;
use crate::fs::sys::FdName;

impl Share {
    fn is_virtual(&self, node: u64) -> Result<bool> {
        Ok(matches!(self.inodes.get(node)?.what, What::Virtual(_)))
    }

    /// Sets attribute `name`.
    ///
    /// # Errors
    /// The host's reason; EROFS for overlays.
    pub fn setxattr(&mut self, node: u64, name: &CStr, value: &[u8], flags: u32) -> Result<()> {
        let fd = self.fd_to_change(node)?;
        self.caller()?;
        rustix::fs::setxattr(FdName::new(&fd).as_c_str(), name, value, XattrFlags::from_bits_retain(flags))
    }

    /// Removes attribute `name`.
    ///
    /// # Errors
    /// The host's reason; EROFS for overlays.
    pub fn removexattr(&mut self, node: u64, name: &CStr) -> Result<()> {
        let fd = self.fd_to_change(node)?;
        self.caller()?;
        rustix::fs::removexattr(FdName::new(&fd).as_c_str(), name)
    }

    /// Appends the value of `name` to `out`, at most `size` bytes, and returns its length; with `size` 0
    /// only the length.
    ///
    /// # Errors
    /// ERANGE: it is longer; ENODATA; or the host's reason.
    pub fn getxattr(&mut self, node: u64, name: &CStr, size: u32, out: &mut Vec<u8>) -> Result<usize> {
        if self.is_virtual(node)? {
            return Err(Errno::NODATA);
        }
        let fd = self.fd(node)?;
        self.caller()?;
        let path = FdName::new(&fd);
        if size == 0 {
            return rustix::fs::getxattr_query(path.as_c_str(), name);
        }
        fetch(size, out, |buf| rustix::fs::getxattr(path.as_c_str(), name, buf))
    }

    /// As [`Share::getxattr`], for the list of names.
    ///
    /// # Errors
    /// ERANGE: it is longer; or the host's reason.
    pub fn listxattr(&mut self, node: u64, size: u32, out: &mut Vec<u8>) -> Result<usize> {
        if self.is_virtual(node)? {
            return Ok(0);
        }
        let fd = self.fd(node)?;
        self.caller()?;
        let path = FdName::new(&fd);
        if size == 0 {
            return rustix::fs::listxattr_query(path.as_c_str());
        }
        fetch(size, out, |buf| rustix::fs::listxattr(path.as_c_str(), buf))
    }
}

/// Lets `call` fill a buffer of `size` bytes behind what `out` has, and keeps what it filled.
fn fetch(size: u32, out: &mut Vec<u8>, call: impl Fn(&mut [u8]) -> Result<usize>) -> Result<usize> {
    let start = out.len();
    out.resize(start + (size as usize).min(XATTR_MAX), 0);
    let got = call(&mut out[start..]);
    let kept = got.unwrap_or(0).min(out.len() - start);
    out.truncate(start + kept);
    got
}
