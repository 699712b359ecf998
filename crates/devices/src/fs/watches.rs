//! Word of changes to files in the window (inotify): a processor of the guest that touches what a file has lost may wait in
//! the host's kernel without an end, and this process never hears of it.

use std::collections::{HashMap, HashSet};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init, remove_watch};
use rustix::io::Errno;

use super::sys::FdName;

/// Files that are watched.
#[derive(Debug)]
pub struct Watches {
    fd: OwnedFd,
    by_node: HashMap<u64, i32>,
    /// A file has one watch, and a node for each mount that it is found below.
    by_watch: HashMap<i32, Vec<u64>>,
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
                self.by_watch.entry(watch).or_default().push(node);
            }
            Err(e) => {
                self.is_complete = false;
                tracing::debug!(node, errno = e.raw_os_error(), "a mapped file is not watched");
            }
        }
    }

    /// Watches none but those of `nodes`.
    pub fn keep(&mut self, nodes: &HashSet<u64>) {
        let Self { fd, by_node, by_watch, .. } = self;
        by_node.retain(|node, watch| {
            let wanted = nodes.contains(node);
            if !wanted {
                let same = by_watch.entry(*watch).or_default();
                same.retain(|other| other != node);
                if same.is_empty() {
                    by_watch.remove(watch);
                    // It may have gone with its file.
                    let _ = remove_watch(&*fd, *watch);
                }
            }
            wanted
        });
    }

    /// Nothing is mapped any more: watches none.
    pub fn clear(&mut self) {
        self.keep(&HashSet::new());
        self.is_complete = true;
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
            if event.events().contains(ReadFlags::IGNORED) {
                for node in self.by_watch.remove(&event.wd()).unwrap_or_default() {
                    self.by_node.remove(&node);
                }
                continue;
            }
            match self.by_watch.get(&event.wd()) {
                Some(changed) => nodes.extend(changed),
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
        w.keep(&[8].into());
        a.set_len(3).unwrap();
        b.set_len(3).unwrap();
        assert_eq!((w.len(), w.take()), (1, vec![8]));
    }

    #[test]
    fn a_file_with_two_nodes_is_watched_until_both_are_gone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let fd: OwnedFd = file.reopen().unwrap().into();
        let mut w = Watches::new().unwrap();
        w.add(7, &fd);
        w.add(8, &fd);
        let change = |n| file.as_file().set_len(n).unwrap();
        change(1);
        assert_eq!(w.take(), [7, 8]);
        w.keep(&[7].into());
        change(2);
        assert_eq!(w.take(), [7]);
        w.keep(&[].into());
        change(3);
        assert_eq!((w.take(), w.by_watch.len()), (vec![], 0));
    }

    #[test]
    fn what_the_host_stops_watching_is_forgotten_and_a_failure_until_all_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut w = Watches::new().unwrap();
        w.add(7, &file.reopen().unwrap().into());
        file.close().unwrap();
        assert_eq!((w.take(), w.len(), w.by_watch.len()), (vec![], 0, 0));
        // A descriptor that is no inotify instance.
        let good = std::mem::replace(&mut w.fd, tempfile::tempfile().unwrap().into());
        w.add(8, &tempfile::tempfile().unwrap().into());
        w.fd = good;
        assert!(!w.is_complete());
        w.keep(&[].into());
        assert!(!w.is_complete(), "it may still be mapped");
        w.clear();
        assert!(w.is_complete());
    }
}
