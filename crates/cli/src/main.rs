//! The `krun` command: programs in microVMs.

mod args;
mod disks;
mod doctor;
mod emulated;
mod exact;
mod nets;
mod run;
mod signals;
mod vhost;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use tracing::level_filters::LevelFilter;

use args::{Accel, Cli, Command, Run};

/// Exit status when the VM could not be set up, as of other programs that run programs.
const EXIT_SETUP: u8 = 125;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { EXIT_SETUP } else { 0 });
        }
    };
    log(cli.verbose);
    match act(&cli) {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(EXIT_SETUP)),
        Err(message) => {
            eprintln!("krun: {message}");
            ExitCode::from(EXIT_SETUP)
        }
    }
}

fn log(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::ERROR,
        1 => LevelFilter::INFO,
        _ => LevelFilter::TRACE,
    };
    // Seconds since the start, as in the guest's messages.
    let time = tracing_subscriber::fmt::time::uptime();
    let ansi = io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(ansi)
        .with_timer(time)
        .init();
}

fn act(cli: &Cli) -> Result<i32, String> {
    let mut out = io::stdout().lock();
    let printing = |e: io::Error| format!("standard output: {e}");
    match &cli.command {
        Command::Run(args) => {
            drop(out);
            run_somewhere(args, cli.verbose)
        }
        Command::Lab(args) => {
            drop(out);
            emulated::lab(args)
        }
        Command::Doctor => doctor::doctor(&mut out).map_err(printing),
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "krun", &mut out);
            Ok(0)
        }
        Command::Man { command } => {
            manual(command.as_deref())?.render(&mut out).map(|()| 0).map_err(printing)
        }
    }
}

/// The page `krun(1)`, or `krun-NAME(1)` of a command.
fn manual(name: Option<&str>) -> Result<clap_mangen::Man, String> {
    let mut all = Cli::command();
    let Some(name) = name else { return Ok(clap_mangen::Man::new(all)) };
    // Lets the commands know what they inherit and what they are called.
    all.build();
    let command = all
        .get_subcommands()
        .find(|command| command.get_name() == name)
        .ok_or_else(|| format!("man {name}: there is no such command"))?;
    Ok(clap_mangen::Man::new(command.clone()).title(format!("krun-{name}")))
}

/// Says why something runs in the emulated host that was to run on KVM if possible.
fn instead(why: &krun::host::Finding) -> String {
    format!("{why}; running in an emulated host instead (krun doctor says more)")
}

/// Runs it on KVM, or in the emulated host where KVM does not serve.
fn run_somewhere(args: &Run, verbose: u8) -> Result<i32, String> {
    match args.accel {
        Accel::Kvm => run::run(args, verbose > 0),
        Accel::Emulated => emulated::run(args, verbose),
        Accel::Auto => {
            let probe = krun::host::probe();
            if probe.usable() {
                return run::run(args, verbose > 0);
            }
            if let Some(why) = probe.findings.first() {
                eprintln!("krun: {}", instead(why));
            }
            emulated::run(args, verbose)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_and_what_is_done_are_one_sentence() {
        let text = instead(&krun::host::Finding::Hung);
        assert_eq!(text.matches("; running in").count(), 1, "{text}");
        assert!(text.starts_with("a trial guest on /dev/kvm did not come to an end; running in"), "{text}");
    }
}
