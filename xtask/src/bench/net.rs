//! `cargo xtask bench net [SECONDS]`: iperf3 through passt, in guests of ours and of QEMU.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::emulated::Lab;
use crate::{kernel, packages, test};

/// How long each measurement takes, if not said.
pub const SECONDS: &str = "5";
/// Whose guest the others are compared with.
const PEER: &str = "QEMU";

/// What one guest reached: kbit/s by the measurement's name, in order of appearance.
#[derive(Debug, Default, PartialEq)]
struct Guest {
    name: String,
    rates: Vec<(String, Option<f64>)>,
}

/// Builds all, runs all and prints the table.
///
/// # Errors
/// What could not be built, or a program that failed.
pub fn run(seconds: &str) -> Result<(), String> {
    seconds.parse::<u32>().map_err(|_| format!("{seconds} is no number of seconds"))?;
    packages::ensure("the benchmark", &["busybox-static", "cpio", "iperf3", "iproute2", "passt"])?;
    let ours = kernel::ensure_guest()?;
    let built = test::build()?;
    let lab = Lab::ensure(&built.krun)?;
    let absolute = |p: &Path| std::path::absolute(p).map_err(|e| format!("{}: {e}", p.display()));
    let stage = absolute(&crate::target_dir().join("bench-net"))?;
    let root = guest_root(&stage)?;
    let script = stage.join("net.sh");
    write(&script, include_str!("net.sh"))?;
    let words: Vec<OsString> = [
        "sh".into(),
        script.into(),
        seconds.into(),
        absolute(&built.krun)?.into(),
        ours.bundle.into(),
        root.clone().into(),
        ours.vmlinux.into(),
        stage.join("initrd.cpio").into(),
    ]
    .into();
    let (status, text) = lab.capture(&words, &[], &[root])?;
    let guests = guests(&text);
    if !status.success() || guests.iter().map(|g| g.rates.len()).min().unwrap_or(0) == 0 {
        return Err(format!("the measurement ended with {status}:\n{text}"));
    }
    println!("Mbit/s as the receiver saw it, {seconds} s each; in brackets the ratio to {PEER}\n");
    print!("{}", table(&guests));
    Ok(())
}

/// A directory with iperf3, the libraries that it needs and a shell; beside it the same as an initial RAM disk.
fn guest_root(stage: &Path) -> Result<PathBuf, String> {
    let _ = fs::remove_dir_all(stage);
    let root = stage.join("root");
    for dir in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        fs::create_dir_all(root.join(dir)).map_err(|e| format!("{}: {e}", root.display()))?;
    }
    write(&root.join("bench"), include_str!("net-guest.sh"))?;
    write(&root.join("init"), include_str!("net-init.sh"))?;
    let script = "chmod 755 init && cp /bin/busybox bin/ && \
        for name in $(bin/busybox --list); do [ $name = busybox ] || ln -sf busybox bin/$name; done && \
        cp -L $(command -v iperf3) bin/ && \
        ldd bin/iperf3 | sed -n 's/.*[[:space:]]\\(\\/[^ ]*\\) (0x.*/\\1/p' | while read -r lib; do \
        mkdir -p \".${lib%/*}\" && cp -L \"$lib\" \".$lib\" || exit 1; done && \
        find . | cpio --quiet -o -H newc > ../initrd.cpio";
    let status = Command::new("sh").args(["-ec", script]).current_dir(&root).status();
    match status {
        Ok(status) if status.success() => Ok(root),
        other => Err(format!("making the guest's root: {other:?}")),
    }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// Reads what the guests printed.
fn guests(text: &str) -> Vec<Guest> {
    let mut guests = Vec::<Guest>::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("== ") {
            guests.push(Guest { name: name.into(), rates: Vec::new() });
            continue;
        }
        let Some(guest) = guests.last_mut() else { continue };
        if let Some(what) = line.strip_prefix("-- ") {
            guest.rates.push((what.into(), None));
        } else if line.ends_with("receiver")
            && let Some((_, rate)) = guest.rates.last_mut()
        {
            // The last such line is the sum of all streams.
            *rate = rate_of(line).or(*rate);
        }
    }
    guests
}

/// The kbit/s of a line of iperf3's.
fn rate_of(line: &str) -> Option<f64> {
    let words: Vec<_> = line.split_whitespace().collect();
    let at = words.iter().position(|w| *w == "Kbits/sec")?;
    words.get(at.checked_sub(1)?)?.parse().ok()
}

fn table(guests: &[Guest]) -> String {
    let rates = |name: &str| -> BTreeMap<&str, f64> {
        let found = guests.iter().find(|g| g.name == name);
        found
            .into_iter()
            .flat_map(|g| &g.rates)
            .filter_map(|(what, rate)| Some((what.as_str(), (*rate)?)))
            .collect()
    };
    let peer = rates(PEER);
    let names: Vec<_> = guests.iter().map(|g| g.name.as_str()).collect();
    let mut text = format!("| what | {} |\n|---|{}\n", names.join(" | "), "---|".repeat(names.len()));
    let whats = guests.iter().max_by_key(|g| g.rates.len()).into_iter().flat_map(|g| &g.rates);
    for (what, _) in whats {
        text.push_str(&format!("| {what} |"));
        for name in &names {
            match (rates(name).get(what.as_str()), peer.get(what.as_str())) {
                (None, _) => text.push_str(" none |"),
                (Some(rate), Some(other)) if *name != PEER => {
                    text.push_str(&format!(" {:.0} ({:.2}) |", rate / 1e3, rate / other));
                }
                (Some(rate), _) => text.push_str(&format!(" {:.0} |", rate / 1e3)),
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "noise\n== krun\n-- TCP out, 1 stream\r\n\
        [  5]   0.00-5.00   sec   300 MBytes  500000 Kbits/sec    0             sender\n\
        [  5]   0.00-5.00   sec   300 MBytes  400000 Kbits/sec                  receiver\n\
        -- TCP out, 8 streams\n\
        [  5]   0.00-5.00   sec   30 MBytes  1000 Kbits/sec                  receiver\n\
        [SUM]   0.00-5.00   sec   30 MBytes  8000 Kbits/sec                  receiver\n\
        -- UDP in, 1 stream\niperf3: error - control socket has closed unexpectedly\n\
        == QEMU\n-- TCP out, 1 stream\n\
        [  5]   0.00-5.00   sec   300 MBytes  200000 Kbits/sec                  receiver\n";

    #[test]
    fn what_guests_print_becomes_a_table() {
        assert_eq!(
            table(&guests(TEXT)),
            "| what | krun | QEMU |\n|---|---|---|\n| TCP out, 1 stream | 400 (2.00) | 200 |\n\
             | TCP out, 8 streams | 8 | none |\n| UDP in, 1 stream | none | none |\n"
        );
    }
}
