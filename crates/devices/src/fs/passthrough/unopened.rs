//! Reading without OPEN: on a share that cannot be changed, the guest is spared the two requests around every
//! use of a file, and reads by node. What is open on this side is then a matter of a small cache.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Result, Share, is_dir, parent_key};
use crate::fs::handles::Dir;
use crate::fs::inodes::{IdMap, What};
use crate::fs::overlay::{Content, FileData};

/// Files and directories kept open at most.
const CAP: usize = 128;

/// Something open for reading.
#[derive(Debug)]
enum Unopened {
    File(Arc<OwnedFd>),
    Dir(Box<Dir>),
}

/// Nodes that are open for reading on this side, the longest unused first.
#[derive(Debug, Default)]
pub struct Reads {
    by_node: IdMap<Unopened>,
    order: VecDeque<u64>,
}

/// Where the bytes of a file come from.
#[derive(Debug)]
pub enum Bytes {
    /// A file of the host.
    Host(Arc<OwnedFd>),
    /// An overlay.
    Virtual(FileData),
}

impl Reads {
    fn add(&mut self, node: u64, what: Unopened) {
        while self.order.len() >= CAP {
            if let Some(oldest) = self.order.pop_front() {
                self.by_node.remove(&oldest);
            }
        }
        if self.by_node.insert(node, what).is_none() {
            self.order.push_back(node);
        }
    }

    /// The guest has forgotten `node`.
    pub fn forget(&mut self, node: u64) {
        if self.by_node.remove(&node).is_some() {
            self.order.retain(|n| *n != node);
        }
    }

    /// Closes all; false when there was nothing.
    pub fn clear(&mut self) -> bool {
        let any = !self.by_node.is_empty();
        self.by_node.clear();
        self.order.clear();
        any
    }

    /// Number of nodes that are open.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.by_node.len()
    }
}

impl Share {
    /// The contents of file `node`, which the guest reads without having opened it.
    ///
    /// # Errors
    /// EISDIR; ENXIO for what is neither file nor directory; the host's reason.
    pub fn contents_of(&mut self, node: u64) -> Result<Bytes> {
        if let Some(Unopened::File(fd)) = self.reads.by_node.get(&node) {
            return Ok(Bytes::Host(Arc::clone(fd)));
        }
        match &self.inodes.get(node)?.what {
            What::Virtual(index) => match self.overlays.content(*index) {
                Some(Content::File { data, .. }) => return Ok(Bytes::Virtual(data.clone())),
                Some(Content::Dir { .. }) => return Err(Errno::ISDIR),
                None => return Err(Errno::NOENT),
            },
            What::Host(host) if is_dir(&host.id) => return Err(Errno::ISDIR),
            What::Host(host) if host.id.kind != libc::S_IFREG => return Err(Errno::NXIO),
            What::Host(_) => {}
        }
        let fd = Arc::new(self.reopen(node, OFlags::RDONLY)?);
        if self.inodes.limits().allow_spare(&fd) {
            self.reads.add(node, Unopened::File(Arc::clone(&fd)));
        }
        Ok(Bytes::Host(fd))
    }

    /// Directory `node`, which the guest lists without having opened it. To be given back.
    ///
    /// # Errors
    /// As those of opening it.
    pub fn listing_of(&mut self, node: u64) -> Result<Box<Dir>> {
        if let Some(Unopened::Dir(dir)) = self.reads.by_node.remove(&node) {
            return Ok(dir);
        }
        self.reads.forget(node);
        let listed = self.overlays.listed(parent_key(self.inodes.get(node)?));
        Ok(Box::new(Dir { node, fd: self.directory(node)?, listed, entries: Vec::new(), at: 0, offset: 0 }))
    }

    /// Gives back what [`Share::listing_of`] gave.
    pub fn keep_listing(&mut self, dir: Box<Dir>) {
        let node = dir.node;
        if dir.fd.as_ref().is_some_and(|fd| !self.inodes.limits().allow_spare(fd)) {
            // With its place in the order.
            self.reads.by_node.insert(node, Unopened::Dir(dir));
            return self.reads.forget(node);
        }
        // Its place in the order was kept if it had one.
        if self.reads.order.contains(&node) {
            self.reads.by_node.insert(node, Unopened::Dir(dir));
        } else {
            self.reads.add(node, Unopened::Dir(dir));
        }
    }
}
