//! Names, arguments and variables are bytes.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::harness::{Case, Env, Failure, TempDir, run, same};
use krun::Share;

pub const CASE: Case = Case { name: "bytes", host, guest };

/// Not UTF-8, and every character that a shell or a kernel command line would stumble over.
fn odd(seed: u8) -> OsString {
    OsString::from_vec([b"\xff\xfe \"quoted\" 'too' \\ $HOME * \t--\x80".as_slice(), &[seed]].concat())
}

fn guest(args: &[OsString]) -> Result<u8, String> {
    let want = |what: &str, seen: Option<&OsStr>, wanted: &OsStr| match seen {
        Some(seen) if seen == wanted => Ok(()),
        other => Err(format!("{what}: got {other:?}, wanted {wanted:?}")),
    };
    want("first argument", args.first().map(OsString::as_os_str), &odd(b'a'))?;
    want("second argument", args.get(1).map(OsString::as_os_str), OsStr::new(""))?;
    want("third argument", args.get(2).map(OsString::as_os_str), &odd(b'b'))?;
    want("variable", std::env::var_os("ODD").as_deref(), &odd(b'c'))?;
    let name = std::path::Path::new("/media").join(odd(b'd'));
    let text = std::fs::read(&name).map_err(|e| format!("{name:?}: {e}"))?;
    want("contents", Some(OsStr::from_bytes(&text)), OsStr::new("in the file"))?;
    let listed =
        std::fs::read_dir("/media").map_err(|e| e.to_string())?.flatten().next().map(|e| e.file_name());
    want("listed name", listed.as_deref(), &odd(b'd'))?;
    std::fs::write(std::path::Path::new("/media").join(odd(b'e')), "back").map_err(|e| e.to_string())?;
    Ok(0)
}

fn host(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("bytes")?;
    std::fs::write(dir.path().join(odd(b'd')), "in the file")?;
    let mut config = env.guest_half("bytes", [odd(b'a'), OsString::new(), odd(b'b')]);
    config.command = config.command.env("ODD", odd(b'c'));
    config.shares.push(Share { mount: Some("/media".into()), ..Share::new("odd", dir.path()) });
    run(config)?.success()?;
    same("written by the guest", std::fs::read(dir.path().join(odd(b'e')))?, b"back".to_vec())?;

    // Far more than a kernel command line holds.
    let long = "x".repeat(100_000);
    let output = run(env.program("/usr/bin/printf", ["%s", &long]))?.success()?;
    same("a long argument", output.stdout.len(), long.len())
}
