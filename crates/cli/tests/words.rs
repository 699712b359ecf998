//! What the command prints without running anything.

#![allow(clippy::unwrap_used, reason = "helpers of tests are no test functions")]

use std::process::{Command, Output};

fn krun(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_krun")).args(words).output().unwrap()
}

fn printed(words: &[&str]) -> String {
    let output = krun(words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn completions_know_the_options() {
    for shell in ["bash", "zsh", "fish"] {
        let script = printed(&["completions", shell]);
        assert!(script.contains("huge-pages") && script.contains("oem-string"), "{shell}");
        assert!(script.contains("vhost-user"), "{shell}");
    }
}

#[test]
fn the_manual_is_a_manual() {
    let page = printed(&["man"]);
    assert!(page.lines().any(|line| line.starts_with(".TH krun")), "{page}");
    assert!(page.contains("microVM"));
    // Each command that it refers to has a page.
    for name in ["run", "doctor", "lab", "completions", "man"] {
        assert!(page.contains(&format!("krun\\-{name}(1)")), "{page}");
        assert!(printed(&["man", name]).contains(&format!(".TH krun-{name}")), "{name}");
    }
    let run = printed(&["man", "run"]);
    for option in ["volume", "vsock", "console\\-log"] {
        assert!(run.contains(&format!("\\-\\-{option}")), "{option}: {run}");
    }
    assert!(!krun(&["man", "brew"]).status.success());
}

#[test]
fn bad_words_are_refused_before_anything_runs() {
    for words in [&["run", "--cpus", "x", "--root", "/"][..], &["run"], &["no-such-command"]] {
        let output = krun(words);
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        assert!(!output.stderr.is_empty());
    }
    let output = krun(&["run", "--accel", "kvm", "--root", "/no/such", "--", "true"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("/no/such"), "{output:?}");
}
