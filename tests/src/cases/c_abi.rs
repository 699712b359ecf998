//! The C library, as a C program uses it.

use std::process::Command;

use crate::harness::{Case, Env, Failure, no_guest, same};

pub const CASE: Case = Case { name: "c_abi", host, guest: no_guest };

fn host(env: &Env) -> Result<(), Failure> {
    let program = env.chroot_vm()?;
    let library = program.parent().map(|p| p.to_owned()).unwrap_or_default();
    let chroot_vm = || {
        let mut command = Command::new(program);
        command.env("LD_LIBRARY_PATH", &library);
        if let Some(kernel) = &env.kernel {
            // The loader finds the bundle by its name.
            let dir = kernel.parent().map(|p| p.to_owned()).unwrap_or_default();
            let mut path = library.clone().into_os_string();
            path.push(":");
            path.push(dir);
            command.env("LD_LIBRARY_PATH", path);
        }
        command.arg(&env.root).stdin(std::process::Stdio::null());
        command
    };
    let output = chroot_vm().args(["/bin/sh", "-c", "echo out; echo err >&2; exit 37"]).output()?;
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    same("output", (text(&output.stdout).as_str(), text(&output.stderr).as_str()), ("out\n", "err\n"))?;
    same("status", output.status.code(), Some(37))?;
    let output = chroot_vm().args(["/no/such/program"]).output()?;
    same("not found", output.status.code(), Some(127))
}
