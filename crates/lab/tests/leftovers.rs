//! Nothing stays behind. Alone in its program: it counts what the whole process has.
#![allow(clippy::unwrap_used, reason = "only tests call it")]

mod common;

use std::time::{Duration, Instant};

use common::{children, engine, read_until, run, script, start};
use krun_lab::Error;

/// Open descriptors and threads of this process.
fn held() -> (usize, usize) {
    let count = |dir: &str| std::fs::read_dir(dir).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}

#[test]
fn nothing_stays_behind() {
    let Some(engine) = engine() else { return };
    assert_eq!(run(&engine, script("true")).0, 0);
    let before = held();
    for n in 0..20 {
        assert_eq!(run(&engine, script(&format!("exit {n}"))).0, n);
    }
    // Dropped while it runs, with output that nobody reads.
    let (running, stdout, stderr) = start(&engine, script("yes"));
    std::thread::sleep(Duration::from_millis(300));
    let time = Instant::now();
    drop(running);
    assert!(time.elapsed() < Duration::from_secs(5));
    drop((stdout, stderr));
    // Killed while another thread waits.
    let (running, mut stdout, stderr) = start(&engine, script("echo go; sleep 1000"));
    read_until(&mut stdout, "go\n");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| running.wait());
        std::thread::sleep(Duration::from_millis(100));
        running.kill();
        assert!(matches!(waiting.join().unwrap(), Err(Error::Qemu { .. })));
    });
    assert!(running.wait().is_err());
    drop((running, stdout, stderr));
    assert_eq!(children(), Vec::<String>::new());
    assert_eq!(held(), before);
}
