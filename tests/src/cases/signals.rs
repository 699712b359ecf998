//! Signals reach the workload; a shutdown ends it in order.

use std::io::Read;
use std::time::Duration;

use crate::harness::{Case, Env, Failure, no_guest, same, start};

pub const CASE: Case = Case { name: "signals", host, guest: no_guest };

const TERM: i32 = 15;

fn host(env: &Env) -> Result<(), Failure> {
    // A signal that arrives before the workload does is not lost.
    let early = start(env.program("sleep", ["100"]))?;
    early.vm.signal(TERM);
    same("TERM, sent early", early.finish()?.code, 143)?;

    let caught =
        start(env.shell("trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.05; done"))?;
    caught.wait_for_output("ready")?;
    caught.vm.signal(TERM);
    let output = caught.finish()?;
    same("TERM, caught", (output.code, output.out().as_str()), (9, "ready\ncaught\n"))?;

    let stubborn = start(env.shell("trap '' TERM; echo ready; while :; do sleep 0.05; done"))?;
    stubborn.wait_for_output("ready")?;
    stubborn.vm.shutdown(Duration::from_millis(200));
    same("shutdown of a workload that ignores TERM", stubborn.finish()?.code, 137)?;

    // The command passes its own signals on.
    let mut child = env
        .krun()?
        .args(["--", "sleep", "100"])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    std::thread::sleep(Duration::from_millis(2500));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    let status = child.wait()?;
    let mut text = String::new();
    if let Some(mut err) = child.stderr.take() {
        err.read_to_string(&mut text)?;
    }
    same(&format!("krun run and TERM (stderr {text:?})"), status.code(), Some(143))
}
