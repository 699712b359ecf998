//! The kernel's command line.

/// A command line that the kernel would not take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CmdlineError {
    /// The kernel would cut it off.
    #[error(
        "the kernel command line has {len} bytes, {devices} of them for the devices; this kernel takes at most {limit}"
    )]
    TooLong {
        /// Its length.
        len: usize,
        /// What the devices take.
        devices: usize,
        /// What the kernel takes.
        limit: usize,
    },
    /// A NUL byte or a line break.
    #[error("the kernel command line has a {0} in it")]
    Character(&'static str),
}

/// `base` with `words` added where the kernel takes them for its own: before ` -- `, behind which
/// everything belongs to init.
///
/// # Errors
/// The result is longer than `limit`, or `base` has bytes that end a command line.
pub fn assemble(
    base: &str,
    words: impl Iterator<Item = String>,
    limit: usize,
) -> Result<String, CmdlineError> {
    for (byte, name) in [('\0', "NUL byte"), ('\n', "line break")] {
        if base.contains(byte) {
            return Err(CmdlineError::Character(name));
        }
    }
    let (kernel, init) = base.split_at(end_of_kernel_part(base));
    let mut line = kernel.trim().to_owned();
    let before = line.len();
    for word in words {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(&word);
    }
    let devices = line.len() - before;
    if !init.is_empty() {
        line.push(' ');
        line.push_str(init.trim());
    }
    let len = line.len();
    if len > limit { Err(CmdlineError::TooLong { len, devices, limit }) } else { Ok(line) }
}

/// Where `--` stands as a word of its own, outside of double quotes (the kernel knows no others).
fn end_of_kernel_part(line: &str) -> usize {
    let (mut quoted, mut word) = (false, 0);
    for (at, c) in line.char_indices() {
        if c == '"' {
            quoted = !quoted;
        } else if c == ' ' && !quoted {
            if &line[word..at] == "--" {
                return word;
            }
            word = at + 1;
        }
    }
    if &line[word..] == "--" { word } else { line.len() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with(base: &str) -> String {
        assemble(base, ["dev=1".to_owned(), "dev=2".to_owned()].into_iter(), 200).unwrap()
    }

    #[test]
    fn devices_come_before_init_s_part() {
        assert_eq!(with("quiet rw"), "quiet rw dev=1 dev=2");
        assert_eq!(with(""), "dev=1 dev=2");
        assert_eq!(with("quiet -- a b"), "quiet dev=1 dev=2 -- a b");
        assert_eq!(with("-- a"), "dev=1 dev=2 -- a");
        assert_eq!(with("x=\"a -- b\" y --z"), "x=\"a -- b\" y --z dev=1 dev=2");
        assert_eq!(with("quiet --"), "quiet dev=1 dev=2 --");
    }

    #[test]
    fn a_line_that_is_too_long_is_refused_with_its_length() {
        let e = assemble(&"a".repeat(100), ["dev=1".to_owned()].into_iter(), 105).unwrap_err();
        assert_eq!(e, CmdlineError::TooLong { len: 106, devices: 6, limit: 105 });
        assert!(assemble(&"a".repeat(100), ["dev=1".to_owned()].into_iter(), 106).is_ok());
        assert!(assemble("a\0b", std::iter::empty(), 100).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_dealt_with(base in ".{0,80}") {
            if let Ok(line) = assemble(&base, ["dev".to_owned()].into_iter(), 1000) {
                prop_assert!(line.contains("dev"));
            }
        }
    }
}
