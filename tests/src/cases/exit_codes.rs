//! The workload's end is the VM's exit status.

use std::ffi::OsString;

use crate::harness::{Case, Env, Failure, contains, run, same};

pub const CASE: Case = Case { name: "exit_codes", host, guest };

fn guest(args: &[OsString]) -> Result<u8, String> {
    args.first().and_then(|a| a.to_str()).and_then(|a| a.parse().ok()).ok_or_else(|| "a number".into())
}

fn host(env: &Env) -> Result<(), Failure> {
    for code in ["0", "37", "255"] {
        let output = run(env.guest_half("exit_codes", [code]))?;
        same("exit status", output.code.to_string().as_str(), code)?;
    }
    same("killed by TERM", run(env.shell("kill -TERM $$"))?.code, 143)?;
    same("killed by KILL", run(env.shell("kill -KILL $$"))?.code, 137)?;

    // Any user can open a file of the root, and only root says over one how the machine ended.
    let forge =
        r#"open(my $f, "<", "/etc/passwd") or die; exit 1 if ioctl($f, 0x7602, 0); exit($!{EPERM} ? 37 : 2)"#;
    let mut config = env.program("/usr/bin/perl", ["-MErrno", "-e", forge]);
    config.command.user = Some(("nobody".into(), None));
    let output = run(config)?;
    same(&format!("status of a forger: {}", output.err()), output.code, 37)?;

    let missing = run(env.program("no-such-program", ["x"]))?;
    same("not found", missing.code, krun::EXIT_NOT_FOUND)?;
    contains("not found", &missing.err(), "no-such-program")?;

    let directory = run(env.program("/etc/passwd", ["x"]))?;
    same("not executable", directory.code, krun::EXIT_NOT_EXECUTABLE)?;
    contains("not executable", &directory.err(), "/etc/passwd")?;

    let mut config = env.shell("true");
    config.command.cwd = Some("/no/such/directory".into());
    let setup = run(config)?;
    same("set-up failure", setup.code, krun::EXIT_SETUP)?;
    contains("set-up failure", &setup.err(), "/no/such/directory")?;

    let mut config = env.shell("true");
    config.command.user = Some(("nobody-here".into(), None));
    let user = run(config)?;
    same("unknown user", user.code, krun::EXIT_SETUP)?;
    contains("unknown user", &user.err(), "nobody-here")
}
