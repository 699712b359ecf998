//! `cargo xtask bench io [ROUNDS] [PART...]`: disks, shares and vsock beside QEMU, virtiofsd and vhost-vsock.

use std::ffi::OsString;
use std::path::Path;

use crate::emulated::Lab;
use crate::{kernel, packages, peers, rootfs, test};

/// How often each runs, if not said.
pub const ROUNDS: &str = "3";
/// The parts of `benches/io/guest.sh`.
const PARTS: [(&str, &str); 5] = [
    ("block", "A disk: a raw image in memory, io_uring on both sides"),
    ("stream", "A share: one file"),
    ("tree", "A share: Python's library"),
    ("sockets", "vsock: a Unix socket here, the host's own vsock there"),
    ("interrupts", "What a thousand small requests cost: less is better"),
];

/// Builds all, runs the named parts, or all, and prints the tables.
///
/// # Errors
/// What could not be built, a part that there is not, or one that failed.
pub fn run(rounds: &str, names: &[String]) -> Result<(), String> {
    if let Some(name) = names.iter().find(|name| PARTS.iter().all(|(part, _)| part != name)) {
        return Err(format!("there is no part {name}, only {}", PARTS.map(|(part, _)| part).join(", ")));
    }
    packages::ensure("the benchmark", &["qemu-system-x86", "python3"])?;
    let ours = kernel::ensure_guest()?;
    let root = rootfs::ensure(rootfs::TEST)?;
    let built = test::build()?;
    let virtiofsd = peers::virtiofsd()?;
    let lab = Lab::ensure(&built.krun)?;
    let absolute = |p: &Path| std::path::absolute(p).map_err(|e| e.to_string());
    let env = [
        ("KRUN", absolute(&built.krun)?),
        ("BUNDLE", ours.bundle),
        ("KERNEL", ours.vmlinux),
        ("ROOT", root.clone()),
        ("VIRTIOFSD", virtiofsd),
    ];
    let script = absolute(Path::new("benches/io/host.sh"))?;
    let bench = absolute(&built.krun.with_file_name("krun-bench"))?;
    let wanted = |part: &str| names.is_empty() || names.iter().any(|name| name == part);
    for (part, title) in PARTS.into_iter().filter(|(part, _)| wanted(part)) {
        let mut words: Vec<OsString> = vec![bench.clone().into(), "figures".into(), rounds.into()];
        for (label, vmm) in [("krun", "krun"), ("QEMU", "qemu")] {
            words.push(label.into());
            words.extend(env.iter().map(|(key, value)| {
                let mut entry = OsString::from(format!("{key}="));
                entry.push(value);
                entry
            }));
            words.extend(["--".into(), "sh".into(), script.clone().into(), vmm.into(), part.into()]);
            words.push(";;".into());
        }
        words.pop();
        let (status, text) = lab.capture(&words, &[], std::slice::from_ref(&root))?;
        if !status.success() {
            return Err(format!("the part {part} ended with {status}"));
        }
        println!("\n{title}; {rounds} rounds, medians\n\n{}", table(&text));
    }
    Ok(())
}

/// A row for each figure, with krun's beside QEMU's.
fn table(text: &str) -> String {
    let rows: Vec<Vec<&str>> = text.lines().map(|l| l.split('\t').collect()).collect();
    let mut table = "| what | unit | krun | QEMU | krun to QEMU |\n|---|---|---|---|---|\n".to_owned();
    for row in &rows {
        let ["krun", name, ours, unit] = row[..] else { continue };
        let peer = rows.iter().find(|r| r.len() == 4 && r[0] == "QEMU" && r[1] == name).map(|r| r[2]);
        let number = |text: &str| text.parse::<f64>().unwrap_or(f64::NAN);
        let (ours, peer) = (number(ours), peer.map_or(f64::NAN, number));
        table += &format!("| {name} | {unit} | {ours:.0} | {peer:.0} | {:.2} |\n", ours / peer);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_that_the_peer_lacks_has_no_ratio() {
        let text = "krun\ta\t10\t1/s\nkrun\tb\t3\t1/s\nQEMU\ta\t5\t1/s\n";
        let table = table(text);
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(rows, ["| a | 1/s | 10 | 5 | 2.00 |", "| b | 1/s | 3 | NaN | NaN |"]);
    }
}
