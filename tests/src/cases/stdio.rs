//! Standard streams reach the workload as they are: apart, binary, to the last byte, with an end.

use std::ffi::OsString;
use std::io::{Read, Write, stderr, stdin, stdout};

use crate::harness::{Case, Env, Failure, no_guest, noise, run, run_with_input, same, start};

pub const CASE: Case = Case { name: "stdio", host, guest };
pub const BULK: Case = Case { name: "stdio_bulk", host: bulk, guest: no_guest };

fn guest(_: &[OsString]) -> Result<u8, String> {
    let mut input = Vec::new();
    stdin().read_to_end(&mut input).map_err(|e| e.to_string())?;
    stdout()
        .write_all(&input)
        .and_then(|()| stderr().write_all(b"to stderr\n"))
        .map_err(|e| e.to_string())?;
    Ok(u8::try_from(input.len() % 251).unwrap_or(0))
}

fn host(env: &Env) -> Result<(), Failure> {
    let input = noise(100_000, 7);
    let output = run_with_input(env.guest_half("stdio", ["x"]), input.clone())?;
    same("status", output.code, 100_000 % 251)?;
    same("standard output is the input", output.stdout == input, true)?;
    same("standard error", output.err().as_str(), "to stderr\n")?;

    let empty = run(env.shell("cat; echo end of input"))?.success()?;
    same("closed input", empty.out().as_str(), "end of input\n")?;

    // Output without a newline, written just before the end, is not lost.
    let last = run(env.shell("printf last; printf also >&2"))?.success()?;
    same("last words", (last.out().as_str(), last.err().as_str()), ("last", "also"))?;

    // A reader that goes away does not keep the guest.
    let mut captured =
        start(env.shell("trap '' PIPE; yes 2>/dev/null | head -c 1000000 >/dev/null; echo done >&2"))?;
    drop(captured.stdin.take());
    let output = captured.finish()?;
    same("after a pipeline", output.err().as_str(), "done\n")
}

/// How much goes through `cat`; `KRUN_TEST_BULK_MIB` makes it more.
fn bulk_mib() -> usize {
    std::env::var("KRUN_TEST_BULK_MIB").ok().and_then(|v| v.parse().ok()).unwrap_or(64)
}

fn bulk(env: &Env) -> Result<(), Failure> {
    let input = noise(bulk_mib() << 20, 11);
    let output = run_with_input(env.program("cat", ["-"]), input.clone())?;
    same("status", output.code, 0)?;
    same("length", output.stdout.len(), input.len())?;
    same("contents are identical", output.stdout == input, true)
}
