//! Nothing stays behind, however often.

use std::time::Duration;

use crate::harness::{Case, Env, Failure, no_guest, own_resources, run, same};

pub const CASE: Case = Case { name: "leftovers", host, guest: no_guest };

/// Runs in a row; `KRUN_TEST_RUNS` makes it more.
fn runs() -> u32 {
    std::env::var("KRUN_TEST_RUNS").ok().and_then(|v| v.parse().ok()).unwrap_or(15)
}

fn temporary_files() -> Result<usize, Failure> {
    Ok(std::fs::read_dir(std::env::temp_dir())?.count())
}

fn host(env: &Env) -> Result<(), Failure> {
    // The first run loads the kernel bundle, which stays.
    same("first run", run(env.program("true", ["x"]))?.code, 0)?;
    let (before, files) = (own_resources()?, temporary_files()?);
    for n in 0..runs() {
        same(&format!("run {n}"), run(env.program("true", ["x"]))?.code, 0)?;
    }
    // A joined thread leaves /proc/self/task a moment after its join.
    for _ in 0..50 {
        if own_resources()? == before {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    same("descriptors and threads", own_resources()?, before)?;
    same("temporary files", temporary_files()?, files)
}
