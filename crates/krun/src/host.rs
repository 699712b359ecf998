//! What this host can do.

pub use krun_machine::host::{Finding, Probe, bundle, max_vcpus, nested_virtualisation, probe};
