//! Huge pages that the host's administrator has set aside.

use std::path::Path;

/// Bytes of a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

const COUNTS: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// More huge pages are needed than are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{need} huge pages of 2 MiB are needed and {free} are free, {} are missing; as root: sysctl vm.nr_hugepages={}",
    need - free, total + need - free
)]
pub struct HugePagesError {
    /// Pages needed.
    need: u64,
    /// Pages neither in use nor promised to others.
    free: u64,
    /// Pages set aside.
    total: u64,
}

/// The error if fewer than `bytes` of huge pages are free.
pub fn shortage(bytes: u64) -> Option<HugePagesError> {
    let count = |name: &str| {
        let text = std::fs::read_to_string(Path::new(COUNTS).join(name)).ok();
        text.and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let (total, free) =
        (count("nr_hugepages"), count("free_hugepages").saturating_sub(count("resv_hugepages")));
    let need = bytes.div_ceil(HUGE_PAGE);
    (free < need).then_some(HugePagesError { need, free, total })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_help_is_told() {
        let text = HugePagesError { need: 256, free: 10, total: 16 }.to_string();
        assert_eq!(
            text,
            "256 huge pages of 2 MiB are needed and 10 are free, 246 are missing; as root: sysctl vm.nr_hugepages=262"
        );
        assert!(shortage(1 << 60).is_some());
        assert_eq!(shortage(0), None);
    }
}
