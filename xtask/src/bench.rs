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

/// What krun is called when its share has a DAX window.
const DAX: &str = "krun, DAX";

/// A row for each figure, with krun's beside QEMU's and so many decimals.
fn table(text: &str, decimals: usize) -> String {
    let rows: Vec<Vec<&str>> = text.lines().map(|l| l.split('\t').collect()).collect();
    let labels: Vec<_> =
        ["krun", DAX].into_iter().filter(|l| rows.iter().any(|row| row.first() == Some(l))).collect();
    let ratios: Vec<_> = labels.iter().map(|label| format!("{label} to QEMU")).collect();
    let mut table = format!("| what | unit | {} | QEMU | {} |\n", labels.join(" | "), ratios.join(" | "));
    table += &format!("|---|---|{}\n", "---|".repeat(2 * labels.len() + 1));
    for row in &rows {
        let ["krun", name, _, unit] = row[..] else { continue };
        let figure = |label: &str| {
            let row = rows.iter().find(|r| r.len() == 4 && r[0] == label && r[1] == name);
            row.and_then(|r| r[2].parse::<f64>().ok()).unwrap_or(f64::NAN)
        };
        let (peer, ours) = (figure("QEMU"), labels.iter().map(|label| figure(label)));
        let cells = ours.clone().chain([peer]).map(|n| format!("{n:.decimals$}"));
        let cells: Vec<_> = cells.chain(ours.map(|n| format!("{:.2}", n / peer))).collect();
        table += &format!("| {name} | {unit} | {} |\n", cells.join(" | "));
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
    fn a_window_has_a_column_where_it_was_measured() {
        let table = table("krun\ta\t10\t1/s\nkrun, DAX\ta\t20\t1/s\nQEMU\ta\t5\t1/s\n", 0);
        let wanted = "| what | unit | krun | krun, DAX | QEMU | krun to QEMU | krun, DAX to QEMU |\n\
            |---|---|---|---|---|---|---|\n| a | 1/s | 10 | 20 | 5 | 2.00 | 4.00 |\n";
        assert_eq!(table, wanted);
    }

    #[test]
    fn variants_are_what_the_program_takes_apart() {
        let words = variants(&[("A", "/b".into())], &[("x", "1"), ("y", "2")], |w| vec![w.into()]);
        assert_eq!(words, ["x", "A=/b", "--", "1", ";;", "y", "A=/b", "--", "2"]);
    }
}
