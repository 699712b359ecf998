//! Carries jobs out: transfers of raw images by io_uring where the host has it, the rest on threads.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use krun_event::Wake;
use rustix::event::{PollFd, PollFlags, poll};

use super::image::Image;
use super::pool::{Job, Pool};
#[cfg(target_os = "linux")]
use super::sys::Ring;

/// Threads of a disk whose transfers need them.
const THREADS: usize = 8;
/// Threads of a disk whose transfers go by io_uring.
const THREADS_BESIDE_RING: usize = 2;

/// Jobs in flight on one image. Owns their buffers until they are done; dropping it waits for all.
pub struct Engine {
    #[cfg(target_os = "linux")]
    ring: Option<Ring>,
    pool: Pool,
    image: Arc<dyn Image>,
    wake: Wake,
    in_flight: usize,
}

impl Engine {
    /// For up to `jobs` at once. Without `threads_only`, io_uring is used if it can be.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(name: &str, image: Arc<dyn Image>, jobs: u32, threads_only: bool) -> io::Result<Self> {
        let wake = Wake::new()?;
        let mut limit = THREADS;
        #[cfg(target_os = "linux")]
        let ring = {
            let file = image.direct(None).filter(|_| !threads_only);
            let ring = file.and_then(|file| match Ring::new(Arc::clone(file), jobs, &wake) {
                Ok(ring) => Some(ring),
                Err(e) => {
                    tracing::debug!("{name}: threads instead of io_uring: {e}");
                    None
                }
            });
            if ring.is_some() {
                limit = THREADS_BESIDE_RING;
            }
            ring
        };
        #[cfg(not(target_os = "linux"))]
        let _ = (jobs, threads_only, &mut limit);
        let pool = Pool::new(name, Arc::clone(&image), limit, wake.clone());
        Ok(Self {
            #[cfg(target_os = "linux")]
            ring,
            pool,
            image,
            wake,
            in_flight: 0,
        })
    }

    /// Readable when jobs are done.
    pub fn wake(&self) -> &Wake {
        &self.wake
    }

    /// Jobs taken whose end was not seen yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Takes a job; [`Engine::kick`] starts it.
    ///
    /// # Errors
    /// The host has no thread for it; the job is not taken.
    pub fn submit(&mut self, id: u64, job: Job) -> io::Result<()> {
        if let Some(job) = self.by_ring(id, job) {
            self.pool.submit(id, job)?;
        }
        self.in_flight += 1;
        Ok(())
    }

    /// Gives the job to the ring, or back where that cannot do it.
    #[cfg(target_os = "linux")]
    fn by_ring(&mut self, id: u64, job: Job) -> Option<Job> {
        let Some(ring) = self.ring.as_mut().filter(|ring| ring.has_room()) else { return Some(job) };
        match job {
            Job::Read { buffers, offset } if self.image.direct(Some(&buffers)).is_some() => {
                ring.read(id, buffers, offset);
            }
            Job::Write { buffers, offset, durable } if self.image.direct(Some(&buffers)).is_some() => {
                ring.write(id, buffers, offset, durable);
            }
            Job::Flush => ring.sync(id),
            other => return Some(other),
        }
        None
    }

    #[cfg(not(target_os = "linux"))]
    fn by_ring(&mut self, _id: u64, job: Job) -> Option<Job> {
        Some(job)
    }

    /// Starts what was taken.
    ///
    /// # Errors
    /// The host's.
    pub fn kick(&mut self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        if let Some(ring) = &mut self.ring {
            ring.submit()?;
        }
        Ok(())
    }

    /// Appends what is done to `out`.
    ///
    /// # Errors
    /// The host's, of starting the rest of what was done in part.
    pub fn reap(&mut self, out: &mut Vec<(u64, io::Result<()>)>) -> io::Result<()> {
        let before = out.len();
        self.wake.take();
        #[cfg(target_os = "linux")]
        if let Some(ring) = &mut self.ring {
            ring.reap(out);
        }
        self.pool.reap(out);
        self.in_flight -= out.len() - before;
        self.kick()
    }

    /// Blocks until something may be done.
    ///
    /// # Errors
    /// The host's.
    pub fn wait(&self) -> io::Result<()> {
        loop {
            let fd = self.wake.as_fd();
            match poll(&mut [PollFd::new(&fd, PollFlags::IN)], None) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}
