//! `krun doctor`: can this host run microVMs?

use std::io::{self, Write};

/// Prints findings, each with its remedy. The exit status: 0 when microVMs run on this host's own KVM.
pub fn doctor(out: &mut impl Write) -> io::Result<i32> {
    let probe = krun::host::probe();
    for finding in &probe.findings {
        writeln!(out, "{finding}")?;
        writeln!(out, "    {}", finding.remedy())?;
    }
    let usable = probe.usable();
    if usable {
        writeln!(out, "KVM works: krun run uses it.")?;
        let nested = if krun::host::nested_virtualisation() { "can" } else { "cannot" };
        writeln!(out, "Guests {nested} run virtual machines themselves (--nested).")?;
    } else {
        match crate::emulated::ready() {
            Ok(engine) => writeln!(out, "krun run uses an emulated host instead: {engine}.")?,
            Err(why) => writeln!(out, "The emulated host cannot be used either: {why}")?,
        }
    }
    match krun::host::bundle() {
        Ok(path) => writeln!(out, "Guest kernel: {}", path.display())?,
        Err(e) => writeln!(out, "Guest kernel: {e}")?,
    }
    Ok(i32::from(!usable))
}
