//! The virtio side: configuration space and queues.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use krun_event::{Interest, Ready};
use krun_virtio::{Chain, ConfigSpace, Cx, DeviceError, DeviceInfo, SharedMemory, ShmRegion, VirtioDevice};

use super::server::Server;
use super::{ExitSink, FsError, FsSpec, TAG_MAX, setup};
use crate::sys::Timer;

/// Virtio device id of a file system.
const DEVICE_ID: u32 = 26;
/// The shared memory region that files are mapped into (virtio 1.2, section 5.11.6.1).
const WINDOW_ID: u8 = 0;
/// FORGET and its like come here.
const HIPRIO_SIZE: u16 = 128;
/// Room for one request of 1 MiB in pages even without indirect descriptors.
const REQUEST_SIZE: u16 = 1024;
/// Transfers from this size on are reported to the guest at once, not with the next ones.
const EAGER: u32 = 128 << 10;
/// Requests that may wait for a lock; what follows needs room in the queue as well.
const WAITING_MAX: usize = 64;
/// How often a lock that is waited for is tried.
const RETRY: Duration = Duration::from_millis(20);
const RETRY_TOKEN: u64 = 0;
/// Files in the window change, and how long it takes at least until that is looked at again.
const CHANGES_TOKEN: u64 = 1;
const PAUSE_TOKEN: u64 = 2;
const PAUSE: Duration = Duration::from_millis(5);

/// A file-system device.
#[derive(Debug)]
pub struct Fs {
    tag: String,
    server: Server,
    config: Arc<Config>,
    /// Requests that wait for a lock, with their queues, and what wakes them; only where locks are shared.
    waiting: Vec<(usize, Chain)>,
    retry: Option<Timer>,
    /// The timer is set.
    is_set: bool,
    /// Ends a pause between looks at changes of files in the window, if there is one.
    pause: Option<Timer>,
}

/// `struct virtio_fs_config`.
#[derive(Debug)]
struct Config([u8; TAG_MAX + 4]);

impl Config {
    fn new(tag: &str) -> Self {
        let mut bytes = [0; TAG_MAX + 4];
        for (to, from) in bytes[..TAG_MAX].iter_mut().zip(tag.bytes()) {
            *to = from;
        }
        bytes[TAG_MAX..].copy_from_slice(&1u32.to_le_bytes());
        Self(bytes)
    }
}

impl ConfigSpace for Config {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)).unwrap_or_default();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = from.get(i).copied().unwrap_or(0);
        }
    }
}

impl Fs {
    /// Opens the source and resolves the overlays.
    ///
    /// # Errors
    /// See [`FsError`].
    pub fn new(spec: FsSpec) -> Result<Self, FsError> {
        let share = setup::share(&spec)?;
        let fail = |source| FsError::Host { what: format!("{:?} without a timer", spec.tag), source };
        let retry = spec.share_locks.then(Timer::new).transpose().map_err(fail)?;
        let server = Server::new(share, spec.exit_code.map(ExitSink));
        let config = Arc::new(Config::new(&spec.tag));
        let pause = server.changes().map(|_| Timer::new()).transpose().map_err(fail)?;
        Ok(Self { config, tag: spec.tag, server, waiting: Vec::new(), retry, is_set: false, pause })
    }

    /// The name by which the guest mounts it.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    fn attach(&mut self) -> Result<(), DeviceError> {
        self.server.attach().map_err(|source| DeviceError::Host {
            what: format!("cannot give the thread of share {:?} an identity of its own", self.tag),
            source,
        })
    }

    fn serve(&mut self, queue: usize, chain: Chain, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let mut reader = chain.reader(cx.memory());
        let writer = chain.writer(cx.memory());
        self.server.let_wait(self.retry.is_some() && self.waiting.len() < WAITING_MAX);
        let written = self.server.serve(&mut reader, writer)?;
        if self.server.waits() {
            self.waiting.push((queue, chain));
            return Ok(());
        }
        let moved = written.max(reader.consumed() as u32);
        cx.complete(queue, chain, written)?;
        if moved >= EAGER {
            cx.flush(queue)?;
        }
        Ok(())
    }

    /// Serves those that wait once more, from the start.
    fn try_again(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        for (queue, chain) in std::mem::take(&mut self.waiting) {
            self.serve(queue, chain, cx)?;
        }
        Ok(())
    }

    /// Sets the timer if anything waits: locks of the host are given back without a word.
    fn plan(&mut self) -> Result<(), DeviceError> {
        let Some(timer) = self.retry.as_ref().filter(|_| !self.waiting.is_empty() && !self.is_set) else {
            return Ok(());
        };
        timer.set(RETRY).map_err(|source| self.failed("setting the timer", source))?;
        self.is_set = true;
        Ok(())
    }

    /// Files in the window have changed, or a pause is over: a program of the host that writes all the time is not to
    /// keep this thread busy.
    fn follow_changes(&mut self, token: u64, cx: &Cx<'_>) -> Result<(), DeviceError> {
        let Some(pause) = &self.pause else { return Ok(()) };
        let Some(changes) = self.server.changes() else { return Ok(()) };
        let done = if token == PAUSE_TOKEN {
            pause.take();
            cx.watch(&changes, CHANGES_TOKEN, Interest::Read)
        } else {
            pause.set(PAUSE).and_then(|()| cx.unwatch(&changes))
        };
        done.map_err(|source| self.failed("watching files", source))?;
        if token == CHANGES_TOKEN {
            self.attach()?;
            self.server.follow_changes();
        }
        Ok(())
    }

    fn failed(&self, what: &str, source: std::io::Error) -> DeviceError {
        DeviceError::Host { what: format!("{what} of share {:?}", self.tag), source }
    }
}

impl VirtioDevice for Fs {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: DEVICE_ID,
            name: format!("fs {}", self.tag),
            features: 0,
            queue_sizes: vec![HIPRIO_SIZE, REQUEST_SIZE],
            shm: self
                .server
                .window()
                .map(|dax| ShmRegion { id: WINDOW_ID, size: dax.size() })
                .into_iter()
                .collect(),
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as Arc<dyn ConfigSpace>
    }

    fn shared_memory(&self) -> Vec<(u8, Arc<dyn SharedMemory>)> {
        let window = self.server.window().cloned();
        window.map(|dax| (WINDOW_ID, dax as Arc<dyn SharedMemory>)).into_iter().collect()
    }

    fn start(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        if let Some(timer) = &self.retry {
            let watched = cx.watch(&timer.as_fd(), RETRY_TOKEN, Interest::Read);
            watched.map_err(|source| self.failed("watching the timer", source))?;
        }
        if let (Some(changes), Some(pause)) = (self.server.changes(), &self.pause) {
            let watched = cx
                .watch(&changes, CHANGES_TOKEN, Interest::Read)
                .and_then(|()| cx.watch(&pause.as_fd(), PAUSE_TOKEN, Interest::Read));
            watched.map_err(|source| self.failed("watching files", source))?;
        }
        self.attach()
    }

    fn on_queue(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        self.attach()?;
        while let Some(chain) = cx.pop(queue)? {
            self.serve(queue, chain, cx)?;
        }
        if self.server.gave_lock_back() {
            self.try_again(cx)?;
        }
        self.plan()
    }

    fn on_event(&mut self, ready: Ready, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        if ready.token != RETRY_TOKEN {
            return self.follow_changes(ready.token, cx);
        }
        if let Some(timer) = &self.retry {
            timer.take();
        }
        self.is_set = false;
        self.attach()?;
        self.try_again(cx)?;
        self.plan()
    }

    fn stop(&mut self) {
        self.waiting.clear();
        // The next session watches all from its start: no pause is to end there.
        if let Some(pause) = &self.pause {
            pause.disarm();
        }
        tracing::debug!(tag = self.tag, "{}", self.server.take_counts());
        self.server.reset();
    }
}

/// Serves `data` as a row of requests, each behind a length of two bytes, from a share of overlays and from a
/// read-only share of a small directory below the temporary one. For fuzzing: nothing is changed on the host.
#[doc(hidden)]
pub fn fuzz_one(data: &[u8]) {
    fuzz::run(data);
}

mod fuzz {
    use std::cell::RefCell;
    use std::path::PathBuf;

    use krun_memory::VolatileSlice;

    use super::super::flat::{FlatSink, FlatSource};
    use super::super::{CachePolicy, Content, DaxSpec, FileData, Overlay};
    use super::*;

    /// The servers, and the directory that one of them shares.
    struct Bench {
        servers: Vec<Server>,
        directory: Option<PathBuf>,
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            if let Some(directory) = &self.directory {
                let _ = std::fs::remove_dir_all(directory);
            }
        }
    }

    thread_local! {
        static BENCH: RefCell<Bench> = RefCell::new(bench());
    }

    fn overlay(path: &str, content: Content) -> Overlay {
        Overlay { path: PathBuf::from(path), content, listed: true }
    }

    fn bench() -> Bench {
        let bytes = FileData::from(&b"contents"[..]);
        let overlays = vec![
            overlay("d", Content::Dir { mode: 0o755 }),
            overlay("d/f", Content::File { data: bytes.clone(), mode: 0o644, one_shot: false }),
            overlay("once", Content::File { data: bytes, mode: 0o755, one_shot: true }),
        ];
        let spec = |source, read_only, cache, overlays: &[Overlay]| FsSpec {
            tag: "fuzz".into(),
            source,
            read_only,
            cache,
            overlays: overlays.to_vec(),
            ..FsSpec::default()
        };
        let directory = directory();
        let all = [
            spec(None, false, CachePolicy::AUTO, &overlays),
            FsSpec { share_locks: true, ..spec(directory.clone(), true, CachePolicy::NEVER, &overlays) },
            // Read by node, without OPEN.
            spec(directory.clone(), true, CachePolicy::ALWAYS, &overlays[..2]),
            // With a window; what it may not change it does not.
            FsSpec {
                dax: Some(DaxSpec { size: 4 << 20, from: 0 }),
                ..spec(directory.clone(), true, CachePolicy::AUTO, &[])
            },
        ];
        let servers =
            all.iter().filter_map(|s| setup::share(s).ok()).map(|share| Server::new(share, None)).collect();
        Bench { servers, directory }
    }

    /// A directory with one of each kind of entry.
    fn directory() -> Option<PathBuf> {
        let name = format!("krun-fuzz-{}-{:?}", std::process::id(), std::thread::current().id());
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(dir.join("sub")).ok()?;
        std::fs::write(dir.join("sub/file"), b"some bytes").ok()?;
        let _ = std::os::unix::fs::symlink("/etc/passwd", dir.join("link"));
        Some(dir)
    }

    pub fn run(data: &[u8]) {
        BENCH.with_borrow_mut(|bench| {
            for server in &mut bench.servers {
                server.reset();
                if server.attach().is_ok() {
                    row(server, &init());
                    row(server, data);
                }
            }
        });
    }

    /// INIT with all that there is, so that the rest is not refused for want of it.
    fn init() -> Vec<u8> {
        let words = [60u32, 26, 1, 0, 0, 0, 0, 0, 0, 0, 7, 41, 0, u32::MAX, 0];
        let request = words.iter().flat_map(|w| w.to_le_bytes());
        60u16.to_le_bytes().into_iter().chain(request).collect()
    }

    fn row(server: &mut Server, data: &[u8]) {
        let mut rest = data;
        let mut room = vec![0u8; 4096 + 16];
        while let Some((len, after)) = rest.split_first_chunk::<2>() {
            let len = usize::from(u16::from_le_bytes(*len)).min(after.len());
            let (request, after) = after.split_at(len);
            rest = after;
            let mut request = request.to_vec();
            // The lengths of real requests agree with themselves; that alone need not be guessed.
            if let Some(field) = request.first_chunk_mut::<4>() {
                *field = (len as u32).to_le_bytes();
            }
            let mut source = FlatSource::new(vec![VolatileSlice::from(&mut request[..])]);
            let sink = FlatSink::new(vec![VolatileSlice::from(&mut room[..])]);
            if let Ok(n) = server.serve(&mut source, sink) {
                assert!(n as usize <= room.len(), "a reply is longer than its room");
            }
        }
    }
}
