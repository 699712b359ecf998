//! `krun run` in the emulated host: the same command there, with the same streams.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use krun::{RawTerminal, terminal_size};
use krun_lab::{Command, Engine, WindowSize};

use crate::args::{Lab, Run};
use crate::signals::{Early, Session, Signals, Target};
use crate::{exact, run};

/// Where the emulated host's kernel may be given.
const KERNEL_VARIABLE: &str = "KRUN_HOST_KERNEL";

/// The engine, if everything that it needs is there; said in a few words.
pub fn ready() -> Result<String, String> {
    let engine = engine()?;
    Ok(format!("{} with {}", engine.qemu.display(), engine.kernel.display()))
}

fn engine() -> Result<Engine, String> {
    Engine::new(&host_kernel()?, krun::INIT.to_vec()).map_err(|e| e.to_string())
}

/// The kernel named by the environment, else the newest in the cache.
fn host_kernel() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os(KERNEL_VARIABLE) {
        return Ok(path.into());
    }
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .unwrap_or_default()
        .join("krun/kernel");
    let kernels = std::fs::read_dir(&cache).into_iter().flatten().flatten();
    kernels
        .map(|entry| entry.path().join("vmlinux-host"))
        .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
        .max()
        .map(|(_, path)| path)
        .ok_or_else(|| {
            format!(
                "the emulated host has no kernel in {}; build it with: cargo xtask kernel --role host, or name one in {KERNEL_VARIABLE}",
                cache.display()
            )
        })
}

/// Runs it there and gives back the exit status.
pub fn run(args: &Run, verbose: u8) -> Result<i32, String> {
    // The message is about what the user gave, not about what the other side sees.
    run::check(args)?;
    if !args.nets.is_empty() {
        return Err("--net: the emulated host has no network of its own; use a host with KVM".into());
    }
    if !args.vsock.is_empty() {
        return Err(
            "--vsock: unix sockets of this host are out of reach for the emulated host; this needs KVM"
                .into(),
        );
    }
    if !args.vhost_user.is_empty() {
        return Err(
            "--vhost-user: processes of this host are out of reach for the emulated host; this needs KVM"
                .into(),
        );
    }
    let engine = engine()?;
    let exe = std::env::current_exe().map_err(|e| format!("cannot find this program's file: {e}"))?;
    start(&engine, Command::new(words(&exe, verbose)), run::exported_paths(args))
}

/// Runs any command of this host there.
pub fn lab(args: &Lab) -> Result<i32, String> {
    let engine = engine()?;
    if args.exact {
        return exact::run(engine, args);
    }
    if args.prepare {
        return engine.prepare().map(|_| 0).map_err(|e| e.to_string());
    }
    let words = if args.command.is_empty() { vec![OsString::from("/bin/sh")] } else { args.command.clone() };
    start(&engine, Command::new(words), args.writable.clone())
}

/// Runs a command there with this process's streams and terminal.
fn start(engine: &Engine, mut command: Command, writable: Vec<PathBuf>) -> Result<i32, String> {
    command.writable = writable;
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    command.terminal = terminal.then(|| {
        let size = terminal_size(std::io::stdout()).unwrap_or_default();
        WindowSize { rows: size.rows, cols: size.cols }
    });
    // While the emulated host boots there is nobody to give them to; QEMU ends with this process.
    let signals = Signals::catch(Early::End).map_err(|e| format!("cannot prepare for signals: {e}"))?;
    let fail = |e: std::io::Error| format!("the terminal cannot be put in raw mode: {e}");
    let raw = if terminal { RawTerminal::new(std::io::stdin()).map_err(fail)? } else { None };
    let running = engine.run(command).map_err(|e| e.to_string())?;
    let session = Arc::new(Session { running, raw });
    // The signals first: one that still ended this process would leave the terminal raw.
    signals.forward_to(&session);
    // Not earlier: until then Ctrl-C has to be a signal. The terminal may have another size by now.
    session.refresh();
    let status = session.running.wait().map_err(|e| e.to_string());
    // Not left to the last owner, which may be the thread of signals.
    session.raw.iter().for_each(RawTerminal::restore);
    status
}

/// This command's own words, to be run on KVM.
fn words(exe: &Path, verbose: u8) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec![exe.into(), "run".into(), "--accel".into(), "kvm".into()];
    words.extend((0..verbose).map(|_| "--verbose".into()));
    // Between `run` and `--`, the options as they were given, but for the one on how to run.
    let mut given = std::env::args_os().skip(1).skip_while(|w| w != "run").skip(1);
    while let Some(word) = given.next() {
        if word == "--" {
            words.push(word);
            break;
        }
        let text = word.to_string_lossy();
        if text == "--accel" {
            let _ = given.next();
        } else if !text.starts_with("--accel=") && text != "--verbose" && !is_verbosity(&text) {
            words.push(word);
        }
    }
    words.extend(given);
    words
}

/// `-v`, `-vv` and so on.
fn is_verbosity(word: &str) -> bool {
    word.len() > 1 && word.strip_prefix('-').is_some_and(|rest| rest.chars().all(|c| c == 'v'))
}
