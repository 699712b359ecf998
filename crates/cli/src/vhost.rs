//! `--vhost-user`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use krun::{DeviceKind, VhostUser};

/// Reads `TYPE:SOCKET[,OPTION]...`.
pub fn parse(text: &OsStr) -> Result<VhostUser, String> {
    let mut words = text.as_bytes().split(|b| *b == b',');
    let first = words.next().unwrap_or_default();
    let colon = first.iter().position(|b| *b == b':').ok_or("write TYPE:SOCKET, as in rng:/run/rng.sock")?;
    let kind: DeviceKind = String::from_utf8_lossy(&first[..colon]).parse().map_err(|e| {
        format!(
            "{e}; there are {}, and numbers of the virtio standard",
            DeviceKind::names().collect::<Vec<_>>().join(", ")
        )
    })?;
    let mut device = VhostUser::new(kind, PathBuf::from(OsStr::from_bytes(&first[colon + 1..])));
    for word in words {
        let word = std::str::from_utf8(word).map_err(|_| "an option is no text")?;
        apply(&mut device, word)?;
    }
    device.validate().map_err(|e| e.to_string())?;
    Ok(device)
}

fn apply(device: &mut VhostUser, word: &str) -> Result<(), String> {
    let number = |text: &str| text.parse::<u16>().map_err(|_| format!("{word}: write a number"));
    match word.split_once('=') {
        Some(("queues", text)) => device.queues = Some(number(text)?),
        Some(("size", text)) => device.sizes = vec![number(text)?],
        Some(("tag", text)) if device.kind == DeviceKind::FS => device.tag = Some(text.to_owned()),
        _ => return Err(format!("unknown option {word}; there are queues=N, size=N, for fs tag=NAME")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<VhostUser, String> {
        parse(OsStr::new(text))
    }

    #[test]
    fn devices_and_options() {
        let device = parsed("fs:/run/a:b,tag=x,queues=3,size=64").unwrap();
        assert_eq!((device.kind, device.path.to_str()), (DeviceKind::FS, Some("/run/a:b")));
        assert_eq!((device.queues, device.sizes, device.tag.as_deref()), (Some(3), vec![64], Some("x")));
        assert_eq!(parsed("17:/x").unwrap().kind, DeviceKind::RTC);
    }

    #[test]
    fn mistakes_are_told() {
        for (text, why) in [
            ("", "write TYPE:SOCKET"),
            ("rng", "write TYPE:SOCKET"),
            ("disk:/x", "there are net, block"),
            ("rng:", "no path"),
            ("rng:/x,tag=y", "unknown option tag=y"),
            ("rng:/x,queues=many", "write a number"),
            ("rng:/x,queues=0", "0 queues"),
            ("rng:/x,size=3", "power of two"),
            ("fs:/x,tag=", "tag"),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
