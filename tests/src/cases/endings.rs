//! However the guest ends, the host knows.

use std::ffi::OsString;

use rustix::system::{RebootCommand, reboot};

use crate::harness::{Case, Env, Failure, contains, own_resources, run, same, start};
use krun::VmConfig;

pub const CASE: Case = Case { name: "endings", host, guest };

/// The workload ends the machine by itself.
fn guest(args: &[OsString]) -> Result<u8, String> {
    let how = match args.first().and_then(|a| a.to_str()) {
        Some("restart") => RebootCommand::Restart,
        Some("power off") => RebootCommand::PowerOff,
        other => return Err(format!("how? {other:?}")),
    };
    reboot(how).map_err(|e| e.to_string())?;
    std::thread::sleep(std::time::Duration::from_secs(1000));
    Ok(0)
}

fn ends_without_status(what: &str, config: VmConfig) -> Result<(), Failure> {
    match run(config) {
        Ok(output) => Err(Failure::Wrong(format!("{what}: ended with status {}", output.code))),
        Err(Failure::Wrong(text)) => contains(what, &text, "without reporting a status"),
        Err(skip) => Err(skip),
    }
}

fn host(env: &Env) -> Result<(), Failure> {
    for how in ["restart", "power off"] {
        ends_without_status(how, env.guest_half("endings", [how]))?;
    }
    // A kernel that runs out of memory and may not kill for it panics.
    let mut config = env.shell("echo 2 > /proc/sys/vm/panic_on_oom; exec tail /dev/zero");
    config.memory_mib = 128;
    ends_without_status("panic", config)?;

    let captured = start(env.shell("sleep 1000"))?;
    captured.vm.kill();
    captured.vm.kill();
    match captured.finish() {
        Ok(output) => return Err(Failure::Wrong(format!("a killed VM ended with status {}", output.code))),
        Err(Failure::Wrong(text)) => contains("killed", &text, "without reporting a status")?,
        Err(skip) => return Err(skip),
    }
    // Dropping the handle of a running VM ends it.
    let before = own_resources()?;
    drop(start(env.shell("sleep 1000"))?.vm);
    std::thread::sleep(std::time::Duration::from_millis(300));
    same("descriptors and threads after a drop", own_resources()?, before)
}
