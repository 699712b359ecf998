//! Which crate may depend on which.

use std::process::Command;

use serde_json::Value;

/// A crate and the crates of this workspace that it may use.
const ARROWS: &[(&str, &[&str])] = &[
    ("krun-memory", &[]),
    ("krun-event", &[]),
    ("krun-wire", &[]),
    ("krun-hv", &["krun-memory", "krun-event"]),
    ("krun-virtio", &["krun-memory", "krun-event"]),
    ("krun-devices", &["krun-virtio", "krun-memory", "krun-event"]),
    ("krun-machine", &["krun-devices", "krun-hv", "krun-virtio", "krun-memory", "krun-event"]),
    ("krun", &["krun-machine", "krun-devices", "krun-virtio", "krun-wire"]),
    ("libkrun", &["krun"]),
    ("krun-lab", &["krun-wire"]),
    ("krun-cli", &["krun", "krun-lab"]),
    ("krun-init", &["krun-wire"]),
    ("krun-tests", &["krun"]),
    ("xtask", &[]),
];

/// Checks every crate of the workspace against [`ARROWS`]; tests may use more than the code.
///
/// # Errors
/// The dependencies that should not be.
pub fn check() -> Result<(), String> {
    let out = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .output()
        .map_err(|e| format!("cannot run cargo metadata: {e}"))?;
    let metadata: Value = serde_json::from_slice(&out.stdout).map_err(|e| format!("cargo metadata: {e}"))?;
    let wrong = violations(&metadata);
    if wrong.is_empty() { Ok(()) } else { Err(format!("dependency arrows: {}", wrong.join("; "))) }
}

fn violations(metadata: &Value) -> Vec<String> {
    let mut wrong = Vec::new();
    let packages = metadata["packages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let ours: Vec<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = ARROWS.iter().find(|(n, _)| *n == name) else {
            wrong.push(format!("{name} is not in the table of xtask/src/arrows.rs"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().unwrap_or_default();
            let normal = dependency["kind"].is_null();
            if normal && ours.contains(&to) && !allowed.contains(&to) {
                wrong.push(format!("{name} must not depend on {to}"));
            }
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_wrong_arrow_and_an_unknown_crate_are_told() {
        let package = |name: &str, to: &str, kind: Value| json!({"name": name, "dependencies": [{"name": to, "kind": kind}]});
        let metadata = json!({"packages": [
            package("krun-devices", "krun-hv", Value::Null),
            package("krun-hv", "krun-memory", Value::Null),
            package("krun-memory", "krun-virtio", json!("dev")),
            package("krun-virtio", "serde", Value::Null),
            package("new", "serde", Value::Null),
        ]});
        assert_eq!(
            violations(&metadata),
            ["krun-devices must not depend on krun-hv", "new is not in the table of xtask/src/arrows.rs"]
        );
    }
}
