//! Packets that the guest's DHCP client receives.

#![no_main]

#[path = "../../guest/init/src/net/dhcp.rs"]
#[allow(dead_code)]
mod dhcp;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some((_, lease)) = dhcp::answer(data, [0; 6], 0) {
        assert!(lease.prefix <= 32 && lease.routes.iter().all(|route| route.prefix <= 32));
    }
});
