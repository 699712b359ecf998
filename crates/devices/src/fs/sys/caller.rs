//! Who the host thinks is acting: the thread's file-system ids, its umask and two capabilities.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags};

/// The identity of the thread that serves a share. All of it belongs to the thread alone: the rest of
/// the process keeps its ids, umask and working directory.
#[derive(Debug)]
pub struct Caller {
    uid: u32,
    gid: u32,
    /// The thread may act under the ids of others.
    switches: bool,
    caps: CapabilitySets,
    /// Whether `CAP_FSETID` is in effect now.
    fsetid: bool,
    /// File capabilities go with the user id, and must be taken back each time.
    fixup: bool,
}

impl Caller {
    /// Sets the calling thread up: a umask and working directory of its own (no mask, and
    /// `/proc/self/fd` as `fds`), so that modes arrive as the guest sent them and attributes of
    /// inodes can be reached by descriptor number. It loses `CAP_SYS_RESOURCE`, which would take it past
    /// quotas and into the space kept for the host's root.
    ///
    /// # Errors
    /// The host refuses a private umask, or `fds` is no directory.
    pub fn enter(fds: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: CLONE_FS detaches umask, root and working directory of this thread; memory and
        // descriptors stay shared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
        rustix::process::umask(Mode::empty());
        rustix::process::fchdir(fds)?;
        let mut caps = rustix::thread::capabilities(None)?;
        if caps.effective.contains(CapabilitySet::SYS_RESOURCE) {
            caps.effective.remove(CapabilitySet::SYS_RESOURCE);
            rustix::thread::set_capabilities(None, caps)?;
        }
        let needed = CapabilitySet::SETUID | CapabilitySet::SETGID;
        let switches = caps.effective.contains(needed);
        // Without this, the file capabilities go while another id is worn and the host would check
        // permissions a second time, not knowing the guest user's groups. The guest has checked.
        let fixup = switches && !keep_caps();
        let fsetid = caps.effective.contains(CapabilitySet::FSETID);
        Ok(Self { uid: set_fsuid(None), gid: set_fsgid(None), switches, caps, fsetid, fixup })
    }

    /// Acts as `uid` and `gid` until the guard goes. Where the host does not allow it, for want of
    /// privilege or of a mapping in the user namespace, the thread's own ids stay.
    pub fn wear(&self, uid: u32, gid: u32) -> Borrowed<'_> {
        let worn = self.switches && (uid, gid) != (self.uid, self.gid);
        if worn {
            set_fsgid(Some(gid));
            set_fsuid(Some(uid));
            if self.fixup {
                // Should it fail, the host checks permissions as well.
                let _ = rustix::thread::set_capabilities(None, self.effective());
            }
        }
        Borrowed { caller: self, worn }
    }

    /// Whether set-id bits survive a write, truncation or change of group: with `CAP_FSETID` they do.
    /// Switches only when it differs from the last request.
    ///
    /// # Errors
    /// The host refuses.
    pub fn keep_set_ids(&mut self, keep: bool) -> Result<(), Errno> {
        if keep == self.fsetid || !self.caps.effective.contains(CapabilitySet::FSETID) {
            return Ok(());
        }
        self.fsetid = keep;
        let set = rustix::thread::set_capabilities(None, self.effective());
        if set.is_err() {
            self.fsetid = !keep;
        }
        set
    }

    /// The capabilities that are to be in effect now.
    fn effective(&self) -> CapabilitySets {
        let mut caps = self.caps;
        caps.effective.set(CapabilitySet::FSETID, self.fsetid);
        caps
    }
}

/// Lets this thread keep its capabilities when its ids change; false where it may not say so.
fn keep_caps() -> bool {
    let bits = rustix::thread::capabilities_secure_bits().unwrap_or(CapabilitiesSecureBits::empty());
    let wanted = bits | CapabilitiesSecureBits::NO_SETUID_FIXUP;
    rustix::thread::set_capabilities_secure_bits(wanted).is_ok()
}

/// Another identity, worn until dropped.
#[must_use = "the identity is worn until this is dropped"]
#[derive(Debug)]
pub struct Borrowed<'a> {
    caller: &'a Caller,
    worn: bool,
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        if self.worn {
            set_fsuid(Some(self.caller.uid));
            set_fsgid(Some(self.caller.gid));
            if self.caller.fixup {
                // The change back raised or dropped file capabilities, `CAP_FSETID` among them.
                let _ = rustix::thread::set_capabilities(None, self.caller.effective());
            }
        }
    }
}

/// Sets the thread's file-system user id and returns the one before.
fn set_fsuid(uid: Option<u32>) -> u32 {
    // SAFETY: a plain system call on the calling thread; -1 changes nothing.
    unsafe { libc::setfsuid(uid.unwrap_or(u32::MAX)) as u32 }
}

/// Sets the thread's file-system group id and returns the one before.
fn set_fsgid(gid: Option<u32>) -> u32 {
    // SAFETY: as above.
    unsafe { libc::setfsgid(gid.unwrap_or(u32::MAX)) as u32 }
}
