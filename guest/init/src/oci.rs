//! `/.krun_config.json`: what an image or a container engine says about the command.
//!
//! Two forms are understood: an OCI runtime configuration (`process.args` and so on), and an image's
//! configuration as Docker has it (`Entrypoint`, `Cmd`, ...), at the top level or under `config`.

use krun_wire::{Rlimit, Tmpfs, User};

use crate::config::Setup;
use crate::failure::{Failure, show};
use crate::json::{self, Value};

/// Names of Linux's resource limits in the order of their numbers, without `RLIMIT_`.
const LIMITS: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

/// What the file says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Image {
    args: Vec<Vec<u8>>,
    /// Follows `args` unless the user gave arguments.
    default_args: Vec<Vec<u8>>,
    env: Vec<Vec<u8>>,
    cwd: Vec<u8>,
    user: Option<User>,
    groups: Vec<u32>,
    limits: Vec<Rlimit>,
    hostname: Vec<u8>,
    tmpfs: Vec<Tmpfs>,
}

/// Reads the file.
///
/// # Errors
/// 125 with the first place that is not JSON, or the field that makes no sense. `path` is for the message.
pub fn parse(text: &[u8], path: &[u8]) -> Result<Image, Failure> {
    let root = json::parse(text).map_err(|e| Failure::setup(format!("{} is damaged: {e}.", show(path))))?;
    let image = match root.get("process") {
        Some(process) => runtime(&root, process),
        None => docker(root.get("config").or_else(|| root.get("Config")).unwrap_or(&root)),
    };
    image.map_err(|what| Failure::setup(format!("{}: {what}.", show(path))))
}

fn runtime(root: &Value, process: &Value) -> Result<Image, &'static str> {
    let mut image = Image {
        args: strings(process.get("args"), "process.args is not a list of strings")?,
        env: strings(process.get("env"), "process.env is not a list of strings")?,
        cwd: bytes(process.get("cwd")),
        hostname: bytes(root.get("hostname")),
        ..Image::default()
    };
    if let Some(user) = process.get("user") {
        let id = |name| {
            user.get(name).map_or(Ok(0), |v| v.as_u64().ok_or("process.user has an id that is no number"))
        };
        let (uid, gid) = (id("uid")?, id("gid")?);
        // Root in group root is what everything runs as unless told otherwise.
        if (uid, gid) != (0, 0) {
            let text = |n: u64| n.to_string().into_bytes();
            image.user = Some(User { user: text(uid), group: Some(text(gid)) });
        }
        let more = user.get("additionalGids").and_then(Value::as_array).unwrap_or_default();
        image.groups = more.iter().filter_map(|g| u32::try_from(g.as_u64()?).ok()).collect();
    }
    for limit in process.get("rlimits").and_then(Value::as_array).unwrap_or_default() {
        image.limits.push(limit_of(limit).ok_or("process.rlimits has an entry that is no resource limit")?);
    }
    for mount in root.get("mounts").and_then(Value::as_array).unwrap_or_default() {
        let destination = bytes(mount.get("destination"));
        // The other base file systems are mounted anyway, and bind mounts are the host's affair.
        let ours = [&b"/dev"[..], b"/dev/shm", b"/proc", b"/sys"].contains(&&destination[..]);
        if bytes(mount.get("type")) == b"tmpfs" && !ours && destination.starts_with(b"/") {
            let options = strings(mount.get("options"), "mounts has options that are no list of strings")?;
            image.tmpfs.push(Tmpfs { path: destination, options: options.join(&b',') });
        }
    }
    Ok(image)
}

fn docker(config: &Value) -> Result<Image, &'static str> {
    let user = bytes(config.get("User"));
    let mut parts = user.splitn(2, |b| *b == b':').map(<[u8]>::to_vec);
    Ok(Image {
        args: strings(config.get("Entrypoint"), "Entrypoint is not a list of strings")?,
        default_args: strings(config.get("Cmd"), "Cmd is not a list of strings")?,
        env: strings(config.get("Env"), "Env is not a list of strings")?,
        cwd: bytes(config.get("WorkingDir")),
        hostname: bytes(config.get("Hostname")),
        user: parts.next().filter(|u| !u.is_empty()).map(|user| User { user, group: parts.next() }),
        ..Image::default()
    })
}

fn bytes(value: Option<&Value>) -> Vec<u8> {
    value.and_then(Value::as_bytes).unwrap_or_default().to_vec()
}

fn strings(value: Option<&Value>, wrong: &'static str) -> Result<Vec<Vec<u8>>, &'static str> {
    let Some(value) = value else { return Ok(Vec::new()) };
    // Docker allows a plain string for a command, which its shell then splits.
    if let Some(line) = value.as_bytes() {
        return Ok(vec![b"/bin/sh".to_vec(), b"-c".to_vec(), line.to_vec()]);
    }
    let list = value.as_array().ok_or(wrong)?;
    list.iter().map(|s| s.as_bytes().map(<[u8]>::to_vec).ok_or(wrong)).collect()
}

fn limit_of(value: &Value) -> Option<Rlimit> {
    let name = value.get("type")?.as_bytes()?.strip_prefix(b"RLIMIT_")?;
    let resource = LIMITS.iter().position(|known| known.as_bytes() == name)?;
    Some(Rlimit {
        resource: u32::try_from(resource).ok()?,
        soft: value.get("soft")?.as_u64()?,
        hard: value.get("hard")?.as_u64()?,
    })
}

impl Image {
    /// Completes `setup` with what it leaves open. A setting that `setup` has already wins, variable by
    /// variable in the environment.
    pub fn complete(self, setup: &mut Setup) {
        let config = &mut setup.config;
        if config.exec.is_empty() {
            let given = std::mem::take(&mut config.args);
            let last = if given.is_empty() { self.default_args } else { given };
            let mut args = self.args.into_iter().chain(last);
            config.exec = args.next().unwrap_or_default();
            config.args = args.collect();
        }
        let given = std::mem::take(&mut config.env);
        let name = |entry: &[u8]| entry.iter().position(|b| *b == b'=').map_or(entry.len(), |n| n + 1);
        let is_given = |entry: &Vec<u8>| given.iter().any(|g| g.starts_with(&entry[..name(entry)]));
        config.env = self.env.into_iter().filter(|entry| !is_given(entry)).collect();
        config.env.extend(given);
        if config.cwd.is_empty() {
            config.cwd = self.cwd;
        }
        if config.user.is_none() {
            config.user = self.user;
            setup.extra_groups = self.groups;
        }
        if config.hostname.is_empty() {
            config.hostname = self.hostname;
        }
        let unset = |l: &Rlimit| !config.rlimits.iter().any(|g| g.resource == l.resource);
        let limits: Vec<_> = self.limits.into_iter().filter(unset).collect();
        config.rlimits.extend(limits);
        config.tmpfs.splice(0..0, self.tmpfs);
    }
}

#[cfg(test)]
mod tests {
    use krun_wire::InitConfig;
    use proptest::prelude::*;

    use super::*;

    fn list(items: &[&str]) -> Vec<Vec<u8>> {
        items.iter().map(|s| s.as_bytes().to_vec()).collect()
    }

    fn completed(text: &str, config: InitConfig) -> Setup {
        let mut setup = Setup { config, ..Setup::default() };
        parse(text.as_bytes(), b"/c").unwrap().complete(&mut setup);
        setup
    }

    #[test]
    fn a_runtime_configuration() {
        let text = r#"{"ociVersion":"1.0","process":{"args":["sh","-c","x"],"env":["A=1","B=2"],"cwd":"/w",
            "user":{"uid":5,"gid":6,"additionalGids":[7,8]},
            "rlimits":[{"type":"RLIMIT_NOFILE","soft":10,"hard":20}]},"hostname":"h",
            "mounts":[{"destination":"/proc","type":"proc"},{"destination":"/dev/shm","type":"tmpfs"},
            {"destination":"/scratch","type":"tmpfs","options":["size=1m","noexec"]}]}"#;
        let got = completed(text, InitConfig { env: list(&["B=3"]), ..InitConfig::default() });
        assert_eq!((&got.config.exec[..], &got.config.args), (&b"sh"[..], &list(&["-c", "x"])));
        assert_eq!(got.config.env, list(&["A=1", "B=3"]));
        assert_eq!(got.config.user, Some(User { user: b"5".to_vec(), group: Some(b"6".to_vec()) }));
        assert_eq!(got.extra_groups, [7, 8]);
        assert_eq!(got.config.rlimits, [Rlimit { resource: 7, soft: 10, hard: 20 }]);
        assert_eq!((&got.config.cwd[..], &got.config.hostname[..]), (&b"/w"[..], &b"h"[..]));
        let scratch = Tmpfs { path: b"/scratch".to_vec(), options: b"size=1m,noexec".to_vec() };
        assert_eq!(got.config.tmpfs, [scratch]);
    }

    #[test]
    fn dockers_form_at_both_places() {
        let inner = r#"{"Entrypoint":["/e"],"Cmd":["c"],"Env":["X=y"],"WorkingDir":"/d","User":"u:g"}"#;
        for text in [inner.to_owned(), format!(r#"{{"config":{inner}}}"#), format!(r#"{{"Config":{inner}}}"#)]
        {
            let got = completed(&text, InitConfig { args: list(&["more"]), ..InitConfig::default() }).config;
            assert_eq!((&got.exec[..], got.args), (&b"/e"[..], list(&["more"])));
            assert_eq!(completed(&text, InitConfig::default()).config.args, list(&["c"]));
            assert_eq!(got.user, Some(User { user: b"u".to_vec(), group: Some(b"g".to_vec()) }));
            assert_eq!((got.env, &got.cwd[..]), (list(&["X=y"]), &b"/d"[..]));
        }
    }

    #[test]
    fn what_was_given_wins() {
        let given = InitConfig {
            exec: b"/mine".to_vec(),
            cwd: b"/here".to_vec(),
            hostname: b"me".to_vec(),
            user: Some(User { user: b"0".to_vec(), group: None }),
            rlimits: vec![Rlimit { resource: 7, soft: 1, hard: 1 }],
            ..InitConfig::default()
        };
        let text = r#"{"process":{"args":["x"],"cwd":"/w","user":{"uid":1,"gid":1,"additionalGids":[3]},
            "rlimits":[{"type":"RLIMIT_NOFILE","soft":10,"hard":20}]},"hostname":"h"}"#;
        let got = completed(text, given.clone());
        assert_eq!((got.config, got.extra_groups), (given, vec![]));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("{", "damaged"),
            (r#"{"process":{"args":"x","env":[1]}}"#, "process.env"),
            (r#"{"process":{"user":{"uid":"x"}}}"#, "process.user"),
            (r#"{"process":{"rlimits":[{"type":"RLIMIT_X","soft":1,"hard":2}]}}"#, "process.rlimits"),
            (r#"{"Cmd":7}"#, "Cmd is not"),
        ] {
            let failure = parse(text.as_bytes(), b"/c").unwrap_err();
            assert!(failure.reason.contains(part) && failure.status == 125, "{failure:?}");
        }
    }

    proptest! {
        #[test]
        fn no_file_panics(text in "[\\[\\]{}\":,a-zA-Z0-9 ]{0,80}") {
            let _ = parse(text.as_bytes(), b"/c");
        }
    }
}
