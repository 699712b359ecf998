//! Holds the dependency whose `cdylib` is measured.
