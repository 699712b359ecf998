//! `cargo xtask bench`: our programs beside those of others, in one run in the emulated host.

mod boot;
mod io;
mod net;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

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
        [what, words @ ..] if what == "net" => net::run(words),
        _ => Err(
            "usage: cargo xtask bench boot [ROUNDS] | io [ROUNDS [PART...]] | net [ROUNDS [SECONDS [PEER...]]]".into()
        ),
    }
}

fn absolute(path: &Path) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// The variants of `krun-bench` with these labels: each with the environment, and the command that its word makes.
fn variants(
    env: &[(&str, PathBuf)],
    labels: &[(&str, &str)],
    command: impl Fn(&str) -> Vec<OsString>,
) -> Vec<OsString> {
    let mut words = Vec::new();
    for (label, word) in labels {
        if !words.is_empty() {
            words.push(OsString::from(";;"));
        }
        words.push(label.into());
        words.extend(env.iter().map(|(key, value)| {
            let mut entry = OsString::from(format!("{key}="));
            entry.push(value);
            entry
        }));
        words.push("--".into());
        words.extend(command(word));
    }
    words
}

/// A row for each figure, with krun's beside QEMU's and so many decimals.
fn table(text: &str, decimals: usize) -> String {
    let rows: Vec<Vec<&str>> = text.lines().map(|l| l.split('\t').collect()).collect();
    let mut table = "| what | unit | krun | QEMU | krun to QEMU |\n|---|---|---|---|---|\n".to_owned();
    for row in &rows {
        let ["krun", name, ours, unit] = row[..] else { continue };
        let peer = rows.iter().find(|r| r.len() == 4 && r[0] == "QEMU" && r[1] == name).map(|r| r[2]);
        let number = |text: &str| text.parse::<f64>().unwrap_or(f64::NAN);
        let (ours, peer) = (number(ours), peer.map_or(f64::NAN, number));
        table +=
            &format!("| {name} | {unit} | {ours:.decimals$} | {peer:.decimals$} | {:.2} |\n", ours / peer);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_that_the_peer_lacks_has_no_ratio() {
        let text = "krun\ta\t10\t1/s\nkrun\tb\t3\t1/s\nQEMU\ta\t5\t1/s\n";
        let table = table(text, 0);
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(rows, ["| a | 1/s | 10 | 5 | 2.00 |", "| b | 1/s | 3 | NaN | NaN |"]);
    }

    #[test]
    fn variants_are_what_the_program_takes_apart() {
        let words = variants(&[("A", "/b".into())], &[("x", "1"), ("y", "2")], |w| vec![w.into()]);
        assert_eq!(words, ["x", "A=/b", "--", "1", ";;", "y", "A=/b", "--", "2"]);
    }
}
