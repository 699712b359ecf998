//! Advice to the host about guest memory, and what the host offers.
#![allow(unsafe_code)]

use krun_memory::Mapping;

/// Keeps guest memory out of core dumps, which would otherwise hold the guest's secrets and take minutes
/// to write, and out of child processes of the program, which have no use for it and would make the guest
/// copy each page on its next write. With `huge`, asks for pages of 2 MiB.
pub fn advise(mapping: &Mapping, huge: bool) {
    let wanted = [(true, libc::MADV_DONTDUMP), (true, libc::MADV_DONTFORK), (huge, libc::MADV_HUGEPAGE)];
    for (_, advice) in wanted.into_iter().filter(|(wanted, _)| *wanted) {
        // SAFETY: the range is exactly the mapping, which is alive; this advice changes no contents. A
        // host that does not know it works as well, only slower.
        unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.len(), advice) };
    }
}

/// Whether this host gives pages of 2 MiB to those who ask: to private memory, or to memory files.
pub fn huge_pages(shared: bool) -> bool {
    let file = if shared { "shmem_enabled" } else { "enabled" };
    let chosen = std::fs::read_to_string(format!("/sys/kernel/mm/transparent_hugepage/{file}"));
    chosen.is_ok_and(|text| offers_huge_pages(&text))
}

/// The choice is the word in brackets (Linux: Documentation/admin-guide/mm/transhuge.rst).
fn offers_huge_pages(text: &str) -> bool {
    let chosen = text.split('[').nth(1).and_then(|rest| rest.split(']').next());
    matches!(chosen, Some("always" | "madvise" | "advise" | "within_size" | "force"))
}

/// Width of a physical address of this host's processor, in bits.
pub fn physical_address_bits() -> u32 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::__cpuid;
        // SAFETY: every x86_64 processor has CPUID; the leaf is read only if the processor has it.
        #[allow(unused_unsafe, reason = "safe in newer toolchains")]
        let eax =
            unsafe { if __cpuid(0x8000_0000).eax >= 0x8000_0008 { __cpuid(0x8000_0008).eax } else { 36 } };
        eax & 0xff
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        40
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_bits_are_plausible() {
        assert!((32..=57).contains(&physical_address_bits()), "{}", physical_address_bits());
    }

    #[test]
    fn the_chosen_word_counts() {
        assert!(offers_huge_pages("always [madvise] never\n"));
        assert!(offers_huge_pages("always within_size [advise] never deny force\n"));
        assert!(!offers_huge_pages("always madvise [never]\n"));
        assert!(!offers_huge_pages("always within_size advise never [deny] force\n"));
        assert!(!offers_huge_pages(""));
    }

    #[test]
    fn advice_reaches_the_mapping() {
        let m = Mapping::anonymous(1 << 20).unwrap();
        advise(&m, true);
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let head = format!("{:x}-", m.as_ptr() as usize);
        let flags = smaps.split(&head).nth(1).and_then(|s| s.split("VmFlags:").nth(1)).unwrap();
        let flags = flags.lines().next().unwrap();
        assert!(flags.contains(" dd") && flags.contains(" dc"), "{flags}");
    }
}
