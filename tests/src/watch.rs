//! A case that hangs is a failure like any other: told with where it hangs, and the run goes on.
//!
//! Threads cannot be taken back, so the program starts itself anew behind the case that hung.

use std::fmt::Write as _;
use std::os::unix::process::CommandExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a case may take; `KRUN_TEST_CASE_SECONDS` says otherwise. The longest takes about 110 s where it
/// was measured.
fn limit() -> Duration {
    let seconds = std::env::var("KRUN_TEST_CASE_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(300))
}

/// Before the progress, in lines that tell whoever started this program how it stands, and that its host is alive.
const SO_FAR: &str = "vm tests so far: ";
/// Seconds between two of them.
const ALIVE: u32 = 10;

/// So many cases may hang before the others are given up.
const HANGS: u32 = 3;

/// How the run stands; travels to the program's next start.
#[derive(Debug, Default, Clone, Copy)]
pub struct Progress {
    /// Index in the list of cases of the next one.
    pub next: usize,
    /// Cases that passed.
    pub passed: u32,
    /// Cases that failed, those that hung included.
    pub failed: u32,
    /// Cases that could not run.
    pub skipped: u32,
    /// Cases that hung.
    pub hung: u32,
}

impl Progress {
    /// From the value of `--progress`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split(',').map(str::parse::<u32>);
        let mut number = || numbers.next()?.ok();
        let (next, passed, failed) = (number()?, number()?, number()?);
        Some(Self { next: next as usize, passed, failed, skipped: number()?, hung: number()? })
    }

    fn word(self) -> String {
        format!("{},{},{},{},{}", self.next, self.passed, self.failed, self.skipped, self.hung)
    }

    /// Whether the rest of the cases is not worth their time.
    pub fn given_up(self) -> bool {
        self.hung >= HANGS
    }
}

/// A case under way.
#[derive(Debug)]
struct Running {
    name: &'static str,
    start: Instant,
    progress: Progress,
}

/// Watches over one case after another.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    running: Arc<Mutex<Option<Running>>>,
}

impl Watch {
    /// Starts watching.
    pub fn new() -> std::io::Result<Self> {
        let watch = Self::default();
        let (watched, limit) = (watch.clone(), limit());
        thread::Builder::new().name("watch".into()).spawn(move || {
            for second in 0u32.. {
                thread::sleep(Duration::from_secs(1));
                // Held until the program starts anew, so that no case ends or begins meanwhile.
                let running = watched.running.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(case) = &*running else { continue };
                if case.start.elapsed() > limit {
                    start_anew(case.name, case.progress, limit);
                }
                if second.is_multiple_of(ALIVE) {
                    println!("{SO_FAR}{}", case.progress.word());
                }
            }
        })?;
        Ok(watch)
    }

    /// A case begins.
    pub fn begin(&self, name: &'static str, progress: Progress) {
        println!("{SO_FAR}{}", progress.word());
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Running { name, start: Instant::now(), progress });
    }

    /// It has ended.
    pub fn end(&self) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn start_anew(name: &str, mut progress: Progress, limit: Duration) {
    println!("vm test {name} ... FAILED: still running after {} s\n{}", limit.as_secs(), threads());
    progress.next += 1;
    progress.failed += 1;
    progress.hung += 1;
    let mut words: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(at) = words.iter().position(|w| w == "--progress") {
        words.drain(at..(at + 2).min(words.len()));
    }
    words.extend(["--progress".into(), progress.word().into()]);
    let failure = std::process::Command::new("/proc/self/exe").args(words).exec();
    println!("cannot start anew: {failure}");
    std::process::exit(1);
}

/// What each thread of this process and of its children waits for.
fn threads() -> String {
    let mut text = String::new();
    let mut processes = vec![std::process::id().to_string()];
    while let Some(process) = processes.pop() {
        let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
        for task in tasks.map(|t| t.path()) {
            let read = |name: &str| std::fs::read_to_string(task.join(name)).unwrap_or_default();
            let (comm, call, stack) = (read("comm"), read("syscall"), read("stack"));
            let call = call.split(' ').next().unwrap_or_default().trim();
            let id = task.file_name().unwrap_or_default().to_string_lossy();
            let _ = writeln!(text, "    {process}/{id} {}: system call {call}", comm.trim());
            stack.lines().take(4).for_each(|line| {
                let _ = writeln!(text, "        {}", line.trim());
            });
            processes.extend(read("children").split_whitespace().map(str::to_owned));
        }
    }
    text
}
