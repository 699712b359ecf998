//! Several VMs in one process, at once and after another, from one kernel.

use crate::harness::{Case, Env, Failure, no_guest, run, same, start};

pub const CASE: Case = Case { name: "several", host, guest: no_guest };

fn host(env: &Env) -> Result<(), Failure> {
    let script = |n: usize| format!("echo machine {n}; exit {n}");
    let running: Vec<_> = (0..3).map(|n| start(env.shell(&script(n)))).collect::<Result<_, _>>()?;
    for (n, captured) in running.into_iter().enumerate() {
        let output = captured.finish()?;
        same("status", output.code, n as i32)?;
        same("output", output.out(), format!("machine {n}\n"))?;
    }
    same("one more", run(env.shell("exit 4"))?.code, 4)
}
