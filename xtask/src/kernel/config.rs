//! Kernel configuration fragments: merging, and checking what Kconfig made of them.

use std::collections::BTreeMap;

/// Options of `fragments`, later ones winning; a value is `y`, `n`, a number or a quoted string.
///
/// # Errors
/// A line that is neither a comment nor `CONFIG_NAME=value`.
pub fn merge<'a>(
    fragments: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<BTreeMap<String, String>, String> {
    let mut options = BTreeMap::new();
    for (name, text) in fragments {
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (option, value) = line
                .split_once('=')
                .filter(|(o, v)| o.starts_with("CONFIG_") && !v.is_empty())
                .ok_or_else(|| format!("{name}, line {}: not CONFIG_NAME=value: {line}", number + 1))?;
            options.insert(option.to_owned(), value.to_owned());
        }
    }
    Ok(options)
}

/// `options` as one file for `KCONFIG_ALLCONFIG`.
pub fn to_text(options: &BTreeMap<String, String>) -> String {
    options.iter().map(|(option, value)| format!("{option}={value}\n")).collect()
}

/// What was asked for and is otherwise in the finished `.config`, each as one readable phrase.
pub fn dropped(options: &BTreeMap<String, String>, dot_config: &str) -> Vec<String> {
    let have: BTreeMap<&str, &str> =
        dot_config.lines().filter(|l| l.starts_with("CONFIG_")).filter_map(|l| l.split_once('=')).collect();
    let mut wrong = Vec::new();
    for (option, wanted) in options {
        // What is off is absent or in a comment.
        let is = have.get(option.as_str()).copied().unwrap_or("n");
        if is != wanted {
            wrong.push(format!("{option}={wanted} became {is}"));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_fragment_wins() {
        let merged =
            merge([("a", "# why\nCONFIG_A=y\nCONFIG_B=16\n"), ("b", "\n  CONFIG_A=n\nCONFIG_C=\"x=y\"\n")]);
        assert_eq!(to_text(&merged.unwrap()), "CONFIG_A=n\nCONFIG_B=16\nCONFIG_C=\"x=y\"\n");
    }

    #[test]
    fn a_malformed_line_is_named() {
        for line in ["CONFIG_A", "A=y", "CONFIG_A=", "CONFIG_A y"] {
            let error = merge([("x.config", format!("CONFIG_OK=y\n{line}\n").as_str())]).unwrap_err();
            assert!(error.starts_with("x.config, line 2"), "{error}");
        }
    }

    #[test]
    fn dropped_and_unwanted_options_are_named() {
        let asked =
            merge([("a", "CONFIG_A=y\nCONFIG_B=n\nCONFIG_C=n\nCONFIG_D=16\nCONFIG_E=y\nCONFIG_F=n\n")]);
        let got = "CONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\nCONFIG_D=8\n# CONFIG_E is not set\nCONFIG_EXTRA=y\n";
        assert_eq!(
            dropped(&asked.unwrap(), got),
            ["CONFIG_B=n became y", "CONFIG_D=16 became 8", "CONFIG_E=y became n"]
        );
    }
}
