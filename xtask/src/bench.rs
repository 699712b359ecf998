//! `cargo xtask bench`: our programs beside those of others, in one run in the emulated host.

mod boot;
mod io;
mod net;

/// Runs the benchmark named first.
///
/// # Errors
/// What could not be built, or a program that failed.
pub fn run(args: &[String]) -> Result<(), String> {
    match args {
        [what] if what == "boot" => boot::run(boot::ROUNDS),
        [what, rounds] if what == "boot" => boot::run(rounds),
        [what] if what == "io" => io::run(io::ROUNDS, &[]),
        [what, rounds, parts @ ..] if what == "io" => io::run(rounds, parts),
        [what] if what == "net" => net::run(net::SECONDS),
        [what, seconds] if what == "net" => net::run(seconds),
        _ => Err("usage: cargo xtask bench boot [ROUNDS] | io [ROUNDS [PART...]] | net [SECONDS]".into()),
    }
}
