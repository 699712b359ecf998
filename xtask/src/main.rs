//! One entry point for everything that is not the product itself: `cargo xtask COMMAND`.

mod arrows;
mod bench;
mod debian;
mod demo;
mod emulated;
mod install;
mod kernel;
mod packages;
mod peers;
mod rootfs;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

/// A subcommand: name, arguments, purpose, what runs it.
type Command = (&'static str, &'static str, &'static str, fn(&[String]) -> Result<(), String>);

const COMMANDS: &[Command] = &[
    ("demo", "", "runs a Python program in a microVM, getting what is missing", |_| demo::run()),
    (
        "bench",
        "boot|io [ROUNDS] | net [ROUNDS [SECONDS [PEER...]]]",
        "boot, devices or networks beside peers, in the emulated host",
        bench::run,
    ),
    ("test", "[NAME...]", "runs all tests, or the VM tests whose names start so", test::run),
    (
        "kernel",
        "[--source DIR|TARBALL] [--role guest|host|all] ...",
        "builds the guest's kernel bundle and the emulated host's kernel",
        kernel::run,
    ),
    ("bundle", "", "fetches Debian's kernel bundle and says where it is", |_| {
        debian::bundle().map(|path| println!("{}", path.display()))
    }),
    ("rootfs", "", "makes the Debian root with Python and says where it is", |_| {
        rootfs::ensure(rootfs::PYTHON).map(|path| println!("{}", path.display()))
    }),
    ("install", "--prefix DIR", "installs library, header, command, completions and manual", install),
    ("arrows", "", "checks which crate depends on which", |_| arrows::check()),
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("xtask: {why}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(args: &[String]) -> Result<(), String> {
    let Some((name, rest)) = args.split_first() else { return Err(usage()) };
    if matches!(name.as_str(), "help" | "--help" | "-h") {
        println!("{}", usage());
        return Ok(());
    }
    match COMMANDS.iter().find(|(command, ..)| command == name) {
        Some((.., run)) => run(rest),
        None => Err(format!("no command {name}\n{}", usage())),
    }
}

fn usage() -> String {
    let mut text = "usage: cargo xtask COMMAND".to_owned();
    for (name, args, purpose, _) in COMMANDS {
        text.push_str(&format!("\n  {name} {args}\n        {purpose}"));
    }
    text
}

fn install(args: &[String]) -> Result<(), String> {
    match args {
        [option, prefix] if option == "--prefix" => {
            let destdir = std::env::var_os("DESTDIR").filter(|d| !d.is_empty()).map(PathBuf::from);
            install::run(prefix.as_ref(), destdir.as_deref())
        }
        _ => Err("usage: cargo xtask install --prefix DIR".into()),
    }
}

/// Where built and fetched things are kept: `$XDG_CACHE_HOME/krun`, else `~/.cache/krun`.
///
/// # Errors
/// Neither variable is set.
pub fn cache_dir() -> Result<PathBuf, String> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map(|dir| dir.join("krun"))
        .ok_or_else(|| "neither XDG_CACHE_HOME nor HOME is set: no place for a cache".into())
}

/// Where cargo puts what it builds.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_command_is_told_with_all_known_ones() {
        let error = dispatch(&["brew".to_owned()]).unwrap_err();
        assert!(error.starts_with("no command brew\n"));
        for (name, ..) in COMMANDS {
            assert!(error.contains(&format!("\n  {name} ")), "{name}");
        }
        assert_eq!(dispatch(&[]).unwrap_err(), usage());
    }
}
