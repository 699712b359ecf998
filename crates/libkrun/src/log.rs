//! Where the library's log goes: nowhere, until the caller says so.

use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Mutex;

use tracing::level_filters::LevelFilter;

use crate::{Answer, EEXIST, EINVAL, Errno, answer};

const OPTION_NO_ENV: u32 = 1;

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

fn init(fd: RawFd, level_number: u32, style: u32, options: u32) -> Answer {
    let mut max = level(level_number)?;
    if style > 2 || options & !OPTION_NO_ENV != 0 {
        return Err(EINVAL);
    }
    if options & OPTION_NO_ENV == 0 {
        let wished = std::env::var("RUST_LOG").ok().and_then(|v| v.parse().ok());
        max = wished.unwrap_or(max);
    }
    let number = if fd == -1 { 2 } else { fd };
    if number < 0 {
        return Err(EINVAL);
    }
    // SAFETY: F_GETFD touches no memory and changes nothing.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(EINVAL);
    }
    // SAFETY: it is open, as was just seen, and only duplicated here.
    let target = unsafe { BorrowedFd::borrow_raw(number) };
    let own = target.try_clone_to_owned().map_err(|e| Errno(e.raw_os_error().unwrap_or(libc::EIO)))?;
    let colours = match style {
        0 => own.is_terminal(),
        s => s == 1,
    };
    tracing_subscriber::fmt()
        .with_max_level(max)
        .with_ansi(colours)
        .with_writer(Mutex::new(File::from(own)))
        .try_init()
        .map_err(|_| EEXIST)?;
    Ok(0)
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_set_log_level(log_level: u32) -> i32 {
    // Setting it again is harmless for callers, so it is no error for them.
    match answer(|| init(-1, log_level, 0, 0)) {
        code if code == -libc::EEXIST => 0,
        code => code,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_init_log(target_fd: RawFd, log_level: u32, style: u32, options: u32) -> i32 {
    answer(|| init(target_fd, log_level, style, options))
}
