//! `cargo xtask bench net [ROUNDS [SECONDS [PEER...]]]`: networks beside QEMU's, through passt, gvproxy and a tap interface.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{absolute, table, variants};
use crate::emulated::Lab;
use crate::{debian, kernel, packages, test};

/// How often each runs, if not said.
const ROUNDS: &str = "3";
/// How long each measurement takes, if not said.
const SECONDS: &str = "3";
/// The networks of `benches/net/host.sh`.
const PEERS: [(&str, &str); 3] = [
    ("passt", "Through passt, an MTU of 65520"),
    ("gvproxy", "Through gvproxy, an MTU of 1500"),
    ("tap", "A tap interface, an MTU of 1500, all offloads"),
];

/// Builds all, runs all and prints the tables.
///
/// # Errors
/// What could not be built, or a part that failed.
pub fn run(words: &[String]) -> Result<(), String> {
    let word = |n: usize, default| words.get(n).map_or(default, String::as_str);
    let (rounds, seconds) = (word(0, ROUNDS), word(1, SECONDS));
    for n in [rounds, seconds] {
        n.parse::<u32>().map_err(|_| format!("{n} is no number"))?;
    }
    let wanted = words.get(2..).unwrap_or_default();
    if let Some(unknown) = wanted.iter().find(|w| !PEERS.iter().any(|(peer, _)| peer == w)) {
        return Err(format!("there is no network {unknown}; there are {}", PEERS.map(|p| p.0).join(", ")));
    }
    packages::ensure(
        "the benchmark",
        &["busybox-static", "cpio", "iperf3", "iproute2", "passt", "qemu-system-x86"],
    )?;
    let ours = kernel::ensure_guest()?;
    let gvproxy = debian::gvproxy()?;
    let built = test::build()?;
    let lab = Lab::ensure(&built.krun)?;
    let (bench, traffic) =
        (built.krun.with_file_name("krun-bench"), built.krun.with_file_name("krun-traffic"));
    let stage = absolute(&crate::target_dir().join("bench-net"))?;
    let root = guest_root(&stage, &absolute(&traffic)?)?;
    let env = [
        ("KRUN", absolute(&built.krun)?),
        ("BUNDLE", ours.bundle),
        ("KERNEL", ours.vmlinux),
        ("ROOT", root.clone()),
        ("INITRD", stage.join("initrd.cpio")),
        ("TRAFFIC", absolute(&traffic)?),
        ("GVPROXY", gvproxy),
    ];
    let script = absolute(Path::new("benches/net/host.sh"))?;
    for (peer, title) in
        PEERS.iter().filter(|(peer, _)| wanted.is_empty() || wanted.iter().any(|w| w == peer))
    {
        let mut words: Vec<OsString> = vec![absolute(&bench)?.into(), "figures".into(), rounds.into()];
        words.extend(variants(&env, &[("krun", "krun"), ("QEMU", "qemu")], |vmm| {
            vec!["sh".into(), script.clone().into(), vmm.into(), peer.into(), seconds.into()]
        }));
        let (status, text) = lab.capture(&words, &[], std::slice::from_ref(&root))?;
        if !status.success() {
            return Err(format!("the part {peer} ended with {status}"));
        }
        let is_exits = |line: &&str| line.ends_with("exits/Mbit") || line.ends_with("exits/1");
        let (exits, rates): (Vec<&str>, Vec<&str>) = text.lines().partition(is_exits);
        println!("\n{title}; {rounds} rounds of {seconds} s, medians\n\n{}", table(&rates.join("\n"), 0));
        println!(
            "Exits of the vCPU to the host's kernel, fewer being better\n\n{}",
            table(&exits.join("\n"), 2)
        );
    }
    Ok(())
}

/// A directory with iperf3, the traffic program, the libraries that they need and a shell; beside it the same as an
/// initial RAM disk.
fn guest_root(stage: &Path, traffic: &Path) -> Result<PathBuf, String> {
    let _ = fs::remove_dir_all(stage);
    let root = stage.join("root");
    for dir in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        fs::create_dir_all(root.join(dir)).map_err(|e| format!("{}: {e}", root.display()))?;
    }
    let copy = |from: &Path, name: &str| {
        fs::copy(from, root.join(name)).map(drop).map_err(|e| format!("{}: {e}", from.display()))
    };
    copy(Path::new("benches/net/guest.sh"), "guest")?;
    copy(Path::new("benches/net/init.sh"), "init")?;
    copy(traffic, "bin/traffic")?;
    let script = "chmod 755 init && cp /bin/busybox bin/ && \
        for name in $(bin/busybox --list); do [ $name = busybox ] || ln -sf busybox bin/$name; done && \
        cp -L $(command -v iperf3) bin/ && \
        for program in bin/iperf3 bin/traffic; do \
        ldd $program | sed -n 's/.*[[:space:]]\\(\\/[^ ]*\\) (0x.*/\\1/p' | while read -r lib; do \
        mkdir -p \".${lib%/*}\" && cp -L \"$lib\" \".$lib\" || exit 1; done || exit 1; done && \
        find . | cpio --quiet -o -H newc > ../initrd.cpio";
    let status = Command::new("sh").args(["-ec", script]).current_dir(&root).status();
    match status {
        Ok(status) if status.success() => Ok(root),
        other => Err(format!("making the guest's root: {other:?}")),
    }
}
