//! `cargo xtask bench io [ROUNDS] [PART...]`: disks, shares and vsock beside QEMU, virtiofsd and vhost-vsock.

use std::ffi::OsString;
use std::path::Path;

use super::{DAX, absolute, table, variants};
use crate::emulated::Lab;
use crate::{kernel, packages, peers, rootfs, test};

/// How often each runs, if not said.
pub const ROUNDS: &str = "3";
/// The parts of `benches/io/guest.sh`.
const PARTS: [(&str, &str); 5] = [
    ("block", "A disk: a raw image in memory, io_uring on both sides"),
    ("stream", "A share: one file"),
    ("tree", "A share: a tree of files"),
    ("sockets", "vsock: a Unix socket here, the host's own vsock there"),
    ("interrupts", "What a thousand small requests cost: less is better"),
];

/// Those in which krun also runs with a DAX window.
const WITH_DAX: [&str; 2] = ["stream", "tree"];

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
    let tree = match std::env::var_os("KRUN_BENCH_TREE") {
        Some(tree) => absolute(Path::new(&tree))?,
        None => root.join("usr/lib/python3.11"),
    };
    if !tree.is_dir() {
        return Err(format!("{} is no directory; KRUN_BENCH_TREE names another", tree.display()));
    }
    let env = [
        ("KRUN", absolute(&built.krun)?),
        ("BUNDLE", ours.bundle),
        ("KERNEL", ours.vmlinux),
        ("ROOT", root.clone()),
        ("VIRTIOFSD", virtiofsd),
        ("TREE", tree.clone()),
    ];
    let script = absolute(Path::new("benches/io/host.sh"))?;
    let bench = absolute(&built.krun.with_file_name("krun-bench"))?;
    let wanted = |part: &str| names.is_empty() || names.iter().any(|name| name == part);
    for (part, title) in PARTS.into_iter().filter(|(part, _)| wanted(part)) {
        let mut words: Vec<OsString> = vec![bench.clone().into(), "figures".into(), rounds.into()];
        let mut labels = vec![("krun", "krun"), ("QEMU", "qemu")];
        if WITH_DAX.contains(&part) {
            labels.insert(1, (DAX, "krun_dax"));
        }
        words.extend(variants(&env, &labels, |vmm| {
            vec!["sh".into(), script.clone().into(), vmm.into(), part.into()]
        }));
        let (status, text) = lab.capture(&words, &[], std::slice::from_ref(&root))?;
        if !status.success() {
            return Err(format!("the part {part} ended with {status}"));
        }
        let what = if part == "tree" { format!(", {}", tree.display()) } else { String::new() };
        println!("\n{title}{what}; {rounds} rounds, medians\n\n{}", table(&text, 0));
    }
    Ok(())
}
