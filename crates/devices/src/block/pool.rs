//! Threads that do what blocks.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use krun_event::Wake;

use super::image::Image;
use super::sys::Buffers;

/// A range of the disk in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub offset: u64,
    pub len: u64,
    /// Zeroes may be a hole.
    pub unmap: bool,
}

/// Something to do on an image.
pub enum Job {
    Read {
        buffers: Buffers,
        offset: u64,
    },
    /// `durable`: on stable storage when it is done.
    Write {
        buffers: Buffers,
        offset: u64,
        durable: bool,
    },
    Flush,
    Discard(Vec<Range>),
    Zero {
        ranges: Vec<Range>,
        durable: bool,
    },
}

impl Job {
    fn run(self, image: &dyn Image) -> io::Result<()> {
        let finish = |durable| if durable { image.flush() } else { Ok(()) };
        match self {
            Self::Read { mut buffers, offset } => image.read(&mut buffers, offset),
            Self::Write { mut buffers, offset, durable } => {
                image.write(&mut buffers, offset)?;
                finish(durable)
            }
            Self::Flush => image.flush(),
            Self::Discard(ranges) => ranges.iter().try_for_each(|r| image.discard(r.offset, r.len)),
            Self::Zero { ranges, durable } => {
                ranges.iter().try_for_each(|r| image.zero(r.offset, r.len, r.unmap))?;
                finish(durable)
            }
        }
    }
}

type Panic = Box<dyn Any + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<(u64, Job)>,
    done: Vec<(u64, io::Result<()>)>,
    panic: Option<Panic>,
    /// Threads that wait for a job.
    idle: usize,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    more: Condvar,
    image: Arc<dyn Image>,
    wake: Wake,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some((id, job)) = state.jobs.pop_front() {
                drop(state);
                let result = catch_unwind(AssertUnwindSafe(|| job.run(&*self.image)));
                state = self.lock();
                match result {
                    Ok(result) => state.done.push((id, result)),
                    Err(panic) => {
                        state.done.push((id, Err(io::Error::other("the driver of the image failed"))));
                        state.panic.get_or_insert(panic);
                    }
                }
                self.wake.wake();
            } else if state.closed {
                return;
            } else {
                state.idle += 1;
                state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

/// Threads for the jobs of one image, started as they are needed. Dropping it waits until all jobs given
/// are done.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    limit: usize,
    name: String,
}

impl Pool {
    /// A pool of at most `limit` threads, which sets `wake` when a job is done.
    pub fn new(name: &str, image: Arc<dyn Image>, limit: usize, wake: Wake) -> Self {
        let shared = Shared { state: Mutex::default(), more: Condvar::new(), image, wake };
        Self { shared: Arc::new(shared), threads: Vec::new(), limit, name: name.to_owned() }
    }

    /// Takes a job.
    ///
    /// # Errors
    /// Not even one thread can be had; the job is lost.
    pub fn submit(&mut self, id: u64, job: Job) -> io::Result<()> {
        let lacking = {
            let mut state = self.shared.lock();
            state.jobs.push_back((id, job));
            state.jobs.len() > state.idle
        };
        self.shared.more.notify_one();
        if lacking && self.threads.len() < self.limit {
            let shared = Arc::clone(&self.shared);
            match std::thread::Builder::new().name(self.name.clone()).spawn(move || shared.work()) {
                Ok(thread) => self.threads.push(thread),
                Err(e) if self.threads.is_empty() => {
                    self.shared.lock().jobs.clear();
                    return Err(e);
                }
                // Slower, but it goes on.
                Err(e) => tracing::debug!("{}: no further thread: {e}", self.name),
            }
        }
        Ok(())
    }

    /// Appends what is done to `out`. Goes on with a job's panic.
    pub fn reap(&self, out: &mut Vec<(u64, io::Result<()>)>) {
        let panic = {
            let mut state = self.shared.lock();
            out.append(&mut state.done);
            state.panic.take()
        };
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
