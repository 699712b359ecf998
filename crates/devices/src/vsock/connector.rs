//! A unix socket of the host to which a port of the guest's host leads.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::socket::Socket;
use super::spec::SocketType;

/// How long a connection may wait for the program at the path to accept others. A guest's Linux waits for two seconds
/// unless told otherwise.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection that is not made yet.
#[derive(Debug)]
struct Waiting {
    id: u32,
    kind: SocketType,
    since: Instant,
}

/// Connects, in the order of the guest's requests.
#[derive(Debug)]
pub struct Connector {
    path: PathBuf,
    /// Connections that are not made yet.
    waiting: VecDeque<Waiting>,
}

impl Connector {
    /// Connects to `path`.
    pub fn new(path: PathBuf) -> Self {
        Self { path, waiting: VecDeque::new() }
    }

    /// Puts connection `id` of this type last. When there are `limit` others, those that are not `wanted` any more are dropped.
    pub fn push(&mut self, id: u32, kind: SocketType, limit: usize, wanted: impl Fn(u32) -> bool) {
        if self.waiting.len() >= limit {
            self.waiting.retain(|w| wanted(w.id));
        }
        self.waiting.push_back(Waiting { id, kind, since: Instant::now() });
    }

    /// Forgets all that wait.
    pub fn clear(&mut self) {
        self.waiting.clear();
    }

    /// Whether some wait.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Connects the first that is `wanted` still, and says how that went; `None` when nobody waits, or the program has
    /// as many connections to accept as fit.
    pub fn next(&mut self, wanted: impl Fn(u32) -> bool) -> Option<(u32, io::Result<Socket>)> {
        while let Some(&Waiting { id, kind, since }) = self.waiting.front() {
            let result = match wanted(id).then(|| Socket::connect(&self.path, kind)) {
                None => None,
                Some(Ok(None)) if since.elapsed() < PATIENCE => return None,
                Some(Ok(None)) => Some(Err(io::ErrorKind::TimedOut.into())),
                Some(Ok(Some(socket))) => Some(Ok(socket)),
                Some(Err(e)) => Some(Err(e)),
            };
            self.waiting.pop_front();
            if let Some(result) = result {
                if let Err(e) = &result {
                    tracing::debug!("vsock: connecting to {}: {e}", self.path.display());
                }
                return Some((id, result));
            }
        }
        None
    }
}
