//! Why the guest's command does not run.

use std::fmt::Display;

use krun_wire::{EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, EXIT_SETUP};

/// An exit status and the sentence that explains it to the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// 125, 126 or 127.
    pub status: i32,
    /// One or two plain sentences.
    pub reason: String,
}

impl Failure {
    /// The guest could not be set up.
    pub fn setup(reason: impl Into<String>) -> Self {
        Self { status: EXIT_SETUP, reason: plain(reason) }
    }

    /// The program is there and cannot be executed.
    pub fn not_executable(reason: impl Into<String>) -> Self {
        Self { status: EXIT_NOT_EXECUTABLE, reason: plain(reason) }
    }

    /// There is no such program.
    pub fn not_found(reason: impl Into<String>) -> Self {
        Self { status: EXIT_NOT_FOUND, reason: plain(reason) }
    }
}

/// The text without the numbers that the standard library adds to a system's errors.
pub fn plain(text: impl Into<String>) -> String {
    let mut text = text.into();
    while let Some(start) = text.find(" (os error ") {
        let Some(len) = text[start..].find(')') else { break };
        text.replace_range(start..=start + len, "");
    }
    text
}

/// Bytes for a message to the user.
pub fn show(bytes: &[u8]) -> impl Display + '_ {
    bytes.escape_ascii()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_words() {
        let error = std::io::Error::from_raw_os_error(2);
        assert_eq!(
            plain(format!("a: {error}, {error}.")),
            "a: No such file or directory, No such file or directory."
        );
        assert_eq!(plain("x (os error "), "x (os error ");
    }
}
