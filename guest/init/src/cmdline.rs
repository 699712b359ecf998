//! The form in which upstream's library configures its init: words on the kernel's command line.
//!
//! The kernel passes `NAME=value` words it does not know as environment and everything after `--` as
//! arguments, so most of the work is done already. It has no escape for a quote, though: it drops some
//! quotes and lets others end a word early. Upstream writes each argument and variable as
//! `"` + text + `"`, separated by single spaces. [`split`] reads that exactly unless a text itself
//! contains a quote followed by a space.

use krun_wire::{BlockRoot, InitConfig, Rlimit};

use crate::config::{ImageConfig, Setup};
use crate::failure::{Failure, show};

/// The command line's words.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// Words before `--` that were quoted as a whole: environment of the command.
    pub quoted: Vec<Vec<u8>>,
    /// Words after `--`; `None`: there is no `--`.
    pub after: Option<Vec<Vec<u8>>>,
}

/// Splits `/proc/cmdline`.
pub fn split(line: &[u8]) -> Words {
    let mut rest = line.strip_suffix(b"\n").unwrap_or(line);
    let mut words = Words::default();
    loop {
        rest = rest.trim_ascii_start();
        if rest.is_empty() {
            return words;
        }
        let (word, quoted, after) = next(rest);
        rest = after;
        match &mut words.after {
            Some(args) => args.push(word),
            None if !quoted && word == b"--" => words.after = Some(Vec::new()),
            None if quoted => words.quoted.push(word),
            None => {}
        }
    }
}

/// The first word of `text`, whether it was quoted as a whole, and what follows it.
fn next(text: &[u8]) -> (Vec<u8>, bool, &[u8]) {
    if let Some(inner) = text.strip_prefix(b"\"") {
        let closing =
            (0..inner.len()).find(|&i| inner[i] == b'"' && matches!(inner.get(i + 1), None | Some(b' ')));
        return match closing {
            Some(end) => (inner[..end].to_vec(), true, &inner[end + 1..]),
            // The line was cut off, which the kernel does silently.
            None => (inner.to_vec(), true, &[]),
        };
    }
    let mut in_quotes = false;
    let end = text.iter().position(|&b| {
        in_quotes ^= b == b'"';
        b.is_ascii_whitespace() && !in_quotes
    });
    let (word, rest) = text.split_at(end.unwrap_or(text.len()));
    (without_value_quotes(word), false, rest)
}

/// `name="a b"` means the value `a b`.
fn without_value_quotes(word: &[u8]) -> Vec<u8> {
    let Some(equals) = word.iter().position(|b| *b == b'=') else { return word.to_vec() };
    let (name, value) = word.split_at(equals + 1);
    let inner = value.strip_prefix(b"\"").map(|v| v.strip_suffix(b"\"").unwrap_or(v));
    [name, inner.unwrap_or(value)].concat()
}

fn variable<'a>(env: &'a [Vec<u8>], name: &str) -> Option<&'a [u8]> {
    // The last one counts, as it does for the kernel.
    env.iter().rev().find_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
}

/// Replaces or adds a variable.
fn set(env: &mut Vec<Vec<u8>>, name: &[u8], value: &[u8]) {
    let prefix = [name, b"="].concat();
    env.retain(|entry| !entry.starts_with(&prefix));
    env.push([&prefix, value].concat());
}

/// `7=1024:4096,4=0:0`
fn limits(text: &[u8]) -> Result<Vec<Rlimit>, Failure> {
    let one = |item: &str| {
        let (resource, values) = item.split_once('=')?;
        let (soft, hard) = values.split_once(':')?;
        Some(Rlimit { resource: resource.parse().ok()?, soft: soft.parse().ok()?, hard: hard.parse().ok()? })
    };
    let text_of = |text| std::str::from_utf8(text).ok();
    text.split(|b| *b == b',').map(|item| text_of(item).and_then(one)).collect::<Option<_>>().ok_or_else(
        || Failure::setup(format!("KRUN_RLIMITS={} is not a list of RESOURCE=SOFT:HARD.", show(text))),
    )
}

/// What init was told by the kernel's command line.
///
/// `args` (without `argv[0]`) and `env` are what the kernel made of it, `line` is the line itself where
/// it can be read.
///
/// # Errors
/// 125 for limits that are no limits.
pub fn parse(args: &[Vec<u8>], env: &[Vec<u8>], line: Option<&[u8]>) -> Result<Setup, Failure> {
    let words = line.map(split).unwrap_or_default();
    let mut env = env.to_vec();
    for entry in words.quoted {
        // The kernel drops a variable with a dot in its name and may have cut one with a quote.
        if let Some(equals) = entry.iter().position(|b| *b == b'=') {
            set(&mut env, &entry[..equals], &entry[equals + 1..]);
        }
    }
    // The kernel's own default. It is nobody's home.
    env.retain(|entry| entry != b"HOME=/");
    for (from, to) in [("KRUN_HOME", b"HOME"), ("KRUN_TERM", b"TERM")] {
        if let Some(value) = variable(&env, from).map(<[u8]>::to_vec) {
            set(&mut env, to, &value);
        }
    }
    let get = |name| variable(&env, name).unwrap_or_default().to_vec();
    let block_root = variable(&env, "KRUN_BLOCK_ROOT_DEVICE").map(|device| BlockRoot {
        device: device.to_vec(),
        fstype: get("KRUN_BLOCK_ROOT_FSTYPE"),
        options: get("KRUN_BLOCK_ROOT_OPTIONS"),
    });
    let config = InitConfig {
        exec: get("KRUN_INIT"),
        // Words before "--" that the kernel does not know end up in its argument list as well.
        args: words.after.unwrap_or_else(|| args.to_vec()),
        cwd: get("KRUN_WORKDIR"),
        hostname: get("HOSTNAME"),
        rlimits: variable(&env, "KRUN_RLIMITS").map(limits).transpose()?.unwrap_or_default(),
        block_root,
        // Upstream's init knows one interface.
        dhcp: variable(&env, "KRUN_DHCP")
            .filter(|v| *v == b"1")
            .map(|_| b"eth0".to_vec())
            .into_iter()
            .collect(),
        env: env.clone(),
        ..InitConfig::default()
    };
    let image = match variable(&env, "KRUN_CONFIG") {
        Some(path) => ImageConfig::At(path.to_vec()),
        None => ImageConfig::IfPresent,
    };
    let replace_init = variable(&env, "KRUN_INIT_PID1").is_some_and(|v| v.first() == Some(&b'1'));
    Ok(Setup { config, image, discover_ports: true, replace_init, extra_groups: Vec::new() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(items: &[&str]) -> Vec<Vec<u8>> {
        items.iter().map(|s| s.as_bytes().to_vec()).collect()
    }

    /// As upstream writes it.
    fn quoted(items: &[Vec<u8>]) -> Vec<u8> {
        let one = |item: &Vec<u8>| [b"\"", &item[..], b"\""].concat();
        items.iter().map(one).collect::<Vec<_>>().join(&b' ')
    }

    proptest! {
        #[test]
        fn quoted_texts_arrive_as_they_were(
            env in prop::collection::vec("[A-Z.]{1,4}=[^\0]{0,9}", 0..5),
            args in prop::collection::vec(prop::collection::vec(1u8.., 0..9), 0..5),
        ) {
            let env: Vec<Vec<u8>> = env.into_iter().map(String::into_bytes).collect();
            let ambiguous = |t: &Vec<u8>| t.windows(2).any(|w| w == b"\" ");
            prop_assume!(!env.iter().chain(&args).any(ambiguous));
            let line = [b"quiet root=/dev/root ", &quoted(&env)[..], b" x=\"y z\" -- ", &quoted(&args), b"\n"].concat();
            prop_assert_eq!(split(&line), Words { quoted: env, after: Some(args) });
        }

        #[test]
        fn no_line_panics(line: Vec<u8>, args: Vec<Vec<u8>>, env: Vec<Vec<u8>>) {
            let _ = parse(&args, &env, Some(&line));
        }

        #[test]
        fn limits_arrive(all in prop::collection::vec(any::<(u32, u64, u64)>(), 1..5)) {
            let text = all.iter().map(|(r, s, h)| format!("{r}={s}:{h}")).collect::<Vec<_>>().join(",");
            let want: Vec<_> = all.into_iter().map(|(resource, soft, hard)| Rlimit { resource, soft, hard }).collect();
            prop_assert_eq!(limits(text.as_bytes()), Ok(want));
        }
    }

    #[test]
    fn the_kernels_words_are_not_the_commands() {
        let line = b"console=hvc0 init=/init.krun KRUN_INIT=/bin/echo KRUN_WORKDIR=/tmp \"a.b=c\" \"K=v \"w\" tsi_hijack -- \"1 2\" \"3\"\n";
        let args = list(&["tsi_hijack", "1 2", "3"]);
        let env = list(&[
            "HOME=/",
            "TERM=linux",
            "KRUN_INIT=/bin/echo",
            "KRUN_WORKDIR=/tmp",
            "K=v",
            "KRUN_TERM=xterm",
        ]);
        let got = parse(&args, &env, Some(line)).unwrap();
        assert_eq!(got.config.exec, b"/bin/echo");
        assert_eq!(got.config.cwd, b"/tmp");
        assert_eq!(got.config.args, list(&["1 2", "3"]));
        let env = got.config.env;
        assert!(env.contains(&b"a.b=c".to_vec()) && env.contains(&b"TERM=xterm".to_vec()), "{env:?}");
        assert_eq!(variable(&env, "K"), Some(&b"v \"w"[..]));
        assert_eq!(variable(&env, "HOME"), None);
    }

    #[test]
    fn everything_else_upstream_says() {
        let env = list(&[
            "KRUN_RLIMITS=7=1:2,4=3:4",
            "KRUN_DHCP=1",
            "KRUN_CONFIG=/c.json",
            "HOSTNAME=box",
            "KRUN_INIT_PID1=1",
            "KRUN_BLOCK_ROOT_DEVICE=/dev/vda1",
            "KRUN_BLOCK_ROOT_FSTYPE=auto",
            "KRUN_HOME=/h",
        ]);
        let got = parse(&list(&["a"]), &env, None).unwrap();
        assert_eq!(got.config.rlimits[1], Rlimit { resource: 4, soft: 3, hard: 4 });
        assert_eq!(got.config.args, list(&["a"]));
        assert_eq!(got.config.hostname, b"box");
        assert_eq!(got.config.dhcp, [b"eth0"]);
        assert!(got.replace_init && got.discover_ports);
        assert_eq!(got.image, ImageConfig::At(b"/c.json".to_vec()));
        let root = BlockRoot { device: b"/dev/vda1".to_vec(), fstype: b"auto".to_vec(), options: vec![] };
        assert_eq!(got.config.block_root, Some(root));
        assert_eq!(variable(&got.config.env, "HOME"), Some(&b"/h"[..]));
    }

    #[test]
    fn bad_limits_fail() {
        for text in ["", "7", "7=1", "7=1:x", "7=1:2,", "-1=1:2"] {
            assert_eq!(limits(text.as_bytes()).unwrap_err().status, 125, "{text}");
        }
    }
}
