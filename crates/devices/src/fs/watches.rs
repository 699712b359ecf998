//! Word of changes to files in the window (inotify): a processor of the guest that touches what a file has lost may wait in
//! the host's kernel without an end, and this process never hears of it.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init, remove_watch};
use rustix::io::Errno;

use super::sys::FdName;

/// Files that are watched.
#[derive(Debug)]
pub struct Watches {
    fd: OwnedFd,
    by_node: HashMap<u64, i32>,
    by_watch: HashMap<i32, u64>,
    /// Each file that was to be watched is.
    is_complete: bool,
}

impl Watches {
    /// None yet.
    ///
    /// # Errors
    /// The host has no room for it.
    pub fn new() -> Result<Self, Errno> {
        let fd = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self { fd, by_node: HashMap::new(), by_watch: HashMap::new(), is_complete: true })
    }

    /// What is readable when there is something to be told.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Watches `file`, which is that of `node`. Where that cannot be done, nothing is told of it.
    pub fn add(&mut self, node: u64, file: &OwnedFd) {
        if self.by_node.contains_key(&node) {
            return;
        }
        let path = format!("/proc/self/fd/{}", FdName::new(file).as_c_str().to_string_lossy());
        match add_watch(&self.fd, &*path, WatchFlags::MODIFY) {
            Ok(watch) => {
                self.by_node.insert(node, watch);
                self.by_watch.insert(watch, node);
            }
            Err(e) => {
                self.is_complete = false;
                tracing::debug!(node, errno = e.raw_os_error(), "a mapped file is not watched");
            }
        }
    }

    /// Watches none but those of `nodes`.
    pub fn keep(&mut self, is_wanted: impl Fn(u64) -> bool) {
        let Self { fd, by_node, by_watch, .. } = self;
        by_node.retain(|node, watch| {
            let wanted = is_wanted(*node);
            if !wanted {
                by_watch.remove(watch);
                // It may have gone with its file.
                let _ = remove_watch(&*fd, *watch);
            }
            wanted
        });
    }

    /// Whether each file that was to be watched is.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Number of files that are watched.
    pub fn len(&self) -> usize {
        self.by_node.len()
    }

    /// Nodes whose files have changed since this was asked last; all of them when the host has lost count.
    pub fn take(&mut self) -> Vec<u64> {
        let mut nodes = Vec::new();
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(&self.fd, &mut space);
        while let Ok(event) = reader.next() {
            match self.by_watch.get(&event.wd()) {
                Some(node) => nodes.push(*node),
                None if event.wd() < 0 => nodes.extend(self.by_node.keys()),
                None => {}
            }
        }
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;

    #[test]
    fn changes_are_told_by_node() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| File::create(dir.path().join(name)).unwrap();
        let (mut a, b) = (open("a"), open("b"));
        let mut w = Watches::new().unwrap();
        w.add(7, &a.try_clone().unwrap().into());
        w.add(8, &b.try_clone().unwrap().into());
        w.add(7, &a.try_clone().unwrap().into());
        assert_eq!((w.len(), w.take()), (2, vec![]));
        a.write_all(b"x").unwrap();
        a.set_len(100).unwrap();
        assert_eq!(w.take(), [7]);
        b.set_len(5).unwrap();
        a.set_len(0).unwrap();
        assert_eq!(w.take(), [7, 8]);
        w.keep(|node| node == 8);
        a.set_len(3).unwrap();
        b.set_len(3).unwrap();
        assert_eq!((w.len(), w.take()), (1, vec![8]));
    }
}
