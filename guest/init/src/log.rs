//! Timings of init's steps, and warnings that matter only if something fails later.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::time::{ClockId, clock_gettime};

use crate::failure::plain;

/// Time since the kernel started.
pub fn uptime() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs().try_into().unwrap_or(0))
}

/// What happened so far.
#[derive(Debug, Default)]
pub struct Log {
    steps: Vec<(Duration, &'static str)>,
    warnings: Vec<String>,
    kernel: Option<OwnedFd>,
}

impl Log {
    /// Notes that a step is done.
    pub fn step(&mut self, what: &'static str) {
        self.steps.push((uptime(), what));
    }

    /// Time since the first step.
    pub fn age(&self) -> Duration {
        self.steps.first().map_or(Duration::ZERO, |(first, _)| uptime().saturating_sub(*first))
    }

    /// Notes what did not work but need not matter.
    pub fn warn(&mut self, what: String) {
        self.warnings.push(plain(what));
    }

    /// Forgets all warnings.
    pub fn clear_warnings(&mut self) {
        self.warnings.clear();
    }

    /// All warnings, one after the other, each after a space; empty if there are none.
    pub fn warnings(&self) -> String {
        self.warnings.iter().map(|w| format!(" {w}")).collect()
    }

    /// Writes what was noted to the kernel's log.
    pub fn flush(&mut self) {
        for (at, what) in std::mem::take(&mut self.steps) {
            self.say(&format!("{}.{:03} ms: {what}", at.as_millis(), at.subsec_micros() % 1000));
        }
        for warning in std::mem::take(&mut self.warnings) {
            self.say(&warning);
        }
    }

    /// Writes a line to the kernel's log, if there is one.
    pub fn say(&mut self, line: &str) {
        if self.kernel.is_none() {
            self.kernel = rustix::fs::open("/dev/kmsg", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).ok();
        }
        if let Some(fd) = &self.kernel {
            // A record is one write; what the kernel refuses is lost, as nobody waits for it.
            let _ = rustix::io::write(fd, format!("krun-init: {}\n", plain(line)).as_bytes());
        }
    }
}
