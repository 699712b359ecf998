//! Where the library's log goes: nowhere, until the caller says so.

use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::Registry;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt;

use crate::{Answer, EEXIST, EINVAL, answer};

const OPTION_NO_ENV: u32 = 1;

/// Changes the level of the log that there is, once there is one.
static LEVEL: Mutex<Option<Handle<LevelFilter, Registry>>> = Mutex::new(None);

fn level(number: u32) -> Answer<LevelFilter> {
    Ok(match number {
        0 => LevelFilter::OFF,
        1 => LevelFilter::ERROR,
        2 => LevelFilter::WARN,
        3 => LevelFilter::INFO,
        4 => LevelFilter::DEBUG,
        5 => LevelFilter::TRACE,
        _ => return Err(EINVAL),
    })
}

/// The caller's descriptor. It is not duplicated: a copy would keep a pipe open that the caller closes, and would
/// be among the descriptors that a caller closes wholesale, which leaves its number to something else. So what is
/// behind the number is looked at before each line, and a line for something else is dropped.
#[derive(Debug, Clone, Copy)]
struct Target {
    number: RawFd,
    identity: (libc::dev_t, libc::ino_t),
}

impl Target {
    fn new(number: RawFd) -> Answer<Self> {
        identity(number).map(|identity| Self { number, identity }).ok_or(EINVAL)
    }
}

/// Device and inode of what is open as `number`.
fn identity(number: RawFd) -> Option<(libc::dev_t, libc::ino_t)> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `stat` has room for the answer, and a number that is not open is answered with an error.
    if number < 0 || unsafe { libc::fstat(number, stat.as_mut_ptr()) } < 0 {
        return None;
    }
    // SAFETY: filled in by the call that succeeded.
    let stat = unsafe { stat.assume_init() };
    Some((stat.st_dev, stat.st_ino))
}

impl Write for Target {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if identity(self.number) != Some(self.identity) {
            return Ok(line.len());
        }
        // SAFETY: it is open, as was just seen; should another thread close it now, the call fails.
        let fd = unsafe { BorrowedFd::borrow_raw(self.number) };
        // There is nobody to tell that the log cannot be written.
        Ok(rustix::io::retry_on_intr(|| rustix::io::write(fd, line)).unwrap_or(line.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Target {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        *self
    }
}

fn wished(level_number: u32, options: u32) -> Answer<LevelFilter> {
    let given = level(level_number)?;
    if options & OPTION_NO_ENV != 0 {
        return Ok(given);
    }
    Ok(std::env::var("RUST_LOG").ok().and_then(|v| v.parse().ok()).unwrap_or(given))
}

fn init(fd: RawFd, level_number: u32, style: u32, options: u32) -> Answer {
    if style > 2 || options & !OPTION_NO_ENV != 0 {
        return Err(EINVAL);
    }
    let max = wished(level_number, options)?;
    let number = if fd == -1 { libc::STDERR_FILENO } else { fd };
    let target = Target::new(number)?;
    let colours = match style {
        // SAFETY: isatty touches no memory.
        0 => unsafe { libc::isatty(number) == 1 },
        s => s == 1,
    };
    let (filter, handle) = reload::Layer::new(max);
    let mut current = LEVEL.lock().unwrap_or_else(PoisonError::into_inner);
    tracing_subscriber::registry()
        .with(filter)
        .with(tracing_subscriber::fmt::layer().with_ansi(colours).with_writer(target))
        .try_init()
        .map_err(|_| EEXIST)?;
    *current = Some(handle);
    Ok(0)
}

/// Changes the level if there is a log, else begins one on standard error.
fn set_level(level_number: u32) -> Answer {
    let max = wished(level_number, 0)?;
    if let Some(handle) = &*LEVEL.lock().unwrap_or_else(PoisonError::into_inner) {
        return handle.modify(|level| *level = max).map(|()| 0).map_err(|_| EEXIST);
    }
    init(-1, level_number, 0, 0)
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_set_log_level(log_level: u32) -> i32 {
    answer(|| set_level(log_level))
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_init_log(target_fd: RawFd, log_level: u32, style: u32, options: u32) -> i32 {
    answer(|| init(target_fd, log_level, style, options))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use std::os::fd::AsRawFd;
    use std::process::Command;

    /// In a process of its own, for the log is the process's.
    #[test]
    fn the_log_follows_the_callers_level_and_descriptor() {
        const MARK: &str = "LIBKRUN_TEST_LOG";
        if std::env::var_os(MARK).is_none() {
            let name = "log::tests::the_log_follows_the_callers_level_and_descriptor";
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", name]).env(MARK, "1").env_remove("RUST_LOG");
            assert!(command.status().unwrap().success());
            return;
        }
        let (mut reader, writer) = io::pipe().unwrap();
        assert_eq!(krun_init_log(writer.as_raw_fd(), 1, 2, 1), 0);
        assert_eq!(krun_init_log(2, 1, 2, 1), -libc::EEXIST);
        tracing::info!("one");
        assert_eq!(krun_set_log_level(3), 0);
        tracing::info!("two");
        assert_eq!(krun_set_log_level(2), 0);
        tracing::info!("three");
        tracing::warn!("four");
        // Something else gets the number, as after a wholesale closing of descriptors.
        let mut other = tempfile::tempfile().unwrap();
        // SAFETY: both are open; the number stays `writer`'s to close.
        assert!(unsafe { libc::dup2(other.as_raw_fd(), writer.as_raw_fd()) } >= 0);
        tracing::error!("five");
        let mut text = String::new();
        // There is an end: no copy is left open.
        reader.read_to_string(&mut text).unwrap();
        let words: Vec<_> = text.lines().filter_map(|l| l.rsplit(' ').next()).collect();
        assert_eq!(words, ["two", "four"]);
        let mut wrong = String::new();
        other.rewind().unwrap();
        other.read_to_string(&mut wrong).unwrap();
        assert_eq!(wrong, "");
        drop(writer);
        tracing::error!("six");
    }
}
