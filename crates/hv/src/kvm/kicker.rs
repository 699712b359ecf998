//! Getting a thread out of guest code from another thread.
//!
//! A vCPU's thread keeps one real-time signal blocked, and has KVM unblock it while guest code
//! runs (KVM_SET_SIGNAL_MASK). Sent to that thread, the signal ends KVM_RUN with EINTR and stays
//! pending, because KVM blocks it again before the thread could take it: no handler is needed, so
//! none is installed and the program around this library keeps its own signal handling. The thread
//! then takes the signal off its queue.
//!
//! A kick between two runs is not lost: the signal stays pending and `immediate_exit` is set, and
//! either of them makes the next KVM_RUN return at once.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::sys::{self, RunPage};

/// The signal: high among the real-time signals, away from those that programs take first.
fn signal() -> libc::c_int {
    libc::SIGRTMAX() - 2
}

thread_local! {
    /// How many vCPUs live on this thread, and whether the signal was blocked before the first.
    static BLOCKED: Cell<(u32, bool)> = const { Cell::new((0, false)) };
}

/// Between two tries to send the signal.
const RETRY: Duration = Duration::from_millis(1);

/// What a kicker and its vCPU share.
#[derive(Debug)]
pub(super) struct Target {
    page: Arc<RunPage>,
    kicked: AtomicBool,
    /// The vCPU's thread, while the vCPU lives. Held during a kick so that the thread cannot end,
    /// and its number be given to another, in between.
    thread: Mutex<Option<libc::pid_t>>,
}

impl Target {
    /// Where a kick has not been taken yet, that one does: the queue of real-time signals is short, and the user's.
    pub(super) fn kick(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        // In this order: whoever sees `immediate_exit` or the signal also sees `kicked`.
        if thread.is_none() || self.kicked.swap(true, Ordering::SeqCst) {
            return;
        }
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        drop(thread);
        let done = || !self.kicked.load(Ordering::SeqCst);
        send(&self.thread, done);
    }
}

/// Sends the signal to a thread. While the user has too many signals pending it is tried again, until the thread
/// ends or `done` says that it needs none.
fn send(thread: &Mutex<Option<libc::pid_t>>, done: impl Fn() -> bool) {
    loop {
        let thread = thread.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(tid) = *thread else { return };
        // SAFETY: takes numbers only. The thread exists and keeps the signal blocked, see `Target::thread`.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal()) };
        if sent == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EAGAIN) {
            return;
        }
        drop(thread);
        if done() {
            return;
        }
        std::thread::sleep(RETRY);
    }
}

/// The vCPU's side: keeps the signal blocked on this thread while it lives.
#[derive(Debug)]
pub(super) struct Kicked {
    target: Arc<Target>,
    /// Blocking is a property of the thread, so this must be dropped where it was made.
    _thread: PhantomData<*const ()>,
}

impl Kicked {
    /// Prepares the calling thread and the vCPU.
    pub(super) fn new(vcpu: &impl AsRawFd, page: Arc<RunPage>) -> io::Result<Self> {
        let (count, before) = BLOCKED.get();
        let old = change_mask(libc::SIG_BLOCK)?;
        BLOCKED.set((count + 1, if count == 0 { old.contains_signal } else { before }));
        // SAFETY: gettid takes nothing and cannot fail.
        let tid = unsafe { libc::gettid() };
        let target = Arc::new(Target { page, kicked: AtomicBool::new(false), thread: Mutex::new(Some(tid)) });
        // From here on drop undoes the blocking.
        let kicked = Self { target, _thread: PhantomData };
        sys::set_signal_mask(vcpu, old.mask & !bit(signal()))?;
        Ok(kicked)
    }

    pub(super) fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// To be called when KVM_RUN was interrupted: true if that was a kick. A kick that comes while
    /// this runs is either reported here or interrupts the next run.
    pub(super) fn take(&self) -> bool {
        self.target.page.immediate_exit().store(0, Ordering::SeqCst);
        drain();
        self.target.kicked.swap(false, Ordering::SeqCst)
    }
}

impl Drop for Kicked {
    fn drop(&mut self) {
        // After this no kicker sends the signal any more.
        *self.target.thread.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let (count, before) = BLOCKED.get();
        BLOCKED.set((count.saturating_sub(1), before));
        if count <= 1 {
            drain();
            if !before {
                let _ = change_mask(libc::SIG_UNBLOCK);
            }
        }
    }
}

/// Takes the signal off this thread's queue as often as it is there.
fn drain() {
    let set = set_of_signal();
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both structures are initialised and outlive the call; no information is asked for.
    while unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const now) } > 0 {}
}

struct OldMask {
    contains_signal: bool,
    /// As the kernel has it: bit n-1 for signal n.
    mask: u64,
}

const fn bit(signal: libc::c_int) -> u64 {
    1 << (signal - 1)
}

fn set_of_signal() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set, sigaddset changes one bit of it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal());
        set.assume_init()
    }
}

/// Blocks or unblocks the signal on this thread and returns the mask before.
fn change_mask(how: libc::c_int) -> io::Result<OldMask> {
    let set = set_of_signal();
    let mut old = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: `set` is initialised, `old` has room for the result.
    let error = unsafe { libc::pthread_sigmask(how, &raw const set, old.as_mut_ptr()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    // SAFETY: initialised by pthread_sigmask.
    let old = unsafe { old.assume_init() };
    let mut mask = 0u64;
    for n in 1..=64 {
        // SAFETY: `old` is initialised and n is a signal number or refused with an error.
        if unsafe { libc::sigismember(&raw const old, n) } == 1 {
            mask |= bit(n);
        }
    }
    Ok(OldMask { contains_signal: mask & bit(signal()) != 0, mask })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::sync::mpsc;

    fn limit_pending(most: libc::rlim_t) {
        let limit = libc::rlimit { rlim_cur: most, rlim_max: libc::RLIM_INFINITY };
        let mut now = limit;
        // SAFETY: both structures live on this stack.
        unsafe {
            assert_eq!(libc::getrlimit(libc::RLIMIT_SIGPENDING, &raw mut now), 0);
            let limit = libc::rlimit { rlim_max: now.rlim_max, ..limit };
            assert_eq!(libc::setrlimit(libc::RLIMIT_SIGPENDING, &raw const limit), 0);
        }
    }

    /// In a process of its own, for the limit is the process's.
    #[test]
    fn a_full_queue_of_signals_delays_a_kick_and_does_not_lose_it() {
        const MARK: &str = "KRUN_HV_TEST_SIGNALS";
        if std::env::var_os(MARK).is_none() {
            let name = "kvm::kicker::tests::a_full_queue_of_signals_delays_a_kick_and_does_not_lose_it";
            let mut command = Command::new(std::env::current_exe().unwrap());
            assert!(command.args(["--exact", name]).env(MARK, "1").status().unwrap().success());
            return;
        }
        let (tell, told) = mpsc::channel();
        let (finish, finished) = mpsc::channel::<()>();
        let target = std::thread::spawn(move || {
            change_mask(libc::SIG_BLOCK).unwrap();
            // SAFETY: gettid takes nothing and cannot fail.
            tell.send(unsafe { libc::gettid() }).unwrap();
            finished.recv().unwrap();
            let (set, now) = (set_of_signal(), libc::timespec { tv_sec: 0, tv_nsec: 0 });
            // SAFETY: both structures are initialised and outlive the call.
            unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const now) == signal() }
        });
        let thread = Mutex::new(Some(told.recv().unwrap()));
        limit_pending(0);
        let tries = Cell::new(0);
        send(&thread, || {
            tries.set(tries.get() + 1);
            tries.get() == 3
        });
        assert_eq!(tries.get(), 3, "the queue was full, and nobody needed the signal at last");
        send(&thread, || {
            limit_pending(100);
            false
        });
        finish.send(()).unwrap();
        assert!(target.join().unwrap(), "the signal arrived");
        *thread.lock().unwrap() = None;
        send(&thread, || unreachable!("there is nobody to send to"));
    }
}
