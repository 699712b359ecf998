use krun_wire::{InitConfig, Stdio, User};
use rustix::process::{WaitOptions, waitpid};

use super::*;
use crate::stdio::Plan;

fn command(config: InitConfig) -> Command {
    let mut setup = Setup { config, ..Setup::default() };
    setup.complete().unwrap();
    Command::new(setup).unwrap()
}

fn shell(script: &str) -> InitConfig {
    InitConfig {
        exec: b"sh".to_vec(),
        args: vec![b"-c".to_vec(), script.as_bytes().to_vec(), b"sh".to_vec(), b"\xff \"".to_vec()],
        ..InitConfig::default()
    }
}

/// Runs the command with all its streams at `/dev/null`.
fn run(config: InitConfig) -> Result<i32, Failure> {
    let streams = Streams::open(Plan::given(Stdio::Ports(0)), std::time::Duration::ZERO, false).unwrap();
    let pid = command(config).start(&streams)?;
    let (_, status) = waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
    Ok(status.exit_status().unwrap())
}

#[test]
fn path_is_searched_in_order() {
    let got = candidates(b"p", Some(b"/a::/b"));
    assert_eq!(got, [&b"/a/p"[..], b"./p", b"/b/p"]);
    assert_eq!(candidates(b"./p", Some(b"/a")), [b"./p"]);
    assert_eq!(candidates(b"p", None).len(), 6);
}

#[test]
fn arguments_environment_directory_and_session() {
    let script = r#"[ "$1" = "$(printf '\377 "')" ] && [ "$K" = "$(printf '\200')" ] && [ "$PWD" = /tmp ] || exit 1
        [ "$HOME" = /root ] || exit 2
        read -r _ _ _ _ pgrp sid _ < /proc/self/stat; [ "$sid" = $$ ] && [ "$pgrp" = $$ ] || exit 3
        exit 37"#;
    let config = InitConfig { env: vec![b"K=\x80".to_vec()], cwd: b"/tmp".to_vec(), ..shell(script) };
    assert_eq!(run(config), Ok(37));
}

#[test]
fn limits_are_set() {
    let limit = Rlimit { resource: 4, soft: 0, hard: 0 };
    assert_eq!(run(InitConfig { rlimits: vec![limit], ..shell("[ $(ulimit -c) = 0 ]") }), Ok(0));
    let bad = Rlimit { resource: 4, soft: 2, hard: 1 };
    let failure = run(InitConfig { rlimits: vec![bad], ..shell("") }).unwrap_err();
    assert!(failure.status == 125 && failure.reason.contains("limit 4"), "{failure:?}");
}

#[test]
fn another_user() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: becoming another user takes root");
        return;
    }
    let user = Some(User { user: b"4242".to_vec(), group: Some(b"17".to_vec()) });
    let script = r#"[ "$(id -u) $(id -g) $(id -G) $HOME" = "4242 17 17 /" ]"#;
    assert_eq!(run(InitConfig { user, ..shell(script) }), Ok(0));
}

#[test]
fn each_way_to_fail_has_its_status_and_reason() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, contents: &[u8], mode: u32| {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.path().join(name);
        std::fs::write(&path, contents).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path.into_os_string().into_encoded_bytes()
    };
    let here = dir.path().as_os_str().as_encoded_bytes().to_vec();
    let cases: [(Vec<u8>, &str, i32, &str); 7] = [
        (b"/no/such".to_vec(), "/", 127, "/no/such does not exist"),
        (b"no-such-program".to_vec(), "/", 127, "not found in the guest's PATH"),
        (file("interpreter", b"#!/no/such\n", 0o755), "/", 127, "the interpreter"),
        (file("plain", b"", 0o644), "/", 126, "may not be executed"),
        (here, "/", 126, "is a directory"),
        (file("garbage", b"\x7fELFgarbage", 0o755), "/", 126, "no program for this machine"),
        (b"/bin/true".to_vec(), "/no/such", 125, "working directory /no/such does not exist"),
    ];
    for (exec, cwd, status, reason) in cases {
        let failure = run(InitConfig { exec, cwd: cwd.into(), ..InitConfig::default() }).unwrap_err();
        assert_eq!(failure.status, status, "{failure:?}");
        assert!(failure.reason.contains(reason), "{failure:?}");
    }
}

#[test]
fn a_file_that_may_not_be_executed_does_not_hide_a_later_one() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("true"), "").unwrap();
    let path = [b"PATH=", dir.path().as_os_str().as_encoded_bytes(), b":/bin"].concat();
    let config =
        |exec: &[u8]| InitConfig { exec: exec.to_vec(), env: vec![path.clone()], ..InitConfig::default() };
    assert_eq!(run(config(b"true")), Ok(0));
    std::fs::write(dir.path().join("unknown-elsewhere"), "").unwrap();
    assert_eq!(run(config(b"unknown-elsewhere")).unwrap_err().status, 126);
}

#[test]
fn nul_bytes_are_refused() {
    let setup = Setup {
        config: InitConfig { exec: b"a\0".to_vec(), cwd: b"/".to_vec(), ..InitConfig::default() },
        ..Setup::default()
    };
    assert_eq!(Command::new(setup).unwrap_err().status, 125);
}
